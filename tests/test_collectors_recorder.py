"""What the recorder writes is what was stepped: count, order, values, for real environments and agents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv

from lram.collectors.darkroom import DarkRoomVector, make
from lram.collectors.recorder import CURVE, Recorder, read_curve
from lram.collectors.sb3 import OneHotCells, RecordVecEnv, VectorToSb3, slot_seeds
from lram.datasets.check import check_task
from lram.datasets.index import read_index
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, read
from lram.datasets.writer import TaskWriter

SAME_STEP = AutoresetMode.SAME_STEP


class Diary(gym.Wrapper):
    """Writes down what one environment really did, episode by episode, with no recorder in sight."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.episodes: list[list[tuple]] = []

    def reset(self, **kwargs: Any) -> tuple:
        self.state, info = self.env.reset(**kwargs)
        self.episodes.append([])
        return self.state, info

    def step(self, action: Any) -> tuple:
        result = self.env.step(action)
        self.episodes[-1].append((self.state, action, *result))
        self.state = result[0]
        return result


class Noise(gym.Env):
    """Images, episodes of random length that end either way, success known at random."""

    observation_space = gym.spaces.Box(0, 255, (1, 64, 64), np.uint8)
    action_space = gym.spaces.Discrete(18)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        return self._frame(), {}

    def _frame(self) -> np.ndarray:
        return self.np_random.integers(0, 256, (1, 64, 64), np.uint8)

    def step(self, action: Any) -> tuple:
        end, cut = (self.np_random.random(2) < 0.01).tolist()
        info = {"success": bool(action % 2)} if end or cut else {}
        return self._frame(), float(self.np_random.normal()), end, cut, info


def diaries(build: Callable[[], gym.Env], slots: int) -> tuple[VectorEnv, list[Diary]]:
    kept = [Diary(build()) for _ in range(slots)]
    return SyncVectorEnv([lambda diary=diary: diary for diary in kept], autoreset_mode=SAME_STEP), kept


def record(env: VectorEnv, root: Path, domain: str, steps: int, seed: int, unfinished: bool = False) -> Recorder:
    """Steps random actions, often out of a Box's bounds, and records them."""
    slots = env.num_envs
    with TaskWriter(root, domain, "task", {}) as writer:
        space = env.single_action_space
        recorder = Recorder(writer, domain, "task", slot_seeds(seed, slots), "test", action_space=space)
        generator = np.random.default_rng(seed)
        recorder.reset(env.reset(seed=seed)[0])
        for _ in range(steps):
            if isinstance(space, gym.spaces.Box):
                actions = generator.normal(size=(slots, *space.shape)).astype(np.float32)
            else:
                actions = generator.integers(0, space.n, slots)
            states, *rest = env.step(actions)
            recorder.step(actions, states, *rest)
            # A careless environment may reuse what it returned.
            states[...] = 0
        recorder.close(write_unfinished=unfinished)
        writer.finish()
    return recorder


def stored(root: Path, domain: str) -> list[Trajectory]:
    index = read_index(root / domain / "task")
    assert index.numpy("episode").tolist() == list(range(len(index.table)))
    return [read(index.folder / path) for path in index.table["path"].to_pylist()]


def expect_diary(trajectories: list[Trajectory], kept: list[Diary], seed: int, unfinished: bool = False) -> None:
    """Compares trajectories with diaries: order of ending, slot breaks ties, then unfinished ones by slot."""
    expected = []
    for slot, diary in enumerate(kept):
        clock = 0
        for episode in diary.episodes:
            clock += len(episode)
            ended = bool(episode) and (episode[-1][4] or episode[-1][5])
            if ended or (unfinished and episode):
                expected.append(((not ended, clock if ended else 0, slot), episode))
    expected.sort(key=lambda row: row[0])
    assert len(trajectories) == len(expected)
    for number, (trajectory, ((open_end, _, slot), episode)) in enumerate(zip(trajectories, expected)):
        states, actions, after, rewards, terminated, truncated, infos = zip(*episode)
        assert trajectory.episode == number and trajectory.seed == seed + slot
        np.testing.assert_array_equal(trajectory.states, np.stack(states))
        low, high = (-1, 1) if trajectory.actions.dtype == np.float32 else (0, 100)
        np.testing.assert_array_equal(trajectory.actions, np.clip(np.stack(actions), low, high))
        np.testing.assert_array_equal(trajectory.rewards, np.float32(rewards))
        np.testing.assert_array_equal(trajectory.final_state, after[-1])
        assert (trajectory.terminated, trajectory.truncated) == (terminated[-1], truncated[-1])
        success = infos[-1].get("success", infos[-1].get("is_success"))
        assert trajectory.success == (None if open_end else success)


def cartpole() -> gym.Env:
    return gym.make("CartPole-v1", max_episode_steps=25)


def car() -> gym.Env:
    return gym.make("MountainCarContinuous-v0", max_episode_steps=40)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 5), st.integers(0, 150), st.integers(0, 1000), st.booleans())
def test_every_transition_is_recorded_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, slots: int, steps: int, seed: int, unfinished: bool
) -> None:
    root = tmp_path_factory.mktemp("data")
    env, kept = diaries(cartpole, slots)
    recorder = record(env, root, "darkroom", steps, seed, unfinished)
    trajectories = stored(root, "darkroom")
    expect_diary(trajectories, kept, seed, unfinished)
    written = sum(trajectory.length for trajectory in trajectories)
    assert recorder.steps == slots * steps == written + recorder.left_out_steps
    open_ends = [diary.episodes[-1] for diary in kept if diary.episodes[-1]]
    assert recorder.left_out_episodes == (0 if unfinished else len(open_ends))


def test_images_of_long_episodes_and_success(tmp_path: Path) -> None:
    env, kept = diaries(Noise, 3)
    recorder = record(env, tmp_path, "atari", 400, seed=5)
    trajectories = stored(tmp_path, "atari")
    expect_diary(trajectories, kept, seed=5)
    assert max(trajectory.length for trajectory in trajectories) > 128  # the buffers had to grow
    assert {trajectory.success for trajectory in trajectories} == {True, False}
    assert {trajectory.terminated for trajectory in trajectories} == {True, False}
    assert recorder.episodes == len(trajectories)


def test_actions_are_stored_as_executed(tmp_path: Path) -> None:
    env, kept = diaries(car, 2)
    record(env, tmp_path, "metaworld", 90, seed=0)
    trajectories = stored(tmp_path, "metaworld")
    expect_diary(trajectories, kept, seed=0)
    actions = np.concatenate([trajectory.actions for trajectory in trajectories])
    assert np.abs(actions).max() == 1 and actions.shape == (160, 1)


def test_learning_curve(tmp_path: Path) -> None:
    env = DarkRoomVector(["room3x3-h4-goal-00-01", "room3x3-h6-goal-01-00"])
    with TaskWriter(tmp_path, "darkroom", "task", {}) as writer:
        recorder = Recorder(writer, "darkroom", "task", [0, 1], "test", first_episode=10)
        recorder.reset(env.reset()[0])
        for _ in range(12):
            states, *rest = env.step(np.array([1, 4]))
            recorder.step(np.array([1, 4]), states, *rest)
        recorder.close()
    curve = recorder.curve()
    assert curve["episode"].tolist() == [10, 11, 12, 13, 14]
    assert curve["steps"].tolist() == [8, 12, 16, 24, 24]
    assert curve["length"].tolist() == [4, 6, 4, 4, 6]
    # Walking right passes the goal at (0, 1) once.
    assert curve["return"].tolist() == [1, 0, 1, 1, 0]
    assert curve["success"].tolist() == [True, False, True, True, False]


ROOM = "room3x3-h5-goal-00-01"


def walk(recorder: Recorder, steps: int, slots: int = 2) -> None:
    """Walks right and back left from the start of an episode; slot 0 passes the goal."""
    env = make(ROOM, slots)
    recorder.reset(env.reset()[0])
    for number in range(steps):
        actions = np.array([1 if number % 2 == 0 else 3, 4])[:slots]
        states, *rest = env.step(actions)
        recorder.step(actions, states, *rest)


def test_the_curve_is_written_beside_the_trajectories(tmp_path: Path) -> None:
    with TaskWriter(tmp_path, "darkroom", "task", {}) as writer:
        recorder = Recorder(writer, "darkroom", "task", [0, 1], "test")
        walk(recorder, 12)
        path = recorder.write_curve()
        writer.finish()
    assert path == tmp_path / "darkroom" / "task" / CURVE
    table = read_curve(path.parent)
    assert table.to_pydict() == {
        "episode": [0, 1, 2, 3],
        "steps": [10, 10, 20, 20],
        "return": [3.0, 0.0, 2.0, 0.0],
        "length": [5] * 4,
        "success": [True, False, True, False],
    }
    assert check_task(path.parent).findings == []
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadInput, match=r"learning_curve\.parquet: not a readable learning curve"):
        read_curve(path.parent)


def test_a_recording_goes_on_where_it_was(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        with TaskWriter(tmp_path / name, "darkroom", "task", {}) as writer:
            recorder = Recorder(writer, "darkroom", "task", [0, 1], "test", first_episode=0)
            walk(recorder, 7)
            recorder.close()
            recorder.write_curve()
            state = recorder.state()
            # All that a checkpoint with this state relies on.
            assert len(list(tmp_path.glob(f"{name}/darkroom/task/000/0*.hdf5"))) == recorder.episodes == 2
            if name == "stopped":
                walk(recorder, 20)  # what a killed run did after its checkpoint
                recorder.write_curve()
                recorder = Recorder(writer, "darkroom", "task", [0, 1], "test", first_episode=0)
                recorder.restore(state)
            walk(recorder, 20)
            recorder.close()
            recorder.write_curve()
            writer.finish()
            assert (recorder.steps, recorder.episodes) == (54, 10)
            assert (recorder.left_out_episodes, recorder.left_out_steps) == (2, 4)
    for path in (tmp_path / "whole").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "stopped" / path.relative_to(tmp_path / "whole")).read_bytes()
    with TaskWriter(tmp_path / "stopped", "darkroom", "task", {}) as writer:
        recorder = Recorder(writer, "darkroom", "task", [0, 1], "test", first_episode=0)
        with pytest.raises(BadInput, match="has 10 episodes, expected 12; remove the folder to begin again"):
            recorder.restore(state | {"next": 12})


def test_only_late_episodes_or_as_many_of_every_slot(tmp_path: Path) -> None:
    with TaskWriter(tmp_path, "darkroom", "late", {}) as writer:
        recorder = Recorder(writer, "darkroom", "late", [0, 1], "test", from_step=10)
        walk(recorder, 15)
        assert (recorder.episodes, recorder.left_out_episodes, recorder.left_out_steps) == (4, 2, 10)
        assert recorder.curve()["episode"].tolist() == [0, 1, 2, 3, 4, 5]
        writer.finish()
    assert read_index(tmp_path / "darkroom" / "late").numpy("episode").tolist() == [2, 3, 4, 5]
    with TaskWriter(tmp_path, "darkroom", "task", {}) as writer:
        recorder = Recorder(writer, "darkroom", "task", [0, 1], "test", quota=[1, 2])
        walk(recorder, 15)
        assert (recorder.episodes, recorder.left_out_episodes) == (3, 3)
        writer.finish()
    index = read_index(tmp_path / "darkroom" / "task")
    assert index.numpy("episode").tolist() == [0, 1, 2] and index.numpy("seed").tolist() == [0, 1, 1]


def test_the_next_run_appends(tmp_path: Path) -> None:
    for _ in range(2):
        record(make("room3x3-h5-goal-01-01", 2), tmp_path, "darkroom", 10, seed=0)
    assert len(stored(tmp_path, "darkroom")) == 8


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in "ab":
        record(diaries(cartpole, 3)[0], tmp_path / name, "darkroom", 80, seed=1)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        contents.append([(path.relative_to(tmp_path / name), path.read_bytes()) for path in files])
    assert contents[0] == contents[1] and len(contents[0]) > 5


def test_a_reset_leaves_out_what_was_under_way(tmp_path: Path) -> None:
    env = make("room3x3-h5-goal-01-01", 2)
    with TaskWriter(tmp_path, "darkroom", "task", {}) as writer:
        recorder = Recorder(writer, "darkroom", "task", [0, 1], "test")
        for _ in range(2):
            recorder.reset(env.reset()[0])
            for _ in range(7):
                states, *rest = env.step(np.zeros(2, np.int64))
                recorder.step(np.zeros(2, np.int64), states, *rest)
        recorder.close()
    assert (recorder.episodes, recorder.left_out_episodes, recorder.left_out_steps) == (4, 4, 8)


def test_a_step_before_a_reset_is_refused(tmp_path: Path) -> None:
    with TaskWriter(tmp_path, "darkroom", "task", {}) as writer:
        recorder = Recorder(writer, "darkroom", "task", [0], "test")
        no = np.zeros(1, bool)
        with pytest.raises(RuntimeError, match="reset"):
            recorder.step(np.zeros(1, np.int64), np.zeros((1, 2), np.float32), np.zeros(1), no, no, {})


def sb3_venv(build: Callable[[], gym.Env], slots: int, root: Path, domain: str) -> tuple:
    kept = [Diary(build()) for _ in range(slots)]
    venv = DummyVecEnv([lambda diary=diary: diary for diary in kept])
    writer = TaskWriter(root, domain, "task", {})
    recorder = Recorder(writer, domain, "task", slot_seeds(7, slots), "test", action_space=venv.action_space)
    return RecordVecEnv(venv, recorder), kept, writer, recorder


def test_stable_baselines3_ppo_is_recorded(tmp_path: Path) -> None:
    venv, kept, writer, recorder = sb3_venv(cartpole, 3, tmp_path, "darkroom")
    with writer:
        PPO("MlpPolicy", venv, n_steps=64, batch_size=64, n_epochs=1, seed=7, device="cpu").learn(64 * 3 * 2)
        recorder.close()
    expect_diary(stored(tmp_path, "darkroom"), kept, seed=7)
    assert {t.truncated for t in stored(tmp_path, "darkroom")} == {True, False}
    assert recorder.steps == 64 * 3 * 2


def test_stable_baselines3_sac_is_recorded(tmp_path: Path) -> None:
    venv, kept, writer, recorder = sb3_venv(car, 1, tmp_path, "metaworld")
    with writer:
        SAC("MlpPolicy", venv, learning_starts=50, train_freq=50, seed=7, device="cpu").learn(150)
        recorder.close(write_unfinished=True)
    trajectories = stored(tmp_path, "metaworld")
    expect_diary(trajectories, kept, seed=7, unfinished=True)
    assert [(t.length, t.truncated) for t in trajectories] == [(40, True)] * 3 + [(30, False)]


def test_vector_environment_reaches_stable_baselines3_unchanged() -> None:
    task = "keydoor4x4-h5-key-01-00-door-02-00"
    ours, venv = make(task, 3), VectorToSb3(make(task, 3))
    np.testing.assert_array_equal(venv.reset(), ours.reset()[0])
    generator = np.random.default_rng(0)
    for _ in range(20):
        actions = generator.integers(0, 5, 3)
        states, rewards, dones, rows = venv.step(actions)
        expected, paid, _, truncated, infos = ours.step(actions)
        np.testing.assert_array_equal(states, expected)
        np.testing.assert_array_equal(rewards, paid)
        np.testing.assert_array_equal(dones, truncated)
        for slot, row in enumerate(rows):
            assert row.get("TimeLimit.truncated", False) == truncated[slot]
            if truncated[slot]:
                np.testing.assert_array_equal(row["terminal_observation"], infos["final_obs"][slot])
                assert row["is_success"] == infos["final_info"]["success"][slot]


def test_other_autoreset_modes_are_refused() -> None:
    with pytest.raises(ValueError, match="SAME_STEP"):
        VectorToSb3(SyncVectorEnv([cartpole]))


def test_one_hot_cells_show_the_cell_and_the_key() -> None:
    rooms = make("keydoor2x3-h3-key-00-01-door-01-02", 2)
    venv = OneHotCells(VectorToSb3(rooms), rooms)
    assert venv.reset().argmax(1).tolist() == [6 * 0 + 0, 0] and venv.observation_space.shape == (12,)
    assert venv.step(np.array([1, 2]))[0].argmax(1).tolist() == [6 + 1, 3]
    assert venv.step(np.array([1, 4]))[0].argmax(1).tolist() == [6 + 2, 3]
    states, _, dones, rows = venv.step(np.array([2, 0]))
    assert dones.all() and states.argmax(1).tolist() == [0, 0]
    assert [row["terminal_observation"].argmax() for row in rows] == [6 + 5, 0]
