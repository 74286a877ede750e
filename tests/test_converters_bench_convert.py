from __future__ import annotations

import gzip
import io

import numpy as np
import pytest

from lram.converters import bench_convert, composuite, dqn_replay
from lram.converters.bench_convert import ConvertBenchSettings
from lram.converters.source import Count
from lram.datasets.bench_loader import as_table

pytest.importorskip("ale_py", reason="the emulator makes the frames")

ROWS = 1500


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple:
    """A run on less than --quick takes, in a folder that is kept."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_convert, "QUICK", bench_convert._Size(ROWS, 300, 2000, 300))
        told: list[str] = []
        rows = list(bench_convert.bench_convert(ConvertBenchSettings(folder, quick=True), told.append))
    return folder, rows, told


def test_the_table_has_every_measurement_and_every_bar(measured):
    _, rows, told = measured
    readers = [row.reader.strip() for row in rows]
    assert readers == [
        "one worker, a core",
        "one worker, wall time",
        "one worker, peak memory",
        "two workers, a core",
        "two workers, wall time",
        "two workers, memory of each",
        "two workers, a core's rate",
        "decompress, twice",
        "resize",
        "compress and hash",
        "write",
        "wait for the disk",
        "one worker, a core",
        "one worker, wall time",
        "one worker, peak memory",
        "read",
        "compress and hash",
        "write",
        "wait for the disk",
    ]
    bars = [row.bar for row in rows if row.bar]
    assert bars == ["≥ 10,000/s", "< 1.5 GiB", "< 1.5 GiB", "within 20 %", "≥ 100,000/s"]
    assert all((row.met is None) == (not row.bar) for row in rows)
    assert all(row.reader in as_table(rows) for row in rows)
    assert told[0] == "making a checkpoint of 1,500 frames"
    shares = [int(row.value.split(", ")[1].rstrip("%")) for row in rows if "µs" in row.value]
    assert 97 <= sum(shares[:5]) <= 103 and 97 <= sum(shares[5:]) <= 103
    memory = next(row for row in rows if row.reader == "one worker, peak memory")
    assert 0.02 < float(memory.value.split()[0]) < 1.5


def test_the_checkpoint_is_one_that_dopamine_could_have_written(measured):
    folder, _, _ = measured
    logs = folder / f"source-{ROWS}" / "dqn-replay" / "Seaquest" / "1" / "replay_logs"

    def load(name: str) -> np.ndarray:
        return np.load(io.BytesIO(gzip.decompress((logs / f"{name}_ckpt.0.gz").read_bytes())))

    frames, terminals = load("$store$_observation"), load("$store$_terminal")
    assert frames.shape == (ROWS, 84, 84) and int(load("add_count")) == ROWS - 1
    begins = [0, *(np.flatnonzero(terminals) + 1)]
    assert len(begins) > 2
    for row in begins:
        if row + 3 < ROWS - 1:
            assert not frames[row : row + 3].any() and frames[row + 3].std() > 5
    assert not frames[-1].any() and not terminals[-1]
    assert set(np.unique(load("$store$_reward"))) <= {-1, 0, 1} and load("$store$_action").max() > 10


def test_both_sources_are_converted_without_a_complaint(measured):
    folder, _, _ = measured
    for converter, name in ((dqn_replay, "dqn-replay"), (composuite, "composuite")):
        options = converter.Options()
        jobs = converter.jobs(folder / f"source-{ROWS}" / name, options)
        count = Count()
        lengths = [t.length for t in converter.trajectories(jobs[0], options, count)]
        count.check()
        assert sum(lengths) == count.written > 500 and not count.problems
    assert lengths == [500] * 4


def test_sources_are_used_again_and_what_was_converted_is_removed(measured):
    folder, _, _ = measured
    assert [path.name for path in folder.iterdir()] == [f"source-{ROWS}"]
    files = sorted(folder.glob("**/*.gz"))
    before = [path.stat().st_mtime_ns for path in files]
    bench_convert.make_dqn_replay(folder / f"source-{ROWS}" / "dqn-replay", ROWS, 300)
    assert before == [path.stat().st_mtime_ns for path in files] and len(files) == 10


def test_episodes_are_drawn_until_the_buffer_is_full():
    order = bench_convert._until_full(np.array([7, 17, 27]), 200)
    assert sum(np.array([10, 20, 30])[order]) >= 196 > sum(np.array([10, 20, 30])[order[:-1]])
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2] and order[:3] != order[3:6]
