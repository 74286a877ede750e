"""The collectors' benchmark runs, and what it calls recording is recording."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from lram.collectors.bench_collect import CollectBenchSettings, bench_collect, recording_share
from lram.collectors.darkroom import make
from lram.collectors.recorder import Recorder
from lram.datasets.bench_loader import as_table
from lram.datasets.writer import TaskWriter


def test_every_measurement_is_made_or_says_what_is_missing(tmp_path: Path) -> None:
    told: list[str] = []
    rows = list(bench_collect(CollectBenchSettings(tmp_path / "bench", quick=True), told.append))
    assert len(told) == 6 and len({row.section for row in rows}) == 6
    assert all(row.value.startswith("not measured: ") or row.value[0].isdigit() for row in rows)
    bars = {row.reader: row.bar for row in rows if row.bar}
    assert set(bars.values()) <= {"≤ 2%", "≤ 5%", "≤ 0.33×"}
    assert "Dark-Room" in as_table(rows)
    assert not list((tmp_path / "bench").iterdir())


def test_the_share_is_time_inside_the_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Recorder.step

    def slow(self: Recorder, *args) -> None:
        time.sleep(0.01)
        step(self, *args)

    monkeypatch.setattr(Recorder, "step", slow)

    def run() -> None:
        env = make("room3x3-goal-00-01", 2)
        with TaskWriter(tmp_path, "darkroom", "task", {}) as writer:
            recorder = Recorder(writer, "darkroom", "task", [0, 1], "test")
            recorder.reset(env.reset()[0])
            for _ in range(10):
                time.sleep(0.02)
                states, *rest = env.step(np.zeros(2, np.int64))
                recorder.step(np.zeros(2, np.int64), states, *rest)

    # Ten times 10 ms inside, nine times 20 ms between; sleeps last longer on a busy machine, never shorter.
    assert 0.2 < recording_share(run) < 2
    assert Recorder.step is slow
