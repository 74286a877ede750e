"""Dark-Room and Dark Key-Door: a grid whose goal the agent cannot see, one environment and many at once.

    from lram.collectors.darkroom import make, rooms, task_name
    training, holdout = rooms(10)                       # the paper's 80 and 20 goals
    env = make(task_name(training[0]), num_envs=64, seed=0)
    states, infos = env.reset()
    states, rewards, terminated, truncated, infos = env.step(env.action_space.sample())

The agent starts at [0, 0], sees its own cell and nothing else, and moves up, right, down, left, or stays; walls
block. In a room the goal pays +1 for every step that ends on it. In a Key-Door room the key's cell pays +1 once
an episode, and from the step after that the door pays +1 for every step that ends on it. With `sparse` the goal
(or door) pays only the first such step of an episode. No episode terminates: each is truncated at the horizon.
That is LRAM's and RA-DT's game (their dense, sparse and Key-Door levels), without MiniHack underneath.

`DarkRoom` is written for reading and `DarkRoomVector` for speed; a test holds them to the same numbers.
What it trades away: no rendering, and whether the key is held is never part of the state, as in the paper: an
agent has to remember it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lram.datasets.specs import BadInput

ACTIONS = ("up", "right", "down", "left", "stay")
"""Names of the actions 0..4."""
MOVES = np.array([[-1, 0], [0, 1], [1, 0], [0, -1], [0, 0]], np.float32)
"""(row, column) that each action adds, shape (5, 2)."""

_GOAL_SEED = 43
"""Seed of the permutation of goal cells (and of doors), from the LRAM code."""
_KEY_SEED = 42
"""Seed of the permutation of key cells, from the LRAM code."""

Cell = tuple[int, int]
"""(row, column), both from 0, counted from the top left corner."""


@dataclass(frozen=True)
class Room:
    """One task: the grid, where the goal is, and how it pays.

    Attributes:
        rows: Height of the grid in cells.
        cols: Width of the grid in cells.
        goal: Cell of the goal, or of the door when there is a key.
        key: Cell of the key; None for a room without one.
        sparse: The goal pays once an episode and not for every step on it.
        horizon: Steps per episode; 0 stands for one per cell, which is the paper's 100 for 10x10.
    """

    rows: int
    cols: int
    goal: Cell
    key: Cell | None = None
    sparse: bool = False
    horizon: int = 0

    def __post_init__(self) -> None:
        if self.horizon == 0:
            object.__setattr__(self, "horizon", self.rows * self.cols)
        if self.rows < 1 or self.cols < 1 or self.horizon < 1:
            raise BadInput(f"a room needs at least one row, one column and one step: {self}")
        for cell in (self.goal, self.key):
            if cell is not None and not (0 <= cell[0] < self.rows and 0 <= cell[1] < self.cols):
                raise BadInput(f"cell {cell} is not in a room of {self.rows}x{self.cols}")

    @property
    def best_return(self) -> int:
        """Highest return an agent can have that knows where everything is."""
        walk = max(1, sum(self.goal if self.key is None else self.key))
        if self.key is not None:
            if walk > self.horizon:
                return 0
            walk += max(1, abs(self.goal[0] - self.key[0]) + abs(self.goal[1] - self.key[1]))
        paid = max(0, self.horizon - walk + 1)
        return (min(paid, 1) if self.sparse else paid) + (self.key is not None)


def task_name(room: Room) -> str:
    """Names a room: `room10x10-goal-07-03`, `keydoor5x5-sparse-h20-key-02-01-door-00-04`.

    The horizon is part of the name where it is not one step per cell. `parse_task` is the way back.
    """
    kind, end = ("room", "goal") if room.key is None else ("keydoor", "door")
    name = f"{kind}{room.rows}x{room.cols}"
    name += "-sparse" if room.sparse else ""
    name += f"-h{room.horizon}" if room.horizon != room.rows * room.cols else ""
    name += f"-key-{room.key[0]:02d}-{room.key[1]:02d}" if room.key is not None else ""
    return f"{name}-{end}-{room.goal[0]:02d}-{room.goal[1]:02d}"


_NAME = re.compile(r"(?:room|keydoor)(\d+)x(\d+)(-sparse)?(?:-h(\d+))?(?:-key-(\d+)-(\d+))?-(?:goal|door)-(\d+)-(\d+)")


def parse_task(name: str) -> Room:
    """Reads a task name back into its room.

    Raises:
        BadInput: No room has this name.
    """
    match = _NAME.fullmatch(name)
    if match:
        rows, cols, sparse, horizon, *cells = match.groups()
        key_row, key_col, goal_row, goal_col = (None if cell is None else int(cell) for cell in cells)
        assert goal_row is not None and goal_col is not None
        key = None if key_row is None or key_col is None else (key_row, key_col)
        room = Room(int(rows), int(cols), (goal_row, goal_col), key, sparse is not None, int(horizon or 0))
        # One room has one name: "room10x10-h100-..." or a goal without its zero would be a second one.
        if task_name(room) == name:
            return room
    raise BadInput(
        f"{name!r} is not a Dark-Room task; names look like 'room10x10-goal-07-03' "
        "or 'keydoor10x10-key-02-05-door-07-03'"
    )


def _cells(size: int | tuple[int, int], seed: int) -> list[Cell]:
    """Returns every cell of a grid once, in the order that the seed gives."""
    rows, cols = (size, size) if isinstance(size, int) else size
    # RandomState and not a Generator: the published goals were drawn with it.
    order = np.random.RandomState(seed).permutation(rows * cols)
    return [divmod(int(cell), cols) for cell in order]


def goals(size: int | tuple[int, int] = 10) -> tuple[list[Cell], list[Cell]]:
    """Splits the cells of a grid into training and hold-out goals, as the LRAM code does.

    Args:
        size: Side of a square grid, or (rows, columns).

    Returns:
        The first four fifths of the permuted cells (rounded down) and the rest: 80 and 20 for 10x10.
    """
    cells = _cells(size, _GOAL_SEED)
    cut = len(cells) * 4 // 5
    return cells[:cut], cells[cut:]


def rooms(
    size: int | tuple[int, int] = 10, keydoor: bool = False, sparse: bool = False, horizon: int = 0
) -> tuple[list[Room], list[Room]]:
    """Lists the training and the hold-out rooms of one size, in the order of `goals`.

    Args:
        size: Side of a square grid, or (rows, columns).
        keydoor: Give the i-th goal (then a door) the i-th key.
        sparse: The goal pays once an episode.
        horizon: Steps per episode; 0 stands for one per cell.

    Returns:
        Training rooms and hold-out rooms.
    """
    rows, cols = (size, size) if isinstance(size, int) else size
    training, holdout = goals(size)
    keys: list[Cell | None] = [*_cells(size, _KEY_SEED)] if keydoor else [None] * (rows * cols)
    every = [Room(rows, cols, goal, key, sparse, horizon) for goal, key in zip(training + holdout, keys)]
    return every[: len(training)], every[len(training) :]


def make(task: str, num_envs: int = 1, seed: int = 0) -> DarkRoomVector:
    """Builds `num_envs` slots of one task, the signature that the environments of every domain share."""
    return DarkRoomVector([task] * num_envs, seed=seed)


class DarkRoom(gym.Env[np.ndarray, np.int64]):
    """One room. States are (2,) float32 [row, column]; `info["success"]` says whether the goal has paid yet."""

    metadata = {"render_modes": []}  # noqa: RUF012  (declared so by Gymnasium)

    def __init__(self, task: str | Room) -> None:
        self.room = parse_task(task) if isinstance(task, str) else task
        high = np.array([self.room.rows - 1, self.room.cols - 1], np.float32)
        self.observation_space = gym.spaces.Box(np.zeros(2, np.float32), high, dtype=np.float32)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self._start()

    def _start(self) -> None:
        self._row = self._col = self._steps = 0
        self._has_key, self._success = self.room.key is None, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts the agent back to [0, 0]; nothing in a room is random, whatever the seed."""
        super().reset(seed=seed)
        self._start()
        return np.zeros(2, np.float32), {"success": False}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves one cell, pays for where that ends, and truncates at the horizon."""
        if not 0 <= action < len(ACTIONS):
            raise ValueError(f"action {action} is none of 0..{len(ACTIONS) - 1}, {', '.join(ACTIONS)}")
        self._row = min(max(self._row + int(MOVES[action, 0]), 0), self.room.rows - 1)
        self._col = min(max(self._col + int(MOVES[action, 1]), 0), self.room.cols - 1)
        self._steps += 1
        reward = 0.0
        if self._has_key:
            if (self._row, self._col) == self.room.goal and not (self.room.sparse and self._success):
                reward, self._success = 1.0, True
        elif (self._row, self._col) == self.room.key:
            reward, self._has_key = 1.0, True
        state = np.array([self._row, self._col], np.float32)
        return state, reward, False, self._steps >= self.room.horizon, {"success": self._success}


class DarkRoomVector(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Many rooms stepped together by NumPy: about 10 microseconds for a step of 64 slots.

    An episode that ends starts again within the same step (`AutoresetMode.SAME_STEP`): the state returned is then
    the new episode's first, and the one that was really seen last is in `infos["final_obs"]`.

    Attributes:
        rooms: The room of each slot; goals, sizes and horizons may all differ.
        has_key: Whether each slot's agent holds the key, shape (N,) bool; always true where there is none. Not
            part of the state: for specialists that are allowed to know more than they record.
        final_has_key: `has_key` as it was when the last episode to end in each slot ended, shape (N,) bool.
    """

    def __init__(self, tasks: Sequence[str | Room], seed: int = 0) -> None:
        """Builds one slot per task.

        Args:
            tasks: Task names or rooms, one per slot.
            seed: Seed of the action space; the rooms themselves are not random.
        """
        self.rooms = [parse_task(task) if isinstance(task, str) else task for task in tasks]
        if not self.rooms:
            raise ValueError("DarkRoomVector needs at least one task")
        self.num_envs = len(self.rooms)
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
        self._corner = np.array([[room.rows - 1, room.cols - 1] for room in self.rooms], np.float32)
        self._cols = np.array([room.cols for room in self.rooms], np.float32)
        self._goal = np.array([room.goal[0] * room.cols + room.goal[1] for room in self.rooms], np.float32)
        # A cell that no agent is ever on stands for "no key", so that one comparison serves both games.
        keys = [-1 if room.key is None else room.key[0] * room.cols + room.key[1] for room in self.rooms]
        self._key = np.array(keys, np.float32)
        self._needs_key = self._key >= 0
        self._any_key = bool(self._needs_key.any())
        self._sparse = np.array([room.sparse for room in self.rooms])
        self._any_sparse = bool(self._sparse.any())
        self._horizon = np.array([room.horizon for room in self.rooms], np.int64)
        self.single_observation_space = gym.spaces.Box(np.zeros(2, np.float32), self._corner.max(0), dtype=np.float32)
        self.single_action_space = gym.spaces.Discrete(len(ACTIONS))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.action_space.seed(seed)
        self._states = np.zeros((self.num_envs, 2), np.float32)
        self._steps = np.zeros(self.num_envs, np.int64)
        self._success = np.zeros(self.num_envs, bool)
        self.has_key = ~self._needs_key
        self.final_has_key = self.has_key.copy()
        self._all = np.ones(self.num_envs, bool)
        self._never = np.zeros(self.num_envs, bool)

    def _restart(self, slots: np.ndarray) -> None:
        """Starts new episodes where `slots`, shape (N,) bool, is true."""
        self._states[slots] = 0.0
        self._steps[slots] = 0
        self._success[slots] = False
        self.has_key[slots] = ~self._needs_key[slots]

    def _infos(self) -> dict[str, Any]:
        return {"success": self._success.copy(), "_success": self._all.copy()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts every agent back to [0, 0]; nothing in a room is random, whatever the seed."""
        super().reset(seed=seed)
        self._restart(self._all)
        return self._states.copy(), self._infos()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Moves every agent one cell.

        Args:
            actions: (N,) integers 0..4.

        Returns:
            States (N, 2) float32, rewards (N,) float32, terminated and truncated (N,) bool, and infos as
            Gymnasium's `SyncVectorEnv` gives them in SAME_STEP mode: `success`, and where an episode ended
            `final_obs` and `final_info`.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.min() < 0 or actions.max() >= len(ACTIONS):
            raise ValueError(f"actions must be {self.num_envs} integers 0..{len(ACTIONS) - 1}: {actions}")
        states = self._states
        states += MOVES[actions]
        np.maximum(states, 0.0, out=states)
        np.minimum(states, self._corner, out=states)
        self._steps += 1
        cell = states[:, 0] * self._cols + states[:, 1]
        paid = cell == self._goal
        if self._any_key:
            found = (cell == self._key) & ~self.has_key
            paid &= self.has_key
        if self._any_sparse:
            paid &= ~(self._sparse & self._success)
        self._success |= paid
        if self._any_key:
            self.has_key |= found
            paid |= found
        rewards = paid.astype(np.float32)
        truncated = self._steps >= self._horizon
        if not truncated.any():
            return states.copy(), rewards, self._never.copy(), truncated, self._infos()
        final_obs = np.full(self.num_envs, None, object)
        for slot in np.flatnonzero(truncated):
            final_obs[slot] = states[slot].copy()
        final = {"success": self._success & truncated, "_success": truncated.copy()}
        self.final_has_key[truncated] = self.has_key[truncated]
        self._restart(truncated)
        infos = self._infos() | {
            "final_obs": final_obs,
            "_final_obs": truncated.copy(),
            "final_info": final,
            "_final_info": truncated.copy(),
        }
        return states.copy(), rewards, self._never.copy(), truncated, infos
