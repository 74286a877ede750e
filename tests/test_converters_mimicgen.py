"""MimicGen's files in their three forms: the real samples whole, names, success, damage, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from lram.converters.mimicgen import KEYS, Options, jobs, task_name, trajectories
from lram.converters.source import Count
from lram.datasets.specs import BadInput, tasks
from lram.datasets.trajectory import Trajectory, encode

SAMPLES = Path(__file__).parent / "data" / "mimicgen"
GENERATED = SAMPLES / "generated" / "demo_src_stack_task_D0_robot_Panda_gripper_PandaGripper"
PROCESSED = SAMPLES / "processed" / "stack_D0_robot_Sawyer_gripper_RethinkGripper.hdf5"
SOURCE = SAMPLES / "source" / "stack.hdf5"


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


def demo(data: h5py.Group, number: int, length: int = 4, rewards: list[float] | None = None, width: int = 5) -> None:
    """Writes a small demonstration whose actions all are a hundredth of its number."""
    group = data.create_group(f"demo_{number}")
    group.attrs["num_samples"] = length
    group["actions"] = np.full((length, 7), number / 100)
    if rewards is not None:
        group["rewards"] = np.array(rewards, float)
    for key, columns in zip(KEYS, (3, 4, 2, width)):
        group[f"obs/{key}"] = np.random.default_rng(number).standard_normal((length, columns))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A small published file: demonstrations 0, 2 and 10."""
    path = tmp_path / "stack_d0.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for number in (0, 2, 10):
            demo(data, number, rewards=[0, 0, 1, 1])
    return path


def test_samples_are_whole():
    made, counts = convert(SAMPLES)
    assert {task: len(ts) for task, ts in made.items()} == {"Stack_D0": 8, "Stack_D0-Sawyer": 8, "Stack_D0.source": 0}
    assert counts["Stack_D0"].dropped == {"failed demonstrations": 342}
    assert counts["Stack_D0.source"].dropped == {"source demonstrations without observations": 940}
    assert not any(count.problems for count in counts.values())
    for task, path in (("Stack_D0", GENERATED / "demo.hdf5"), ("Stack_D0-Sawyer", PROCESSED)):
        with h5py.File(path) as file:
            assert sum(t.length for t in made[task]) == file["data"].attrs["total"] == 848
            for number, t in enumerate(made[task]):
                recorded = file[f"data/demo_{number}"]
                states = np.concatenate([recorded["obs"][key][:] for key in KEYS], 1).astype(np.float32)
                assert t.episode == number and t.states.shape[1] == 32 and np.array_equal(t.states, states)
                assert np.array_equal(t.actions, recorded["actions"][:].astype(np.float32))
                assert t.rewards[-1] == 1 and not t.rewards[:-1].any()
                assert (t.success, t.terminated, t.truncated) == (True, True, False)
                if task == "Stack_D0":
                    assert t.final_state is None
                else:
                    following = np.concatenate([recorded["next_obs"][key][-1] for key in KEYS])
                    assert np.array_equal(t.final_state, following.astype(np.float32))
                assert t.state_layout == {
                    "robot0_eef_pos": [0, 3],
                    "robot0_eef_quat": [3, 7],
                    "robot0_gripper_qpos": [7, 9],
                    "object": [9, 32],
                }


def test_failed_demonstrations_come_on_request_and_are_marked():
    made, counts = convert(GENERATED, failed=True)
    *succeeded, first, second, third = made["Stack_D0"]
    assert len(succeeded) == 8 and all(t.success for t in succeeded)
    assert [t.length for t in (first, second, third)] == [108, 125, 109]
    for number, t in enumerate((first, second, third), 8):
        assert t.episode == number and t.state_layout == succeeded[0].state_layout
        assert (t.success, t.terminated, t.truncated, t.total) == (False, False, True, 0)
    assert not counts["Stack_D0"].dropped


def test_failed_demonstrations_alone_are_a_source(tmp_path):
    folder = tmp_path / GENERATED.name
    folder.mkdir()
    shutil.copy(GENERATED / "demo_failed.hdf5", folder)
    assert convert(folder)[0] == {"Stack_D0": []}
    assert len(convert(folder / "demo_failed.hdf5", failed=True)[0]["Stack_D0"]) == 3


def test_a_source_file_alone_is_refused():
    with pytest.raises(BadInput, match=f"^{SOURCE}: data/demo_0 has no obs, only the simulator's states"):
        convert(SOURCE)


def test_post_processed_source_demonstrations_are_taken(tmp_path, published):
    path = published.rename(tmp_path / "stack_three.hdf5")
    assert [t.length for t in convert(path)[0]["StackThree_D0.source"]] == [4, 4, 4]


@pytest.mark.parametrize(
    "name, task",
    [
        ("stack_d0", "Stack_D0"),
        ("three_piece_assembly_d1", "ThreePieceAssembly_D1"),
        ("square_d0_iiwa", "Square_D0-IIWA"),
        ("threading_d1_ur5e", "Threading_D1-UR5e"),
        ("square_d1_panda", "Square_D1"),
        ("mug_cleanup_o1", "MugCleanup_O1"),
        ("coffee_preparation", "CoffeePreparation_D0.source"),
        ("demo_src_coffee_preparation_task_D0/demo", "CoffeePreparation_D0"),
        ("demo_src_stack_task_D1_robot_IIWA_gripper_Robotiq85Gripper/demo_failed", "Stack_D1-IIWA"),
        ("stack_three_D1_robot_UR5e_gripper_Robotiq85Gripper", "StackThree_D1-UR5e"),
        ("stack_D0_robot_IIWA_gripper_Robotiq140Gripper", "Stack_D0-IIWA.Robotiq140Gripper"),
        ("stack_D0_robot_Panda_gripper_PandaGripper_failed", "Stack_D0"),
        ("nut_assembly_d0", "NutAssembly_D0"),
        ("nut_assembly_D0_robot_Sawyer_gripper_RethinkGripper", "NutAssembly_D0-Sawyer"),
        ("pick_place_D0_robot_Panda_gripper_PandaGripper", "PickPlace_D0-Panda"),
    ],
)
def test_names_tell_the_task(name, task):
    assert task_name(Path(f"{name}.hdf5")) == task


def test_every_task_of_the_table_has_a_file_name():
    grippers = {"IIWA": "Robotiq85Gripper", "UR5e": "Robotiq85Gripper", "Sawyer": "RethinkGripper"}
    for domain, task in tasks():
        if domain == "mimicgen":
            plain, _, arm = task.partition("-")
            family, variant = plain.split("_")
            snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in family).strip("_")
            name = f"{snake}_{variant}_robot_{arm}_gripper_{grippers[arm]}" if arm else f"{snake}_{variant.lower()}"
            assert task_name(Path(f"{name}.hdf5")) == task


@pytest.mark.parametrize("name", ["demo", "lift", "lift_d0", "stack_d0_low_dim", "demo_src_lift_task_D0/demo", "0"])
def test_names_that_tell_no_task_are_refused(tmp_path, name):
    path = tmp_path / f"{name}.hdf5"
    path.parent.mkdir(exist_ok=True)
    path.touch()
    with pytest.raises(BadInput, match="its name tells no MimicGen task, expected one like stack_d0"):
        jobs(tmp_path, Options())


def test_nothing_to_convert_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"holds no \.hdf5 files"):
        jobs(tmp_path, Options())


def test_two_sets_of_one_task_are_two_jobs(tmp_path, published):
    shutil.copy(published, tmp_path / "stack_D0_robot_Panda_gripper_PandaGripper.hdf5")
    assert [job.task for job in jobs(tmp_path, Options())] == ["Stack_D0", "Stack_D0"]


def test_demonstrations_come_in_the_order_of_their_numbers(published):
    ts = convert(published)[0]["Stack_D0"]
    assert [round(float(t.actions[0, 0] * 100)) for t in ts] == [0, 2, 10]
    assert [t.episode for t in ts] == [0, 1, 2]


def test_success_is_read_from_rewards_where_they_are(published):
    with h5py.File(published, "r+") as file:
        file["data/demo_2/rewards"][:] = [0, 0.5, 0.75, 0.75]  # three of four objects in their bins
        file["data/demo_10/rewards"][:] = [0, 0, 1, 0]  # placed, and fallen again
    made, counts = convert(published)
    assert [t.rewards.tolist() for t in made["Stack_D0"]] == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert counts["Stack_D0"].dropped == {"failed demonstrations": 4}
    assert [t.success for t in convert(published, failed=True)[0]["Stack_D0"]] == [True, False, True]


@pytest.mark.parametrize(
    "what, reason",
    [
        ("num_samples", "it has 4 actions and num_samples 5"),
        ("no num_samples", "it has 4 actions and num_samples None"),
        ("object", "it has 4 actions and obs/object 3"),
        ("rewards", "it has 4 actions and rewards 2"),
        ("empty", "it has 0 actions"),
        ("nan", "it holds values that are not finite"),
        ("unreadable", "it cannot be read"),
    ],
)
def test_a_damaged_demonstration_costs_itself_only(published, what, reason):
    place = None
    with h5py.File(published, "r+") as file:
        damaged = file["data/demo_2"]
        if what == "num_samples":
            damaged.attrs["num_samples"] = 5
        elif what == "no num_samples":
            del damaged.attrs["num_samples"]
        elif what == "object":
            del damaged["obs/object"]
            damaged["obs/object"] = np.zeros((3, 5))
        elif what == "rewards":
            del damaged["rewards"]
            damaged["rewards"] = np.zeros(2)
        elif what == "empty":
            del file["data/demo_2"]
            demo(file["data"], 2, length=0)
        elif what == "nan":
            damaged["obs/object"][1, 1] = np.inf
        else:
            del damaged["obs/object"]
            stored = damaged.create_dataset("obs/object", data=np.zeros((4, 5)), compression="gzip", fletcher32=True)
            place = stored.id.get_chunk_info(0).byte_offset
    if place:
        data = bytearray(published.read_bytes())
        data[place : place + 8] = bytes(8)
        published.write_bytes(data)
    made, counts = convert(published)
    assert [round(float(t.actions[0, 0] * 100)) for t in made["Stack_D0"]] == [0, 10]
    (problem,) = counts["Stack_D0"].problems
    assert problem.startswith(f"{published}: data/demo_2 is left out, {reason}")


def env_args(file: h5py.File, name: str, robot: str) -> None:
    file["data"].attrs["env_args"] = json.dumps({"env_name": name, "env_kwargs": {"robots": [robot]}})


def rename(file: h5py.File, old: str, new: str) -> None:
    file.move(old, new)


def replace(file: h5py.File, name: str, values: np.ndarray) -> None:
    del file[name]
    file[name] = values


REFUSED = {
    "no observations": (lambda f: f.pop("data/demo_0/obs"), "data/demo_0 has no obs, only the simulator's states"),
    "a key missing": (
        lambda f: rename(f, "data/demo_2/obs/object", "data/demo_2/obs/objects"),
        "data/demo_2/obs/object is missing, expected an array",
    ),
    "another width": (
        lambda f: replace(f, "data/demo_10/obs/object", np.zeros((4, 6))),
        "data/demo_10 has state columns .*'object': \\[9, 15\\]}, others of its task .*'object': \\[9, 14\\]}",
    ),
    "a state too wide": (
        lambda f: replace(f, "data/demo_0/obs/object", np.zeros((4, 300))),
        "data/demo_0 has a state of 309 columns, expected 204 at most",
    ),
    "absolute actions": (
        lambda f: replace(f, "data/demo_0/actions", np.full((4, 7), 3.14)),
        "data/demo_0 has actions to 3.14, expected \\[-1, 1\\]",
    ),
    "two arms": (
        lambda f: replace(f, "data/demo_0/actions", np.zeros((4, 14))),
        "data/demo_0/actions has shape \\(4, 14\\), expected \\(any, 7\\)",
    ),
    "endless": (
        lambda f: replace(f, "data/demo_0/actions", np.zeros((100_001, 7), np.float32)),
        "data/demo_0 declares 100001 steps, expected 100000 at most",
    ),
    "a stranger": (lambda f: rename(f, "data/demo_0", "data/episode_0"), "data holds 'episode_0', expected demo_0"),
    "no data": (lambda f: f.pop("data"), "data is missing, expected a group"),
    "another task": (lambda f: env_args(f, "Stack_D1", "Panda"), "its name tells Stack_D0, its env_args 'Stack_D1'"),
    "arguments that are none": (lambda f: f["data"].attrs.__setitem__("env_args", "[]"), "attribute env_args of data"),
    "a link outside": (
        lambda f: f.__setitem__("data/demo_2/obs/extra", h5py.ExternalLink("elsewhere.hdf5", "x")),
        "'data/demo_2/obs/extra' is a link to another file",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_another_content_is_refused(published, what):
    change, said = REFUSED[what]
    with h5py.File(published, "r+") as file:
        change(file)
    with pytest.raises(BadInput, match=f"^{published}: {said}"):
        convert(published)


def test_the_arm_of_the_name_is_that_of_the_simulator(tmp_path, published):
    path = published.rename(tmp_path / "stack_d0_iiwa.hdf5")
    for robot in ("IIWA", "UR5e"):
        with h5py.File(path, "r+") as file:
            env_args(file, "Stack_D0", robot)
        if robot == "IIWA":
            assert len(convert(path)[0]["Stack_D0-IIWA"]) == 3
        else:
            with pytest.raises(BadInput, match="its name tells the arm IIWA, its env_args \\['UR5e'\\]"):
                convert(path)
