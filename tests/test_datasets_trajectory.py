from __future__ import annotations

import io
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lram.datasets.specs import BadInput
from lram.datasets.trajectory import ARRAYS, Trajectory, encode, read, scan_bytes, write_whole

DOMAINS = ("darkroom", "dmcontrol", "composuite", "metaworld", "atari", "procgen")


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("codec", [None, "gzip", "zstd", "none"])
@pytest.mark.parametrize("length", [1, 64, 300])
def test_round_trip_is_exact(make, tmp_path, domain, codec, length):
    trajectory = make(domain, 3, length, success=True)
    path = tmp_path / "a.hdf5"
    write_whole(path, encode(trajectory, codec).data)
    back = read(path)
    for name, value in vars(trajectory).items():
        assert np.array_equal(getattr(back, name), value), name
        if isinstance(value, np.ndarray):
            assert getattr(back, name).dtype == value.dtype


def test_same_trajectory_gives_same_bytes(make):
    assert encode(make("atari", 1)).data == encode(make("atari", 1)).data
    assert encode(make("atari", 1)).sha256 != encode(make("atari", 2)).sha256


def test_bytes_hold_no_time(make):
    data = {domain: encode(make(domain)).data for domain in DOMAINS}
    time.sleep(1.1)
    assert data == {domain: encode(make(domain)).data for domain in DOMAINS}


def test_threads_do_not_disturb_each_other(make):
    trajectories = [make("darkroom", episode) for episode in range(200)]
    expected = [encode(trajectory).data for trajectory in trajectories]
    with ThreadPoolExecutor(8) as pool:
        assert [image.data for image in pool.map(encode, trajectories)] == expected
        back = list(pool.map(lambda data: scan_bytes(data, "a")[0], expected))
    assert [trajectory.episode for trajectory in back] == list(range(200))


def locate(file: h5py.File) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Where plain h5py finds contiguous arrays, and (offset, stored bytes) of each chunk of `states`."""
    offsets: dict[str, int] = {}
    chunks: list[tuple[int, int]] = []
    for name in file:
        array = file[name]
        if array.chunks is None:
            offsets[name] = array.id.get_offset()
        else:
            table: list = []
            array.id.chunk_iter(table.append)
            table.sort(key=lambda info: info.chunk_offset)
            chunks = [(info.byte_offset, info.size) for info in table]
    return offsets, chunks


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("codec", ["gzip", "zstd", "none"])
def test_plain_h5py_sees_the_same(make, domain, codec):
    trajectory = make(domain, 3, 300, success=True)
    image = encode(trajectory, codec)
    with h5py.File(io.BytesIO(image.data)) as file:
        for name in (*ARRAYS, "final_state"):
            assert np.array_equal(file[name][...], getattr(trajectory, name)), name
            assert file[name].dtype == getattr(trajectory, name).dtype, name
        for name in ("domain", "task", "source", "episode", "seed", "terminated", "truncated", "success"):
            assert file.attrs[name] == getattr(trajectory, name), name
        assert (file.attrs["length"], file.attrs["return"]) == (300, trajectory.total)
        assert isinstance(file.attrs["task"], str) and file.attrs["terminated"].dtype == bool
        assert locate(file) == (image.offsets, image.chunks)
    assert scan_bytes(image.data, "a")[1] == image


@pytest.mark.skipif(not shutil.which("h5dump"), reason="h5dump is not installed")
def test_h5dump_reads_the_file(make, tmp_path):
    write_whole(tmp_path / "a.hdf5", encode(make("dmcontrol", length=3)).data)
    said = subprocess.run(["h5dump", tmp_path / "a.hdf5"], capture_output=True, text=True, check=True).stdout
    assert "H5T_IEEE_F32LE" in said and '"lram-trajectory"' in said and "( 3, 5 )" in said


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_texts_come_back(source):
    states = np.zeros((2, 2), np.float32)
    rewards = np.zeros(2, np.float32)
    t = Trajectory("darkroom", "t", 0, 0, states, np.zeros(2, np.int64), rewards, False, True, source)
    assert scan_bytes(encode(t).data, "a")[0].source == source


@pytest.mark.parametrize("source", ["a\0b", "\ud800"])
def test_texts_that_utf8_cannot_hold_are_refused(make, source):
    with pytest.raises(BadInput, match="UTF-8"):
        encode(replace(make(), source=source))


# HDF5 loops for ever on some flipped bits, which no exception ends: another process, with a watchdog.
FLIPPER = """
import faulthandler, pickle, sys
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import scan_bytes

data, refused = pickle.load(sys.stdin.buffer), 0
for at in range(0, len(data), 2):
    faulthandler.dump_traceback_later(20, exit=True)
    flipped = bytearray(data)
    flipped[at] ^= (0xFF, 0x01, 0x80, 0x10)[at // 2 % 4]
    try:
        scan_bytes(bytes(flipped), "a")
    except BadInput:
        refused += 1
print(refused)
"""


@pytest.mark.parametrize("domain", ["darkroom", "atari"])
def test_no_flipped_bit_hangs_or_crashes(make, domain):
    data = encode(make(domain, length=4)).data
    run = subprocess.run([sys.executable, "-c", FLIPPER], input=pickle.dumps(data), capture_output=True, check=True)
    # Free space, data of states and texts may change unnoticed here: the index's sha256 is there for them.
    assert int(run.stdout) > 700


def test_offsets_point_at_the_arrays(make):
    trajectory = make("dmcontrol", 0, 50)
    image = encode(trajectory)
    for name, dtype in (("states", np.float32), ("rewards", np.float32), ("returns_to_go", np.float32)):
        values = getattr(trajectory, name)
        at = image.offsets[name]
        assert np.array_equal(np.frombuffer(image.data[at : at + values.nbytes], dtype), values.ravel())
    assert not image.chunks


@given(st.lists(st.integers(-100, 100), min_size=1, max_size=50))
def test_returns_to_go_sum_what_follows(rewards):
    values = np.array(rewards, np.float32)
    states = np.zeros((len(rewards), 2), np.float32)
    t = Trajectory("darkroom", "t", 0, 0, states, np.zeros(len(rewards), np.int64), values, False, True, "test")
    assert t.returns_to_go.tolist() == [sum(rewards[i:]) for i in range(len(rewards))]
    assert t.dones.tolist() == [False] * (len(rewards) - 1) + [True]
    assert t.total == sum(rewards)


@pytest.mark.parametrize(
    ("domain", "fields", "said"),
    [
        ("darkroom", {"actions": np.full(20, 5)}, "actions outside 0..4"),
        ("darkroom", {"states": np.full((20, 2), np.nan, np.float32)}, "not finite"),
        ("darkroom", {"rewards": np.zeros(19, np.float32)}, "expected equal ones"),
        ("darkroom", {"states": np.zeros((20, 2))}, "expected float32"),
        ("metaworld", {"actions": np.full((20, 4), 1.5, np.float32)}, "outside [-1, 1]"),
        ("metaworld", {"actions": np.full((20, 4), np.nan, np.float32)}, "outside [-1, 1]"),
        ("metaworld", {"actions": np.zeros((20, 5), np.float32)}, "at most 4"),
        ("atari", {"states": np.zeros((20, 1, 84, 84), np.uint8)}, "64, 64"),
        ("atari", {"rewards": np.full(20, np.inf, np.float32)}, "rewards hold values"),
        ("darkroom", {"final_state": np.zeros(3, np.float32)}, "expected a row of states"),
    ],
)
def test_what_breaks_the_format_is_refused(make, domain, fields, said):
    with pytest.raises(BadInput, match="episode 7") as error:
        encode(replace(make(domain, 7), **fields))
    assert said in str(error.value)


def test_unknown_domain_and_empty_trajectory_are_refused(make):
    with pytest.raises(BadInput, match="unknown domain 'chess'"):
        encode(replace(make(), domain="chess"))
    nothing = {"states": np.zeros((0, 2), np.float32), "actions": np.zeros(0, np.int64)}
    with pytest.raises(BadInput, match="no transitions"):
        encode(replace(make(), **nothing, rewards=np.zeros(0, np.float32)))


def damage(path: Path, name: str, value: object) -> None:
    with h5py.File(path, "r+") as file:
        if name in file.attrs:
            file.attrs[name] = value
        else:
            file[name][...] = value


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("version", 2, "expected 'lram-trajectory' version 1"),
        ("format", "other", "expected 'lram-trajectory' version 1"),
        ("returns_to_go", 1.0, "returns_to_go does not follow"),
        ("dones", True, "dones does not follow"),
        ("length", 19, "length and return do not agree"),
        ("return", -1.0, "length and return do not agree"),
        ("actions", 9, "actions outside"),
    ],
)
def test_read_names_the_damage(make, tmp_path, name, value, said):
    path = tmp_path / "a.hdf5"
    write_whole(path, encode(make()).data)
    damage(path, name, value)
    with pytest.raises(BadInput, match=r"a\.hdf5") as error:
        read(path)
    assert said in str(error.value)


def test_cut_and_foreign_files_are_refused(make, tmp_path):
    data = encode(make()).data
    for cut in (0, 10, 100, len(data) // 2):
        path = tmp_path / f"{cut}.hdf5"
        path.write_bytes(data[:cut])
        with pytest.raises(BadInput, match=f"{cut}.hdf5: not a whole trajectory file"):
            read(path)
    with pytest.raises(BadInput, match="No such file"):
        read(tmp_path / "missing.hdf5")


def test_links_to_other_files_are_refused(make, tmp_path):
    secret = tmp_path / "secret.hdf5"
    write_whole(secret, encode(make()).data)
    path = tmp_path / "a.hdf5"
    write_whole(path, encode(make()).data)
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        file["rewards"] = h5py.ExternalLink(str(secret), "rewards")
    with pytest.raises(BadInput, match="rewards is a link"):
        read(path)
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        layout = h5py.VirtualLayout((20,), np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "rewards", (20,))
        file.create_virtual_dataset("rewards", layout)
    with pytest.raises(BadInput, match="rewards points to other files"):
        read(path)


# What a stranger writes who has only h5py and numpy; the keys are those of the LRAM code's load_hdf5.
PLAIN_READER = """
import sys
import h5py
import numpy as np

with h5py.File(sys.argv[1], "r") as file:
    states, actions, rewards = file["states"][:], file["actions"][:], file["rewards"][:]
    returns_to_go, dones = file["returns_to_go"][2:5], file["dones"][:]
    print(dict(file.attrs)["task"], states.shape, actions.dtype, float(rewards.sum()), returns_to_go.shape)
    assert np.isclose(returns_to_go[0], rewards[2:].sum()) and dones[-1] and not dones[:-1].any()
"""


def test_a_plain_script_reads_the_file(make, tmp_path):
    trajectory = make("darkroom", 0, 20)
    write_whole(tmp_path / "a.hdf5", encode(trajectory).data)
    assert len(PLAIN_READER.strip().splitlines()) <= 20
    run = [sys.executable, "-c", PLAIN_READER, str(tmp_path / "a.hdf5")]
    said = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.strip() == f"task (20, 2) int64 {trajectory.total} (3,)"
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert set(file) == {*ARRAYS, "final_state"}
