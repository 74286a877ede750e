from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import dask.array
import h5py
import numpy as np
import pyarrow as pa
import pytest
import zarr

from lram.datasets import pack as pack_module
from lram.datasets.index import INDEX, fingerprint, read_index, write_description, write_index
from lram.datasets.pack import pack_description, pack_task, unpack_description, unpack_task
from lram.datasets.reader import open_task
from lram.datasets.shards import shard_task
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import ARRAYS, read
from lram.datasets.writer import TaskWriter

LENGTHS = (1, 130, 64, 300, 7)


@pytest.fixture(scope="module")
def root(make, tmp_path_factory) -> Path:
    """Tasks of every kind, with and without final states, success and keys in an order of their own."""
    root = tmp_path_factory.mktemp("root")
    for domain, codec in (
        ("darkroom", None),
        ("dmcontrol", None),
        ("composuite", None),
        ("atari", None),
        ("procgen", "zstd"),
    ):
        with TaskWriter(root, domain, "task", {"maker": "test"}, codec) as writer:
            for episode, length in enumerate(LENGTHS):
                fields = {"source": f"test {episode % 2}", "success": (None, True, False)[episode % 3]}
                if episode == 2:
                    fields["final_state"] = None
                if domain == "dmcontrol":
                    fields["state_layout"] = {"velocity": [3, 5], "position": [0, 3]}
                fields["terminated"], fields["truncated"] = episode == 1, episode == 3
                writer.add(make(domain, episode, length, **fields))
            writer.finish()
    write_description(root)
    return root


@pytest.fixture(scope="module")
def packed(root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out.zarr"
    pack_description(root, out)
    for folder in sorted(root.glob("*/*/")):
        assert pack_task(folder, out) == len(LENGTHS)
    return out


def hashes(root: Path) -> dict[str, bytes]:
    files = [path for path in root.glob("**/*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).digest() for path in files}


def test_unpacking_gives_the_same_bytes(root, packed, tmp_path):
    for task in sorted(packed.glob("*/*/")):
        assert unpack_task(task, tmp_path) == len(LENGTHS)
    unpack_description(packed, tmp_path)
    assert hashes(tmp_path) == hashes(root)
    assert len(hashes(root)) == 5 * (len(LENGTHS) + 1) + 1
    index = read_index(tmp_path / "atari" / "task")
    for path, expected in zip(index.table["path"].to_pylist(), index.table["sha256"].to_pylist()):
        assert hashlib.sha256((index.folder / path).read_bytes()).digest() == expected


def test_zarr_reads_every_array_end_to_end(root, packed):
    for domain in ("dmcontrol", "atari", "procgen"):
        group = zarr.open_group(packed, mode="r")[f"{domain}/task"]
        offsets = group["offsets"][:]
        assert offsets.tolist() == [0, *np.cumsum(LENGTHS)]
        for episode in range(len(LENGTHS)):
            trajectory = read(root / domain / "task" / f"000/{episode:09d}.hdf5")
            for name in ARRAYS:
                part = group[name][offsets[episode] : offsets[episode + 1]]
                assert part.dtype == getattr(trajectory, name).dtype
                np.testing.assert_array_equal(part, getattr(trajectory, name))
            assert group["return"][episode] == trajectory.total
            assert group["seed"][episode] == trajectory.seed
            assert group["success"][episode] == {None: -1, True: 1, False: 0}[trajectory.success]
        assert group["states"].shards is not None
        assert group.attrs["provenance"] == {"maker": "test"}


def test_dask_and_zarr_agree_on_the_mean_state(root, packed):
    whole = np.concatenate([read(path).states for path in sorted((root / "composuite/task").glob("*/*.hdf5"))])
    array = zarr.open_group(packed, mode="r")["composuite/task/states"]
    lazy = dask.array.from_zarr(array)
    assert lazy.shape == whole.shape and lazy.dtype == np.float32
    by_name = dask.array.from_zarr(str(packed), component="composuite/task/states")
    for mean in (lazy.mean(axis=0).compute(), by_name.mean(axis=0).compute(), array[:].mean(axis=0)):
        np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-4, atol=1e-6)


def test_shards_are_filled_in_order(make, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "SHARD_ROWS", {True: 128, False: 2048})
    with TaskWriter(tmp_path / "root", "procgen", "task", {}) as writer:
        for episode, length in enumerate((50, 128, 1, 200, 64)):
            writer.add(make("procgen", episode, length))
        writer.finish()
    folder = tmp_path / "root/procgen/task"
    monkeypatch.setattr(pack_module, "VALUE_ROWS", 64)
    pack_task(folder, tmp_path / "out.zarr")
    assert len(list((tmp_path / "out.zarr/procgen/task/states/c").iterdir())) == 4
    reader = open_task(tmp_path / "out.zarr/procgen/task")
    for row, path in enumerate(sorted(folder.glob("*/*.hdf5"))):
        trajectory = read(path)
        for name in ("states", "actions", "rewards", "returns_to_go"):
            got = reader.slice(name, row, 0, trajectory.length)
            np.testing.assert_array_equal(got, getattr(trajectory, name))
    unpack_task(tmp_path / "out.zarr/procgen/task", tmp_path / "back")
    assert hashes(tmp_path / "back") == hashes(tmp_path / "root")


def test_chunks_of_zeros_are_stored_like_all_others(write, tmp_path):
    pack_task(write(tmp_path / "root", "metaworld", count=3, rewards=np.zeros(20, np.float32)), tmp_path / "out.zarr")
    assert not open_task(tmp_path / "out.zarr/metaworld/task").slice("rewards", 2, 0, 20).any()


def test_the_fingerprint_is_that_of_the_files(root, packed):
    assert fingerprint([packed / "atari/task"]) == fingerprint([root / "atari/task"])


def test_packing_again_continues_and_follows_changes(write, make, tmp_path):
    folder, out = write(tmp_path / "root", "metaworld", count=3), tmp_path / "out.zarr"
    pack_task(folder, out)
    states = out / "metaworld/task/states/c/0/0"
    written = states.stat().st_mtime_ns
    assert pack_task(folder, out) == 3
    assert states.stat().st_mtime_ns == written
    shutil.rmtree(out / "metaworld/task/index")  # as after a kill: it is written last
    with pytest.raises(BadInput, match="no index"):
        open_task(out / "metaworld/task")
    pack_task(folder, out)
    assert states.stat().st_mtime_ns > written
    with TaskWriter(tmp_path / "root", "metaworld", "task", {"maker": "test"}) as writer:
        writer.add(make("metaworld", 3))
    assert pack_task(folder, out) == 4
    assert len(open_task(out / "metaworld/task")) == 4
    unpack_task(out / "metaworld/task", tmp_path / "back")
    assert unpack_task(out / "metaworld/task", tmp_path / "back") == 4
    (tmp_path / "back/metaworld/task" / INDEX).write_bytes(b"other")
    with pytest.raises(BadInput, match="holds other trajectories than"):
        unpack_task(out / "metaworld/task", tmp_path / "back")


def test_files_that_are_not_the_indexs_are_refused(write, make, tmp_path):
    folder, other = write(tmp_path / "a", "metaworld", count=3), write(tmp_path / "b", "metaworld", count=3, length=21)
    shutil.copy(other / "000/000000001.hdf5", folder / "000/000000001.hdf5")
    with pytest.raises(BadInput, match=r"000000001.hdf5: differs from what its index says"):
        pack_task(folder, tmp_path / "out.zarr")
    shards = shard_task(other, tmp_path / "shards", 10**6)
    with pytest.raises(BadInput, match="is stored in tar shards, expected trajectory files"):
        pack_task(shards, tmp_path / "out.zarr")


def test_files_that_could_not_be_given_back_are_refused(write, tmp_path):
    folder = write(tmp_path / "a", "metaworld", count=2)
    path = folder / "000/000000001.hdf5"
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = "ours do not have this"
    index = read_index(folder)
    at = index.table.schema.get_field_index("sha256")
    hashed = [index.table["sha256"][0].as_py(), hashlib.sha256(path.read_bytes()).digest()]
    write_index(folder, index.table.set_column(at, "sha256", pa.array(hashed, pa.binary(32))))
    with pytest.raises(BadInput, match=r"000000001.hdf5: was written by other versions of lram or HDF5"):
        pack_task(folder, tmp_path / "out.zarr")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("states/c/0/0", lambda data: data[:100], "states/c/0/0: missing or cut"),
        ("states/c/0/0", None, "states/c/0/0: missing or cut"),
        ("states/c/0/0", lambda data: data[:-10] + b"x" + data[-9:], "states/c/0/0: its table of chunks is damaged"),
        ("rewards/zarr.json", lambda data: b"{", "rewards/zarr.json: not the metadata of a packed array"),
        ("rewards/zarr.json", None, "rewards/zarr.json: not the metadata of a packed array"),
        ("rewards/zarr.json", lambda data: data.replace(b'"zstd"', b'"gzip"'), "not an array of its index's lengths"),
    ],
)
def test_damaged_stores_are_named(write, tmp_path, name, damage, said):
    pack_task(write(tmp_path / "root", "metaworld", count=3), tmp_path / "out.zarr")
    task = tmp_path / "out.zarr/metaworld/task"
    data = (task / name).read_bytes()
    (task / name).unlink()
    if damage:
        (task / name).write_bytes(damage(data))
    with pytest.raises(BadInput, match=said):
        open_task(task)


def test_damaged_chunks_are_named_when_read_and_never_unpacked(write, tmp_path):
    pack_task(write(tmp_path / "root", "metaworld", count=3), tmp_path / "out.zarr")
    task = tmp_path / "out.zarr/metaworld/task"
    path = task / "states/c/0/0"
    data = bytearray(path.read_bytes())
    data[8:400] = b"\xff" * 392
    path.write_bytes(data)
    with pytest.raises(BadInput, match="states/c/0/0: a chunk of states does not inflate"):
        open_task(task).slice("states", 0, 0, 20)
    with pytest.raises(BadInput, match=r"packed array cannot be read|is not what its index says"):
        unpack_task(task, tmp_path / "back")
    assert not (tmp_path / "back/metaworld/task" / INDEX).exists()
