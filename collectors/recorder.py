"""Records what a vectorised environment does, and writes a trajectory whenever an episode ends.

    with TaskWriter(root, "darkroom", task, provenance) as writer:
        recorder = Recorder(writer, "darkroom", task, seeds=range(64), source="random policy")
        states, _ = env.reset()
        recorder.reset(states)
        for _ in range(1000):
            actions = env.action_space.sample()
            states, rewards, terminated, truncated, infos = env.step(actions)
            recorder.step(actions, states, rewards, terminated, truncated, infos)
        recorder.close()
        recorder.write_curve()          # learning_curve.parquet, beside the trajectories
        writer.finish()

One recorder for every collector: it takes exactly what a `gymnasium.vector` environment in SAME_STEP mode
returns; `lram.collectors.sb3.RecordVecEnv` feeds it from stable-baselines3. Episodes are numbered in the order in
which they end, and by slot where several end in one step, so the same run gives the same files; `state` and
`restore` let a run go on where another stopped.
What it trades away: each slot keeps a buffer as long as the longest episode that any slot has had, and an episode
reaches the disk only when it ends.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lram.datasets.index import read_index, task_folder
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, write_whole
from lram.datasets.writer import TaskWriter, finished, same_provenance

CURVE = "learning_curve.parquet"
"""Name of the learning curve in a task's folder."""
CURVE_SCHEMA = pa.schema(
    [
        ("episode", pa.int64()),
        ("steps", pa.int64()),
        ("return", pa.float64()),
        ("length", pa.int64()),
        ("success", pa.bool_()),
    ]
)
"""One row per episode that ended. `steps` are the transitions of all slots when it ended, which is how long the
policy had been learning; `success` is null where the environment does not say."""
_FIRST_CAPACITY = 128
"""Steps of an episode that buffers hold before they grow for the first time."""


class Recorder:
    """Buffers the episode under way in every slot; hands it to a `TaskWriter` when it ends.

    Attributes:
        seeds: For every slot, the seed that its trajectories carry.
        steps: Transitions seen so far, over all slots.
        episodes: Trajectories written so far.
        left_out_episodes: Episodes that were begun and not written: most because they never ended.
        left_out_steps: Transitions of those episodes.
    """

    def __init__(
        self,
        writer: TaskWriter,
        domain: str,
        task: str,
        seeds: Sequence[int],
        source: str,
        first_episode: int | None = None,
        action_space: gym.Space | None = None,
        state_layout: dict[str, list[int]] | None = None,
        from_step: int = 0,
        quota: Sequence[int] | None = None,
    ) -> None:
        """Starts a recording.

        Args:
            writer: Where trajectories go; the caller opens it, finishes it and closes it.
            domain: The task's domain.
            task: The task's name.
            seeds: For every slot, the seed its stream of episodes was started with; each of the slot's
                trajectories carries it.
            source: Who makes these trajectories, with versions.
            first_episode: Number of the first trajectory, by default the writer's next one.
            action_space: Of one slot. For a Box, actions are clipped to it, as the environment does: what is
                stored is what was executed.
            state_layout: {key: [start, stop]} over the columns of vector states.
            from_step: Leave out episodes that began before this many transitions; the learning curve has them.
            quota: For every slot, how many of its episodes are numbered and written; the rest are left out.
                Recording until there are enough of all slots would prefer short episodes.
        """
        self._writer = writer
        self._domain, self._task, self._source = domain, task, source
        self.seeds = [int(seed) for seed in seeds]
        self._from_step = from_step
        self._quota = None if quota is None else list(quota)
        self._box = action_space if isinstance(action_space, gym.spaces.Box) else None
        self._layout = state_layout
        self._slots = np.arange(len(self.seeds))
        self._lengths = np.zeros(len(self.seeds), np.int64)
        self._longest = 0
        self._states: np.ndarray | None = None
        self._actions: np.ndarray | None = None
        self._rewards = np.zeros((len(self.seeds), _FIRST_CAPACITY), np.float32)
        self._begun = np.zeros(len(self.seeds), np.int64)
        self._curve: list[tuple[int, int, float, int, bool | None]] = []
        self._next = writer.next_episode if first_episode is None else first_episode
        self.steps = self.episodes = self.left_out_episodes = self.left_out_steps = 0

    @property
    def under_way(self) -> int:
        """Returns the transitions of episodes that have not ended."""
        return int(self._lengths.sum())

    def reset(self, states: np.ndarray) -> None:
        """Takes the first states after a reset of every slot; episodes under way are left out.

        Args:
            states: (N, D) or (N, C, 64, 64).
        """
        self._leave_out()
        if self._states is None:
            shape = (len(self._slots), self._rewards.shape[1], *states.shape[1:])
            self._states = np.empty(shape, np.uint8 if states.dtype == np.uint8 else np.float32)
        self._states[:, 0] = states
        self._begun[:] = self.steps

    def step(
        self,
        actions: np.ndarray,
        states: np.ndarray,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        infos: dict[str, Any],
    ) -> None:
        """Takes one step of every slot.

        Args:
            actions: (N,) integers or (N, A) floats, as given to the environment.
            states: What it returned, (N, ...): the next state, or after an end the new episode's first.
            rewards: (N,).
            terminated: (N,) bool.
            truncated: (N,) bool.
            infos: `final_obs[i]` is the last state of an episode that ended in slot i;
                `final_info["success"][i]`, where given, whether it solved its task.
        """
        if self._states is None:
            raise RuntimeError("Recorder.reset has to be given the first states before the first step")
        if self._actions is None:
            self._actions = self._empty_actions(actions)
        if self._box is not None:
            actions = np.minimum(np.maximum(actions, self._box.low), self._box.high)  # a third of np.clip's time
        at = self._place()
        self._actions[at] = actions
        self._rewards[at] = rewards
        self._lengths += 1
        self._longest += 1
        self.steps += len(self._slots)
        if np.count_nonzero(terminated) or np.count_nonzero(truncated):
            for slot in np.flatnonzero(terminated | truncated).tolist():
                success = _success(infos, slot)
                self._write(slot, bool(terminated[slot]), bool(truncated[slot]), infos["final_obs"][slot], success)
                self._lengths[slot], self._begun[slot] = 0, self.steps
            self._longest = int(self._lengths.max())
        if self._longest == self._rewards.shape[1]:
            self._grow()
        self._states[self._place()] = states

    def _place(self) -> tuple[Any, Any]:
        """Returns the index of every slot's next step in the buffers; of one slot a slice, which is faster."""
        return (self._slots, self._lengths) if len(self._slots) > 1 else (slice(1), self._longest)

    def close(self, write_unfinished: bool = False) -> None:
        """Ends the recording.

        Args:
            write_unfinished: Write the episodes still under way, in order of slots, neither terminated nor
                truncated; by default they are counted in `left_out_episodes` and `left_out_steps`.
        """
        if write_unfinished and self._states is not None:
            for slot in np.flatnonzero(self._lengths).tolist():
                self._write(slot, False, False, self._states[slot, self._lengths[slot]], None)
                self._lengths[slot] = 0
        self._leave_out()

    def curve(self) -> dict[str, np.ndarray]:
        """Returns the learning curve: one entry per episode that ended, in order; columns of `CURVE_SCHEMA`."""
        table = self._table()
        columns = {name: table[name].to_numpy() for name in table.column_names if name != "success"}
        return columns | {"success": np.array(table["success"].to_pylist(), object)}

    def _table(self) -> pa.Table:
        columns = zip(*self._curve) if self._curve else [()] * len(CURVE_SCHEMA)
        return pa.table([list(column) for column in columns], schema=CURVE_SCHEMA)

    def write_curve(self) -> Path:
        """Writes the learning curve whole into the task's folder; returns its path."""
        buffer = io.BytesIO()
        pq.write_table(self._table(), buffer, compression="zstd")
        path = self._writer.folder / CURVE
        write_whole(path, buffer.getvalue())
        return path

    def state(self) -> dict[str, int]:
        """Returns where the recording is, for `restore`; call it between episodes, after `write_curve`.

        All trajectories up to there are on disk when it returns: a checkpoint may rely on them.
        """
        self._writer.sync()
        return {
            "next": self._next,
            "steps": self.steps,
            "episodes": self.episodes,
            "left_out_episodes": self.left_out_episodes,
            "left_out_steps": self.left_out_steps,
        }

    def restore(self, state: dict[str, int]) -> None:
        """Goes on from where another recorder of the same task was.

        What that one wrote later is overwritten as the run comes to it; the curve's rows of later episodes are
        dropped.

        Raises:
            BadInput: The learning curve is missing or unreadable, or ends before.
        """
        rows = read_curve(self._writer.folder).to_pylist()
        self._curve = [tuple(row.values()) for row in rows if row["episode"] < state["next"]]
        if len(self._curve) != state["next"]:
            found = f"has {len(self._curve)} episodes, expected {state['next']}"
            raise BadInput(f"{self._writer.folder / CURVE}: {found}; remove the folder to begin again")
        self._next, self.steps, self.episodes = state["next"], state["steps"], state["episodes"]
        self.left_out_episodes, self.left_out_steps = state["left_out_episodes"], state["left_out_steps"]

    def _empty_actions(self, actions: np.ndarray) -> np.ndarray:
        kind = np.int64 if np.issubdtype(actions.dtype, np.integer) else np.float32
        return np.empty((*self._rewards.shape, *actions.shape[1:]), kind)

    def _write(
        self, slot: int, terminated: bool, truncated: bool, final_state: np.ndarray, success: bool | None
    ) -> None:
        assert self._states is not None and self._actions is not None
        length = int(self._lengths[slot])
        enough = self._quota is not None and self._quota[slot] == 0
        if not enough:
            total = float(np.sum(self._rewards[slot, :length], dtype=np.float64))
            self._curve.append((self._next, self.steps, total, length, success))
            self._next += 1
        if enough or self._begun[slot] < self._from_step:
            self.left_out_episodes += 1
            self.left_out_steps += length
            return
        if self._quota is not None:
            self._quota[slot] -= 1
        # Copies: the buffers go on being written while the writer may still hold the trajectory.
        trajectory = Trajectory(
            domain=self._domain,
            task=self._task,
            episode=self._next - 1,
            seed=self.seeds[slot],
            states=self._states[slot, :length].copy(),
            actions=self._actions[slot, :length].copy(),
            rewards=self._rewards[slot, :length].copy(),
            terminated=terminated,
            truncated=truncated,
            source=self._source,
            final_state=np.array(final_state, self._states.dtype),
            success=success,
            state_layout=self._layout,
        )
        self._writer.add(trajectory)
        self.episodes += 1

    def _grow(self) -> None:
        """Doubles the buffers; only what is in use is copied, so untouched pages cost nothing."""
        assert self._states is not None and self._actions is not None
        grown = []
        for old in (self._states, self._actions, self._rewards):
            new = np.empty((old.shape[0], 2 * old.shape[1], *old.shape[2:]), old.dtype)
            for slot, length in enumerate(self._lengths):
                new[slot, :length] = old[slot, :length]
            grown.append(new)
        self._states, self._actions, self._rewards = grown

    def _leave_out(self) -> None:
        self.left_out_episodes += int(np.count_nonzero(self._lengths))
        self.left_out_steps += int(self._lengths.sum())
        self._lengths[:] = 0
        self._longest = 0


def _success(infos: dict[str, Any], slot: int) -> bool | None:
    """Reads whether the episode that ended in a slot solved its task; None where the environment does not say."""
    final = infos.get("final_info", {})
    if "success" not in final or not final.get("_success", [True] * (slot + 1))[slot]:
        return None
    value = final["success"][slot]
    return None if value is None else bool(value)


def read_curve(folder: Path) -> pa.Table:
    """Reads the learning curve of a task, columns of `CURVE_SCHEMA`.

    Raises:
        BadInput: It is missing or not one of ours.
    """
    path = Path(folder) / CURVE
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{path}: not a readable learning curve ({str(error).splitlines()[0]})") from error
    if not table.schema.equals(CURVE_SCHEMA, check_metadata=False):
        raise BadInput(f"{path}: columns are {table.column_names}, expected {CURVE_SCHEMA.names}")
    return table


def record_once(
    root: Path,
    domain: str,
    task: str,
    provenance: dict[str, Any],
    collect: Callable[[TaskWriter], dict[str, int]],
    recent: int,
) -> dict[str, Any]:
    """Has a specialist's task recorded, unless it is complete on disk.

    Args:
        root: The dataset's directory.
        domain: The task's domain.
        task: Its name there.
        provenance: What decides the content of its files; libraries may have been updated since.
        collect: Records it; returns `left_out`, transitions that it did not store, and what else it has to say.
        recent: Trajectories, from the last, that `last_return` is the mean of.

    Returns:
        `task`, `skipped` (it was complete on disk), `episodes` and `steps` stored, `last_return`, `left_out`, `seconds`
        and what `collect` said.

    Raises:
        BadInput: The folder was made with other settings.
    """
    started = time.perf_counter()
    old = finished(root, domain, task)
    said = {"left_out": 0, "learned": 0}
    if old is None:
        with TaskWriter(root, domain, task, provenance) as writer:
            said |= collect(writer)
            writer.finish({"left_out_steps": said["left_out"]})
    else:
        same_provenance(old, provenance, task_folder(root, domain, task), free=frozenset({"source"}))
    index = read_index(task_folder(root, domain, task))
    returns = index.numpy("return")
    return {
        "task": task,
        "skipped": old is not None,
        "episodes": len(returns),
        "steps": int(index.numpy("length").sum()),
        "last_return": float(returns[-recent:].mean()) if len(returns) else float("nan"),
        "seconds": time.perf_counter() - started,
        **said,
    }
