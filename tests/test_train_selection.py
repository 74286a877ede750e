from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lram.collectors import darkroom
from lram.datasets.specs import DOMAINS, BadInput, tasks
from lram.datasets.writer import TaskWriter
from lram.train.selection import choose, is_holdout, read_mix, share_out


def test_holdout_tasks_are_those_of_the_table_and_their_variants():
    split = {key: is_holdout(*key) for key in tasks()}
    assert sum(split.values()) == 37 and len(split) == 469
    assert split["atari", "pong"] and not split["atari", "breakout"]
    assert is_holdout("procgen", "ninja.rgb") and not is_holdout("procgen", "bigfish.rgb")
    assert is_holdout("composuite", "Panda_Box_ObjectWall_Push.medium")
    assert not is_holdout("metaworld", "a-task-nobody-listed")


@pytest.mark.parametrize("keydoor", [False, True])
def test_holdout_goals_of_darkroom_are_those_of_the_collector(keydoor):
    training, holdout = darkroom.rooms(10, keydoor, sparse=True, horizon=50)
    assert [sum(is_holdout("darkroom", darkroom.task_name(room)) for room in part) for part in (training, holdout)] == [
        0,
        20,
    ]
    assert is_holdout("darkroom", darkroom.task_name(holdout[0]) + ".variant")
    assert not is_holdout("darkroom", "task")


@pytest.fixture
def root(write, tmp_path):
    for name in (
        "dmcontrol/walker-run",
        "dmcontrol/walker-walk",
        "procgen/bigfish",
        "procgen/ninja",
        "procgen/ninja.b",
    ):
        write(tmp_path, *name.split("/"), count=1)
    return tmp_path


def names(chosen) -> tuple[list[str], int]:
    folders, left_out = chosen
    return [f"{folder.parent.name}/{folder.name}" for folder in folders], sum(left_out.values())


def test_tasks_are_chosen_by_pattern_and_split(root):
    assert names(choose(root)) == (["dmcontrol/walker-run", "procgen/bigfish"], 3)
    assert names(choose(root, holdout=True)) == (["dmcontrol/walker-walk", "procgen/ninja", "procgen/ninja.b"], 2)
    assert names(choose(root, ["procgen/*"])) == (["procgen/bigfish"], 2)
    assert names(choose(root, ["procgen/ninja*", "*/walker-*"], holdout=True))[1] == 1
    assert names(choose(root, mix={"procgen": 0, "dmcontrol": 3})) == (["dmcontrol/walker-run"], 1)
    with pytest.raises(BadInput, match=r"no task matches --tasks 'atari/\*', its tasks are like dmcontrol/walker-run"):
        choose(root, ["procgen/*", "atari/*"])
    with pytest.raises(BadInput, match="no task to train on, there are 1 hold-out tasks; --holdout trains on"):
        choose(root, ["dmcontrol/walker-walk"])
    with pytest.raises(BadInput, match="there are 1 tasks that are not hold-out tasks"):
        choose(root, ["procgen/bigfish"], holdout=True)
    with pytest.raises(BadInput, match="no task of atari to train on, which --mix names"):
        choose(root, mix={"atari": 2})
    with pytest.raises(BadInput, match="no task to train on, --mix gives none of its domains a share"):
        choose(root, mix={"procgen": 0, "dmcontrol": 0})


def test_tasks_without_a_trajectory_are_left_out_and_counted(root):
    with TaskWriter(root, "metaworld", "empty", {}) as writer:
        writer.finish()
    assert choose(root)[1] == {"hold-out tasks": 3, "tasks without a trajectory": 1}
    assert names(choose(root))[0] == ["dmcontrol/walker-run", "procgen/bigfish"]
    with pytest.raises(BadInput, match="no task to train on, there are 1 tasks without a trajectory"):
        choose(root, ["metaworld/*"])


def test_shares_are_read_and_checked():
    assert read_mix(["atari=2", "procgen=0.5", "darkroom=0"]) == {"atari": 2, "procgen": 0.5, "darkroom": 0}
    for wrong in ("atari", "atari=", "atari=-1", "atari=nan", "atari=inf", "doom=1", "=1"):
        with pytest.raises(BadInput, match=r"expected <domain>=<share> such as atari=2"):
            read_mix([wrong])


@given(
    st.integers(1, 300), st.dictionaries(st.sampled_from(sorted(DOMAINS)), st.floats(0.01, 100), min_size=1, max_size=7)
)
def test_windows_are_shared_out_to_the_last_one(per_domain, mix):
    counts = share_out(per_domain, list(mix), mix)
    assert sum(counts.values()) == per_domain * len(mix)
    total = sum(mix.values())
    assert all(abs(counts[name] - per_domain * len(mix) * share / total) < 1 for name, share in mix.items())
    assert share_out(per_domain, list(reversed(mix)), mix) == counts
    assert set(share_out(per_domain, list(mix), {}).values()) == {per_domain}
