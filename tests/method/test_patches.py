"""What patches and KoLeo add to the method, against formulas written out in float64: losses, gradients, statistics."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.counters import kernels_counted, saved_bytes
from fastdino.config import Config, HeadConfig, LossConfig, ModelConfig, RunConfig, ViewsConfig
from fastdino.data import Batch, Masks
from fastdino.data.masks import masks_of, sample_masks
from fastdino.engine.schedules import Now
from fastdino.method.dino import Dino
from fastdino.method.targets import Centering, Sinkhorn, Target
from fastdino.model import Outputs, build_network
from tests.method import plain
from tests.method.networks import B, D, Given, K, N, Tiny, batch, some_hidden

NOW = Now(lr=0.0, weight_decay=0.0, momentum=0.0, teacher_temp=0.05, freeze_last_layer=False)
LOSS = LossConfig(student_temp=0.1, patch_weight=0.7, koleo_weight=0.2)
WEIGHTS = {"dino": 1.0, "ibot": 0.7, "koleo": 0.2}
OWN = 9  # K' of a head of the patches' own


def dino(ranks: Any, student: nn.Module, teacher: nn.Module, kinds: str, loss: LossConfig = LOSS) -> Dino:
    """``kinds``: of the targets of views and of patches."""
    sizes = K, OWN if isinstance(student, Tiny) and student.own else K
    targets: list[Target] = [
        Sinkhorn(ranks) if kind == "sinkhorn" else Centering(size, momentum=0.9, accumulate=1, ranks=ranks)
        for kind, size in zip(kinds.split(), sizes, strict=True)
    ]
    return Dino(student, teacher, loss, *targets)


class Plain:
    """The method in float64 loops: ``targets`` of a teacher's outputs, then the parts of a student's loss."""

    def __init__(self, kinds: str, num_prototypes: int, num_patch_prototypes: int) -> None:
        self.kinds = kinds.split()
        self.centers = [torch.zeros(size, dtype=torch.float64) for size in (num_prototypes, num_patch_prototypes)]

    def targets(self, seen: Outputs) -> list[Tensor]:
        """(2B, K) and (M, K'). The centers move after their use."""
        logits = [seen.cls_points.flatten(0, 1) @ seen.prototypes.T, seen.patch_points @ seen.patch_prototypes.T]
        made = []
        for i, (kind, x) in enumerate(zip(self.kinds, logits, strict=True)):
            if kind == "sinkhorn":
                made.append(plain.balanced(x, NOW.teacher_temp))
            else:
                made.append(plain.centered(x, self.centers[i], NOW.teacher_temp))
                self.centers[i] = 0.9 * self.centers[i] + 0.1 * x.mean(0)
        return made

    def parts(self, made: Outputs, seen: Outputs, hidden: Tensor) -> dict[str, Tensor]:
        views, patches = self.targets(seen)
        return {
            "dino": plain.dino(made, views.unflatten(0, (2, -1)), LOSS.student_temp),
            "ibot": plain.ibot(made, patches, hidden, LOSS.student_temp),
            "koleo": plain.koleo(made),
        }


KINDS = ["center center", "sinkhorn sinkhorn", "center sinkhorn", "sinkhorn center"]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("own", [None, OWN], ids=["shared head", "own head"])
def test_three_steps_equal_the_formulas(alone, kinds, own):
    """Loss, its parts and every gradient, on weights that move; two centers, even where the head is one."""
    student, teacher = Tiny(0, own), Tiny(1, own)
    method, expected = dino(alone, student, teacher, kinds), Plain(kinds, K, own or K)
    for step in range(3):
        hidden = some_hidden(step)
        given = batch(step, hidden=hidden)
        loss, parts = method.loss(given, NOW)
        loss.backward()
        exact_student, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
        exact_student.zero_grad()
        views = {name: x.double() for name, x in given.views.items()}
        seen = exact_teacher({"global": views["global"]}, Masks(None, given.masks.rows, given.masks.weight))
        wanted = expected.parts(exact_student(views, given.masks), Outputs(*(x.detach() for x in seen)), hidden)
        (wanted["dino"] + 0.7 * wanted["ibot"] + 0.2 * wanted["koleo"]).backward()
        assert parts.keys() == wanted.keys()
        for name, part in parts.items():
            assert part.item() == pytest.approx(wanted[name].item(), rel=1e-5), name
            assert not part.requires_grad
        assert loss.item() == pytest.approx(sum(w * parts[n].item() for n, w in WEIGHTS.items()), rel=1e-6)
        for (name, p), q in zip(student.named_parameters(), exact_student.parameters(), strict=True):
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            assert q.grad.any(), name
        method.after_step(torch.tensor(True))
        with torch.no_grad():
            for p in student.parameters():
                p -= 0.05 * p.grad
                p.grad = None
    state = {"center": expected.centers[0], "patch_center": expected.centers[1]}
    left = {name for name, kind in zip(state, kinds.split(), strict=True) if kind == "center"}
    assert method.state().keys() == left
    for name in left:
        torch.testing.assert_close(method.state()[name].double(), state[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("own", [False, True], ids=["shared head", "own head"])
def test_a_step_of_the_real_networks_equals_the_formulas(alone, kinds, own):
    """Every parameter's gradient, with masks of the loader, registers, LayerScale and local views."""
    patch_head = HeadConfig(num_prototypes=20, hidden_dim=24, num_layers=2, bottleneck_dim=6)
    head = HeadConfig(num_prototypes=32, hidden_dim=24, bottleneck_dim=8, freeze_prototype_norm=False)
    config = Config(
        model=ModelConfig(arch="vit_nano", patch_size=8, drop_path=0.0, registers=2, layer_scale=0.5, init="xavier"),
        head=head,
        patch_head=patch_head if own else None,
        views=ViewsConfig(global_size=32, local_size=16, num_local=2),
        loss=LOSS,
        run=RunConfig(local_batch=4),
    )
    torch.manual_seed(0)
    student, teacher = build_network(config), build_network(config, teacher=True)
    sizes = head.num_prototypes, patch_head.num_prototypes if own else head.num_prototypes
    with torch.no_grad():  # tokens and biases that start at 0 count too
        for p in (*student.parameters(), *teacher.parameters()):
            p += 0.02 * torch.randn_like(p)
    hidden = sample_masks(0, 0, range(4), config.views, (4, 4))
    masks = masks_of(hidden)
    given = Batch({"global": torch.randn(2, 4, 3, 32, 32), "local": torch.randn(2, 4, 3, 16, 16)}, masks)
    targets: list[Target] = [
        Sinkhorn(alone) if kind == "sinkhorn" else Centering(size, momentum=0.9, accumulate=1, ranks=alone)
        for kind, size in zip(kinds.split(), sizes, strict=True)
    ]
    loss, parts = Dino(student, teacher, LOSS, *targets).loss(given, NOW)
    loss.backward()

    exact, exact_teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    exact.zero_grad()
    views = {name: x.double() for name, x in given.views.items()}
    seen = exact_teacher({"global": views["global"]}, masks._replace(hidden=None))
    wanted = Plain(kinds, *sizes).parts(exact(views, masks), seen, hidden.flatten(0, 1))
    sum(WEIGHTS[name] * part for name, part in wanted.items()).backward()
    for name, part in parts.items():
        assert part.item() == pytest.approx(wanted[name].item(), rel=1e-5), name
    for (name, p), q in zip(student.named_parameters(), exact.parameters(), strict=True):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() < 1e-3 * q.grad.norm(), name
            assert p.grad.norm().item() == pytest.approx(q.grad.norm().item(), rel=1e-4), name


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((0.0, 0.0), ["dino"]),
        ((0.5, 0.0), ["dino", "ibot"]),
        ((0.0, 0.5), ["dino", "koleo"]),
        ((0.5, 0.5), ["dino", "ibot", "koleo"]),
    ],
)
def test_a_loss_of_weight_zero_is_not_built(alone, weights, parts):
    config = LossConfig(patch_weight=weights[0], koleo_weight=weights[1])
    kinds = "center center" if weights[0] else "center"
    targets = [Centering(K, momentum=0.9, accumulate=1, ranks=alone) for _ in kinds.split()]
    method = Dino(Tiny(0), Tiny(1), config, *targets)
    found = method.loss(batch(0, hidden=some_hidden() if weights[0] else None), NOW)[1]
    assert list(found) == parts
    assert len(method.state()) == len(targets)
    assert ("patch_cos" in method.statistics()) == bool(weights[0])


def test_the_teacher_sees_what_is_hidden_from_the_student_and_reads_it(alone):
    seen: dict[str, Masks] = {}

    class Noting(Tiny):
        def forward(self, views: dict[str, Tensor], masks: Masks | None = None) -> Outputs:
            seen[", ".join(views)] = masks
            return super().forward(views, masks)

    given = batch(0, hidden=some_hidden())
    dino(alone, Noting(0), Noting(1), "center center").loss(given, NOW)
    assert seen.keys() == {"global, local", "global"}
    assert seen["global, local"] is given.masks
    assert seen["global"].hidden is None
    assert torch.equal(seen["global"].rows, given.masks.rows)


@pytest.mark.parametrize("hidden", [None, some_hidden()], ids=["no masks", "masks"])
def test_masks_that_nobody_asked_for_and_masks_that_are_missing_are_our_mistake(alone, hidden):
    kinds = "center" if hidden is not None else "center center"
    method = Dino(Tiny(0), Tiny(1), LOSS, *(Centering(K, 0.9, 1, alone) for _ in kinds.split()))
    with pytest.raises(AssertionError, match="exactly when patches are predicted"):
        method.loss(batch(0, hidden=hidden), NOW)


def given_teacher(patches: Tensor, patch_logits: Tensor, cls: Tensor | None = None) -> Given:
    cls = torch.eye(D)[:3].expand(2, 3, D) if cls is None else cls
    return Given(cls, torch.zeros(*cls.shape[:2], K), patches, patch_logits)


def statistics(ranks: Any, teacher: Given, hidden: Tensor) -> dict[str, float]:
    method = dino(ranks, teacher, teacher, "center center")
    method.loss(batch(0, images=teacher.outputs.cls.shape[1], hidden=hidden), NOW)
    return {name: value.item() for name, value in method.statistics().items()}


def test_patch_statistics_equal_loops(alone):
    torch.manual_seed(3)
    hidden = some_hidden()
    num_patches = int(hidden.sum())
    teacher = given_teacher(torch.randn(num_patches, D), torch.randn(num_patches, K) * 0.1, torch.randn(2, B, D))
    found = statistics(alone, teacher, hidden)
    patches, cls = teacher.outputs.patches.double(), teacher.outputs.cls.double().flatten(0, 1)
    view_of = [view for view in range(2 * B) for _ in range(int(hidden[view].sum()))]
    cosines = [F.cosine_similarity(patches[i], cls[view], dim=0) for i, view in enumerate(view_of)]
    pairs = [
        F.cosine_similarity(patches[i], patches[j], dim=0)
        for i in range(num_patches)
        for j in range(num_patches)
        if i != j and view_of[i] == view_of[j]
    ]
    assert found["patch_cos"] == pytest.approx(float(sum(cosines) / len(cosines)), abs=1e-6)
    assert found["contrast"] == pytest.approx(1 - float(sum(pairs) / len(pairs)), abs=1e-6)
    p = torch.softmax(teacher.outputs.patch_points.double() / NOW.teacher_temp, dim=-1)
    assert found["patch_entropy"] == pytest.approx(sum(plain.entropy(row) for row in p) / len(p), rel=1e-5)
    assert found["patch_usage_entropy"] == pytest.approx(plain.entropy(p.mean(0)), rel=1e-5)


@pytest.mark.parametrize(("copies", "cosine", "contrast"), [("CLS", 1.0, 0.0), ("each other", 0.0, 0.0)])
def test_statistics_tell_patches_that_are_one_vector(alone, copies, cosine, contrast):
    hidden = torch.ones(6, N, dtype=torch.bool)
    cls = torch.eye(D)[:3].expand(2, 3, D).flatten(0, 1)
    patches = cls.repeat_interleave(N, 0) if copies == "CLS" else torch.eye(D)[3].expand(6 * N, D)
    found = statistics(alone, given_teacher(patches, torch.zeros(6 * N, K)), hidden)
    assert found["patch_cos"] == pytest.approx(cosine, abs=1e-6)
    assert found["contrast"] == pytest.approx(contrast, abs=1e-6)
    assert found["patch_entropy"] == pytest.approx(math.log(K))


def test_patch_statistics_look_at_few_patches_of_all_images(alone):
    """Of 4096 patches whose second half has another target, both halves are seen."""
    images, M = 512, 4096
    logits = torch.zeros(M, K)
    logits[: M // 2, 0], logits[M // 2 :, 1] = 100, 100
    teacher = given_teacher(torch.randn(M, D), logits, torch.randn(2, images, D))
    found = statistics(alone, teacher, torch.ones(2 * images, N, dtype=torch.bool))
    assert found["patch_usage_entropy"] == pytest.approx(math.log(2), rel=1e-4)
    assert found["patch_entropy"] == pytest.approx(0, abs=1e-6)


def test_the_patches_logits_never_exist_whole(alone):
    """On the path of a GPU less is kept for the backward pass than one matrix of the student's logits takes."""

    class Wide(nn.Module):
        """Few features, many prototypes and patches."""

        def __init__(self) -> None:
            super().__init__()
            self.points, self.prototypes = nn.Parameter(torch.randn(6000, 8)), nn.Parameter(torch.randn(3000, 8))

        def forward(self, views: dict[str, Tensor], masks: Masks | None = None) -> Outputs:
            cls = self.points[:4].view(2, 2, 8)
            return Outputs(cls, self.points, cls, self.points, self.prototypes, self.prototypes)

    student, teacher = Wide(), Wide().requires_grad_(False)
    targets = Centering(3000, 0.9, 1, alone), Centering(3000, 0.9, 1, alone)
    method = Dino(student, teacher, dataclasses.replace(LOSS, koleo_weight=0.0), *targets)
    rows = torch.arange(6000)
    masks = Masks(torch.ones(4, 1500, dtype=torch.bool), rows, torch.full((6000,), 1 / 6000))
    given = Batch({"global": torch.zeros(2, 2, 3, 8, 8)}, masks)
    with kernels_counted() as counted, saved_bytes() as saved:
        method.loss(given, NOW)
        assert saved() < 6000 * 3000 * 4 / 10
    assert counted["_ibot_loss_kernel"] == 3, "chunks of 2048 rows"
