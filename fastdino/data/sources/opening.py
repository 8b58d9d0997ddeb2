"""What ``--data.root`` names becomes a source. Only here is it decided what is taken for what."""

import glob
import logging
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from fastdino.config import ConfigError, DataConfig
from fastdino.config.data import mixture
from fastdino.data.sources.composed import Mixture
from fastdino.data.sources.decode import extensions
from fastdino.data.sources.folder import SPLITS, TAKEN, FolderSource, split_folders
from fastdino.data.sources.manifest import ManifestSource
from fastdino.data.sources.packed.arrow import open_parquet, open_saved
from fastdino.data.sources.packed.images import Archive
from fastdino.data.sources.packed.tar import CLASSES, open_shards
from fastdino.data.sources.remote import fetched, is_url, listed, text
from fastdino.data.sources.shapes import ShapesSource, check_shows_shapes
from fastdino.data.sources.source import Source

log = logging.getLogger(__name__)

_MANIFESTS, _PACKED = (".csv", ".jsonl"), (".tar", ".parquet")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(root: str, config: DataConfig) -> Source:
    """What to train on: one source, several that are mixed as ``a:0.7 b:0.3``, or a .yaml of them.

    Raises ConfigError for what is not there or is not taken, for a source without an image, and for weights that are
    not positive.
    """
    if not root:
        raise ConfigError("data.root is empty: point it at a folder of images, or use --data.root shapes")
    path = os.path.expanduser(root)
    if os.path.isfile(path) and _ending(path) in (".yaml", ".yml"):
        parts = _listed_mixture(path)
    else:
        parts = [] if os.path.exists(path) else mixture(root)
    if not parts:
        return _open_one(root, config)
    names = [part for part, _ in parts]
    if len({*names}) < len(names):
        raise ConfigError(f"data.root={root!r} names a source twice: add its weights")
    return Mixture({part: _open_one(part, config) for part in names}, [weight for _, weight in parts])


def _listed_mixture(path: str) -> list[tuple[str, float]]:
    """What a .yaml lists as ``SOURCE: WEIGHT``, a line each; a path is relative to the file."""
    try:
        with open(path, encoding="utf-8") as file:
            listed = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(listed, dict) or len(listed) < 2:
        raise ConfigError(f"{path} lists no mixture: write two lines or more such as /data/photos: 0.7")
    parts = []
    for name, weight in listed.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise ConfigError(f"{path}: the weight of {name} is {weight!r}, and it must be a positive number")
        here = str(name) == "shapes" or is_url(str(name))
        place = str(name) if here else os.path.join(os.path.dirname(path), os.path.expanduser(str(name)))
        parts.append((place, float(weight)))
    return parts


def _open_one(root: str, config: DataConfig) -> Source:
    """As :func:`open_part` knows it, or the word ``shapes`` (``./shapes`` for a folder of that name).

    Raises ConfigError, also for a folder that holds a data set's training images beside its others: they would be
    trained on as well.
    """
    if root == "shapes":
        check_shows_shapes(config)
        return ShapesSource(config.num_images, config.image_size)
    parts = {} if is_url(root) else split_folders(root)
    if len(parts) > 1:
        raise ConfigError(
            f"data.root={root!r} holds {' and '.join(f'{path.name}/' for path in parts.values())}: give "
            f"{parts.get('train', next(iter(parts.values())))}. To train on all of them, give a folder of links to "
            "them under other names"
        )
    return open_part(root, config)


def open_part(root: str | Path, config: DataConfig) -> Source:
    """A place that holds images of one data set, by what is there:

    - a folder that ``datasets.save_to_disk`` wrote;
    - a folder that holds .tar or .parquet files, and neither an image nor a folder: those files, by name;
    - another folder: every image below it;
    - a .tar or .parquet, or several by a glob (``*?[``) or in braces (``{000..099}``, ``{a,b}``);
    - a .csv or .jsonl;
    - a URL of such files: one, several by a glob (``*[``) or in braces, or a folder that holds some.

    Raises ConfigError.
    """
    root = os.path.expanduser(root)
    if is_url(root):
        return _open_url(root, config)
    if os.path.isdir(root):
        return _open_folder(root, config)
    if os.path.isfile(root):
        return _open_files([root], root, config)
    if re.search(r"[*?\[{]", root):
        return _open_files(_expanded(root), root, config)
    if files := _files_of_a_shell(root):
        return _open_files(files, root, config)
    return _images(root, config)  # which says what is wrong with it


def _files_of_a_shell(root: str) -> list[str]:
    """What a shell made of a pattern that was not quoted: several words, each a file; else none."""
    try:
        words = [os.path.expanduser(word) for word in shlex.split(root)]
    except ValueError:  # a quote in a name
        return []
    return words if len(words) > 1 and all(map(os.path.isfile, words)) else []


def _open_folder(root: str, config: DataConfig) -> Source:
    """By what lies in it, hidden names apart."""
    try:
        with os.scandir(root) as entries:
            visible = sorted((e.name, e.is_dir()) for e in entries if not e.name.startswith("."))
    except (OSError, ValueError):
        return _images(root, config)  # which says why
    names = {name for name, _ in visible}
    if names >= {"state.json", "dataset_info.json"}:
        return open_saved(root, config)
    if "dataset_dict.json" in names:
        raise ConfigError(f"data.root={root!r} holds splits of a dataset: give the folder of one, such as {root}/train")
    shards = [os.path.join(root, name) for name, is_folder in visible if not is_folder and _ending(name) in _PACKED]
    if shards and not any(is_folder or _ending(name) in extensions(config.takes_arrays) for name, is_folder in visible):
        return _open_files(shards, root, config)
    images = _images(root, config)
    if shards:
        log.warning(
            "data.root=%r: %d images are used, and not the %d %s files beside them; for these give %s",
            root, len(images), len(shards), _ending(shards[0]), os.path.join(root, "*" + _ending(shards[0])),
        )  # fmt: skip
    return images


def _images(root: str, config: DataConfig) -> FolderSource:
    return FolderSource(root, config)


def _open_files(files: Sequence[str], root: str, config: DataConfig) -> Source:
    """Files of one kind, told by their endings."""
    kind = _kind(files, root)
    if kind in _MANIFESTS:
        if len(files) > 1:
            raise ConfigError(f"data.root={root!r} names {len(files)} manifests: give one, which lists all images")
        return ManifestSource(files[0], config)
    archives = [Archive(os.path.basename(file), Path(os.path.abspath(file))) for file in files]
    if kind == ".parquet":
        return open_parquet(archives, config)
    return open_shards(archives, _text(archives[0].path.with_name(CLASSES)), config)


def _open_url(root: str, config: DataConfig) -> Source:
    """Whole shards out of the cache: single images, and the paths of a manifest, are not fetched."""
    files = listed(braces(root), (*_PACKED, *_COMPRESSED))
    if _kind([file.plain for file in files], root) == ".parquet":
        return open_parquet(fetched(files, config), config)
    return open_shards(fetched(files, config), text(f"{files[0].plain.rpartition('/')[0]}/{CLASSES}"), config)


def _kind(files: Sequence[str], root: str) -> str:
    """The ending of all the files. Raises ConfigError where it is none of a source, or theirs differ, or splits do."""
    endings = {_ending(file) for file in files}
    if found := endings.intersection(_COMPRESSED):
        raise ConfigError(
            f"data.root={root!r} names a {min(found)}, and images inside a compressed archive cannot be read one by "
            "one: unpack it (images are compressed already)"
        )
    if len(endings) != 1 or not endings.issubset((*_MANIFESTS, *_PACKED)):
        kinds = " and ".join(sorted(ending or "no ending" for ending in endings)) or "nothing"
        raise ConfigError(f"data.root={root!r} names {kinds}: give {TAKEN}")
    _check_one_split(files, root)
    return endings.pop()


def _text(path: Path) -> str | None:
    """What a small file holds; None where there is none."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _check_one_split(files: Sequence[str], root: str) -> None:
    """Raises ConfigError for files that their names tell to be of different splits: test images would be trained on."""
    splits: dict[str, str] = {}
    for file in files:
        for word in re.split(r"[^a-z]+", os.path.basename(file).lower()):
            if word in SPLITS:
                splits.setdefault(SPLITS[word], os.path.basename(file))
    if len(splits) > 1:
        raise ConfigError(
            f"data.root={root!r} names files of several splits, such as {' and '.join(splits.values())}: give those of "
            f"one, by a glob such as {os.path.join(os.path.dirname(files[0]), '*train*' + _ending(files[0]))}"
        )


def _ending(name: str) -> str:
    """In lower case; that of a compressed archive has two parts."""
    lower = name.lower()
    return next((ending for ending in _COMPRESSED if lower.endswith(ending)), os.path.splitext(lower)[1])


def _expanded(pattern: str) -> list[str]:
    """The files that a pattern names, those of a glob by name. Raises ConfigError where a part of it names none."""
    files = []
    for path in braces(pattern):
        found = sorted(glob.glob(path)) if re.search(r"[*?\[]", path) else [path] if os.path.isfile(path) else []
        if not found:
            raise ConfigError(f"data.root={pattern!r}: there is no file {path}. Give {TAKEN}")
        files += found
    return files


def braces(pattern: str) -> list[str]:
    """``a{0..2}`` is a0, a1, a2; ``{08..10}`` has as many digits throughout; ``{a,b}`` is a, b."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    steps = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if steps:
        width = len(steps[1]) if steps[1].startswith("0") else 0
        words = [f"{number:0{width}d}" for number in range(int(steps[1]), int(steps[2]) + 1)]
    else:
        words = match[1].split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + word + rest for word in words for rest in braces(after)]
