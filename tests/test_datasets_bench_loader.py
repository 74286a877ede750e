from __future__ import annotations

import h5py
import numpy as np
import pytest

from lram.datasets import bench_data, bench_loader
from lram.datasets.bench_loader import LoaderBenchSettings, Row, as_table
from lram.datasets.index import find_tasks, read_index
from lram.datasets.specs import DOMAINS, BadInput
from lram.datasets.trajectory import validate
from lram.datasets.windows import Windows, WindowSettings


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple:
    """A run on less than --quick takes, in a folder that is kept."""
    folder = tmp_path_factory.mktemp("bench")
    size = bench_loader._Size(4, 2, 3, 1, 90, 1, 1, 6, 864)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_loader, "QUICK", size)
        patch.setattr(bench_loader, "PER_DOMAIN", 8)
        patch.setattr(bench_data, "has_emulator", lambda: False)
        told: list[str] = []
        rows = list(bench_loader.bench_loader(LoaderBenchSettings(folder, quick=True), told.append))
    return folder, rows, told


def test_the_table_has_every_reader_and_every_measurement(measured):
    _, rows, told = measured
    by_section: dict[str, list[str]] = {}
    for row in rows:
        by_section.setdefault(row.section, []).append(row.reader)
    read = [readers for section, readers in by_section.items() if "windows" in section and "batches" not in section]
    assert len(read) == 3
    for readers in read:
        assert {bench_loader.LRAM, "our files", "tar shards", "Zarr"} <= set(readers)
    assert len(by_section) == 6 and told[0] == "making data"
    assert all(row.met is not None for row in rows if row.bar)
    table = as_table(rows)
    assert all(row.reader in table and row.value in table for row in rows)
    assert table.count("batches of 48 windows, 6 domains") == 1


def test_all_stores_hold_the_same_data(measured):
    folder, _, _ = measured
    opened = [Windows.open(folder / name, WindowSettings()) for name in ("files", "shards", "packed.zarr")]
    for domain in ("atari", "composuite", "dmcontrol"):
        batches = [w.read(domain, w.draw(domain, 0, "train", 8, 0), "train") for w in opened]
        for batch in batches[1:]:
            assert np.array_equal(batch.states, batches[0].states) and batches[0].states.any()
    for piece in opened[0].draw("atari", 0, "train", 8, 0):
        path = folder / "lram/atari" / piece.task.task / f"{piece.task.episodes[piece.row]:09d}.hdf5"
        states, *_ = bench_data.read_lram_window(str(path), piece.first, piece.last)
        assert np.array_equal(states, piece.task.slice("states", piece.row, piece.first, piece.last))
        with h5py.File(path) as file:
            assert file["states"].compression_opts == 1 and file["states"].chunks[0] != 64
        with h5py.File(str(path).replace("/lram/", "/lram-rgb/")) as file:
            assert file["states"].shape[1] == 3


def test_the_folder_is_used_again(measured):
    folder, _, _ = measured
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/*/*.hdf5")}
    size = bench_loader._Size(4, 2, 3, 1, 90, 1, 1, 6, 864)
    bench_loader.make_data(folder, size, None)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*/*/*/*.hdf5")} != {}


def test_the_synthetic_index_is_one_that_opens(tmp_path):
    bench_data.write_synthetic_index(tmp_path, 432 * 10)
    folders = find_tasks(tmp_path)
    assert len(folders) == 432
    count = sum(read_index(folder).table.num_rows for folder in folders)
    assert count == pytest.approx(432 * 10, rel=0.05)
    # In the proportions of the paper's Table 1.
    procgen = sum(read_index(folder).table.num_rows for folder in folders if folder.parent.name == "procgen")
    assert procgen / count == pytest.approx(2185 / 3444, rel=0.05)
    seconds, peak, draw, opened = bench_loader.open_index(tmp_path)
    assert opened == count and seconds > 0 and draw > 0 and peak > 2**20


@pytest.mark.parametrize("maker", ["walker", "composuite", "metaworld", "blocks"])
def test_synthetic_trajectories_keep_to_the_format(maker, monkeypatch):
    monkeypatch.setattr(bench_data, "has_emulator", lambda: False)
    trajectory = {
        "walker": lambda: bench_data.vector_maker("dmcontrol", "walker-walk", 1000, 24, 6)(3),
        "composuite": lambda: bench_data.composuite_maker("task", None)(3),
        "metaworld": lambda: bench_data.vector_maker("metaworld", "reach-v3", 200, 39, 4)(3),
        "blocks": lambda: next(bench_data.atari("pong", 50)),
    }[maker]()
    validate(trajectory)
    if DOMAINS[trajectory.domain].state == "vector":
        steps = np.abs(np.diff(trajectory.states, axis=0)).mean()
        assert steps < 0.2 * trajectory.states.std()  # smooth


def test_frames_come_from_the_emulator():
    pytest.importorskip("ale_py")
    episodes = list(bench_data.atari("pong", 70))
    assert sum(episode.length for episode in episodes) == 70
    for episode in episodes:
        validate(episode)
    assert episodes[0].states.std() > 5 and not np.array_equal(episodes[0].states[-1], episodes[0].states[-20])


def test_composuites_own_files_are_taken_in_turn(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "expert" / "IIWA_Box_None_Push"
    folder.mkdir(parents=True)
    states = rng.standard_normal((12, 93)).astype(np.float32)
    with h5py.File(folder / "data.hdf5", "w") as file:
        file["observations"], file["actions"] = states, rng.uniform(-1, 1, (12, 8))
        file["rewards"], file["terminals"] = np.zeros(12), np.arange(12) == 4
        file["timeouts"] = np.arange(12) == 9  # the last two rows are of an unfinished episode
    make = bench_data.composuite_maker("task", tmp_path)
    assert [make(episode).length for episode in range(4)] == [5, 5, 5, 5]
    assert np.array_equal(make(1).states, states[5:10])
    with pytest.raises(BadInput, match="holds no <Robot>"):
        bench_data.composuite_maker("task", folder / "nothing")


def test_area_interpolation_averages_neighbours():
    halves = bench_data._area(4, 2)
    assert halves.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    np.testing.assert_allclose(bench_data._area(210, 84).sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(bench_data._area(3, 2) @ np.array([0, 3, 6]), [1, 5])


def test_a_bar_that_is_not_met_is_said():
    rows = [
        Row("a", "one", "1 windows/s", 0.5, "≥ 2×", False),
        Row("a", "two", "3", 12.0, "≥ 2×", True),
        Row("b", "x", "y"),
    ]
    lines = as_table(rows).splitlines()
    assert lines[0] == "a" and lines[1].endswith("NOT MET") and lines[2].endswith("met") and lines[4] == "b"
    assert "12×" in lines[2] and "0.50×" in lines[1]
