"""Alarms: raised for a state that lasts, once, and never for a run that learns."""

import math

import pytest

from fastdino.method.health import PATIENCE, Health

K = 1024
LEARNING = {"loss": 4.0, "teacher_entropy": 3.0, "usage_entropy": 5.0, "feature_std": 0.9}


def alarms(line: dict[str, float], lines: int = PATIENCE, first_epoch: bool = False) -> list[str]:
    health = Health(K)
    return [text for _ in range(lines) for text in health.check(line, first_epoch)]


def test_learning_raises_nothing():
    assert alarms(LEARNING, lines=100) == []


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"loss": math.log(K)}, "loss sits at ln K = 6.931"),
        ({"teacher_entropy": math.log(K)}, "entropy sits at ln K"),
        ({"usage_entropy": 0.01}, "collapsed to one prototype"),
        ({"feature_std": 0.001}, "backbone has collapsed"),
    ],
)
def test_collapse_raises_one_alarm_once(state, says):
    found = alarms(LEARNING | state, lines=5 * PATIENCE)
    assert len(found) == 1
    assert says in found[0]
    assert alarms(LEARNING | state, lines=PATIENCE - 1) == [], "one line is noise"
    assert alarms(LEARNING | state, first_epoch=True) == [], "every run starts there"
