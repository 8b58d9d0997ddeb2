"""The architecture as a test: who imports whom, one home per optional package, sizes, no package named kernels."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bench.record import ROOT
from tests.children import environment

PACKAGES = [*ROOT.glob("fastdino/**/*.py"), *ROOT.glob("kernels/**/*.py")]
HOME = {
    "xformers": ["fastdino/model/attention.py"],
    "deepspeed": ["fastdino/engine/zero"],
    "PIL": ["fastdino/data/", "fastdino/eval/dense/attention_maps.py"],
    "simplejpeg": ["fastdino/data/sources/decode.py"],
    "timm": ["fastdino/model/"],
    "torchvision": ["fastdino/data/views/supervised.py"],
    "pyarrow": ["fastdino/data/sources/packed/arrow.py"],
    "fsspec": ["fastdino/data/sources/remote.py", "fastdino/training/checkpoint/objects.py"],
    "tifffile": ["fastdino/data/sources/formats/tiff.py"],
    "imagecodecs": ["fastdino/data/sources/formats/tiff.py"],
    "prometheus_client": ["fastdino/training/monitoring/monitors.py"],
    "wandb": ["fastdino/training/monitoring/monitors.py"],
    "pynvml": ["fastdino/training/monitoring/nvml.py"],
}
MAY_IMPORT = {  # rooms of fastdino, or files in them, that a room may import, besides itself, config and distributed
    "config": set(),
    "recipes": set(),
    "data": set(),
    "model": {"data.batch"},
    "method": {"model", "data", "engine"},
    "engine": {"model.network"},  # the rates of its layers
    "eval": {"model", "data"},
    "commands": {"recipes", "model", "data", "engine", "eval", "training"},
    "training": {"method", "model", "data", "engine", "eval"},
    "doctor": {"model", "engine", "training", "planning"},
    "planning": {"method", "model", "data", "engine", "training.flops"},
}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imported(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def top(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("package", HOME)
def test_optional_package_has_one_home(package):
    users = {str(path.relative_to(ROOT)) for path in PACKAGES if package in top(path)}
    assert users, f"nobody imports {package}: drop the rule or the dependency"
    assert not [user for user in users if not user.startswith(tuple(HOME[package]))]


@pytest.mark.parametrize("path", [*ROOT.glob("kernels/**/*.py")], ids=lambda p: p.name)
def test_kernels_stand_alone(path):
    assert top(path) - sys.stdlib_module_names <= {"fastdino_kernels", "torch", "triton"}


@pytest.mark.parametrize("path", [*ROOT.glob("fastdino/*/**/*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_lies_below(path):
    room = path.relative_to(ROOT / "fastdino").parts[0]
    allowed = MAY_IMPORT[room] | {room, "config"}
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "fastdino" and len(parts) > 1 and parts[1] in MAY_IMPORT:
            assert parts[1] in allowed or ".".join(parts[1:3]) in allowed, name


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_bench_or_tests(path):
    assert not top(path) & {"bench", "tests"}


@pytest.mark.parametrize("path", [*PACKAGES, *ROOT.glob("bench/**/*.py")], ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    assert len(path.read_text().splitlines()) <= 400, "a file up to 400 lines: split it by meaning"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            limit = 80 if node.name.endswith("_kernel") else 50
            start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            assert node.end_lineno - start < limit, f"{node.name}: a function up to {limit} lines"


@pytest.mark.parametrize("path", PACKAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_parameters_are_few(path):
    """At most seven beside tensors; a kernel's are pointers, strides and sizes."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            plain = [a.arg for a in given if a.arg != "self" and "Tensor" not in ast.unparse(a.annotation or a)]
            assert len(plain) <= 7, f"{node.name}: {plain}"


ROOMS = sorted({path.parent for path in [*PACKAGES, *ROOT.glob("bench/**/*.py")]} - {ROOT / "bench/kernels"})


@pytest.mark.parametrize("room", ROOMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_small(room):
    """Nine files beside __init__; bench/kernels has one for each operation."""
    files = [file.name for file in room.glob("*.py") if file.name not in ("__init__.py", "__main__.py")]
    assert len(files) <= 9, "a room that grows past this is split by meaning"


def test_tests_have_the_rooms_of_the_code():
    rooms = {path.name for path in (ROOT / "fastdino").iterdir() if (path / "__init__.py").exists()}
    judged = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert judged <= rooms | {"kernels", "bench", "cluster"}


@pytest.mark.parametrize("path", [*ROOT.glob("kernels/**/*.py")], ids=lambda p: p.name)
def test_all_but_kernels_are_annotated(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
            arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
            assert node.returns is not None, node.name
            assert all(a.annotation for a in arguments), node.name


def test_no_package_or_module_is_named_kernels():
    """Hugging Face's package of that name is imported from whatever folder comes first on the path."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "bench/kernels/__init__.py").exists()
    assert not [p for folder in ("fastdino", "kernels", "bench", "tests") for p in (ROOT / folder).rglob("kernels.py")]


def test_children_of_tests_inherit_the_path():
    """A machine may keep its packages on PYTHONPATH: tests.children adds to it, nobody replaces it."""
    users = {path.name for path in ROOT.glob("tests/**/*.py") if "PYTHONPATH" in path.read_text()}
    assert users == {"children.py", "test_record.py", Path(__file__).name}


def test_text_is_ascii_and_names_no_package_registry():
    for path in [*PACKAGES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/**/*.py"), *ROOT.glob("*.md")]:
        text = path.read_text()
        assert text.isascii(), path
        if path != Path(__file__):
            assert "pypi.org" not in text, path


@pytest.mark.parametrize(
    "absent",
    [
        {"fastdino": "torch deepspeed xformers timm torchvision"},
        {  # one after the other in a process
            "fastdino_kernels": "fastdino deepspeed xformers timm torchvision",
            "fastdino.model": "deepspeed",
            "fastdino.eval": "deepspeed sklearn scipy matplotlib torchvision",
        },
    ],
    ids=" ".join,
)
def test_import_is_light(absent):
    """A trained backbone loads without DeepSpeed; the kernels know nothing of the trainer."""
    code = "import importlib, sys\n"
    for module, others in absent.items():
        code += f"importlib.import_module({module!r}); print([m for m in {others.split()} if m in sys.modules])\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.split("\n") == [*["[]"] * len(absent), ""]
