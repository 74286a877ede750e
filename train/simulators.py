"""Simulators in worker processes; their states and rewards lie in memory that the policy's process sees too.

    with Simulators("dmcontrol", slots=16, workers=2) as simulators:
        simulators.send(0, {0: Job("dmcontrol", "walker-stand", 7)})            # slot 0 starts episode 7
        events = simulators.receive(0)                                          # [Event(0, "started", …)]
        simulators.board.actions[0] = …
        simulators.send(0, {})                                                  # every slot of half 0 takes a step

A slot plays one episode at a time, of any task of the domain. The slots are in two halves, and every process has
slots of both: it simulates one half while the policy reads the other. An episode follows from (seed, task, number)
alone, wherever and beside whatever it is played. What raises, returns NaN, hangs or kills its process costs one
episode: which one, each process notes before every call. The others of that process are "lost" through no fault of
theirs, and can be played again.
What it trades away: every slot is an environment of its own, so one that is quicker in batches (Procgen, Dark-Room)
is stepped one by one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

from lram.collectors import environments
from lram.collectors.slots import Slots
from lram.datasets.specs import DOMAINS, IMAGE_SIDE, NUM_DIMS, STATE_WIDTH, BadInput, state_columns

Make = Callable[[str, str, int, int, int], VectorEnv]
"""Builds an environment from domain, task, number of slots, seed and number of the first episode."""
FIRST_SEED = 1_000_003
"""Added to the seed of an evaluation: its episodes are not those of a collection with the same seed."""
POLL_SECONDS = 0.5
IDLE = -1


class Job(NamedTuple):
    """An episode to play."""

    domain: str
    task: str
    episode: int

    @property
    def name(self) -> str:
        """Returns <domain>/<task>."""
        return f"{self.domain}/{self.task}"


class Event(NamedTuple):
    """What happened in a slot.

    Attributes:
        slot: The slot.
        kind: "started", "ended", "failed" (this episode cannot be played), "missing" (this task cannot be built) or
            "lost" (the process died while another episode was being stepped).
        detail: Of "started": `columns` of the state's numbers and `layout` (vectors), `dims` valid actions. Of
            "ended": `return`, `length`, `terminated`, `truncated`, `success`, `score`. Else `words`.
    """

    slot: int
    kind: str
    detail: dict[str, Any]


@dataclass
class Board:
    """The shared memory; S slots, W processes.

    Attributes:
        states: (S, 204) float32 in policy columns, or (S, 1, 64, 64) uint8.
        finals: The same; what was seen last in an episode that ended.
        actions: (S,) int64, or (S, 8) float32.
        rewards: (S,) float32.
        at: (W,) int64; the slot being called, or IDLE.
        beats: (W,) int64; signs of life, the first that the process runs, then one a call; 0 while it starts.
    """

    states: np.ndarray
    finals: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    at: np.ndarray
    beats: np.ndarray


def _fields(domain: str, slots: int, workers: int) -> list[tuple[tuple[int, ...], type]]:
    spec = DOMAINS[domain]
    states: tuple[tuple[int, ...], type] = ((slots, STATE_WIDTH), np.float32)
    if spec.state == "image":
        states = (slots, 1, IMAGE_SIDE, IMAGE_SIDE), np.uint8
    actions: tuple[tuple[int, ...], type] = ((slots,), np.int64)
    if spec.action == "continuous":
        actions = (slots, NUM_DIMS), np.float32
    return [states, states, actions, ((slots,), np.float32), ((workers,), np.int64), ((workers,), np.int64)]


def _board(raw: list[Any], domain: str, slots: int, workers: int) -> Board:
    fields = _fields(domain, slots, workers)
    return Board(*(np.frombuffer(data, kind).reshape(shape) for data, (shape, kind) in zip(raw, fields)))


class _Played:
    """One slot's environment, and where it is."""

    def __init__(self, make: Make, job: Job, seed: int) -> None:
        self.task = job.task
        self.env = make(job.domain, job.task, 1, FIRST_SEED + seed, job.episode)
        self.first, _ = self.env.reset()
        self.episode, self.total, self.length = job.episode, 0.0, 0
        self.layout = getattr(self.env, "state_layout", None)
        spec, self.columns = DOMAINS[job.domain], None
        if spec.state == "vector":
            self.columns = state_columns(job.domain, self.layout, self.first.shape[1])
        space: Any = self.env.single_action_space
        self.dims = int(space.n) if spec.action == "discrete" else int(space.shape[0])
        self.continuous = spec.action == "continuous"

    def go_to(self, episode: int) -> bool:
        """Goes to another episode, unless only a new environment can."""
        if self.episode != episode:
            if not isinstance(self.env, Slots):
                return False
            self.env.episodes[:] = episode - 1
            self.first, _ = self.env.reset()
            self.episode = episode
        self.total, self.length = 0.0, 0
        return True


class _Worker:
    """What runs in a process: its slots, and the memory they write to."""

    def __init__(self, make: Make, seed: int, board: Board, number: int) -> None:
        self.make, self.seed, self.board, self.number = make, seed, board, number
        self.played: dict[int, _Played] = {}
        self.playing: set[int] = set()

    def half(self, slots: list[int], starts: dict[int, Job]) -> list[Event]:
        """Starts or steps every slot of a half."""
        events = []
        for slot in slots:
            if slot not in starts and slot not in self.playing:
                continue
            self.board.at[self.number] = slot
            self.board.beats[self.number] += 1
            try:
                event = self._start(slot, starts[slot]) if slot in starts else self._step(slot)
            except Exception as error:  # a simulator may raise anything; it costs its episode and nothing else
                kind = "missing" if isinstance(error, BadInput) and slot not in self.played else "failed"
                words = str(error) if kind == "missing" else f"{type(error).__name__}: {error}"
                event = Event(slot, kind, {"words": words})
                with contextlib.suppress(Exception):
                    self._drop(slot)
            if event:
                events.append(event)
        self.board.at[self.number] = IDLE
        return events

    def _drop(self, slot: int) -> None:
        self.playing.discard(slot)
        if slot in self.played:
            self.played.pop(slot).env.close()

    def _start(self, slot: int, job: Job) -> Event:
        held = self.played.get(slot)
        if held is not None and not (held.task == job.task and held.go_to(job.episode)):
            self._drop(slot)
            held = None
        if held is None:
            held = self.played[slot] = _Played(self.make, job, self.seed)
        self.board.states[slot] = 0
        self._write(self.board.states, slot, held, held.first[0])
        self.playing.add(slot)
        return Event(slot, "started", {"columns": held.columns, "layout": held.layout, "dims": held.dims})

    def _step(self, slot: int) -> Event | None:
        held, board = self.played[slot], self.board
        actions = board.actions[slot : slot + 1]
        states, rewards, terminated, truncated, infos = held.env.step(
            actions[:, : held.dims].copy() if held.continuous else actions.copy()
        )
        reward = float(rewards[0])
        held.length += 1
        if not np.isfinite(reward):
            raise ValueError(f"reward {reward} at step {held.length}")
        board.rewards[slot] = reward
        held.total += reward
        if not (terminated[0] or truncated[0]):
            self._write(board.states, slot, held, states[0])
            return None
        board.finals[slot] = 0
        self._write(board.finals, slot, held, infos["final_obs"][0])
        # The environment is at the next episode's first state already: should that be wanted, it costs nothing more.
        held.first, held.episode = states, held.episode + 1
        self.playing.discard(slot)
        final = infos.get("final_info", {})
        known = {key: value[0] for key, value in final.items() if key in ("success", "score")}
        detail = {
            "return": held.total,
            "length": held.length,
            "terminated": bool(terminated[0]),
            "truncated": bool(truncated[0]),
            "success": bool(known["success"]) if "success" in known else None,
            "score": float(known["score"]) if "score" in known else None,
        }
        return Event(slot, "ended", detail)

    def _write(self, to: np.ndarray, slot: int, held: _Played, state: np.ndarray) -> None:
        if held.columns is None:
            to[slot] = state
            return
        if not np.isfinite(state).all():
            raise ValueError(f"state with NaN or infinity at step {held.length}")
        to[slot, held.columns] = state


def _work(
    make: Make, seed: int, raw: list[Any], shape: tuple[str, int, int], number: int, connection: Connection
) -> None:
    """The process: answers (half, slots, starts) with (half, events), until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    worker = _Worker(make, seed, _board(raw, *shape), number)
    worker.board.beats[number] = 1
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            half, slots, starts = connection.recv()
            connection.send((half, worker.half(slots, starts)))


class Simulators:
    """All slots of one domain, and the processes they are in.

    Attributes:
        board: The shared memory.
        halves: The slots of each half, as slices; one of all slots where they do not overlap.
        restarts: Processes that died or hung and were replaced.
    """

    def __init__(
        self,
        domain: str,
        slots: int,
        workers: int = 0,
        seed: int = 0,
        timeout: float = 120.0,
        make: Make = environments.make,
        overlap: bool = True,
    ) -> None:
        """Starts the processes.

        Args:
            domain: The domain of all episodes.
            slots: Episodes played at once.
            workers: Processes; 0 takes one per core.
            seed: Of all episodes.
            timeout: Seconds that one call of a simulator may take.
            make: Builds an environment.
            overlap: Have two halves, and not all slots in one.
        """
        workers = min(slots, workers or len(os.sched_getaffinity(0)))
        self._shape = domain, slots, workers
        self._context = multiprocessing.get_context("spawn")
        sizes = [int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in _fields(*self._shape)]
        self._raw = [self._context.RawArray("b", size) for size in sizes]
        self.board = _board(self._raw, *self._shape)
        self.board.at[:] = IDLE
        first = (slots + 1) // 2
        self.halves = [slice(0, first), slice(first, slots)] if overlap and slots > 1 else [slice(0, slots)]
        self._slots = [[list(range(slots))[half][worker::workers] for worker in range(workers)] for half in self.halves]
        self._seed, self._timeout, self._make = seed, timeout, make
        self._pending: list[set[int]] = [set() for _ in self.halves]
        self._inbox: list[list[Event]] = [[] for _ in self.halves]
        self._active: set[int] = set()
        self.restarts = 0
        self._processes: list[Any] = [None] * workers
        self._connections: list[Any] = [None] * workers
        for worker in range(workers):
            self._launch(worker)

    def _launch(self, worker: int) -> None:
        ours, theirs = self._context.Pipe()
        self.board.beats[worker] = 0
        arguments = (self._make, self._seed, self._raw, self._shape, worker, theirs)
        process = self._context.Process(target=_work, args=arguments, daemon=True, name=f"simulators-{worker}")
        # A Dask worker is a daemon, which multiprocessing lets have no children. These end with their parent anyway.
        config: dict[str, Any] = vars(multiprocessing.current_process())["_config"]
        daemon = config.pop("daemon", None)
        try:
            process.start()
        finally:
            if daemon is not None:
                config["daemon"] = daemon
        theirs.close()
        self._processes[worker], self._connections[worker] = process, ours

    @property
    def pids(self) -> list[int]:
        """Returns the processes' numbers."""
        return [process.pid for process in self._processes]

    def send(self, half: int, starts: dict[int, Job]) -> None:
        """Has the slots of a half take a step with the board's actions; those in `starts` start an episode instead."""
        self._active |= starts.keys()
        for worker, slots in enumerate(self._slots[half]):
            if not any(slot in self._active for slot in slots):
                continue
            self._pending[half].add(worker)
            message = half, slots, {slot: starts[slot] for slot in slots if slot in starts}
            # A process that has just died is noticed in `receive`, with all that it held.
            with contextlib.suppress(OSError):
                self._connections[worker].send(message)

    def receive(self, half: int) -> list[Event]:
        """Waits for a half that was sent; returns what happened in its slots, in order of slots."""
        since = {worker: (time.monotonic(), int(self.board.beats[worker])) for worker in self._pending[half]}
        while self._pending[half]:
            waiting = {self._connections[worker]: worker for worker in self._pending[half]}
            ready: list[Any] = wait(list(waiting), min(POLL_SECONDS, self._timeout))
            for connection in ready:
                worker = waiting[connection]
                try:
                    answered, events = connection.recv()
                except (EOFError, OSError):
                    self._replace(worker, "its process died")
                    continue
                self._pending[answered].discard(worker)
                self._inbox[answered] += events
            for worker in self._pending[half] & since.keys():
                beats = int(self.board.beats[worker])
                if beats != since[worker][1]:
                    since[worker] = time.monotonic(), beats
                # Starting is no call of a simulator: it takes as long as it takes.
                elif beats and time.monotonic() - since[worker][0] > self._timeout:
                    self._replace(worker, f"it did not answer for {self._timeout:g} s")
        events, self._inbox[half] = sorted(self._inbox[half], key=lambda event: event.slot), []
        self._active -= {event.slot for event in events if event.kind != "started"}
        return events

    def _replace(self, worker: int, words: str) -> None:
        """Starts a process afresh; the episode that was being stepped has failed, its others are lost."""
        process, at = self._processes[worker], int(self.board.at[worker])
        process.kill()
        process.join()
        self._connections[worker].close()
        for half, slots in enumerate(self._slots):
            told = {event.slot for event in self._inbox[half] if event.kind != "started"}
            mine = set(slots[worker])
            # Of those that had started only, nothing else is to be told.
            self._inbox[half] = [e for e in self._inbox[half] if e.slot not in mine or e.slot in told]
            for slot in mine & self._active - told:
                detail = {"words": f"{words} (exit {process.exitcode})" if "died" in words else words}
                self._inbox[half].append(Event(slot, "failed" if slot == at else "lost", detail))
            self._pending[half].discard(worker)
        self.board.at[worker] = IDLE
        self.restarts += 1
        self._launch(worker)

    def close(self) -> None:
        """Ends the processes."""
        for process, connection in zip(self._processes, self._connections):
            connection.close()
            process.kill()
            process.join()

    def __enter__(self) -> Simulators:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
