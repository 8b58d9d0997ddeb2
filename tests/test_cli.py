"""The command as a user meets it: what it says to a wrong word, and the path from training to weights in timm."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from mmap import mmap
from pathlib import Path

import pytest
import torch

from fastdino import cli
from fastdino.config import Config, HeadConfig, LossConfig, PatchHeadConfig
from fastdino.training.trainer import Preempted
from tests.children import environment, forked, python

TINY = [
    *("--model.arch", "vit_nano", "--model.patch-size", 8, "--model.pos-embed", "sincos"),
    *("--views.global-size", 32, "--views.local-size", 16, "--views.num-local", 2),
    *("--head.num-prototypes", 64, "--head.hidden-dim", 48, "--head.bottleneck-dim", 32),
    *("--data.root", "shapes", "--data.num-images", 40, "--data.image-size", 32, "--data.num-workers", 0),
    *("--optim.warmup-epochs", 1, "--run.epochs", 2, "--run.local-batch", 8, "--run.log-every", 1),
    *("--run.knn-every", 2, "--engine.device", "cpu"),
]

QUICK = ("--num-workers", 0, "--baselines", "no", "--no-cache")


def fastdino(
    *arguments: object, code: int = 0, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process; ``variables`` are added to its environment.

    ``fresh`` is the interpreter that a user starts, whose imports take seconds and may fail or warn.
    """
    words, variables = [*map(str, arguments)], {"COLUMNS": "80", **variables}
    if fresh:
        command = [sys.executable, "-m", "fastdino", *words]
        env = environment(**variables)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    else:
        done = forked(python, "-m", "fastdino", *words, timeout=300, **variables)
    assert done.returncode == code, done.stderr
    if code:
        assert "Traceback" not in done.stderr, "a user's mistake is no crash"
    return done


@pytest.fixture
def here(monkeypatch, capfd):
    """The command in this process, which has imported everything; how a process ends is told by :func:`fastdino`."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        command = [*map(str, arguments)]
        ended = 0
        capfd.readouterr()
        try:
            cli.main(command)
        except SystemExit as end:
            ended = end.code
        done = subprocess.CompletedProcess(command, ended, *capfd.readouterr())
        assert done.returncode == code, done.stderr
        return done

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished tiny run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = fastdino("train", "vit_small_16", "--run.dir", folder, *TINY)
    assert "deepspeed ZeRO 0, float32 on cpu" in done.stderr
    assert "done: 10 steps" in done.stderr
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "no command 'trian'"),
        (["train", "vit_smal_16"], "no recipe 'vit_smal_16': did you mean vit_small_16?"),
        (["train", "vit_small_16", "--los.teacher-temp", "0.07"], "--loss.teacher-temp"),
        (["train", "vit_small_16", "--loss.teacher-temp", "7"], "loss.teacher_temp=7.0 must be in"),
        (["train", "vit_small_16", "--head.batch-nrm", "true"], "--head.batch-norm"),
        (["train", "vit_small_16", "--head.batch-norm", "maybe"], "write --head.batch-norm true or "),
        (["train", "vit_small_16", "--head.no-batch-norm=true"], "one of --head.batch-norm and --head.no-batch-norm"),
        (["train", "vit_small_16", "--patch-head", "shared"], "write --patch-head None"),
        (["train", "vit_small_16", "--patch-head.num-prototypes", "9"], "loss.patch_weight=0 reads none"),
        (["train", "vit_small_16", "--loss.patch-weight", 1, "--patch-head.num-layers", 0], "patch_head.num_layers=0"),
        (["train", "vit_small_16", "--loss.patch-weight", "1", "--model.arch", "timm:resnet18"], "=1 hides patches"),
        (["train", "vit_small_16", *TINY, "--loss.koleo-weight", "0.1", "--run.local-batch", 1], "use at least 2"),
        (["train", "vit_small_16", *TINY, "--loss.targets", "sinkhorn", "--run.local-batch", 2], "balances 4 samples"),
        (["train", "vit_small_16", "--views.num-local", "many"], "--views.num-local"),
        (["train", "small", "--views.global-size", "many"], "--views.global-size"),
        (["train", "small", "--views.global-size=63"], "views.global_size=63 must be a multiple of 4, at least 8"),
        (["train", "vit_small_16", "--views.num-local", "40"], "at most 32 views"),
        (["train", "vit_small_16", "--model.patch-size", "15"], "use 210 or 225"),
        (["train", "vit_small_16"], "data.root is empty"),
        (["train", "vit_small_16", "--data.root", "/no/such/folder"], "does not exist"),
        (["bench", "vit_smal_16"], "no recipe 'vit_smal_16': did you mean vit_small_16?"),
        (["bench", "demo", "--json", "/no/such/folder/figures.json"], "--json /no/such/folder/figures.json cannot be"),
        (["bench", "demo", "--profile", "/"], "--profile / cannot be written: Is a directory"),
        (["bench", "demo", "--seconds", "0"], "--seconds=0.0 must be a positive number of seconds"),
        (["bench", "demo", "--second", "3"], "--seconds"),
        (["train", "vit_small_16", "--model.attention", "xformers", *TINY], "needs a GPU"),
        (["train", "vit_small_16", "--data.root", "shapes", "--model.arch", "timm:resnet5O"], "resnet50"),
        (["train", "vit_small_16", *TINY, "--run.local-batch", 64], "do not fill one global batch"),
        (["eval", "knn", "/no/such/run"], "neither a run folder nor a file"),
        (["eval", "nearest"], "kinds:"),
        (["eval", "attention", "/no/such/run", "--num-images", "0"], "--num-images=0 must be at least 1"),
        (["eval", "patches", "/no/such/run", "--data", "/images"], "--data='/images' must be shapes"),
        (["eval", "knn", "/no/such/run", "--neighbors"], "--neighbors"),
        (["eval", "knn", "/no/such/run", "--neighbor", "5"], "--neighbors"),
        (["export", "/no/such/run"], "not a run folder"),
    ],
    ids=lambda value: " ".join(map(str, value[:4]))[-40:] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_message_and_exit_code_2(arguments, says, tmp_path, here):
    extra = ["--run.dir", tmp_path / "run"] if arguments[0] == "train" and len(arguments) > 2 else []
    assert says in here(*arguments, *extra, code=2).stderr
    assert not any(tmp_path.iterdir()), "a run folder with this config would refuse the corrected one"


def test_a_process_ends_with_one_message(tmp_path):
    """When what was asked for cannot be, while ranks and images stand ready."""
    few = ("train", "vit_small_16", *TINY, "--run.local-batch", 64, "--run.dir", tmp_path / "run")
    for command in (("bench", "demo", "--seconds", 0), ("eval", "knn", "/no/such/run"), few):
        done = fastdino(*command, code=2, fresh=command is few)  # training imports what the others do
        assert done.stdout == ""
        assert done.stderr.startswith("fastdino "), "no warning before it"
        assert len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_every_rank_says_what_stopped_it(monkeypatch, capsys):
    """It may be the only one: a worker that died, a folder that one machine lacks. But all are told of a notice."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for raised, says in ((cli.UserError("worker killed"), "rank 3: worker killed\n"), (Preempted("a signal"), "")):
        monkeypatch.setattr(cli, "_run", lambda *_, raised=raised: (_ for _ in ()).throw(raised))
        with pytest.raises(SystemExit) as ended:
            cli.main(["train"])
        assert capsys.readouterr().err == (f"fastdino train, {says}" if says else "")
        assert ended.value.code == (2 if says else 85)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77"}, "start it with srun"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK is missing beside WORLD_SIZE, LOCAL_RANK"),
    ],
)
def test_an_environment_that_cannot_work_is_one_message(variables, says, tmp_path):
    done = fastdino("train", "vit_small_16", *TINY, "--run.dir", tmp_path / "run", code=2, **variables)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "batch_norm", "freeze"),
    [
        ([], False, True),
        (["--head.batch-norm"], True, True),
        (["--head.batch-norm", "true", "--head.freeze-prototype-norm", "false"], True, False),
        (["--head.batch-norm=True", "--head.freeze-prototype-norm=False"], True, False),
        (["--head.no-freeze-prototype-norm", "--head.no-batch-norm"], False, False),
        (["--head.batch_norm", "false", "--head.freeze_prototype_norm"], False, True),
    ],
)
def test_a_boolean_is_a_switch_or_has_a_value(flags, batch_norm, freeze):
    for before, after in ((["--views.blur", "0", "0", "1"], []), ([], ["--data.root", "true"])):
        config = cli.configured("vit_small_16", [*before, *flags, *after])
        assert (config.head.batch_norm, config.head.freeze_prototype_norm) == (batch_norm, freeze)
        assert config.data.root == ("true" if after else "")


def test_a_patch_head_is_like_the_head_but_for_what_is_said():
    """It comes with its first flag, wherever that stands; None takes a recipe's away."""
    flags = ["--patch_head.num-prototypes", "9", "--loss.patch-weight", "1", "--patch-head.batch_norm=true"]
    config = cli.configured("vit_base_16", flags)
    assert config.patch_head == dataclasses.replace(PatchHeadConfig(), num_prototypes=9, batch_norm=True)
    assert (config.head.num_prototypes, config.head.batch_norm) == (65536, False)
    assert cli.configured("vit_base_16", ["--loss.patch-weight", "1"]).patch_head is None
    for off in (["--patch-head", "None"], ["--patch_head=none"]):
        assert cli.configured("vit_base_16", [*off, "--loss.patch-weight", "1"]).patch_head is None


def test_a_recipes_patch_head_is_changed_or_left_out(monkeypatch):
    own = dataclasses.replace(Config(), loss=LossConfig(patch_weight=1), patch_head=HeadConfig(num_prototypes=5))
    monkeypatch.setattr(cli.recipes, "get", lambda *asked: own)
    changed = cli.configured("vit_small_16", ["--patch-head.num-layers", "2"]).patch_head
    assert changed == PatchHeadConfig(num_prototypes=5, num_layers=2)
    assert cli.configured("vit_small_16", ["--patch-head", "None"]).patch_head is None
    assert own.patch_head == PatchHeadConfig(num_prototypes=5), "the recipe itself stays"


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ([], (28, 14, 7)),
        (["--views.global-size", "64"], (64, 32, 16)),
        (["--views.global_size=96"], (96, 48, 24)),
        (["--views.global-size=64", "--model.patch-size", "8"], (64, 32, 8)),
        (["--views.global-size", "28", "--views.global-size", "32"], (32, 16, 8)),  # the last one holds, as in tyro
    ],
)
def test_a_recipe_that_follows_the_size_of_the_pictures(flags, sizes):
    config = cli.configured("small", flags)
    assert (config.views.global_size, config.views.local_size, config.model.patch_size) == sizes
    assert config.optim.patch_embed_lr == (28 / config.views.global_size) ** 2


def test_other_recipes_follow_no_size():
    given = cli.configured("vit_small_16", [])
    config = cli.configured("vit_small_16", ["--views.global-size", "112"])
    assert config.views == dataclasses.replace(given.views, global_size=112)
    assert config.model == given.model


def test_what_a_launcher_adds_to_the_command_is_dropped():
    done = fastdino("--local-rank=0", "recipes", "demo", "--local_rank", 0)
    assert '"arch": "vit_nano"' in done.stdout


@pytest.mark.parametrize("command", ["recipes vit_small_16", "--help", "train vit_small_16 --help", "eval --help"])
def test_a_reader_that_has_had_enough_is_no_error(command):
    """As in ``fastdino recipes X | head -1``."""
    end, start = os.pipe()
    os.close(end)
    line = [sys.executable, "-m", "fastdino", *command.split()]
    done = subprocess.run(line, stdout=start, stderr=subprocess.PIPE, env=environment(), timeout=100, check=False)
    os.close(start)
    assert done.stderr == b""
    assert done.returncode == 128 + signal.SIGPIPE


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch):
    def breaks(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_run", breaks)
    monkeypatch.setattr(cli, "_reader_has_gone", lambda: False)
    with pytest.raises(BrokenPipeError):
        cli.main(["train"])


@pytest.mark.parametrize("command", ["train", "bench", "eval", "train --run.seed 3"])
def test_what_is_missing_is_listed(command, here):
    done = here(*command.split(), code=2)
    assert done.stdout == ""
    assert "usage: fastdino" in done.stderr


@pytest.mark.parametrize("command", ["bench demo", "plan demo", "eval", "eval knn"])
def test_every_command_explains_itself(command, here):
    assert "fastdino" in here(*command.split(), "--help").stdout


@pytest.mark.parametrize(
    "command", ["", "train", "train demo", "bench", "bench data", "plan", "recipes", "export", "demo"]
)
def test_what_needs_no_torch_explains_itself_at_once(command):
    line = [sys.executable, "-X", "importtime", "-m", "fastdino", *command.split(), "--help"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=100, check=True)
    assert "fastdino" in done.stdout
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert imported & {"fastdino.cli", "torch"} == {"fastdino.cli"}


def test_help_teaches(here):
    assert "train RECIPE" in here("--help").stdout
    page, knn = (
        " ".join(here(*command, "--help").stdout.replace("\u2502", " ").split())
        for command in (["train", "vit_small_16"], ["eval", "knn"])
    )
    assert "found values over 0.07 unstable" in page
    assert "--patch-head.num-prototypes" in page, "also where the recipe has none"
    assert "k-NN 69.3" in page, "the recipe's docstring is the page's head"
    assert "are bank and test" in knn
    assert "Side in pixels that the backbone sees" in knn, "flags that all evaluations share are explained too"
    bench = " ".join(here("bench", "vit_small_16", "--help").stdout.replace("\u2502", " ").split())
    assert "Seconds of each measurement" in bench
    assert "alone and when all others are on" in bench
    assert "--views.num-local" in bench, "settings are flags here too"
    assert "vit_base_16" in here("recipes").stdout
    assert '"arch": "vit_nano"' in here("recipes", "demo").stdout


def test_bench_prints_a_table_and_what_it_does(tmp_path):
    big = torch.frombuffer(mmap(-1, 10**9), dtype=torch.uint8).fill_(1)  # memory of the process that starts it
    figures = tmp_path / "figures.json"
    asked = ("--seconds", 0.1, "--json", figures, "--loss.patch-weight", 1)
    done = fastdino("bench", "vit_small_16", *TINY, *asked, fresh=True)
    assert done.stdout.startswith("vit_nano on 1 x CPU, float32, deepspeed ZeRO 0; 8 images a step\n")
    assert "optimizer and EMA" in done.stdout
    assert "measuring training\n" in done.stderr
    found = json.loads(figures.read_text())
    assert found["training"] > 0
    assert found["peak_memory"] < big.numel(), "its own"
    assert found["config"]["loss"]["patch_weight"] == 1
    assert found["config"]["run"]["log_every"] == 1, "the settings that were given"


def score(told: str, name: str = "accuracy") -> float:
    """Of the JSON that an evaluation prints."""
    return json.loads(told)["scores"][name]["value"]


def test_eval_and_export(run, tmp_path, here):
    cache = ("--num-workers", 0, "--cache-dir", tmp_path / "cache")
    done = fastdino("eval", "knn", run, "--neighbors", 5, 20, *cache)
    told = json.loads(done.stdout)
    assert told["scores"].keys() >= {"accuracy", "knn_5", "knn_20"}
    assert told["baselines"].keys() == {"pixels", "random_init"}
    assert (told["weights"]["step"], told["weights"]["role"]) == (10, "teacher")
    assert told["out"] == str(run / "eval/knn-shapes")
    assert json.loads((run / "eval/knn-shapes/knn.json").read_text())["scores"] == told["scores"]
    assert "knn accuracy" in done.stderr
    assert "random init" in done.stderr
    weights = tmp_path / "teacher.safetensors"
    here("export", run, "--out", weights)
    few = ("--neighbors", 5, 20, "--baselines", "no", *cache)
    again = json.loads(here("eval", "knn", weights, *few).stdout)
    assert again["scores"] == told["scores"], "the exported weights are the teacher's"
    assert again["weights"]["sha256"] == told["weights"]["sha256"]
    assert json.loads(here("eval", "knn", f"{run}@5:student", *few).stdout)["weights"]["step"] == 5
    assert "no checkpoint of step 7; there are: 5, 10" in here("eval", "knn", f"{run}@7", *few, code=2).stderr
    assert "is no run folder" in here("eval", "knn", weights, "--step", 5, *few, code=2).stderr
    assert "not the timm:resnet50" in here("eval", "knn", run, "--arch", "timm:resnet50", code=2).stderr
    out = tmp_path / "new"
    assert 0 < score(here("eval", "attention", run, "--out", out).stdout, "jaccard_one_head") < 100
    assert 0 < score(here("eval", "patches", run, "--num-images", 24, "--out", out).stdout, "patch_miou") < 100
    for sheet in ("attention.png", "patches.png"):
        assert (out / sheet).read_bytes()[:4] == b"\x89PNG"


def test_eval_of_published_weights(run, tmp_path, here):
    """A state dict that says nothing of itself: the arch is told by its shapes, or named."""
    import timm
    import torch
    from safetensors.torch import load_file

    weights, published = tmp_path / "teacher.safetensors", tmp_path / "pretrain.pth"
    here("export", run, "--out", weights)
    torch.save({"teacher": {"module.backbone." + k: v for k, v in load_file(weights).items()}}, published)
    flags = ("--neighbors", 20, "--data", images(tmp_path / "data"), *QUICK)
    ours, theirs = (json.loads(here("eval", "knn", path, *flags).stdout) for path in (weights, published))
    assert theirs["scores"] == ours["scores"]
    torch.save(timm.create_model("resnet18").state_dict(), published)
    assert "--arch timm:" in here("eval", "knn", published, *flags, code=2).stderr
    found = here("eval", "knn", published, *flags, "--arch", "timm:resnet18", "--size", 64).stdout
    assert json.loads(found)["protocol"]["size"] == 64
    assert 0 <= score(found, "knn_20") <= 100
    for kind in ("attention", "patches"):
        refused = here("eval", kind, published, "--arch", "timm:resnet18", "--out", tmp_path / "x", code=2)
        assert "one of our ViTs (model.arch=vit_...), not timm:resnet18" in refused.stderr
        assert not (tmp_path / "x").exists()


def test_weights_of_others(run, tmp_path, here):
    """A folder of Hugging Face is evaluated and trained from with no further flag; what does not fit is one message."""
    hf, data = tmp_path / "hf", images(tmp_path / "data")
    said = fastdino("export", run, "--format", "hf", "--out", hf)
    assert said.stdout == f"wrote {hf}\n"
    assert f"transformers.AutoModel.from_pretrained({str(hf)!r}) loads it" in said.stderr
    flags = ("--neighbors", 20, "--data", data, *QUICK)
    ours, theirs = (json.loads(here("eval", "knn", path, *flags).stdout) for path in (run, hf))
    assert theirs["scores"] == ours["scores"]
    begun = ("train", "vit_small_16", *TINY, "--run.epochs", 1, "--run.knn-every", 0, "--model.weights", hf)
    fastdino(*begun, "--run.dir", tmp_path / "run")
    assert '"layer_scale": 1e-05' in (tmp_path / "run/config.json").read_text()
    refused = here(*begun, "--run.dir", tmp_path / "other", "--model.arch", "vit_tiny", code=2).stderr
    assert "asks for arch vit_tiny: start it with --model.arch vit_nano" in refused
    assert len(here("export", run, "--format", "hf", "--out", data, code=2).stderr.splitlines()) == 1
    (hf / "config.json").unlink()
    for command in (("eval", "knn", hf, *flags), (*begun, "--run.dir", tmp_path / "other")):
        assert "looked for config.json beside model.safetensors" in here(*command, code=2).stderr
    assert not (tmp_path / "other").exists()


def images(folder):
    """Two classes of noise, one darker."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name, top in (("bright", 255), ("dark", 120)):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(random.integers(0, top, (40, 40, 3), np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_exported_weights_load_in_timm(run, tmp_path):
    import timm
    import torch
    from safetensors.torch import load_file

    from fastdino.training.export import run_backbone

    weights = tmp_path / "teacher.safetensors"
    fastdino("export", run, "--out", weights, fresh=True)
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=0)
    model.load_state_dict(load_file(weights), strict=True)
    backbone, _, step = run_backbone(run)
    assert step == 10
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), backbone(x), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A run of another model."""
    folder = tmp_path_factory.mktemp("cli") / "other"
    few = ("--run.epochs", 1, "--run.knn-every", 0, "--engine.name", "torch")
    fastdino("train", "vit_small_16", "--run.dir", folder, *TINY, "--model.patch-size", 16, *few)
    return folder


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["train", "export"])
@pytest.mark.parametrize("case", ["truncated", "another model", "newer format"])
def test_a_checkpoint_that_cannot_be_loaded(run, other, tmp_path, case, command):
    """One message, exit code 2, and no file of the run changes."""
    copy, newest = tmp_path / "run", "checkpoints/step-00000010"
    shutil.copytree(run, copy)
    for older in set((copy / "checkpoints").iterdir()) - {copy / newest}:
        shutil.rmtree(older)
    if case == "truncated":
        victim = copy / newest / "rank-00000.safetensors"
        victim.write_bytes(victim.read_bytes()[:-100])
        says = "damaged"
    elif case == "another model":
        shutil.rmtree(copy / newest)
        found = next((other / "checkpoints").iterdir())
        shutil.copytree(found, copy / "checkpoints" / found.name)
        says = "another model"
    else:
        manifest = copy / newest / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
        says = "format 99, this fastdino reads up to"
    before = snapshot(copy)
    arguments = ["train", "vit_small_16", "--run.dir", copy, *TINY] if command == "train" else ["export", copy]
    assert says in fastdino(*arguments, code=2).stderr
    assert snapshot(copy) == before


def test_a_damaged_checkpoint_among_others(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    fastdino("export", copy, "--step", 3, code=2)
    victim = copy / "checkpoints/step-00000010/rank-00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    assert "damaged" in fastdino("export", copy, "--step", 10, code=2).stderr
    assert "damaged" in fastdino("export", copy).stderr, "the newest is damaged: an older one, with a warning"
