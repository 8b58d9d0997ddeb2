"""Alarms: raised for a state that lasts, once, and never for a run that learns."""

import math

import pytest

from fastdino.method.health import PATIENCE, Health

K = 1024
PATCH_K = 512
LEARNING = {"loss_dino": 4.0, "teacher_entropy": 3.0, "usage_entropy": 5.0, "feature_std": 0.9}
PATCHES_LEARN = LEARNING | {"patch_entropy": 3.0, "patch_usage_entropy": 5.0, "patch_cos": 0.8, "contrast": 0.3}


def alarms(line: dict[str, float], lines: int = PATIENCE, first_epoch: bool = False) -> list[str]:
    health = Health(K, PATCH_K)
    return [text for _ in range(lines) for text in health.check(line, first_epoch)]


def test_learning_raises_nothing():
    assert alarms(LEARNING, lines=100) == []
    assert alarms(PATCHES_LEARN, lines=100) == []
    same_size = PATCHES_LEARN | {"patch_entropy": math.log(PATCH_K), "loss_ibot": math.log(K)}
    assert [text for _ in range(PATIENCE) for text in Health(K).check(same_size, False)] == [], "of K' = K prototypes"


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"loss_dino": math.log(K)}, "loss sits at ln K = 6.931"),
        ({"teacher_entropy": math.log(K)}, "entropy sits at ln K"),
        ({"usage_entropy": 0.01}, "collapsed to one prototype"),
        ({"feature_std": 0.001}, "backbone has collapsed"),
        ({"patch_entropy": math.log(PATCH_K)}, "entropy of the patches' targets sits at ln K = 6.238"),
        ({"patch_usage_entropy": 0.01}, "one prototype for them. Use loss.patch_targets=sinkhorn"),
    ],
)
def test_collapse_raises_one_alarm_once(state, says):
    found = alarms(PATCHES_LEARN | state, lines=5 * PATIENCE)
    assert len(found) == 1
    assert says in found[0]
    assert alarms(PATCHES_LEARN | state, lines=PATIENCE - 1) == [], "one line is noise"
    assert alarms(PATCHES_LEARN | state, first_epoch=True) == [], "every run starts there"


def test_patches_that_become_the_cls_token_are_told_in_the_first_epoch_too():
    for first_epoch in (True, False):
        found = alarms(PATCHES_LEARN | {"patch_cos": 0.975}, lines=5 * PATIENCE, first_epoch=first_epoch)
        assert len(found) == 1
        assert "above 0.97" in found[0]
        assert "loss.patch_targets=sinkhorn" in found[0]
        assert alarms(PATCHES_LEARN | {"patch_cos": 0.965}, lines=5 * PATIENCE, first_epoch=first_epoch) == []
    health = Health(K)
    lines = [PATCHES_LEARN | {"patch_cos": 0.99 if i % PATIENCE else 0.9} for i in range(3 * PATIENCE)]
    assert not [text for line in lines for text in health.check(line, False)], "nine lines are noise"


def test_a_rank_below_that_of_the_start_is_said_once():
    health = Health(64)
    assert health.check_rank({"rankme": 9.0}) == [], "the run has none to compare with"
    assert health.check_rank({"rankme": 10.0, "rankme_at_start": 10.0}) == []
    (alarm,) = health.check_rank({"rankme": 9.9, "rankme_at_start": 10.0})
    assert alarm.startswith("RankMe of the teacher is 9.9, and was 10.0 before the first step")
    assert health.check_rank({"rankme": 1.0, "rankme_at_start": 10.0}) == []
