"""MimicGen's and CompoSuite's environments: names, errors, and, where they are installed, the data's own numbers."""

# ruff: noqa: NPY002  (robosuite draws from the process's random numbers)

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from xml.etree import ElementTree

import gymnasium as gym
import h5py
import numpy as np
import pytest

from lram.collectors import robosuite
from lram.collectors.robosuite import CompoSuite, MimicGen, fit_mujoco_3, make, parse_task, seeded, task_name
from lram.datasets.specs import BadInput, tasks

DATA = Path(__file__).parent / "data"
SAWYER = DATA / "mimicgen/processed/stack_D0_robot_Sawyer_gripper_RethinkGripper.hdf5"
PANDA = DATA / "mimicgen/generated/demo_src_stack_task_D0_robot_Panda_gripper_PandaGripper/demo.hdf5"
BOX = DATA / "composuite/expert/IIWA_Box_None_PickPlace/data.hdf5"

with_mimicgen = pytest.mark.skipif(
    importlib.util.find_spec("mimicgen") is None, reason="NVlabs/mimicgen is not installed (docs/mimicgen.md)"
)
with_composuite = pytest.mark.skipif(
    importlib.util.find_spec("composuite") is None,
    reason="Lifelong-ML/CompoSuite is not installed (docs/mimicgen.md)",
)


def test_every_listed_task_has_an_environment() -> None:
    names = [name for domain, name in tasks() if domain == "mimicgen"]
    assert len(names) == 83 + 2
    arms = {name: parse_task(name) for name in names}
    assert arms["Stack_D0"] == ("Stack_D0", "Stack", "Panda", "PandaGripper")
    assert arms["Coffee_D2-IIWA"] == ("Coffee_D2", "Coffee", "IIWA", "Robotiq85Gripper")
    assert arms["PickPlace_D0"].robot == arms["PickPlace_D0-Sawyer"].robot == "Sawyer"
    # Two names for one arm, as in LRAM's data: what is generated gets the long one.
    twice = {name for name, arm in arms.items() if task_name(arm.env, arm.robot) != name}
    assert twice == {"PickPlace_D0", "NutAssembly_D0"}


def test_other_grippers_are_other_tasks() -> None:
    assert task_name("Stack_D0", "IIWA", "Robotiq85Gripper") == task_name("Stack_D0", "IIWA") == "Stack_D0-IIWA"
    name = task_name("Stack_D0", "IIWA", "PandaGripper")
    assert name == "Stack_D0-IIWA.PandaGripper"
    assert parse_task(name).gripper == "PandaGripper"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Stack", "names are like"),
        ("Stacks_D0", "names are like"),
        ("Stack_D0-Baxter", "robot 'Baxter'"),
        ("Stack_D0-IIWA.Hook", "gripper 'Hook'"),
        ("IIWA_Box_None_Fly", "'Fly' is none of PickPlace"),
    ],
)
def test_what_does_not_exist_is_said(name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make(name)


@pytest.mark.parametrize(
    ("package", "task", "words"),
    [
        ("mimicgen", "Stack_D0", r"NVlabs/mimicgen \(known to work: 72bd767\).*d309eae"),
        ("composuite", "IIWA_Box_None_Push", "Lifelong-ML/CompoSuite"),
    ],
)
def test_what_is_missing_is_named_with_its_repository(package: str, task: str, words: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(BadInput, match=words):
        make(task)


def test_a_stranger_of_the_same_name_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mimicgen").mkdir()
    (tmp_path / "mimicgen/__init__.py").write_text("raise RuntimeError('its code was run')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mimicgen", raising=False)
    with pytest.raises(BadInput, match="NVlabs/mimicgen"):
        make("Stack_D0")


def test_only_a_sawyers_model_is_changed_and_only_once() -> None:
    assert fit_mujoco_3("<mujoco><asset/></mujoco>") == "<mujoco><asset/></mujoco>"
    xml = '<mujoco><asset><mesh name="robot0_head_0"/><mesh name="robot0_l0_0"/></asset></mujoco>'
    once = fit_mujoco_3(xml)
    root = ElementTree.fromstring(once)
    assert [mesh.get("inertia") for mesh in root.iter("mesh")] == ["shell", None]
    assert [(e.get("body1"), e.get("body2")) for e in root.iterfind("./contact/exclude")] == [
        ("robot0_right_arm_base_link", "robot0_right_l0")
    ]
    assert fit_mujoco_3(once) == once


def test_seeding_leaves_the_process_as_it_was() -> None:
    def draw() -> tuple[float, float]:
        return float(np.random.rand()), random.random()

    np.random.seed(1)
    random.seed(1)
    draw()
    expected = draw()
    np.random.seed(1)
    random.seed(1)
    draw()
    with seeded(np.random.SeedSequence(5)):
        first = draw()
    assert draw() == expected
    with seeded(np.random.SeedSequence(5)):
        assert draw() == first
    with seeded(np.random.SeedSequence(6)):
        others = draw()
    assert others[0] != first[0] and others[1] != first[1]


@pytest.fixture(scope="module")
def sawyer() -> MimicGen:
    return MimicGen("Stack_D0-Sawyer")


def row_of(slot: MimicGen | CompoSuite) -> np.ndarray:
    return np.full(slot.observation_space.shape, np.nan, np.float32)


@with_mimicgen
def test_mimicgen_states_are_those_of_published_files_bit_for_bit(sawyer: MimicGen) -> None:
    row = row_of(sawyer)
    sawyer.start(np.random.SeedSequence(0), row)
    with h5py.File(SAWYER) as file:
        for demo in ("demo_0", "demo_7"):
            group = file["data"][demo]
            stored = np.concatenate([group["obs"][key] for key in sawyer.state_layout], 1).astype(np.float32)
            for simulator, expected in zip(group["states"][:], stored):
                sawyer.env.sim.set_state_from_flattened(simulator)
                row[:] = np.nan
                sawyer.observe(row)
                assert np.array_equal(row, expected)


@with_mimicgen
def test_files_straight_from_the_generator_are_one_simulation_step_behind() -> None:
    import mujoco

    slot = MimicGen("Stack_D0")
    row = row_of(slot)
    slot.start(np.random.SeedSequence(0), row)
    sim = slot.env.sim
    with h5py.File(PANDA) as file:
        group = file["data/demo_0"]
        stored = np.concatenate([group["obs"][key] for key in slot.state_layout], 1).astype(np.float32)
        gripper = slice(*slot.state_layout["robot0_gripper_qpos"])
        for simulator, expected in list(zip(group["states"][:], stored))[1:40]:
            sim.set_state_from_flattened(simulator)
            slot.observe(row)
            assert np.array_equal(row[gripper], expected[gripper])
            qpos = sim.data.qpos.copy()
            mujoco.mj_integratePos(sim.model._model, qpos, sim.data.qvel, -0.002)
            sim.data.qpos[:] = qpos
            slot.observe(row)
            row[gripper] = expected[gripper]
            np.testing.assert_allclose(row, expected, rtol=0, atol=2e-6)
    slot.close()


@with_mimicgen
def test_live_states_belong_to_the_simulators_and_episodes_to_their_numbers(sawyer: MimicGen) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 6, 1, 7)).astype(np.float32)
    env = make("Stack_D0-Sawyer", num_envs=1, seed=3)
    assert env.state_layout == {
        "robot0_eef_pos": [0, 3],
        "robot0_eef_quat": [3, 7],
        "robot0_gripper_qpos": [7, 9],
        "object": [9, 32],
    }
    assert env.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP
    seen = row_of(sawyer)
    sawyer.start(np.random.SeedSequence(0), seen)
    runs = []
    for plays in actions:
        states = [env.reset()[0][0]]
        np.random.seed(0)  # a collector's own draws have nothing to do with the environment's
        untouched = np.random.get_state()[1].copy()
        for action in plays:
            states.append(env.step(action)[0][0])
            sawyer.env.sim.set_state_from_flattened(env._slots[0].env.sim.get_state().flatten())
            sawyer.observe(seen)
            assert np.array_equal(seen, states[-1])
        assert np.array_equal(np.random.get_state()[1], untouched)
        runs.append(np.stack(states))
    assert not np.array_equal(runs[0][0], runs[1][0])
    env.close()
    # The second episode, without having played the first.
    env = make("Stack_D0-Sawyer", seed=3, first_episode=1)
    states = [env.reset()[0][0]] + [env.step(action)[0][0] for action in actions[1]]
    assert np.array_equal(np.stack(states), runs[1])
    assert not np.array_equal(env.reset(seed=4)[0][0], runs[1][0])
    env.close()


@with_mimicgen
def test_a_sawyers_base_does_not_hold_it_back(sawyer: MimicGen) -> None:
    row = row_of(sawyer)
    sawyer.start(np.random.SeedSequence(0), row)
    before = row[:3].copy()
    for _ in range(30):
        assert sawyer.step(np.array([0, 1, 0, 0, 0, 0, -1]), row) == (0.0, False, False)
    # 0.32 m to the side; 0.17 m when base and first link rub on each other.
    assert row[1] - before[1] > 0.25
    assert sawyer.info() == {"success": False}


@with_mimicgen
def test_an_episode_is_truncated_at_the_horizon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(robosuite.HORIZONS, "Stack", 3)
    env = make("Stack_D0-UR5e")
    first, _ = env.reset()
    assert first.shape == (1, 36) and first.dtype == np.float32
    for step in range(3):
        states, rewards, terminated, truncated, infos = env.step(np.zeros((1, 7), np.float32))
        assert (rewards[0], terminated[0], truncated[0]) == (0, False, step == 2)
    assert infos["final_info"]["success"][0] == False  # noqa: E712  (a NumPy bool)
    assert not np.array_equal(infos["final_obs"][0], states[0])
    env.close()


@with_composuite
def test_composuite_replays_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robosuite, "COMPOSUITE_HORIZON", 40)
    slot = CompoSuite("IIWA_Box_None_PickPlace")
    assert slot.observation_space.shape == (93,) and slot.action_space.shape == (8,)
    assert slot.state_layout["object_id"] == [45, 49] and slot.state_layout["robot0_proprio-state"] == [61, 93]
    row = row_of(slot)
    with h5py.File(BOX) as file:
        for begin in (0, 500):
            states, actions, rewards = (file[key][begin:][:41] for key in ("observations", "actions", "rewards"))
            slot.start(np.random.SeedSequence(1), row)
            # All that is drawn is where the object lies.
            assert np.flatnonzero(row != states[0]).tolist() == [0, 1, 7, 8, 9, 42, 43]
            base, joint = slot.env.env, slot.env.env.object.joints[0]
            pose = base.sim.data.get_joint_qpos(joint).copy()
            pose[:3] = states[0][:3]
            base.sim.data.set_joint_qpos(joint, pose)
            base.sim.forward()
            for step in range(40):
                reward, terminated, truncated = slot.step(actions[step], row)
                # The data knows that place in float32 only.
                np.testing.assert_allclose(row, states[step + 1], rtol=0, atol=1e-6)
                assert reward == pytest.approx(rewards[step], abs=1e-8)
                assert (terminated, truncated) == (False, step == 39)
    assert slot.info() == {"success": False}
    slot.close()


@with_composuite
def test_composuite_tells_its_tasks_apart() -> None:
    env = make("Panda_Plate_ObjectWall_Push")
    states, infos = env.reset()
    layout = env.state_layout
    ones = {key: states[0][slice(*layout[key])].argmax() for key in layout if key.endswith("_id")}
    with h5py.File(DATA / "composuite/expert/Panda_Plate_ObjectWall_Push/data.hdf5") as file:
        stored = file["observations"][0]
    assert ones == {key: stored[slice(*layout[key])].argmax() for key in ones}
    assert infos["success"].tolist() == [False]
    env.close()
