"""Export: where the file goes, and one message where it cannot."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdino
from fastdino.config import (
    Config,
    ConfigError,
    DataConfig,
    EngineConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ViewsConfig,
)
from fastdino.engine.shards import Fragment
from fastdino.model import build_backbone, build_network
from fastdino.model.weights import exports, onnx_graph
from fastdino.model.weights.onnx_graph import export_onnx
from fastdino.training import export
from fastdino.training.checkpoint import MANIFEST, About, CheckpointError, Folder, reading
from fastdino.training.checkpoint.saving import SHARED
from fastdino.training.export import any_backbone, export_run, run_backbone
from tests.children import environment
from tests.training.test_checkpoint import save, size

NAME = "backbone.safetensors"


def config(folder: Path, arch: str, size: int) -> Config:
    return Config(
        model=ModelConfig(arch=arch, patch_size=8, drop_path=0.0),
        head=HeadConfig(num_prototypes=64, hidden_dim=48, bottleneck_dim=32),
        views=ViewsConfig(global_size=size, local_size=16, num_local=0),
        data=DataConfig(root="shapes", num_images=4, image_size=32, num_workers=0),
        optim=OptimConfig(warmup_epochs=0),
        engine=EngineConfig(name="torch", device="cpu"),
        run=RunConfig(dir=folder, epochs=1, local_batch=4, knn_every=0),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of one step."""
    folder = tmp_path_factory.mktemp("export") / "run"
    fastdino.train(config(folder, "vit_nano", 32))
    return folder


@pytest.mark.parametrize(("out", "path"), [("folder", f"folder/{NAME}"), ("new/deep/x.safetensors", None)])
def test_where_the_file_goes(run, tmp_path, out, path):
    (tmp_path / "folder").mkdir()
    written = export_run(run, tmp_path / out)
    assert written == tmp_path / (path or out)
    assert load_file(written).keys() == run_backbone(run)[0].published.state_dict().keys()
    assert [p.name for p in written.parent.iterdir()] == [written.name]


def test_a_tilde_is_the_home_folder(run, tmp_path, monkeypatch):
    """A shell expands it neither behind = nor in a notebook."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(run)
    assert export_run(Path("~/link"), Path("~/new/x.safetensors")) == tmp_path / "new/x.safetensors"
    assert run_backbone(Path("~/link"))[2] == run_backbone(run)[2]


@pytest.mark.parametrize("out", ["weights.pth", "weights", "weights.safetensors.bak"])
def test_another_format_is_refused_before_any_work(tmp_path, out, monkeypatch):
    monkeypatch.setattr(export, "run_backbone", lambda *_: pytest.fail("worked"))
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        export_run(tmp_path / "run", tmp_path / out)


@pytest.mark.parametrize("call", ["save_file", "mkdir", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_file_that_cannot_be_written_is_one_message(run, tmp_path, monkeypatch, call, number):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    home = {"save_file": exports, "replace": os, "mkdir": Path}[call]
    with monkeypatch.context() as patch:
        patch.setattr(home, call, refuse)
        with pytest.raises(ConfigError, match=f"{os.strerror(number)}.*--out"):
            export_run(run, tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir()), "nothing half written stays"


def test_a_checkpoint_is_checksummed_once(run, tmp_path, monkeypatch):
    measured, original = [], reading.blocks
    monkeypatch.setattr(reading, "blocks", lambda file: measured.append(Path(file.name).name) or original(file))
    export_run(run, tmp_path / "x.safetensors")
    assert sorted(measured) == ["rank-00000.safetensors", "shared.safetensors"]


def test_copies_and_notes_beside_checkpoints(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checkpoints = folder / "checkpoints"
    shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-00000001 (copy)")
    shutil.copytree(checkpoints / "step-00000001", checkpoints / "step-1-backup")
    (checkpoints / "notes.txt").write_text("the good one")
    assert run_backbone(folder)[2] == 1
    assert run_backbone(folder, step=1)[2] == 1
    with pytest.raises(CheckpointError, match=r"there are: 1$"):
        run_backbone(folder, step=7)


def test_a_checkpoint_with_buffers_that_are_no_state(run, tmp_path):
    """Earlier versions also saved those that a module makes anew, like a Swin's indices."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "checkpoints/step-00000001"
    shared = load_file(path / SHARED)
    save_file({**shared, "teacher.backbone.index": torch.ones(3)}, path / SHARED)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][SHARED] = size(path / SHARED)
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert run_backbone(folder)[2] == 1
    settings = config(folder, "vit_nano", 32)
    longer = dataclasses.replace(settings, run=dataclasses.replace(settings.run, epochs=2))
    assert fastdino.train(longer).steps == 2


@pytest.mark.parametrize(
    ("format", "out", "path"),
    [
        ("hf", None, "run/backbone"),
        ("hf", "new/deep", "new/deep"),
        ("repository", None, "run/backbone.pth"),
        ("repository", "folder", "folder/backbone.pth"),
        ("repository", "x.safetensors", "x.safetensors"),
    ],
)
def test_other_formats(run, tmp_path, format, out, path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "folder").mkdir()
    shutil.copytree(run, tmp_path / "run")
    for _ in range(2):  # an earlier export is replaced
        written = export_run(tmp_path / "run", out and tmp_path / out, format=format)
        assert written == tmp_path / path
    loads = {"hf": "transformers.AutoModel.from_pretrained", "repository": "model.load_state_dict"}[format]
    assert f"{loads}(" in caplog.text
    (tmp_path / "file").touch()
    for file in written.iterdir() if format == "hf" else [written]:
        assert file.stat().st_mode == (tmp_path / "file").stat().st_mode, "others may read it as any other file"
    if format == "hf":
        assert sorted(path.name for path in written.iterdir()) == ["config.json", "model.safetensors"]
    ours, theirs = run_backbone(run)[0], any_backbone(written)[0]
    x = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-6)
    assert not [p.name for p in (*tmp_path.iterdir(), *written.parent.iterdir()) if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("format", "out", "says"),
    [
        ("hf", "a.safetensors", "writes a folder"),
        ("repository", "a.bin", r"must end in \.pth or \.safetensors with --format repository"),
        ("timm", "a.pth", r"must end in \.safetensors with --format timm"),
        ("hf", "strangers", r"it holds mine\.txt.*--out"),
        ("hf", "file", "Not a directory.*--out"),
    ],
)
def test_formats_have_their_places(run, tmp_path, format, out, says):
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers/mine.txt").write_text("kept")
    (tmp_path / "strangers/config.json").write_text("kept")
    (tmp_path / "file").write_text("kept")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=says):
        export_run(run, tmp_path / out, format=format)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("call", ["save_file", "rename"])
def test_a_folder_that_cannot_be_written_is_one_message(run, tmp_path, monkeypatch, call):
    """An earlier export stays as it was."""
    out = tmp_path / "hf"
    export_run(run, out, format="hf")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    original, calls = os.rename, []

    def refuse(*given: Any, **_: Any) -> None:
        calls.append(given)
        if call == "rename" and len(calls) != 2:  # the new folder is what cannot come to its place
            return original(*given)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(exports if call == "save_file" else os, call, refuse)
        with pytest.raises(ConfigError, match=r"No space left.*--out"):
            export_run(run, out, format="hf")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


VARIANTS = [{"registers": 2, "pos_embed": "rope", "layer_scale": 0.1}, {"image_size": 48}]


@pytest.mark.parametrize("options", VARIANTS, ids=["rotary", "resampled"])
def test_a_graph_of_onnx_gives_torchs_features(tmp_path, options):
    """Of any number of images."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = ModelConfig(**{"arch": "vit_nano", "patch_size": 8, "drop_path": 0.0, **options})
    backbone = build_backbone(model, 32).eval().requires_grad_(False)
    for param in backbone.parameters():
        param.add_(0.02 * torch.randn_like(param))
    assert str(tmp_path / "x.onnx") in export_onnx(backbone, tmp_path / "x.onnx", 32, {"step": "3"})
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["step"] == "3"
    for images in (1, 2, 5):
        x = torch.randn(images, 3, 32, 32)
        (found,) = session.run(["features"], {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), backbone(x), atol=2e-5, rtol=1e-4)


def test_a_run_as_a_graph_of_onnx(run, tmp_path, monkeypatch):
    written = export_run(run, tmp_path, format="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.onnx"]
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(str(written))
    assert {entry.key for entry in onnx.load(written).metadata_props} == {"config", "step", "role"}
    with pytest.raises(ConfigError, match=r"must end in \.onnx"):
        export_run(run, tmp_path / "x.safetensors", format="onnx")
    monkeypatch.setattr(onnx_graph, "LARGEST", 1000)
    with pytest.raises(ConfigError, match="a file of ONNX holds 2 GB"):
        export_run(run, tmp_path, format="onnx")
    monkeypatch.setattr(onnx_graph, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx and onnxscript: pip install 'fastdino\[onnx\]'"):
        export_run(run, tmp_path, format="onnx")


MEASURE = """
import logging, resource, sys
from pathlib import Path
import torch
from fastdino.training import export
run, out = Path(sys.argv[1]), Path(sys.argv[2])
export.export_run(run / "small", out / "small.safetensors")  # imports what is needed
used = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (used + 48 * 2**20, resource.RLIM_INFINITY))
for format, name in {"timm": "timm.safetensors", "hf": "hf", "repository": "repository.pth"}.items():
    export.export_run(run / "large", out / name, format=format)
try:
    export.run_backbone(run / "large")
except RuntimeError:
    print("the limit holds")
"""


def test_an_export_takes_the_memory_of_the_largest_parameter(run, tmp_path):
    """An 85 MB backbone where a process may have 48 MB more; file-backed memory is the system's to give."""
    settings = config(tmp_path / "large", "vit_small", 32)
    network = build_network(settings, teacher=True)
    shapes = {name: [*p.shape] for name, p in network.named_parameters()}
    wholes = [Fragment(name, 0, p.numel(), tensors={"ema": p.view(-1)}) for name, p in network.named_parameters()]
    save(Folder(tmp_path / "large/checkpoints"), About(1, shapes, {}), lambda copy: wholes, {"c": torch.ones(1)})
    (tmp_path / "large/config.json").write_text(settings.to_json())
    (tmp_path / "small").symlink_to(run)
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out")],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "the limit holds\n", done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "hf", "repository.pth", "small.safetensors", "timm.safetensors",
    ]  # fmt: skip
    for written in ("timm.safetensors", "hf", "repository.pth"):
        found = any_backbone(tmp_path / "out" / written)[0].state_dict()
        for name, value in network.backbone.state_dict().items():
            assert torch.equal(found[name], value), name
