"""Dark-Room's rules, and that the vectorised form is the single one, many times."""

from __future__ import annotations

import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from lram.collectors.darkroom import DarkRoom, DarkRoomVector, Room, goals, make, parse_task, rooms, task_name
from lram.datasets.specs import DOMAINS, BadInput

UP, RIGHT, DOWN, LEFT, STAY = range(5)


@st.composite
def any_room(draw: st.DrawFn) -> Room:
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    cell = st.tuples(st.integers(0, rows - 1), st.integers(0, cols - 1))
    return Room(rows, cols, draw(cell), draw(st.none() | cell), draw(st.booleans()), draw(st.integers(1, 12)))


def play(room: Room, actions: list[int]) -> tuple[list[float], list[list[float]], bool]:
    env = DarkRoom(room)
    env.reset(seed=0)
    steps = [env.step(np.int64(action)) for action in actions]
    return [step[1] for step in steps], [step[0].tolist() for step in steps], steps[-1][4]["success"]


def test_goals_are_the_papers() -> None:
    training, holdout = goals(10)
    order = np.random.RandomState(43).permutation(100)
    assert training == [divmod(int(cell), 10) for cell in order[:80]]
    assert holdout == [divmod(int(cell), 10) for cell in order[80:]]
    assert len({*training, *holdout}) == 100
    # Written down once by hand, so that a change of NumPy's generator cannot go unnoticed.
    assert training[:3] == [(2, 0), (0, 2), (1, 5)]


@pytest.mark.parametrize("size", [1, 2, 5, 7, (3, 8)])
def test_every_size_is_split_into_four_fifths_and_the_rest(size: int | tuple[int, int]) -> None:
    rows, cols = (size, size) if isinstance(size, int) else size
    training, holdout = goals(size)
    assert len(training) == rows * cols * 4 // 5
    assert {*training, *holdout} == {(row, col) for row in range(rows) for col in range(cols)}


def test_the_ith_door_has_the_ith_key() -> None:
    training, holdout = rooms(10, keydoor=True)
    keys = [divmod(int(cell), 10) for cell in np.random.RandomState(42).permutation(100)]
    assert [room.key for room in training + holdout] == keys
    assert [room.goal for room in training] == goals(10)[0]
    assert all(room.horizon == 100 and not room.sparse for room in training + holdout)


@given(any_room())
def test_names_and_rooms_are_one_to_one(room: Room) -> None:
    name = task_name(room)
    assert parse_task(name) == room
    assert name == name.strip("./") and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("room10x10-goal-07-03", Room(10, 10, (7, 3), horizon=100)),
        ("room5x5-h20-goal-00-04", Room(5, 5, (0, 4), horizon=20)),
        ("room20x40-sparse-goal-19-39", Room(20, 40, (19, 39), sparse=True, horizon=800)),
        ("keydoor10x10-key-02-05-door-07-03", Room(10, 10, (7, 3), key=(2, 5))),
    ],
)
def test_names_read_as_documented(name: str, room: Room) -> None:
    assert task_name(room) == name and parse_task(name) == room


@pytest.mark.parametrize(
    "name",
    [
        "room10x10-goal-7-3",
        "room10x10-h100-goal-07-03",
        "room10x10-goal-10-00",
        "room0x0-goal-00-00",
        "keydoor10x10-goal-07-03",
        "room10x10-door-07-03",
        "room10x10-goal-07-03\n",
        "",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(BadInput):
        parse_task(name)


def test_moves_and_walls() -> None:
    _, states, _ = play(Room(3, 2, (2, 1)), [UP, LEFT, RIGHT, RIGHT, DOWN, DOWN, DOWN, UP, LEFT, STAY])
    assert states == [[0, 0], [0, 0], [0, 1], [0, 1], [1, 1], [2, 1], [2, 1], [1, 1], [1, 0], [1, 0]]


def test_dense_pays_every_step_on_the_goal() -> None:
    rewards, _, success = play(Room(3, 3, (0, 1), horizon=8), [RIGHT, STAY, UP, RIGHT, LEFT, LEFT, STAY, RIGHT])
    assert rewards == [1, 1, 1, 0, 1, 0, 0, 1] and success


def test_sparse_pays_once_an_episode() -> None:
    env = DarkRoom(Room(3, 3, (0, 1), sparse=True, horizon=4))
    for _ in range(2):
        env.reset()
        assert [env.step(np.int64(action))[1] for action in (RIGHT, STAY, LEFT, RIGHT)] == [1, 0, 0, 0]


def test_keydoor_pays_the_key_once_and_the_door_only_after_it() -> None:
    actions = [RIGHT, STAY, LEFT, DOWN, STAY, UP, RIGHT, RIGHT, STAY]
    dense = Room(3, 3, (0, 1), key=(1, 0))
    assert play(dense, actions)[0] == [0, 0, 0, 1, 0, 0, 1, 0, 0]
    assert play(dense, [DOWN, UP, RIGHT, STAY, STAY])[0] == [1, 0, 1, 1, 1]
    assert play(Room(3, 3, (0, 1), (1, 0), sparse=True), [DOWN, UP, RIGHT, STAY])[0] == [1, 0, 1, 0]
    # Key and door in one cell: the key first, the door from the next step on.
    assert play(Room(3, 3, (0, 1), key=(0, 1)), [RIGHT, STAY, STAY])[0] == [1, 1, 1]
    assert play(dense, [RIGHT, STAY])[2] is False


def test_never_terminates_and_is_truncated_at_the_horizon() -> None:
    env = DarkRoom("room10x10-goal-00-01")
    env.reset()
    ends = [env.step(np.int64(RIGHT))[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


@given(any_room())
def test_best_return_is_what_the_shortest_path_earns(room: Room) -> None:
    def walk(start: tuple[int, int], end: tuple[int, int]) -> list[int]:
        down, right = end[0] - start[0], end[1] - start[1]
        return [DOWN if down > 0 else UP] * abs(down) + [RIGHT if right > 0 else LEFT] * abs(right)

    stops = [room.goal] if room.key is None else [room.key, room.goal]
    actions, here = [], (0, 0)
    for stop in stops:
        actions += walk(here, stop) or [STAY]
        here = stop
    actions = (actions + [STAY] * room.horizon)[: room.horizon]
    assert sum(play(room, actions)[0]) == room.best_return


@pytest.mark.filterwarnings("ignore:.*not within the observation space|.*spec:UserWarning")
@pytest.mark.parametrize("name", ["room10x10-goal-07-03", "keydoor5x5-sparse-h20-key-02-01-door-00-04"])
def test_gymnasium_accepts_it(name: str) -> None:
    check_env(DarkRoom(name), skip_render_check=True)


def same(ours: object, theirs: object) -> None:
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and ours.keys() == theirs.keys()
        for key in theirs:
            same(ours[key], theirs[key])
    elif isinstance(theirs, np.ndarray) and theirs.dtype == object:
        assert isinstance(ours, np.ndarray) and ours.dtype == object
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    else:
        np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None, max_examples=50)
@given(st.lists(any_room(), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_vector_equals_gymnasiums_vector_of_single_environments(tasks: list[Room], seed: int) -> None:
    # SyncVectorEnv wants one observation space: give every slot the largest.
    high = np.array([[room.rows - 1, room.cols - 1] for room in tasks], np.float32).max(0)

    def single(room: Room) -> gym.Env:
        env = DarkRoom(room)
        env.observation_space = gym.spaces.Box(np.zeros(2, np.float32), high)
        return env

    theirs = SyncVectorEnv([lambda room=room: single(room) for room in tasks], autoreset_mode=AutoresetMode.SAME_STEP)
    ours = DarkRoomVector(tasks)
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"]
    for one, other in zip(ours.reset(seed=seed), theirs.reset(seed=seed), strict=True):
        same(one, other)
    generator = np.random.default_rng(seed)
    for _ in range(30):
        actions = generator.integers(0, 5, len(tasks))
        for one, other in zip(ours.step(actions), theirs.step(actions), strict=True):
            same(one, other)


def test_returned_arrays_stay_as_they_were() -> None:
    env = make("room5x5-h3-goal-02-02", 2)
    seen, kept = [], []
    for step in range(6):
        result = env.step(np.array([DOWN, RIGHT]))
        arrays = [*result[:4], result[4]["success"], *result[4].get("final_obs", [])]
        seen.append(arrays)
        kept.append([array.copy() for array in arrays])
        assert ("final_obs" in result[4]) == (step % 3 == 2)
    for before, after in zip(kept, seen, strict=True):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)


def test_held_key_is_known_at_the_end_of_an_episode() -> None:
    env = make("keydoor5x5-h2-key-01-00-door-02-02", 2)
    env.step(np.array([DOWN, UP]))
    assert env.has_key.tolist() == [True, False]
    env.step(np.array([DOWN, UP]))
    assert env.has_key.tolist() == [False, False] and env.final_has_key.tolist() == [True, False]


@pytest.mark.parametrize("actions", [[0], [0, 5], [-1, 0]])
def test_wrong_actions_are_refused(actions: list[int]) -> None:
    with pytest.raises(ValueError, match="actions must be 2 integers"):
        make("room5x5-goal-01-01", 2).step(np.array(actions))
    with pytest.raises(ValueError, match="is none of"):
        DarkRoom("room5x5-goal-01-01").step(np.int64(5))


def test_spaces_are_what_the_domain_says() -> None:
    env = make("room10x10-goal-07-03", 3, seed=1)
    spec = DOMAINS["darkroom"]
    assert env.single_action_space == gym.spaces.Discrete(spec.num_actions)
    assert env.single_observation_space.shape == (2,) and env.single_observation_space.dtype == np.float32
    assert np.array_equal(env.action_space.sample(), make("room10x10-goal-07-03", 3, seed=1).action_space.sample())


def test_a_step_of_64_slots_is_fast() -> None:
    env = make("keydoor10x10-key-02-05-door-07-03", 64)
    actions = env.action_space.sample()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(200):
            env.step(actions)
        best = min(best, (time.perf_counter() - start) / 200)
    assert best < 200e-6  # about 10 microseconds alone on a core; the bound is for a busy machine


def test_importing_it_is_light() -> None:
    heavy = ["torch", "stable_baselines3", "h5py"]
    code = f"import lram.collectors.darkroom, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
