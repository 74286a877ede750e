from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lram.datasets import writer as writer_module
from lram.datasets.check import check_task
from lram.datasets.index import find_tasks, read_index
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter, finished


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_files_are_at_most_a_thousand_a_folder(write, tmp_path):
    folder = write(tmp_path, count=1001, length=1)
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["000", "001"]
    assert len(list((folder / "000").iterdir())) == 1000
    assert finished(tmp_path, "darkroom", "task") == {"maker": "test"}
    assert not list(folder.glob("index-part-*"))


def test_unfinished_tasks_are_not_finished_and_go_on(make, write, tmp_path):
    with TaskWriter(tmp_path / "a", "darkroom", "task", {"maker": "test"}) as task:
        task.add(make(episode=0))
    assert finished(tmp_path / "a", "darkroom", "task") is None
    assert finished(tmp_path / "a", "darkroom", "other") is None
    with TaskWriter(tmp_path / "a", "darkroom", "task", {"maker": "test"}) as task:
        assert task.next_episode == 1
        for episode in range(1, 12):
            task.add(make(episode=episode))
        task.finish()
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_another_provenance_is_refused(write, tmp_path):
    write(tmp_path)
    with pytest.raises(BadInput, match="was made with maker = 'test', not 'me'"):
        TaskWriter(tmp_path, "darkroom", "task", {"maker": "me"})


def test_two_writers_of_one_task_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "LOCK_SECONDS", 0.1)
    with (
        TaskWriter(tmp_path, "darkroom", "task", {}),
        pytest.raises(BadInput, match="another process is writing this task"),
    ):
        TaskWriter(tmp_path, "darkroom", "task", {})
    TaskWriter(tmp_path, "darkroom", "task", {}).close()


def test_foreign_trajectories_are_refused(make, tmp_path):
    with TaskWriter(tmp_path, "metaworld", "task", {}) as task:
        task.add(make("metaworld", 0))
        with pytest.raises(BadInput, match="metaworld/other is not its own"):
            task.add(make("metaworld", 1, task="other"))
        narrow = make("metaworld", 1)
        narrow.actions = narrow.actions[:, :3].copy()
        with pytest.raises(BadInput, match=r"action_shape \[3\], expected \[4\]"):
            task.add(narrow)
        assert len(task) == 1


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.hdf5*"))


def test_adding_does_not_wait_for_the_disk_and_syncing_does(make, tmp_path, monkeypatch):
    disk, fsync = threading.Event(), os.fsync
    with TaskWriter(tmp_path, "darkroom", "task", {"maker": "test"}) as task:
        monkeypatch.setattr(os, "fsync", lambda number: disk.wait(60) and fsync(number))
        for episode in range(writer_module.BEHIND):
            task.add(make(episode=episode))
        assert len(task) == task.next_episode == writer_module.BEHIND and 3 in task
        assert names(tmp_path) == [f".{episode:09d}.hdf5.tmp" for episode in range(writer_module.BEHIND)]
        threading.Timer(0.1, disk.set).start()
        task.add(make(episode=writer_module.BEHIND))  # one too many: it waits for the first
        assert disk.is_set() and (tmp_path / "darkroom/task/000/000000000.hdf5").exists()
        task.sync()
        disk.clear()
        task.add(make(episode=5, length=6))
        threading.Timer(0.1, disk.set).start()
        task.add(make(episode=5, length=7))  # replaces one that has no name yet: it waits, too
        task.sync()
        assert names(tmp_path) == [f"{episode:09d}.hdf5" for episode in range(writer_module.BEHIND + 1)]
        task.flush()
        task.finish()
    folder = tmp_path / "darkroom" / "task"
    assert read_index(folder).numpy("length").tolist() == [20] * 5 + [7] + [20] * (writer_module.BEHIND - 5)
    assert check_task(folder).findings == []


def test_after_a_file_that_the_disk_fails_none_appears(make, tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def failing(number: int) -> None:
        calls.append(number)
        if len(calls) == 4:
            raise OSError(errno.EIO, "the disk failed")
        fsync(number)

    task = TaskWriter(tmp_path, "darkroom", "task", {})
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="the disk failed"):
        for episode in range(10):
            task.add(make(episode=episode))
        task.sync()
    for call in (task.sync, task.flush, task.finish, lambda: task.add(make(episode=11)), task.close):
        with pytest.raises(OSError, match="the disk failed"):
            call()
    assert [name for name in names(tmp_path) if name[0] != "."] == [f"{episode:09d}.hdf5" for episode in range(3)]
    assert read_index(tmp_path / "darkroom" / "task").numpy("episode").tolist() == [0, 1, 2]
    assert finished(tmp_path, "darkroom", "task") is None
    with TaskWriter(tmp_path, "darkroom", "task", {}) as task:
        assert (task.next_episode, task.adopted) == (3, 0) and names(tmp_path)[0][0] != "."
        task.add(make(episode=3))


# Forks writers of four tasks and kills each at a random moment, until `kills` have died of it; then lets them
# finish. One process imports for all, and each is killed after it has opened its task, so that the moments fall
# into the writing.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter

root, wanted = Path(sys.argv[1]), int(sys.argv[2])
names = ["one", "two", "three", "four"]

def write(name):
    with TaskWriter(root, "darkroom", name, {"maker": "killed"}) as writer:
        os.write(opened[1], b".")
        for episode in range(writer.next_episode, 1000):
            rng = np.random.default_rng(episode)
            states, rewards = rng.random((30, 2), np.float32), rng.random(30, np.float32)
            actions = rng.integers(0, 5, 30)
            writer.add(Trajectory("darkroom", name, episode, 0, states, actions, rewards, False, True, "s"))
            if episode % 20 == 0:
                writer.flush()
        writer.finish()

def start(name):
    child = os.fork()
    if not child:
        status = 1
        try:
            write(name)
            status = 0
        finally:
            os._exit(status)
    return child

rng, opened = random.Random(0), os.pipe()
kills = temporaries = 0
while kills < wanted:
    running = [start(name) for name in names]
    for _ in running:
        os.read(opened[0], 1)
    for child in rng.sample(running, 4):
        time.sleep(rng.uniform(0, 0.004))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    temporaries += len(list(root.rglob(".*.tmp")))
    if len(list(root.rglob("*.hdf5"))) == 4000:
        break
whole = [os.waitpid(child, 0)[1] for child in [start(name) for name in names]]
print(json.dumps({"kills": kills, "temporaries": temporaries, "status": whole}))
"""


def test_killed_writers_lose_nothing(tmp_path, capsys):
    def run(name: str, kills: int) -> dict:
        command = [sys.executable, "-c", KILLER, str(tmp_path / name), str(kills)]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=240).stdout)

    assert run("whole", 0)["status"] == [0] * 4
    killed = run("killed", 50)
    assert killed["status"] == [0] * 4
    assert killed["kills"] >= 50
    with capsys.disabled():
        print(f"\n{killed['kills']} writers killed, {killed['temporaries']} of them within a file")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    for folder in find_tasks(tmp_path / "killed"):
        assert read_index(folder).meta["complete"]
        result = check_task(folder)
        assert (result.trajectories, result.findings) == (1000, [])
