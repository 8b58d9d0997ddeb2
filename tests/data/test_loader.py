"""Batches: the same bits for any number of workers and any place to resume; bad images are told."""

import dataclasses
import os
import re
from itertools import islice

import pytest
import torch
from PIL import Image

from fastdino.config import ConfigError
from fastdino.data import BadData, BadImage, FolderSource, labelled_batches
from fastdino.data.sampler import epoch_order
from fastdino.data.views import apply, center_view, fast, sample_params
from tests.data.batches import assert_equal, children, make_config, start, take

# ------------------------------------------------------------------------------------------------ the right views


def test_a_batch_holds_the_views_of_its_images(shapes):
    config = make_config()
    batches = start(config, shapes)
    assert batches.steps_per_epoch == 5
    batch = next(batches)
    assert {name: group.shape for name, group in batch.views.items()} == {
        "global": (2, 4, 3, 32, 32),
        "local": (2, 4, 3, 16, 16),
    }
    assert batch.masks is None
    assert batch.bad == []
    for position, (epoch, index) in enumerate(batches.plan.micro_batch(0, 0, 0)):
        image, _ = shapes.read(index)
        params = sample_params(3, epoch, index, config.views, image.shape[1::-1])
        for name, group in apply(image, params, config.views).items():
            assert torch.equal(batch.views[name][:, position], group)


@pytest.mark.skipif(bool(fast.why_not()), reason=f"fast: {fast.why_not()}")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_implementations_of_the_views_make_the_same_batches(shapes, num_workers, caplog):
    caplog.set_level("INFO")
    made = {}
    for name in ("reference", "fast"):
        config = make_config(num_workers)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, views=name))
        made[name] = take(6, config, shapes)
        assert f"views by {name}" in caplog.text
    assert_equal(made["fast"], made["reference"])


def test_fast_views_that_are_not_built_are_told_before_any_worker_starts(shapes, monkeypatch):
    monkeypatch.setattr(fast, "_REASON", "it is not built")
    config = make_config(2)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, views="fast"))
    before = children()
    with pytest.raises(ConfigError, match=r"data.views='fast' cannot be used: it is not built"):
        start(config, shapes)
    assert children() == before


def test_no_local_views(shapes):
    assert list(next(start(make_config(num_local=0), shapes)).views) == ["global"]


@pytest.mark.parametrize("by", ["reference", "auto"])
@pytest.mark.parametrize("num_workers", [1, 2, 9])
def test_workers_change_nothing(shapes, num_workers, by, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert_equal(take(12, make_config(num_workers, by=by), shapes), take(12, make_config(0, by="reference"), shapes))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_any_step_continues_exactly(shapes, num_workers):
    config = make_config(num_workers, local_batch=2, accumulate=2)
    whole = take(24, make_config(0, local_batch=2, accumulate=2), shapes)  # two epochs and a bit
    for step in (1, 4, 5, 6, 10):
        assert_equal(take(24 - 2 * step, config, shapes, step=step), whole[2 * step :])


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_and_micro_batches_together_make_the_whole_batch(shapes, world_size, accumulate):
    config = make_config(local_batch=8 // world_size // accumulate, accumulate=accumulate)
    whole = take(3, make_config(local_batch=8), shapes)
    by_rank = [take(3 * accumulate, config, shapes, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(3):
        parts = [by_rank[rank][step * accumulate + j] for j in range(accumulate) for rank in range(world_size)]
        for name, group in whole[step].views.items():
            assert torch.equal(torch.cat([part.views[name] for part in parts], 1), group)


def test_epochs_differ(shapes):
    batches = take(10, make_config(), shapes)
    first = {view.numpy().tobytes() for batch in batches[:5] for view in batch.views["global"][0]}
    second = {view.numpy().tobytes() for batch in batches[5:] for view in batch.views["global"][0]}
    assert len(first) == len(second) == 20
    assert not first & second


def test_too_few_images(shapes):
    with pytest.raises(ConfigError, match=r"22 images .* 32 .*run\.local_batch=16 \* 2 ranks"):
        start(make_config(local_batch=16), shapes, world_size=2)


# ----------------------------------------------------------------------------------------------------- bad images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_image_is_replaced_and_named(folder, num_workers):
    good = take(5, make_config(), FolderSource(folder))
    (folder / "07.png").write_bytes(b"not an image")
    source = FolderSource(folder)
    found = take(5, make_config(num_workers), source)
    (bad,) = [image for batch in found for image in batch.bad]
    assert bad.startswith("07.png: UnidentifiedImageError: cannot identify image file")
    assert_equal(found, take(5, make_config(), source))
    plan = start(make_config(), source).plan
    for step, (ours, theirs) in enumerate(zip(found, good, strict=True)):
        for position, (_, index) in enumerate(plan.micro_batch(step, 0, 0)):
            same = torch.equal(ours.views["global"][:, position], theirs.views["global"][:, position])
            assert same == (index != 7), "only the bad image's place differs"
            if index == 7:
                assert ours.views["global"][:, position].float().std() > 10, "another image stands in"


def test_the_replacement_varies_with_the_epoch(folder):
    (folder / "07.png").write_bytes(b"")
    source, reads = FolderSource(folder), []
    config = make_config(local_batch=20)
    batches = start(config, source)
    real = source.read
    source.read = lambda index: (reads.append(index), real(index))[1]
    for _ in range(6):
        next(batches)
    stand_ins = [reads[i + 1] for i, index in enumerate(reads) if index == 7]
    assert len(set(stand_ins)) > 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_images_stop_the_run(folder, num_workers, caplog):
    for i in range(10):
        (folder / f"{i:02d}.png").write_bytes(b"")
    source = FolderSource(folder)
    config = make_config(num_workers, local_batch=1)
    per_batch = [len(batch.bad) for batch in take(20, config, source)]
    allowed = max(per_batch) + 1  # so that only a sum over batches can pass it
    assert sum(per_batch) > allowed
    caplog.clear()
    batches = start(make_config(num_workers, local_batch=1, max_bad=allowed / 20), source)
    with pytest.raises(BadData) as caught:
        list(islice(batches, 20))
    message = str(caught.value)
    assert len(caplog.records) == batches.num_bad > allowed
    assert all("skipped an image that cannot be read: " in record.message for record in caplog.records)
    assert " of an epoch's 20 images" in message
    assert f"data.max_bad={allowed / 20:g}" in message
    assert len(re.findall(r"\d\d\.png: ValueError: it holds no bytes", message)) == 3, "names some, and why"
    assert "\n" not in message, "no worker's traceback"


def test_bad_images_are_counted_anew_each_epoch(folder):
    """Also when resumed in the middle of one: early in its epoch, late in the one before, an image counts once each."""
    where = [{int(index): place // 4 for place, index in enumerate(epoch_order(3, epoch, 20))} for epoch in range(2)]
    image = max(range(20), key=lambda index: where[0][index] - where[1][index])
    assert where[0][image] > where[1][image]
    (folder / f"{image:02d}.png").write_bytes(b"")
    source, config = FolderSource(folder), make_config(max_bad=0.05)  # 1 of 20 an epoch
    for step in (0, where[0][image]):
        found = take(10 - step, config, source, step=step)
        assert sum(len(batch.bad) for batch in found) == 2
    with pytest.raises(BadData):
        take(5, make_config(max_bad=0.04), source)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_source_that_is_gone_is_an_error_whatever_is_allowed(folder, num_workers):
    source = FolderSource(folder)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(BadData, match=r"looks gone or damaged.*FileNotFoundError"):
        next(start(make_config(num_workers, max_bad=1.0), source))


# ---------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("num_workers", [0, 2])
def test_labelled_batches_visit_everything_once_in_order(shapes, num_workers):
    found = list(labelled_batches(shapes, 32, 5, num_workers))
    assert [len(labels) for _, labels, _ in found] == [5, 5, 5, 5, 2]
    assert torch.cat([labels for _, labels, _ in found]).tolist() == [i % 12 for i in range(22)]
    assert torch.cat([indices for *_, indices in found]).tolist() == [*range(22)]
    views = torch.cat([views for views, *_ in found])
    assert views.dtype == torch.uint8
    for index in range(22):
        assert torch.equal(views[index], center_view(shapes.read(index)[0], 32))


def test_labelled_batches_leave_out_what_cannot_be_read(tmp_path, caplog):
    for i in range(6):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    for name in ["b/1.png", "b/3.png", "b/5.png"]:
        (tmp_path / name).write_bytes(b"")
    found = list(labelled_batches(FolderSource(tmp_path), 16, 2, 0))
    assert [labels.tolist() for _, labels, _ in found] == [[0, 0], [0], []]
    assert [int(view[0, 8, 8]) for views, *_ in found for view in views] == [0, 80, 160]
    assert caplog.text.count("left out of the evaluation") == 3
    assert "b/3.png" in caplog.text


# ----------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(shapes, num_workers):
    """While the GPU is busy with earlier batches, whose memory must not be written over."""
    device = torch.device("cuda", torch.cuda.current_device())
    busy, sums = torch.randn(2048, 2048, device=device), []
    batches = start(make_config(num_workers), shapes, device=device)
    for batch in islice(batches, 15):
        assert batch.views["global"].device == device
        for _ in range(20):
            busy = torch.nn.functional.normalize(busy @ busy)
        sums.append({name: group.clone() for name, group in batch.views.items()})
        del batch  # its memory is free while the GPU is still at it
    batches.close()
    for views, want in zip(sums, take(15, make_config(0), shapes), strict=True):
        for name, group in want.views.items():
            assert torch.equal(views[name].cpu(), group)


def test_a_bad_image_is_an_exception_of_its_own():
    assert issubclass(BadImage, Exception)
    assert not issubclass(BadImage, OSError), "or a bare except OSError would hide it"
