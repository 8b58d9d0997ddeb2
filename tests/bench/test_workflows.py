"""The workflows and docs/ci.md name commands that exist with options that they take, and no action but GitHub's own."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.gates import summary
from bench.record import ROOT
from tests.bench.conftest import Python
from tests.bench.test_visit import Parsed, parsed

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGE = ROOT / "docs" / "ci.md"
PLAIN = {"git", "echo", "export", "tee", "nvidia-smi", "sudo", "apt-get", "./config.sh"}
ENDS = {"|", ">", ">>", "&&", ";"}  # of a command
FROM_OUTSIDE = re.compile(r"\$\{\{.*(github\.event|github\.head_ref|inputs)")


def steps(path: Path) -> Iterator[dict[str, Any]]:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


def fenced(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a page."""
    found: list[tuple[str, str]] = []
    inside = False
    for line in path.read_text().splitlines():
        if line.strip().startswith("```"):
            inside = not inside
            if inside:
                found.append((line.strip()[3:], ""))
        elif inside:
            found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
    return found


def blocks() -> list[tuple[str, str]]:
    """Every piece of shell, with where it is from."""
    found = [(path.name, step["run"]) for path in WORKFLOWS for step in steps(path) if "run" in step]
    return found + [(PAGE.name, text) for language, text in fenced(PAGE) if not language]


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command, without variables that are set for it and where its output goes."""
    for line in script.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word in ENDS:
                if words:
                    yield words
                words = []
                if word in (">", ">>"):
                    break
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)


COMMANDS = [(name, words) for name, script in blocks() for words in commands(script)]
MODULES = [words[2:] for _, words in COMMANDS if words[1:2] == ["-m"]]
OURS = [words for words in MODULES if words[0].startswith(("bench", "fastdino"))]
PYTEST = [words[1:] for words in MODULES if words[0] == "pytest"]
PYTEST += [words[1:] for _, words in COMMANDS if words[0] == "pytest"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning:runpy")
@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_command_of_ours_takes_its_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Parsed):
        parsed(shlex.join(words), monkeypatch)


def test_pytest_takes_its_options_and_finds_its_paths(python: Python) -> None:
    """Parsed by pytest with its plugins, each list in turn; a list that is not understood ends it."""
    code = "import json, sys\nfrom _pytest.config import _prepareconfig as parse\nfor words in json.loads(sys.argv[1]):"
    assert len(PYTEST) > 4
    done = python("-c", f"{code} parse(words)", json.dumps(PYTEST))
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = python("-c", f"{code} parse(words)", json.dumps([["bench", "--benchmark-compare-fail=median:five"]]))
    assert wrong.returncode != 0
    assert all((ROOT / words[0]).exists() for words in PYTEST)


def test_other_commands_are_known() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name, words in COMMANDS:
        first = words[0].rsplit("/", 1)[-1]
        if words[0] == ".ci/run":
            assert (ROOT / ".ci" / "run").stat().st_mode & 0o100, "is executable"
        elif first == "make":
            assert all(re.search(rf"^(\.PHONY:.*\b)?{word}\b", makefile, re.MULTILINE) for word in words[1:])
        else:
            assert first in ("python", "pytest") or words[0] in PLAIN, f"{name}: {words}"


@pytest.mark.parametrize(("name", "script"), blocks())
def test_shell_is_shell(name: str, script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_small_safe_and_ours(path: Path) -> None:
    text = path.read_text()
    document = yaml.safe_load(text)
    assert text.isascii()
    assert document["permissions"] == {"contents": "read"}
    assert document["defaults"]["run"]["shell"] == "bash", "GitHub's default lets `a | b` pass where a fails"
    for job in document["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v1")), step
            assert not FROM_OUTSIDE.search(step.get("run", "")), "what others write reaches no shell but by env"
    used = {step.get("uses", "").split("@")[0]: step for step in steps(path)}
    assert used["actions/setup-python"]["with"]["cache"] == "pip"
    assert all((ROOT / file).exists() for file in used["actions/setup-python"]["with"]["cache-dependency-path"].split())
    assert used["actions/checkout"]["with"]["fetch-depth"] == 0, "merge bases and the history need it"
    assert "GITHUB_STEP_SUMMARY" in text


def test_the_gpu_job_runs_by_hand_or_by_label_alone() -> None:
    """Never for a change that nobody has looked at: its code would run on the runner."""
    document = yaml.safe_load((ROOT / ".github/workflows/gpu.yml").read_text())
    on = document[True]  # what YAML 1.1 makes of the word
    assert on.keys() == {"workflow_dispatch", "pull_request"}
    assert on["pull_request"] == {"types": ["labeled"]}
    (job,) = document["jobs"].values()
    assert "github.event.label.name == 'gpu'" in job["if"]
    assert job["runs-on"] == ["self-hosted", "linux", "gpu"]


def test_the_cpu_job_runs_what_ci_runs() -> None:
    assert ".ci/run" in [step.get("run") for step in steps(ROOT / ".github/workflows/cpu.yml")]


def test_the_example_of_the_page_counts() -> None:
    """As it stands it passes; with one call more, or one read, it does not."""
    (example,) = (text for language, text in fenced(PAGE) if language == "python")
    exec(compile(example, str(PAGE), "exec"), {})
    work = "network(images).sum().backward()"
    for plant, message in ((".clone()", "aten::clone"), (".add(torch.ones(()).item())", "the step waits")):
        with pytest.raises(AssertionError, match=message):
            exec(example.replace(work, f"network(images){plant}.sum().backward()"), {})


def saved(folder: Path, name: str, **medians: float) -> str:
    entries = ", ".join(f'{{"fullname": "{n}", "stats": {{"median": {m}}}}}' for n, m in medians.items())
    (folder / name).write_text(f'{{"benchmarks": [{entries}]}}')
    return str(folder / name)


def test_a_summary_of_benchmarks(tmp_path: Path, python: Python) -> None:
    now, base = saved(tmp_path, "now.json", a=2.0, b=1.0, new=3.0), saved(tmp_path, "base.json", a=1.0, b=1.0, old=1.0)
    done = python("-m", "bench.gates.summary", "--benchmarks", now, "--base", base)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "### Benchmarks: 1 of 2 slower than the base by 5 %"
    assert lines[4:7] == [
        "| `a` | 2000.000 ms | 1000.000 ms | **2.000** |",
        "| `b` | 1000.000 ms | 1000.000 ms | 1.000 |",
        "| `new` | 3000.000 ms | - | - |",
    ]
    assert "In the base alone: old" in done.stdout
    assert "no base beside them" in summary.benchmarks({"a": 1.0}, {})


def test_a_summary_of_verdicts() -> None:
    slower = "1.100 [1.090, 1.110] times the base, then 1.101 [1.090, 1.112]; base against itself 1.000"
    printed = (
        f"step: SLOWER, {slower}\n"
        "dino_loss: UNFIT, the base against itself is 1.100 [0.900, 1.200]: this machine cannot tell 5 %\n"
        "W1127 a warning of torch: not a verdict\n"
    )
    lines = summary.verdicts(printed).splitlines()
    assert lines[2:6] == [
        "| case | | time |",
        "| --- | --- | --- |",
        f"| step | **SLOWER** | {slower} |",
        "| dino_loss | **UNFIT** | the base against itself is 1.100 [0.900, 1.200]: this machine cannot tell 5 % |",
    ]
    assert "    W1127 a warning of torch: not a verdict" in lines
    assert "judged nothing" in summary.verdicts("error: --base x: no such commit\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "nothing to show"),
        ("--base x.json", "--base FILE goes with --benchmarks FILE"),
        ("--verdicts none.txt", "none.txt cannot be read: No such file"),
        ("--benchmarks pyproject.toml", "pyproject.toml is no file of pytest-benchmark"),
        ("--benchmarks bench/results/counts.json", "counts.json is no file of pytest-benchmark"),
    ],
)
def test_a_summary_of_nothing_is_one_message(
    arguments: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bench.gates.summary", *arguments.split()])
    with pytest.raises(SystemExit) as error:
        summary.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
