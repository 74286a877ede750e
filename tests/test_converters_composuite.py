"""Composuite's flat files: the real samples whole, kinds side by side, damage counted, nonsense refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from lram.converters import composuite
from lram.converters.composuite import Options, jobs, trajectories
from lram.converters.source import Count
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, encode

SAMPLES = Path(__file__).parent / "data" / "composuite"
TASK = "IIWA_Box_None_PickPlace"


def convert(src: Path, **options) -> tuple[dict[str, list[Trajectory]], dict[str, Count]]:
    """Converts every task of a source; its account must add up."""
    chosen, made, counts = Options(**options), {}, {}
    for job in jobs(src, chosen):
        count = counts[job.task] = Count()
        made[job.task] = list(trajectories(job, chosen, count))
        count.check()
        for trajectory in made[job.task]:
            encode(trajectory)
    return made, counts


def recorded(path: Path, lengths: tuple[int, ...] = (5, 7, 4), **fields) -> Path:
    """Writes a small file of one task: episodes of these lengths, each ended by a timeout."""
    rng = np.random.default_rng(0)
    rows = sum(lengths)
    arrays = {
        "observations": rng.standard_normal((rows, 93), np.float32),
        "actions": rng.uniform(-1, 1, (rows, 8)).astype(np.float32),
        "rewards": rng.uniform(0, 0.9, rows).astype(np.float32),
        "terminals": np.zeros(rows, np.uint8),
        "timeouts": np.zeros(rows, np.uint8),
    }
    arrays["timeouts"][np.cumsum(lengths) - 1] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in (arrays | fields).items():
            if values is not None:
                # Chunks of few columns, as in the published files.
                chunks = (3, 2) if values.ndim == 2 and values.shape[1] > 1 else None
                file.create_dataset(name, data=values, chunks=chunks)
    return path


def edit(path: Path, **values) -> None:
    """Sets {name: (index, value)} in a file."""
    with h5py.File(path, "r+") as file:
        for name, (index, value) in values.items():
            file[name][index] = value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return recorded(tmp_path / "expert" / TASK / "data.hdf5")


def test_samples_are_whole_and_the_tail_is_reported():
    made, counts = convert(SAMPLES)
    other = "Panda_Plate_ObjectWall_Push"
    assert {task: [t.length for t in ts] for task, ts in made.items()} == {
        TASK: [500] * 4,
        f"{TASK}.medium": [500] * 2,
        other: [500] * 2,
    }
    assert counts[other].dropped == {"unfinished episode at the end": 230}
    assert not any(count.problems for count in counts.values())
    for task, kind in ((TASK, "expert"), (f"{TASK}.medium", "medium"), (other, "expert")):
        with h5py.File(SAMPLES / kind / task.split(".")[0] / "data.hdf5") as file:
            for number, t in enumerate(made[task]):
                rows = slice(number * 500, number * 500 + 500)
                assert t.episode == number and t.task == task and t.seed == -1
                assert np.array_equal(t.states, file["observations"][rows]) and t.states.dtype == np.float32
                assert np.array_equal(t.actions, file["actions"][rows])
                assert np.array_equal(t.rewards, file["rewards"][rows])
                assert (t.terminated, t.truncated, t.success, t.final_state) == (False, True, False, None)
                assert f"offline data, {kind} (" in t.source


def test_state_layout_finds_the_one_hots():
    made, _ = convert(SAMPLES, tasks=("Panda_Plate_ObjectWall_Push",))
    (trajectory, _), *_ = made.values()
    layout = trajectory.state_layout
    assert layout["object-state"] == [0, 14] and layout["robot0_proprio-state"] == [61, 93]
    one_hots = {key: trajectory.states[0, slice(*layout[key])].tolist() for key in layout if key.endswith("_id")}
    assert one_hots == {
        "object_id": [0, 0, 1, 0],
        "robot_id": [0, 0, 1, 0],
        "obstacle_id": [0, 1, 0, 0],
        "subtask_id": [0, 1, 0, 0],
    }


def test_unfinished_tail_is_kept_on_request():
    made, counts = convert(SAMPLES, unfinished=True)
    *_, tail = made["Panda_Plate_ObjectWall_Push"]
    assert (tail.length, tail.episode, tail.terminated, tail.truncated) == (230, 2, False, False)
    assert not tail.dones.any() and not counts["Panda_Plate_ObjectWall_Push"].dropped


def test_episodes_beyond_the_number_asked_for_are_counted():
    made, counts = convert(SAMPLES, episodes=1, unfinished=True)
    assert [len(ts) for ts in made.values()] == [1, 1, 1]
    beyond = "episodes beyond the number asked for"
    assert counts[TASK].dropped == {beyond: 1500}
    assert counts["Panda_Plate_ObjectWall_Push"].dropped == {beyond: 500, "unfinished episode at the end": 230}
    assert len(convert(SAMPLES, episodes=0)[0][TASK]) == 4


def test_any_level_of_the_tree_is_a_source():
    assert [(job.task, job.detail) for job in jobs(SAMPLES / "medium", Options())] == [(f"{TASK}.medium", "medium")]
    for src in (SAMPLES / "medium" / TASK, SAMPLES / "medium" / TASK / "data.hdf5"):
        (job,) = jobs(src, Options())
        assert (job.task, job.src, job.files) == (f"{TASK}.medium", src, (SAMPLES / "medium" / TASK / "data.hdf5",))


def test_folders_of_the_archives_and_older_names_are_kinds(tmp_path):
    for folder in (
        "expert/expert-iiwa-offline-comp-data",
        "medium-replay-subsampled-iiwa-offline-comp-data",
        "random",
        "medium",
    ):
        recorded(tmp_path / folder / TASK / "data.hdf5")
    names = [TASK, f"{TASK}.medium", f"{TASK}.medium-replay-subsampled", f"{TASK}.warmstart"]
    assert [job.task for job in jobs(tmp_path, Options())] == names
    assert [job.task for job in jobs(tmp_path, Options(kinds=("medium", "warmstart")))] == [names[1], names[3]]


def test_sources_without_a_task_are_refused(tmp_path):
    with pytest.raises(BadInput, match="nothing to convert"):
        jobs(tmp_path, Options())
    with pytest.raises(BadInput, match="nothing to convert"):
        jobs(SAMPLES, Options(kinds=("warmstart",)))
    with pytest.raises(BadInput, match="'Lift' is no Composuite task"):
        jobs(SAMPLES, Options(tasks=("Lift",)))
    stray = recorded(tmp_path / "a" / TASK / "data.hdf5")
    with pytest.raises(BadInput, match="no folder above it is named after a kind"):
        jobs(stray, Options())
    stray = recorded(tmp_path / "b" / "expert" / "IIWA" / "data.hdf5")
    with pytest.raises(BadInput, match="lies in 'IIWA', expected the folder of a task"):
        jobs(stray, Options())


@pytest.mark.parametrize(
    "length, terminal, timeout, ended",
    [
        (9, 0, 1, (False, True)),
        (9, 1, 0, (True, False)),
        # The simulator's one end is its time limit, which it tells as a terminal.
        (9, 1, 1, (False, True)),
        (500, 1, 0, (False, True)),
        (500, 1, 1, (False, True)),
    ],
)
def test_end_flags(tmp_path, length, terminal, timeout, ended):
    path = recorded(tmp_path / "expert" / TASK / "data.hdf5", (3, length))
    edit(path, terminals=(-1, terminal), timeouts=(-1, timeout))
    _, last = convert(tmp_path)[0][TASK]
    assert last.length == length and (last.terminated, last.truncated) == ended


def test_success_is_a_reward_of_exactly_one(path):
    edit(path, rewards=(2, 0.9999999), observations=(0, 1))
    assert [t.success for t in convert(path)[0][TASK]] == [False, False, False]
    edit(path, rewards=(6, 1))
    assert [t.success for t in convert(path)[0][TASK]] == [False, True, False]


def test_actions_are_clipped_as_the_simulator_does(path):
    edit(path, actions=(6, [-3, 3, 0.5, 1, -1, 2, 0, -0.25]))
    made, counts = convert(path)[:2]
    trajectory = made[TASK][1]
    assert trajectory.actions[1].tolist() == [-1, 1, 0.5, 1, -1, 1, 0, -0.25]
    assert "actions clipped" in trajectory.source
    assert counts[TASK].changed == {"actions clipped to [-1, 1]": 1}


@pytest.mark.parametrize("block", [1, 6, 12, 13, 1000])
def test_blocks_do_not_show(path, monkeypatch, block):
    whole = [encode(t).sha256 for t in convert(path)[0][TASK]]
    monkeypatch.setattr(composuite, "BLOCK", block)
    assert [encode(t).sha256 for t in convert(path)[0][TASK]] == whole and len(whole) == 3


def test_double_precision_and_other_flags_are_taken(tmp_path):
    expected = [encode(t).sha256 for t in convert(recorded(tmp_path / "expert" / TASK / "data.hdf5"))[0][TASK]]
    with h5py.File(tmp_path / "expert" / TASK / "data.hdf5") as file:
        arrays = {name: file[name][:].astype(float) for name in file}
    path = recorded(tmp_path / "expert" / TASK / "data.hdf5", **arrays, successes=np.zeros(16))
    assert [encode(t).sha256 for t in convert(path)[0][TASK]] == expected


def test_damaged_episodes_are_left_out_and_told(path):
    edit(path, observations=((6, 3), np.nan))
    made, counts = convert(path)
    assert [(t.length, t.episode) for t in made[TASK]] == [(5, 0), (4, 1)]
    assert counts[TASK].dropped == {"values that are not finite": 7}
    assert counts[TASK].problems == [
        f"{path}: 1 episodes left out (values that are not finite), the first from row 5 on"
    ]


def test_a_lost_end_flag_glues_nothing(tmp_path):
    path = recorded(tmp_path / "expert" / TASK / "data.hdf5", (400, 300, 300, 5))
    edit(path, timeouts=(699, 0))
    made, counts = convert(path)
    assert [t.length for t in made[TASK]] == [400, 5]
    assert counts[TASK].dropped == {"longer than 500 steps": 600} and "from row 400 on" in counts[TASK].problems[0]


def test_an_unreadable_chunk_costs_its_episode_only(tmp_path):
    src = tmp_path / "expert" / TASK
    shutil.copytree(SAMPLES / "expert" / TASK, src)
    with h5py.File(src / "data.hdf5") as file:
        whole = file["observations"][:]
        chunk = next(
            info for i in range(file["observations"].id.get_num_chunks())
            if (info := file["observations"].id.get_chunk_info(i)).chunk_offset == (500, 24)
        )  # fmt: skip
    data = bytearray((src / "data.hdf5").read_bytes())
    data[chunk.byte_offset + 20 : chunk.byte_offset + 200] = bytes(180)
    (src / "data.hdf5").write_bytes(data)
    made, counts = convert(tmp_path)
    assert [t.episode for t in made[TASK]] == [0, 1, 2]
    assert np.array_equal(np.concatenate([t.states for t in made[TASK]]), np.delete(whole, range(500, 1000), 0))
    assert counts[TASK].dropped == {"unreadable rows": 500} and "from row 500 on" in counts[TASK].problems[0]


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"rewards": None}, "rewards is missing, expected an array"),
        ({"observations": np.zeros((16, 77), np.float32)}, r"observations has shape \(16, 77\), expected \(any, 93\)"),
        ({"actions": np.zeros((16, 7), np.float32)}, r"actions has shape \(16, 7\), expected \(any, 8\)"),
        ({"rewards": np.zeros((16, 1), np.float32)}, "rewards has 2 dimensions, expected 1"),
        ({"actions": np.zeros((16, 8), np.int64)}, "actions is int64, expected float"),
        ({"rewards": np.zeros(15, np.float32)}, "lengths are observations 16, actions 16, rewards 15, terminals 16"),
        ({"timeouts": np.full(16, 2, np.uint8)}, "timeouts holds other values than 0 and 1"),
    ],
)
def test_another_content_is_refused(tmp_path, fields, said):
    path = recorded(tmp_path / "expert" / TASK / "data.hdf5", **fields)
    with pytest.raises(BadInput, match=f"^{path}: {said}"):
        convert(path)


def test_flags_that_cannot_be_read_and_links_outside_are_refused(tmp_path, path):
    elsewhere = recorded(tmp_path / "elsewhere.hdf5")
    with h5py.File(path, "r+") as file:
        del file["rewards"]
        file["rewards"] = h5py.ExternalLink(elsewhere, "rewards")
    with pytest.raises(BadInput, match=f"^{path}: 'rewards' is a link to another file"):
        convert(path)
    path = recorded(path)
    with h5py.File(path, "r+") as file:
        values = file["timeouts"][:]
        del file["timeouts"]
        damaged = file.create_dataset("timeouts", data=values, compression="gzip", fletcher32=True)
        at, size = damaged.id.get_chunk_info(0).byte_offset, damaged.id.get_chunk_info(0).size
    data = bytearray(path.read_bytes())
    data[at : at + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(BadInput, match="timeouts cannot be read, so no episode's end is known"):
        convert(path)
