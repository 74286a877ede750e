"""What goes wrong on a machine: a disk that fills up, a worker that dies; what flows say of it, and what is left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lram.collectors.specialists import DarkRoomSettings, tasks_of, train_goal
from lram.datasets.index import find_tasks, read_index
from lram.datasets.trajectory import read
from lram.train import checkpoint

DATA = Path(__file__).parent / "data"


def content(root: Path) -> dict[str, bytes]:
    """Returns every file of a dataset but its locks, and dataset.json, which names all tasks of a run."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (".lock", "dataset.json")
    }


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, of 512 KB; `disk(size)` makes it another size."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> subprocess.CompletedProcess:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = mount("size=512k")
    if done.returncode:
        pytest.skip(f"this machine mounts no small disk: {done.stderr.strip()}")
    yield lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", "-l", str(place)], check=True)


def full(done: subprocess.CompletedProcess, disk: Path) -> None:
    """Asserts that a command ended with the one sentence about a full disk, and that what it left is whole."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"no room left on the disk mounted at {disk}; make room there and run the same again" in said
    left = [path for path in disk.rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix == ".tmp"]
    for path in left:
        if path.suffix == ".hdf5":
            read(path)
    for index in disk.rglob("index*.parquet"):
        read_index(index.parent, index.name)


def test_a_conversion_meets_a_full_disk_and_goes_on_when_there_is_room(lram, disk, tmp_path):
    place, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    command = ("convert", "composuite", DATA / "composuite")
    full(lram(*command, place / "data"), place)
    disk("64m")
    for root in (place / "data", elsewhere):
        done = lram(*command, root)
        assert done.returncode == 0, done.stdout + done.stderr
    assert content(place / "data") == content(elsewhere)
    disk("1500k")
    # The shards are a second copy, for which there is no room; nothing is announced, and no shard is cut.
    full(lram("publish", place / "data", "--to", place / "published"), place)
    assert not list(place.rglob("*.tar.*"))


def test_a_collection_meets_a_full_disk_and_goes_on_when_there_is_room(lram, disk, tmp_path):
    place, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    settings = DarkRoomSettings(size=3, horizon=6, steps=1200)
    small = ("--size", 3, "--horizon", 6, "--steps", 1200, "--goals", "training", "--at-most", 3, "--workers", 1)
    full(lram("collect", "darkroom", place / "data", *small), place)
    disk("64m")
    done = lram("collect", "darkroom", place / "data", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(find_tasks(place / "data")) >= 3
    for folder in find_tasks(place / "data"):
        assert folder.name in tasks_of(settings, "training")
        train_goal(settings, folder.name, elsewhere)
    assert content(place / "data") == content(elsewhere)


def test_a_training_meets_a_full_disk_and_goes_on_when_there_is_room(lram, disk, rooms, tmp_path):
    place, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    dials = ("--size", "tiny", "--per-domain", 4, "--gap", 10, "--updates", 4, "--save-every", 2, "--readers", 0)
    command = ("train", rooms, *dials, "--out")
    disk("2m")  # room for the weights, and not for the optimizer's moments
    full(lram(*command, place / "run"), place)
    assert not list(place.rglob("*update-*"))
    disk("64m")
    for out in (place / "run", elsewhere):
        done = lram(*command, out)
        assert done.returncode == 0, done.stdout + done.stderr
    weights = [checkpoint.find(out) / checkpoint.WEIGHTS for out in (place / "run", elsewhere)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
