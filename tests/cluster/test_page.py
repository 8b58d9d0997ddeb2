"""docs/cluster.md: the shell understands its commands, and the programs theirs."""

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from bench.record import ROOT
from fastdino import cli

PAGE, SCRIPT = ROOT / "docs" / "cluster.md", ROOT / "scripts" / "train.sbatch"
PROGRAMS = (
    "fastdino",
    "torchrun",
    "deepspeed",
    "sbatch",
    "srun",
    "scontrol",
    "tail",
    "tensorboard",
    "sleep",
    "python3.11",
)


def shell(script: str, folder: Path) -> list[list[str]]:
    """The commands of a script with their words, as programs that do nothing else found them. There are no others."""
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f"#!/bin/sh\n(printf '%s\\037' {name} \"$@\"; echo) >> {folder}/calls\n")
        program.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", script], env={"PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    assert "syntax error" not in done.stderr, done.stderr
    assert "command not found" not in done.stderr, done.stderr
    return [line.split("\037")[:-1] for line in (folder / "calls").read_text().splitlines()]


def taken(words: Sequence[str]) -> None:
    """Raises SystemExit when ``fastdino`` would not take them."""
    name, *rest = words
    if name == "train":
        cli.configured(rest[0], rest[1:])
    elif name == "plan":
        cli.main(words)
    else:
        assert name in ("doctor", "status", "eval", "export"), words


def test_every_command_of_the_page_is_taken(tmp_path):
    blocks = "\n".join(re.findall(r"(?:^ {4}.*\n)+", PAGE.read_text(), re.MULTILINE))
    blocks = blocks.replace("/shared/", f"{tmp_path}/")  # whose pip would install
    found = shell(f"RUN={tmp_path}/runs/g\n{blocks}", tmp_path)
    for program, *words in {tuple(words): words for words in found}.values():
        if program == "fastdino":
            taken(words)
        elif program == "torchrun":
            asked = parse_args(words)
            assert (asked.training_script, asked.max_restarts, asked.nnodes) == ("fastdino", 0, "8")
            taken(asked.training_script_args)
        elif program == "deepspeed":
            taken(words[words.index("--module") + 2 :])
        elif program == "sbatch":
            assert words[2] == "scripts/train.sbatch"
            taken(["train", words[4], "--run.dir", words[3], *words[5:]])
    programs = Counter(words[0] for words in found)
    assert all(programs[name] >= 2 for name in ("fastdino", "torchrun", "deepspeed", "sbatch"))


@pytest.mark.parametrize(("code", "again", "requeues"), [(0, 0, 0), (2, 0, 0), (85, 0, 1), (85, 1, 0), (137, 0, 1)])
def test_the_script_requeues_what_should_be_started_again(tmp_path, code, again, requeues):
    """srun ends with ``code``, ``fastdino status --requeue`` with ``again``."""
    functions = (
        f'srun() {{ command srun "$@"; return {code}; }}\nfastdino() {{ command fastdino "$@"; return {again}; }}'
    )
    script = SCRIPT.read_text()
    calls = shell(f"set -- /runs/g dinov2_vit_giant_14 --run.seed 3\nSLURM_JOB_ID=7\n{functions}\n{script}", tmp_path)
    train = "fastdino train dinov2_vit_giant_14 --run.dir /runs/g --run.seed 3"
    assert calls[0] == ["srun", "--kill-on-bad-exit=1", *train.split()]
    assert calls.count(["scontrol", "requeue", "7"]) == requeues
    assert (["fastdino", "status", "--requeue", "/runs/g"] in calls) == (code not in (0, 2))
