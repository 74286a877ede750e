from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from lram.datasets.index import INDEX, SHARD_SCHEMA, read_index, write_index
from lram.datasets.reader import open_task
from lram.datasets.shards import damaged, shard_task, unpack_shards, write_shard
from lram.datasets.specs import BadInput


def hashes(root: Path) -> dict[str, bytes]:
    return {p.name: hashlib.sha256(p.read_bytes()).digest() for p in root.glob("**/*") if p.is_file()}


def test_shards_hold_the_unchanged_files(write, tmp_path):
    folder = write(tmp_path / "files", "metaworld", count=12)
    target = shard_task(folder, tmp_path / "shards", 60_000)
    index = read_index(target)
    assert index.table.schema.equals(SHARD_SCHEMA, check_metadata=False)
    assert index.table.drop_columns(["shard", "member_offset"]).equals(read_index(folder).table)
    names = sorted(path.name for path in target.glob("*.tar"))
    assert len(names) > 2 and names == [f"shard-{number:05d}.tar" for number in range(len(names))]
    seen = []
    for name in names:
        data = (target / name).read_bytes()
        with tarfile.open(target / name, "r:") as tar:
            assert sum(member.size for member in tar) <= 60_000
            for member in tar:
                row = index.table.filter(pa.compute.equal(index.table["path"], member.name)).to_pylist()[0]
                assert (row["shard"], row["member_offset"]) == (name, member.offset_data)
                content = tar.extractfile(member).read()
                assert content == (folder / member.name).read_bytes()
                assert content == data[row["member_offset"] : row["member_offset"] + row["size"]]
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
                seen.append(member.name)
    assert seen == index.table["path"].to_pylist()


def test_the_same_files_give_the_same_shards(write, tmp_path):
    folder = write(tmp_path / "files", "procgen", count=5)
    shard_task(folder, tmp_path / "a", 10**6)
    for path in folder.glob("*/*.hdf5"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    shard_task(folder, tmp_path / "b", 10**6)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") != {}


def test_a_file_larger_than_a_shard_has_one_of_its_own(write, tmp_path):
    folder = write(tmp_path / "files", "metaworld", count=3)
    target = shard_task(folder, tmp_path / "shards", 1)
    assert read_index(target).table["shard"].to_pylist() == [f"shard-{number:05d}.tar" for number in range(3)]
    assert open_task(target).slice("states", 2, 0, 20).shape == (20, 39)


def test_a_shard_that_is_cut_or_missing_is_named(write, tmp_path):
    folder = write(tmp_path / "files", "metaworld", count=12)
    target = shard_task(folder, tmp_path / "shards", 60_000)
    reader = open_task(target)
    shards = read_index(target).table["shard"].to_pylist()
    os.truncate(target / shards[-1], 700)
    (target / shards[0]).unlink()
    with pytest.raises(BadInput, match=r"shard-00000.tar: No such file or directory, but the index names it"):
        reader.slice("rewards", 0, 0, 5)
    with pytest.raises(BadInput, match=rf"{shards[-1]}: shorter than its index says"):
        reader.slice("rewards", 11, 0, 5)
    between = next(row for row, shard in enumerate(shards) if shard not in (shards[0], shards[-1]))
    assert reader.slice("rewards", between, 0, 5).shape == (5,)


def test_what_cannot_be_sharded_is_refused(write, tmp_path):
    folder = write(tmp_path / "files", "metaworld", count=3)
    target = shard_task(folder, tmp_path / "shards", 10**6)
    with pytest.raises(BadInput, match="is stored in shards already"):
        shard_task(target, tmp_path / "again", 10**6)
    (folder / "000/000000001.hdf5").unlink()
    with pytest.raises(BadInput, match=r"000000001.hdf5: missing, but the index names it"):
        shard_task(folder, tmp_path / "other", 10**6)
    assert not list((tmp_path / "other").glob("**/shard-*.tar"))


def test_a_shard_outside_its_folder_is_refused(write, tmp_path):
    folder = shard_task(write(tmp_path / "files", "metaworld", count=2), tmp_path / "shards", 10**6)
    table = read_index(folder).table
    at = table.schema.get_field_index("shard")
    for bad in ("../shard-00000.tar", "/etc/passwd", "shard-0.tar", None):
        write_index(folder, table.set_column(at, "shard", pa.array(["shard-00000.tar", bad])))
        with pytest.raises(BadInput, match=r"column shard holds .*, expected shard-NNNNN.tar"):
            open_task(folder)
    assert (folder / INDEX).is_file()


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    with pytest.raises(FileNotFoundError):
        write_shard(tmp_path / "shard-00000.tar", [("a", tmp_path / "a"), ("b", tmp_path / "b")])
    assert not (tmp_path / "shard-00000.tar").exists()
    digest = write_shard(tmp_path / "shard-00000.tar", [("a", tmp_path / "a"), ("c", tmp_path / "a")])
    assert digest == hashlib.sha256((tmp_path / "shard-00000.tar").read_bytes()).hexdigest()


def test_shards_go_back_to_the_files_they_were_made_of(write, tmp_path):
    folder = write(tmp_path / "files", "metaworld", count=12)
    target = shard_task(folder, tmp_path / "shards", 60_000)
    assert unpack_shards(target, tmp_path / "back") == 12
    back = tmp_path / "back" / "metaworld" / "task"
    for path in folder.rglob("*.*"):
        if path.name != ".lock":
            assert (back / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_a_flipped_byte_is_found_and_named(write, tmp_path):
    target = shard_task(write(tmp_path / "files", "metaworld", count=12), tmp_path / "shards", 60_000)
    assert list(damaged(target)) == []
    path = target / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    ((found, sentence),) = damaged(target)
    assert found == path and "shard-00001.tar: damaged or cut" in sentence
    with pytest.raises(BadInput, match=r"shard-00001.tar: member 000/\d+.hdf5 has other bytes than the index says"):
        unpack_shards(target, tmp_path / "back")
    path.unlink()
    ((_, sentence),) = damaged(target)
    assert "shard-00001.tar: missing" in sentence
