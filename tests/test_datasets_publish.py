from __future__ import annotations

import subprocess
import sys

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError

from lram.datasets.bench_data import write_synthetic_index
from lram.datasets.index import read_index
from lram.datasets.publish import FILES_PER_COMMIT, Plan, TaskPlan, patiently, plan_dataset, plan_task
from lram.datasets.shards import shard_task
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter


def test_a_new_task_is_sent_whole_and_a_published_one_not_at_all(write, tmp_path):
    folder = write(tmp_path / "data", "metaworld", count=12)
    new = plan_task(read_index(folder), None, 20_000)
    assert new.changed and len(new.send) > 3 and not new.keep and new.files == len(new.send) + 1
    there = shard_task(folder, tmp_path / "out", 20_000)
    for name, size in new.send.items():
        assert (there / name).stat().st_size == size
    again = plan_task(read_index(folder), read_index(there), 20_000)
    assert not again.changed and not again.send and again.keep.keys() == new.send.keys()


def test_what_is_added_at_the_end_changes_the_last_shard(write, make, tmp_path):
    folder = write(tmp_path / "data", "metaworld", count=12)
    there = shard_task(folder, tmp_path / "out", 20_000)
    before = {path.name: path.read_bytes() for path in there.glob("*.tar")}
    with TaskWriter(tmp_path / "data", "metaworld", "task", {"maker": "test"}) as writer:
        writer.add(make("metaworld", 12))
        writer.finish()
    plan = plan_task(read_index(folder), read_index(there), 20_000)
    assert plan.changed and set(plan.send) <= {max(before), f"shard-{len(before):05d}.tar"}
    assert plan.keep.keys() == before.keys() - plan.send.keys() and not plan.drop
    shard_task(folder, tmp_path / "out", 20_000)
    for name in plan.keep:
        assert (there / name).read_bytes() == before[name]


def test_shards_that_are_no_more_are_dropped(write, tmp_path):
    old = shard_task(write(tmp_path / "a", "metaworld", count=12), tmp_path / "out", 20_000)
    plan = plan_task(read_index(write(tmp_path / "b", "metaworld", count=3)), read_index(old), 20_000)
    names = sorted(path.name for path in old.glob("*.tar"))
    assert plan.drop == names[len(plan.send) + len(plan.keep) :] != []
    shard_task(tmp_path / "b" / "metaworld" / "task", tmp_path / "out", 20_000)
    assert sorted(path.name for path in old.glob("*.tar")) == [name for name in names if name not in plan.drop]


def test_a_change_of_the_index_alone_sends_the_index_alone(write, tmp_path):
    folder = write(tmp_path / "data", count=5)
    there = shard_task(folder, tmp_path / "out")
    with TaskWriter(tmp_path / "data", "darkroom", "task", {"maker": "test"}) as writer:
        writer.finish({"dropped": {"late news": 1}})
    plan = plan_task(read_index(folder), read_index(there))
    assert plan.changed and not plan.send and len(plan.keep) == 1


def task(name: str, shards: int, size: int = 1) -> TaskPlan:
    return TaskPlan(f"atari/{name}", {f"shard-{n:05d}.tar": size for n in range(shards)}, {}, [], True, 1, 1)


def test_commits_hold_a_hundred_files_or_fifty_gigabytes():
    plan = Plan([task(f"t{n}", 9) for n in range(25)])
    assert [len(group) for group in plan.commits] == [10, 10, 5]
    assert all(sum(part.files for part in group) <= FILES_PER_COMMIT for group in plan.commits)
    assert [len(group) for group in Plan([task(f"t{n}", 1, 30 * 2**30) for n in range(3)]).commits] == [1, 1, 1]
    assert Plan([TaskPlan("atari/same", {}, {"shard-00000.tar": ""}, [], False, 1, 1)]).commits == []


def test_too_many_files_are_refused():
    with pytest.raises(BadInput, match=r"atari/many: 1201 files in a folder, at most 1000"):
        Plan([task("many", 1200)]).check()
    with pytest.raises(BadInput, match="2012 files in the repository, at most 2000"):
        Plan([task(f"t{n}", 200) for n in range(10)]).check()


def test_an_empty_task_and_shards_are_refused(write, tmp_path):
    folder = write(tmp_path / "data", count=2)
    with pytest.raises(BadInput, match="is stored in shards already"):
        plan_dataset(shard_task(folder, tmp_path / "out").parents[1])
    with TaskWriter(tmp_path / "none", "darkroom", "task", {}) as writer:
        writer.finish()
    with pytest.raises(BadInput, match="holds no trajectory"):
        plan_dataset(tmp_path / "none")


def refusal(status: int, **headers: str) -> HfHubHTTPError:
    response = httpx2.Response(status, headers=headers, request=httpx2.Request("GET", "http://hub"))
    return HfHubHTTPError(f"status {status}", response=response)


def test_later_is_waited_for_as_long_as_the_hub_says():
    answers, slept = iter([refusal(429, **{"Retry-After": "7"}), refusal(503), "done"]), []

    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert patiently(ask, slept.append) == "done"
    assert slept == [7.0, 2.0]


def test_no_is_no():
    def ask() -> None:
        raise refusal(403)

    with pytest.raises(BadInput, match="the Hub refuses: status 403"):
        patiently(ask, lambda seconds: pytest.fail("waited"))


PLAN = """
import resource, sys
from pathlib import Path
from lram.datasets.publish import plan_dataset
plan = plan_dataset(Path(sys.argv[1]))
print(plan.files, len(plan.tasks), len(plan.commits), max(task.files for task in plan.tasks))
print(sum(task.trajectories for task in plan.tasks), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def test_a_synthetic_dataset_of_432_tasks_is_planned(tmp_path):
    write_synthetic_index(tmp_path, 50_000)
    done = subprocess.run([sys.executable, "-c", PLAN, str(tmp_path)], capture_output=True, text=True, check=True)
    files, tasks, commits, most, trajectories, gigabytes = map(float, done.stdout.split())
    assert tasks == 432 and files <= 2000 and most <= 1000 and commits < 128
    assert trajectories == pytest.approx(50_000, rel=0.01)
    assert gigabytes < 4
