from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lram.datasets.ahead import SLOTS, batches_ahead
from lram.datasets.specs import BadInput
from lram.datasets.windows import Batch, Windows, WindowSettings


@pytest.fixture
def root(write, tmp_path) -> Path:
    for domain in ("metaworld", "procgen"):
        write(tmp_path, domain, count=6, length=30)
    return tmp_path


def copied(batches: list[Batch]) -> list[dict[str, object]]:
    return [
        {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in vars(batch).items()}
        for batch in batches
    ]


def assert_equal(one: list[dict[str, object]], two: list[dict[str, object]]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two):
        for name, value in left.items():
            assert np.array_equal(value, right[name]) if isinstance(value, np.ndarray) else value == right[name], name


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_gives_the_batches_of_the_updates_in_order(root, workers):
    windows = Windows.open(root, WindowSettings(context=20))
    expected = {u: copied(list(windows.batches(u, "train", 8, 5, (1, 2)))) for u in range(3, 14)}
    updates = []
    for update, batches in batches_ahead(windows, range(3, 14), "train", 8, 5, part=(1, 2), workers=workers):
        updates.append(update)
        assert_equal(copied(batches), expected[update])
    assert updates == list(range(3, 14))
    assert not multiprocessing.active_children()


def test_a_run_continues_at_any_update(root):
    windows = Windows.open(root, WindowSettings())
    whole = {update: copied(batches) for update, batches in batches_ahead(windows, range(9), "train", 4, 0)}
    for update, batches in batches_ahead(windows, range(6, 9), "train", 4, 0):
        assert_equal(copied(batches), whole[update])


def test_no_update_and_one_update_need_no_worker(root):
    windows = Windows.open(root, WindowSettings())
    assert list(batches_ahead(windows, range(4, 4), "train", 4, 0)) == []
    assert [update for update, _ in batches_ahead(windows, [4], "train", 4, 0)] == [4]


def test_batches_stay_as_they_are_until_the_next_is_asked_for(root):
    windows = Windows.open(root, WindowSettings())
    for _, batches in batches_ahead(windows, range(8), "train", 4, 0, workers=1):
        before = copied(batches)
        time.sleep(0.05)  # the worker has filled what it may by now
        assert_equal(copied(batches), before)
    assert SLOTS >= 2  # with one, nothing would be read ahead


def test_leaving_early_ends_the_workers(root):
    windows = Windows.open(root, WindowSettings())
    reading = batches_ahead(windows, range(1000), "train", 4, 0, workers=2)
    next(reading)
    assert len(multiprocessing.active_children()) == 2
    reading.close()
    assert not multiprocessing.active_children()


def test_what_a_worker_cannot_read_is_said_here(root):
    windows = Windows.open(root, WindowSettings())
    reading = batches_ahead(windows, range(1000), "train", 4, 0, workers=2)
    next(reading)
    for path in root.glob("metaworld/task/*/*.hdf5"):
        os.truncate(path, 100)
    with pytest.raises(BadInput, match=r"\.hdf5: shorter than its index says, run `lram check`"):
        list(reading)
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_said(root):
    windows = Windows.open(root, WindowSettings())
    reading = batches_ahead(windows, range(1000), "train", 4, 0, workers=2)
    next(reading)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a process that reads windows was killed before update"):
        list(reading)


def test_workers_end_with_a_reader_that_is_killed(root):
    code = f"""
import multiprocessing, time
from pathlib import Path
from lram.datasets.ahead import batches_ahead
from lram.datasets.windows import Windows, WindowSettings
reading = batches_ahead(Windows.open(Path({str(root)!r}), WindowSettings()), range(1000), "train", 4, 0, workers=2)
next(reading)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
