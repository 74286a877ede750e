from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import h5py
import pytest

from lram.converters import composuite
from lram.converters import run as convert_run
from lram.converters.composuite import Options
from lram.converters.run import convert_job
from lram.converters.source import Count
from lram.datasets.check import check_task
from lram.datasets.index import read_index
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter

DATA = Path(__file__).parent / "data" / "composuite"


@pytest.fixture
def src(tmp_path) -> Path:
    """Two episodes of one task."""
    return Path(shutil.copytree(DATA / "medium", tmp_path / "src" / "medium")).parent


def run(src: Path, root: Path, **options):
    chosen = Options(**options)
    (job,) = composuite.jobs(src, chosen)
    return convert_job("composuite", job, chosen, root)


def test_provenance_tells_files_version_and_options(src, tmp_path):
    result = run(src, tmp_path / "data")
    assert (result.episodes, result.transitions, result.skipped) == (2, 1000, False)
    meta = read_index(tmp_path / "data" / result.name).meta
    path = src / "medium" / "IIWA_Box_None_PickPlace" / "data.hdf5"
    said = meta["provenance"]
    assert said["files"] == [
        {
            "path": "medium/IIWA_Box_None_PickPlace/data.hdf5",
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
    ]
    assert (said["converter"], said["version"], said["options"]["episodes"]) == ("composuite", 1, 2000)
    assert meta["account"]["read"] == meta["account"]["written"] == 1000 and meta["complete"]
    assert str(tmp_path) not in json.dumps(meta)


def test_a_finished_task_is_not_made_again(src, tmp_path):
    run(src, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")}
    again = run(src, tmp_path / "data")
    assert again.skipped and (again.episodes, again.transitions) == (2, 1000)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*.*")} == before
    # What selects tasks is no reason to make them again.
    assert run(src, tmp_path / "data", tasks=("IIWA_Box_None_PickPlace",)).skipped


def test_a_changed_source_option_or_version_makes_the_task_anew(src, tmp_path, monkeypatch):
    root = tmp_path / "data"
    run(src, root)
    shorter = run(src, root, episodes=1)
    assert (shorter.anew, shorter.skipped, shorter.episodes) == ("options.episodes", False, 1)
    assert len(list(root.rglob("*.hdf5"))) == 1 and read_index(root / shorter.name).table.num_rows == 1
    # A file of the same size, with other bytes.
    path = src / "medium" / "IIWA_Box_None_PickPlace" / "data.hdf5"
    with h5py.File(path, "a") as file:
        file["rewards"][3] = 0.25
    run(src, root, episodes=1)
    changed = run(src, root)
    assert changed.anew == "options.episodes" and run(src, root).skipped
    with h5py.File(path, "a") as file:
        file["rewards"][3] = 0.5
    assert run(src, root).anew == "files"
    monkeypatch.setattr(composuite, "VERSION", 2)
    again = run(src, root)
    assert again.anew == "version" and run(src, root).skipped
    run(src, tmp_path / "fresh")
    for path in (tmp_path / "fresh").rglob("*"):
        if path.is_file():
            assert (root / path.relative_to(tmp_path / "fresh")).read_bytes() == path.read_bytes()
    assert {path.name for path in (root / "composuite").iterdir()} == {"IIWA_Box_None_PickPlace.medium"}


def test_a_source_is_hashed_again_only_when_it_was_touched(src, tmp_path, monkeypatch):
    run(src, tmp_path / "data")
    hashed = []
    sha256 = convert_run.sha256_of
    monkeypatch.setattr(convert_run, "sha256_of", lambda path: hashed.append(path) or sha256(path))
    assert run(src, tmp_path / "data").skipped and not hashed
    path = src / "medium" / "IIWA_Box_None_PickPlace" / "data.hdf5"
    os.utime(path)
    assert run(src, tmp_path / "data").skipped and hashed == [path]
    hashed.clear()
    for record in (tmp_path / "data").rglob(".sources.json"):
        record.write_text("{")
    assert run(src, tmp_path / "data").skipped and hashed == [path]


def test_a_source_that_cannot_be_read_and_another_makers_task_lose_nothing(src, tmp_path):
    run(src, tmp_path / "data")
    (kept,) = {path.parent for path in (tmp_path / "data").rglob("index.parquet")}
    path = src / "medium" / "IIWA_Box_None_PickPlace" / "data.hdf5"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BadInput):
        run(src, tmp_path / "data")
    assert read_index(kept).table.num_rows == 2 and not check_task(kept).findings
    with TaskWriter(tmp_path / "mine", "composuite", kept.name, {"collector": "mine"}) as writer:
        writer.finish()
    with pytest.raises(BadInput, match="was made with collector = 'mine'"):
        run(src, tmp_path / "mine")


def test_an_interrupted_task_goes_on_with_what_is_there(src, tmp_path, monkeypatch):
    run(src, tmp_path / "whole")
    made = composuite.trajectories

    def cut(job, options, count):
        yield next(made(job, options, count))
        raise KeyboardInterrupt

    monkeypatch.setattr(composuite, "trajectories", cut)
    with pytest.raises(KeyboardInterrupt):
        run(src, tmp_path / "data")
    (first,) = (tmp_path / "data").rglob("*.hdf5")
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(composuite, "trajectories", made)
    assert not run(src, tmp_path / "data").skipped
    assert first.stat().st_mtime_ns == before
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.is_file():
            assert (tmp_path / "data" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


def test_a_source_without_a_trajectory_makes_no_task(src, tmp_path, monkeypatch):
    monkeypatch.setattr(composuite, "trajectories", lambda job, options, count: iter(()))
    assert run(src, tmp_path / "data").episodes == 0
    assert not (tmp_path / "data").exists()


def test_rows_that_are_not_accounted_for_stop_the_job(src, tmp_path, monkeypatch):
    made = composuite.trajectories

    def forgetful(job, options, count):
        yield from made(job, options, count)
        count.read += 1

    monkeypatch.setattr(composuite, "trajectories", forgetful)
    with pytest.raises(AssertionError, match="rows do not add up"):
        run(src, tmp_path / "data")
    assert not read_index(tmp_path / "data" / "composuite" / "IIWA_Box_None_PickPlace.medium").meta["complete"]


def test_an_account_adds_up():
    count = Count(read=10)
    count.wrote(6)
    count.drop("padding", 3)
    count.drop("padding", 1)
    count.drop("nothing", 0)
    count.change("clipped", 2)
    count.check()
    assert count.dropped == {"padding": 4} and count.changed == {"clipped": 2} and count.episodes == 1
    count.drop("late", 1)
    with pytest.raises(AssertionError, match="do not add up"):
        count.check()
