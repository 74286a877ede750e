from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from lram.datasets.index import (
    INDEX,
    find_tasks,
    fingerprint,
    read_index,
    rebuild,
    splits,
    task_folder,
    validation_rank,
    write_description,
    write_index,
)
from lram.datasets.shards import shard_task
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter


@pytest.mark.parametrize("domain", ["darkroom", "dmcontrol", "procgen", "composuite"])
def test_rebuilding_gives_the_writers_index(write, tmp_path, domain):
    folder = write(tmp_path, domain, count=5)
    written = (folder / INDEX).read_bytes()
    rebuild(folder)
    assert (folder / INDEX).read_bytes() == written


def test_a_lost_index_is_made_from_the_files(write, tmp_path):
    folder = write(tmp_path)
    before = read_index(folder)
    (folder / INDEX).unlink()
    after = rebuild(folder)
    assert after.table.equals(before.table)
    assert after.meta == before.meta | {"complete": False, "provenance": {}}


def test_validation_never_moves_and_is_never_empty():
    few, many = splits("darkroom", "x", list(range(30))), splits("darkroom", "x", list(range(4000)))
    chosen = {i for i, split in enumerate(many) if split == "validation"}
    assert 0.015 < len(chosen) / 4000 < 0.035
    assert {i for i, split in enumerate(few) if split == "validation"} == {i for i in chosen if i < 30} or few.count(
        "validation"
    ) == 1
    for count in range(2, 60):
        assert "validation" in splits("darkroom", "y", list(range(count)))
    assert splits("darkroom", "y", [0]) == ["train"] or validation_rank("darkroom", "y", 0) < 0.025


def test_indices_that_lie_are_refused(write, tmp_path):
    folder = write(tmp_path)
    index = read_index(folder)
    paths = index.table["path"].to_pylist()
    for bad in ("../../secret.hdf5", "/etc/passwd", "000/../000000001.hdf5"):
        column = pa.array([bad, *paths[1:]])
        at = index.table.schema.get_field_index("path")
        write_index(folder, index.table.set_column(at, "path", column))
        with pytest.raises(BadInput, match=r"column path holds"):
            read_index(folder)
    write_index(folder, index.table.drop_columns("sha256"))
    with pytest.raises(BadInput, match="columns are"):
        read_index(folder)
    (folder / INDEX).write_bytes(b"PAR1 but not really")
    with pytest.raises(BadInput, match="not a readable index"):
        read_index(folder)
    (folder / INDEX).unlink()
    with pytest.raises(BadInput, match="no index, rebuild it with `lram index`"):
        read_index(folder)


def test_an_index_of_another_task_is_refused(write, tmp_path):
    one, two = write(tmp_path, task="one"), write(tmp_path, task="two")
    (one / INDEX).write_bytes((two / INDEX).read_bytes())
    with pytest.raises(BadInput, match="names the task 'darkroom/two'"):
        read_index(one)


def test_unsafe_names_and_missing_roots_are_refused(tmp_path):
    for name in ("..", ".hidden", "a/b", "", "a b"):
        with pytest.raises(BadInput, match="may hold letters"):
            task_folder(tmp_path, "darkroom", name)
    with pytest.raises(BadInput, match="unknown domain"):
        task_folder(tmp_path, "..", "x")
    with pytest.raises(BadInput, match="no such dataset directory"):
        find_tasks(tmp_path / "missing")
    with pytest.raises(BadInput, match="no tasks found"):
        find_tasks(tmp_path)


def test_fingerprint_follows_the_data(write, make, tmp_path):
    folders = [write(tmp_path / "a"), write(tmp_path / "b")]
    assert fingerprint(folders[:1]) == fingerprint(folders[1:])
    with TaskWriter(tmp_path / "b", "darkroom", "task", {"maker": "test"}) as writer:
        writer.add(make(episode=12))
    assert fingerprint(folders[:1]) != fingerprint(folders[1:])


def test_fingerprint_is_that_of_the_content(write, tmp_path):
    folder = write(tmp_path / "a")
    shard_task(folder, tmp_path / "shards", 20_000)
    shards = tmp_path / "shards" / "darkroom" / "task"
    assert read_index(shards).table.column_names != read_index(folder).table.column_names
    assert fingerprint([shards]) == fingerprint([folder])
    assert fingerprint([write(tmp_path / "b", task="other")]) != fingerprint([folder])
    assert fingerprint([write(tmp_path / "c", length=19)]) != fingerprint([folder])


def test_the_description_counts_and_names_reference_scores(write, tmp_path):
    write(tmp_path, "procgen", "bigfish", count=3)
    write(tmp_path, count=2)
    described = json.loads(write_description(tmp_path).read_text())["tasks"]
    assert described["darkroom/task"]["reference"] is None
    assert described["procgen/bigfish"]["reference"]["reference"] == "dataset-min/dataset-mean"
    assert described["procgen/bigfish"]["trajectories"] == 3
    sizes = sum(path.stat().st_size for path in tmp_path.glob("procgen/*/*/*.hdf5"))
    assert described["procgen/bigfish"]["bytes"] == sizes
    lengths = read_index(tmp_path / "procgen" / "bigfish").numpy("length")
    assert described["procgen/bigfish"]["transitions"] == np.sum(lengths)
