from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lram.datasets import reader as reader_module
from lram.datasets.index import read_index, trajectory_path, write_index
from lram.datasets.pack import pack_task
from lram.datasets.reader import COLUMNS, OPEN_FILES, READ, TaskReader, open_task
from lram.datasets.shards import shard_task
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import read
from lram.datasets.windows import Windows, WindowSettings
from lram.datasets.writer import TaskWriter


@pytest.fixture(scope="module")
def long(make, tmp_path_factory) -> dict[tuple[str, str], tuple[TaskReader, Path]]:
    """Readers of trajectories of several chunks, by codec and storage, and where their files are."""
    root, opened = tmp_path_factory.mktemp("long"), {}
    for domain, codec in (("metaworld", "none"), ("composuite", "gzip"), ("composuite", "zstd"), ("atari", "gzip")):
        with TaskWriter(root / codec, domain, "task", {}, codec) as writer:
            for episode, length in enumerate((700, 30, 256)):
                writer.add(make(domain, episode, length))
            writer.finish()
        folder = root / codec / domain / "task"
        shard_task(folder, root / codec / "shards", 10**9)
        pack_task(folder, root / codec / "packed.zarr")
        for storage in (".", "shards", "packed.zarr"):
            opened[f"{domain} {codec}", storage] = open_task(root / codec / storage / domain / "task"), folder
    return opened


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_slices_equal_those_of_the_whole_array(long, data):
    reader, folder = long[data.draw(st.sampled_from(sorted(long)))]
    row, name = data.draw(st.integers(0, 2)), data.draw(st.sampled_from(READ))
    start = data.draw(st.integers(0, int(reader.lengths[row]) - 1))
    stop = data.draw(st.integers(start + 1, int(reader.lengths[row])))
    whole = getattr(read(folder / trajectory_path(row)), name)
    got = reader.slice(name, row, start, stop)
    assert got.dtype == whole.dtype
    np.testing.assert_array_equal(got, whole[start:stop])


def test_several_slices_come_with_few_system_calls(write, tmp_path, monkeypatch):
    folder = write(tmp_path, "metaworld", count=2, length=200)
    reader, trajectory = open_task(folder), read(folder / trajectory_path(1))
    calls, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: calls.append(given) or preadv(*given))
    got = {name: np.zeros_like(getattr(trajectory, name)[:50]) for name in READ}
    reader.read(1, [(name, 100, 150, array.data.cast("B")) for name, array in got.items()])
    for name, array in got.items():
        np.testing.assert_array_equal(array, getattr(trajectory, name)[100:150])
    assert len(calls) <= 2  # states lie apart from the rest


def test_only_the_chunks_that_are_needed_are_read(long, monkeypatch):
    reader, _ = long["atari gzip", "."]
    sizes, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *given: sizes.append(given[1]) or pread(*given))
    reader.slice("states", 0, 64, 128)
    assert len(sizes) == 1
    reader.slice("states", 0, 63, 129)
    assert len(sizes) == 4


def test_open_files_stay_bounded(make, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with TaskWriter(tmp_path, "metaworld", "task", {}) as writer:
        trajectory = make("metaworld", 0, 2)
        for episode in range(3000):
            trajectory.episode = episode
            writer.add(trajectory)
        writer.finish()
    # In a process of its own with room for 64 files: half of them may be ours.
    code = f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from lram.datasets.reader import open_task
from pathlib import Path
reader = open_task(Path({str(tmp_path)!r}) / "metaworld" / "task")
most = 0
for row in range(3000):
    assert reader.slice("rewards", row, 0, 2).shape == (2,)
    most = max(most, len(os.listdir("/proc/self/fd")))
print(most)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 32 <= int(said.stdout) <= 48
    reader = open_task(tmp_path / "metaworld" / "task")
    before = len(os.listdir("/proc/self/fd"))
    for row in range(3000):
        reader.slice("rewards", row, 0, 1)
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_FILES


def read_all(reader: TaskReader, folder: Path, seed: int) -> bool:
    """Reads slices at random from a folder of many files, and says whether they are right."""
    rng = np.random.default_rng(seed)
    for _ in range(300):
        row, start = int(rng.integers(len(reader))), int(rng.integers(19))
        if not (reader.slice("rewards", row, start, 20) == row).all():
            return False
    return True


@pytest.fixture
def many(write, make, tmp_path) -> Path:
    with TaskWriter(tmp_path, "metaworld", "task", {}) as writer:
        for episode in range(60):
            writer.add(make("metaworld", episode, 20, rewards=np.full(20, episode, np.float32)))
        writer.finish()
    return tmp_path / "metaworld" / "task"


def test_threads_may_read_at_once_while_files_are_closed(many, monkeypatch):
    monkeypatch.setattr(reader_module, "_cached", functools.lru_cache(3)(reader_module._OpenFile))
    reader, right = open_task(many), []
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=lambda k=k: right.append(read_all(reader, many, k))) for k in range(6)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(0.005)
    assert right == [True] * 6


def test_forked_processes_may_read_files_that_were_open(many):
    reader = open_task(many)
    assert read_all(reader, many, 0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = [pool.apply_async(_forked, (k,)) for k in range(4)]
        _forked.reader = reader  # too late for the children: they read what they inherited
        assert read_all(reader, many, 1)
        assert [result.get(30) for result in results] == ["nothing inherited"] * 4
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = [pool.apply_async(_forked, (k,)) for k in range(4)]
        assert read_all(reader, many, 2)
        assert [result.get(30) for result in results] == [True] * 4
    del _forked.reader


def _forked(seed: int) -> bool | str:
    reader = getattr(_forked, "reader", None)
    return read_all(reader, reader.folder, seed) if reader else "nothing inherited"


def test_a_file_replaced_since_is_read_anew(write, make, tmp_path):
    folder = write(tmp_path, "metaworld", count=3)
    open_task(folder).slice("rewards", 0, 0, 20)
    shutil.rmtree(tmp_path)
    write(tmp_path, "metaworld", count=3, rewards=np.full(20, 5, np.float32))
    assert (open_task(folder).slice("rewards", 0, 0, 20) == 5).all()


def test_missing_short_and_damaged_files_are_named(write, tmp_path):
    folder = write(tmp_path, "procgen", count=4, length=100)
    reader = open_task(folder)
    paths = [folder / trajectory_path(episode) for episode in range(4)]
    index = read_index(folder)
    paths[0].unlink()
    os.truncate(paths[1], 3000)
    with open(paths[2], "r+b") as file:
        file.seek(index.table["chunk_offsets"][2][0].as_py())
        file.write(b"\xff" * 40)
    for name in ("rewards", "states"):
        with pytest.raises(BadInput, match=r"000000000.hdf5: No such file or directory, but the index names it"):
            reader.slice(name, 0, 0, 10)
    with pytest.raises(BadInput, match=r"000000001.hdf5: shorter than its index says, run `lram check`"):
        reader.slice("states", 1, 0, 10)
    with pytest.raises(BadInput, match=r"000000001.hdf5: shorter than its index says"):
        reader.slice("actions", 1, 0, 100)
    with pytest.raises(BadInput, match=r"000000002.hdf5: a chunk of states does not inflate"):
        reader.slice("states", 2, 0, 10)
    assert reader.slice("states", 2, 70, 80).shape == (10, 1, 64, 64)  # the other chunk is whole
    assert reader.slice("states", 3, 0, 100).shape == (100, 1, 64, 64)
    with pytest.raises(BadInput, match=r"00000000[012].hdf5"):
        windows = Windows([reader], WindowSettings())
        for update in range(20):
            list(windows.batches(update, "train", 8, seed=0))


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_chunk_that_inflates_to_less_is_refused(make, tmp_path, codec):
    with TaskWriter(tmp_path, "procgen", "task", {}, codec) as writer:
        for episode, length in enumerate((20, 40)):
            writer.add(make("procgen", episode, length))
        writer.finish()
    index = read_index(tmp_path / "procgen" / "task")
    at = index.table.schema.get_field_index("length")
    # A chunk holds min(length, 64) rows: with another length it inflates to less than it should.
    table = index.table.set_column(at, "length", pa.array([64, 40], pa.int32()))
    write_index(index.folder, table)
    with pytest.raises(BadInput, match=r"000000000.hdf5: a chunk of states does not inflate"):
        open_task(index.folder).slice("states", 0, 0, 64)


def test_an_index_without_places_is_refused(write, tmp_path):
    folder = write(tmp_path, "procgen", count=3, length=100)
    index = read_index(folder)
    at = index.table.schema.get_field_index("length")
    write_index(folder, index.table.set_column(at, "length", pa.array([100, 20, 100], pa.int32())))
    with pytest.raises(BadInput, match="chunk tables do not fit its lengths"):
        open_task(folder)
    at = index.table.schema.get_field_index("rewards_offset")
    write_index(folder, index.table.set_column(at, "rewards_offset", pa.array([1, None, 1], pa.int64())))
    with pytest.raises(BadInput, match="lacks the offset of rewards"):
        open_task(folder)


@pytest.mark.parametrize("name", ["rewards", "states"])
def test_offsets_outside_the_file_are_refused(write, tmp_path, name):
    folder = write(tmp_path, "procgen", count=2)
    table = read_index(folder).table
    for offset, said in ((-5000, "cannot be read at the index's offsets"), (10**9, "shorter than its index says")):
        column = "chunk_offsets" if name == "states" else "rewards_offset"
        at = table.schema.get_field_index(column)
        values = [[offset]] * 2 if name == "states" else [offset] * 2
        write_index(folder, table.set_column(at, column, pa.array(values, table.schema.field(column).type)))
        with pytest.raises(BadInput, match=rf"000000001\.hdf5: {said}"):
            open_task(folder).slice(name, 1, 0, 20)


def test_arrays_that_overlap_are_read_apart(write, tmp_path):
    folder = write(tmp_path, "metaworld", count=2)
    table = read_index(folder).table
    at = table.schema.get_field_index("returns_to_go_offset")
    write_index(folder, table.set_column(at, "returns_to_go_offset", table["rewards_offset"]))
    got = np.zeros((2, 20), np.float32)
    places = [("rewards", 0, 20, got[0].data.cast("B")), ("returns_to_go", 0, 20, got[1].data.cast("B"))]
    open_task(folder).read(1, places)
    assert got[0].any() and np.array_equal(got[0], got[1])


def test_what_reading_needs_is_what_it_reads(write, tmp_path):
    folder = write(tmp_path, "dmcontrol", count=30)
    few, all_of_it = open_task(folder), TaskReader(read_index(folder))
    assert set(read_index(folder, columns=COLUMNS).table.column_names) == set(COLUMNS) - {"shard", "member_offset"}
    for name in ("lengths", "returns", "episodes", "validation"):
        assert np.array_equal(getattr(few, name), getattr(all_of_it, name)), name
    assert few.validation.dtype == bool and few.validation.any() and not few.validation.all()
    assert (few.task, few.num_dims, few.state_shape) == ("task", 4, (5,))
    assert few.state_runs == ((0, 41, 3), (3, 14, 2))
    with pytest.raises(BadInput, match="holds no trajectory"):
        TaskReader(type(read_index(folder))(folder, {}, read_index(folder).table.slice(0, 0)))
