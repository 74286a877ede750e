from __future__ import annotations

import pytest

from lram.datasets.specs import BadInput
from lram.train.bench_evaluate import EvaluateBenchSettings, bench_evaluate

ROOM = "darkroom/room5x5-h8-goal-01-01"


def test_both_ways_play_the_same_episodes():
    told: list[str] = []
    settings = EvaluateBenchSettings(ROOM, episodes=3, slots=2, workers=1, rounds=1, size="tiny", device="cpu")
    one, many, same = bench_evaluate(settings, told.append)
    assert told == ["round 1 of 1, 1 at a time", "round 1 of 1, 2 at a time"]
    assert one.value.endswith(" steps/s") and many.reader == "2 at a time" and many.ratio > 0
    assert same.value == "3 of 3" and same.met


def test_what_cannot_be_compared_or_played_is_refused():
    with pytest.raises(BadInput, match="--slots"):
        next(bench_evaluate(EvaluateBenchSettings(ROOM, slots=1)))
    with pytest.raises(BadInput, match="nowhere"):
        next(bench_evaluate(EvaluateBenchSettings("darkroom/nowhere", episodes=1, rounds=1, size="tiny", device="cpu")))
