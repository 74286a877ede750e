"""Measures what recording costs and how fast specialists learn: what `lram bench collect` prints.

    rows = list(bench_collect(CollectBenchSettings(quick=True)))
    print(as_table(rows))

What is compared takes turns in one process on one core, and medians are given: other processes of the machine then
slow all alike. What recording adds to a specialist's run is the time inside the recorder, the trajectories' files and
the checkpoints, in a real run, as a share of the rest of that run; it includes waiting for the disk.
What it trades away: minutes. `--quick` shows that everything runs, not how fast.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from lram.collectors.environments import make, status
from lram.collectors.recorder import Recorder
from lram.datasets.bench_loader import Row
from lram.datasets.writer import TaskWriter


@dataclass(frozen=True)
class CollectBenchSettings:
    """What to measure the collectors on."""

    folder: Path | None = None
    """Folder on the disk to measure on; a temporary one by default."""
    quick: bool = False
    """Few steps and repetitions: shows that it runs, not how fast."""


@dataclass(frozen=True)
class _Size:
    """How much of everything.

    Attributes:
        sac: Transitions of the recorded SAC run.
        update: Transitions of each slot in an update of the recorded PPO run, and its slots.
        rooms: Transitions of the recorded Dark-Room run.
        learn: Transitions of each way to learn in a round.
        rounds: Rounds in which what is compared takes turns.
        minari: Transitions of each recorder in a round.
        record: Transitions recorded of each game.
    """

    sac: int
    update: tuple[int, int]
    rooms: int
    learn: int
    rounds: int
    minari: int
    record: int


FULL = _Size(3000, (64, 64), 20_000, 400, 5, 100_000, 200_000)
QUICK = _Size(200, (8, 4), 400, 5, 2, 1000, 640)


def bench_collect(settings: CollectBenchSettings, progress: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Measures everything that is installed.

    Args:
        settings: Where, and how much.
        progress: Told what is done now.

    Yields:
        The rows of the table.
    """
    import torch

    torch.set_num_threads(1)
    size = QUICK if settings.quick else FULL
    tell = progress or (lambda text: None)
    if settings.folder is not None:
        settings.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        tell("SAC, plain and faster")
        yield from _learning(size)
        tell("what recording adds to specialists")
        yield from _shares(folder, size)
        tell("what recording adds to stepping, and Minari's collector")
        yield from _minari(folder, size)
        for domain, task, slots in (("procgen", "coinrun", 64), ("procgen", "bigfish", 64), ("atari", "breakout", 16)):
            tell(f"recording {domain} {task}")
            yield from _recording(folder, domain, task, slots, size)


def _missing(domain: str) -> str | None:
    found = status(domain)
    return None if found.works else f"not measured: {found.words}"


def _learning(size: _Size) -> Iterator[Row]:
    """Compares stable-baselines3's SAC with ours, both without a recorder."""
    section = "SAC on cartpole-swingup, settings/sac_dmcontrol.yaml, one thread"
    missing = _missing("dmcontrol")
    if missing:
        yield Row(section, "steps a second", missing)
        return
    from stable_baselines3 import SAC

    from lram.collectors.defaults import defaults
    from lram.collectors.off_policy import OffPolicySettings, build
    from lram.collectors.sb3 import VectorToSb3

    def env() -> VectorToSb3:
        return VectorToSb3(make("dmcontrol", "cartpole-swingup"))

    plain, ours = "stable-baselines3", "the same, faster operations"
    agents = {
        plain: SAC("MlpPolicy", env(), seed=0, device="cpu"),
        ours: build(OffPolicySettings(), defaults("sac", "dmcontrol"), env()),
    }
    for agent in agents.values():
        agent.learn(agent.learning_starts + 20)

    def learn(agent: Any) -> Callable[[], None]:
        return lambda: agent.learn(size.learn, reset_num_timesteps=False)

    seconds = _medians({name: learn(agent) for name, agent in agents.items()}, size.rounds)
    for name in agents:
        yield Row(section, name, f"{size.learn / seconds[name]:,.0f} steps/s", seconds[plain] / seconds[name])


def _shares(folder: Path, size: _Size) -> Iterator[Row]:
    """Measures what recording adds to real runs of three specialists."""
    from lram.collectors.off_policy import OffPolicySettings, train_off_policy
    from lram.collectors.on_policy import OnPolicySettings, train_on_policy
    from lram.collectors.specialists import DarkRoomSettings, tasks_of, train_goal

    steps, slots = size.update
    ppo = OnPolicySettings(
        steps=steps * slots, num_envs=slots, n_steps=steps, batch_size=steps * slots // 2, device="cpu"
    )
    rooms = DarkRoomSettings(steps=size.rooms)
    runs: dict[str, tuple[str, float, Callable[[], Any]]] = {
        "SAC, cartpole-swingup": (
            "dmcontrol",
            0.02,
            lambda: train_off_policy(OffPolicySettings(steps=size.sac), "dmcontrol", "cartpole-swingup", folder),
        ),
        "PPO + IMPALA, coinrun": ("procgen", 0.05, lambda: train_on_policy(ppo, "procgen", "coinrun", folder)),
        # No bar: 30,000 steps a second make a file every three milliseconds: the disk decides.
        "PPO, Dark-Room 10×10": ("darkroom", 0.0, lambda: train_goal(rooms, tasks_of(rooms)[0], folder)),
    }
    section = "what recording adds to a run"
    for name, (domain, bar, run) in runs.items():
        missing = _missing(domain)
        if missing:
            yield Row(section, name, missing)
            continue
        share = recording_share(run)
        yield Row(section, name, f"{share:.2%}", None, f"≤ {bar:.0%}" if bar else "", share <= bar if bar else None)


def recording_share(run: Callable[[], Any]) -> float:
    """Runs something that records, and returns the time that recording took as a share of the rest.

    Counted are the recorder, its files, the learning curve and the checkpoints, between the first and the last step.
    """
    from lram.collectors import resume

    inside, moments, depth = 0.0, [float("inf"), 0.0], 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside, depth
            began = time.perf_counter()
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                ended = time.perf_counter()
                moments[0], moments[1] = min(moments[0], began), ended
                if depth == 0:
                    inside += ended - began

        return call

    places: list[tuple[Any, str]] = [(Recorder, name) for name in ("step", "write_curve", "state")]
    places += [(TaskWriter, "add"), (resume, "save"), (resume, "agent_state")]
    before = [getattr(place, name) for place, name in places]
    try:
        for (place, name), function in zip(places, before):
            setattr(place, name, timed(function))
        run()
    finally:
        for (place, name), function in zip(places, before):
            setattr(place, name, function)
    return inside / (moments[1] - moments[0] - inside)


def _minari(folder: Path, size: _Size) -> Iterator[Row]:
    """Compares what our recorder and Minari's collector add to stepping the same environment."""
    section = f"recording MountainCarContinuous, {size.minari:,} random steps of one slot"
    try:
        with _minari_in(folder / "minari"):
            from minari import DataCollector

            collected: gym.Env = DataCollector(_car())
        collected.reset(seed=0)
        collected.step(np.zeros(1, np.float32))  # fails without JAX
    except ImportError as error:
        yield Row(section, "added per step", f'not measured: pip install "minari[create]" ({error})')
        return
    single, vector, recorded = _car(), _cars(), _cars()
    actions = np.random.default_rng(0).uniform(-1, 1, (size.minari, 1, 1)).astype(np.float32)

    def step_single(env: gym.Env) -> Callable[[], None]:
        def step() -> None:
            env.reset(seed=0)
            for action in actions:
                *_, terminated, truncated, _ = env.step(action[0])
                if terminated or truncated:
                    env.reset()

        return step

    with TaskWriter(folder, "metaworld", "car", {}) as writer:
        recorder = Recorder(writer, "metaworld", "car", [0], "bench")

        def step_recorded() -> None:
            recorder.reset(recorded.reset(seed=0)[0])
            for action in actions:
                states, *rest = recorded.step(action)
                recorder.step(action, states, *rest)
            recorder.close(write_unfinished=True)
            writer.flush()  # files and index are on disk, which Minari does not wait for

        ways = {
            "bare": step_single(single),
            "minari": step_single(collected),
            "bare vector": lambda: _step_vector(vector, actions),
            "ours": step_recorded,
        }
        seconds = _medians(ways, size.rounds)
    collected.close()
    theirs = (seconds["minari"] - seconds["bare"]) / size.minari * 1e6
    ours = (seconds["ours"] - seconds["bare vector"]) / size.minari * 1e6
    yield Row(section, "Minari's DataCollector adds", f"{theirs:.1f} µs a step")
    yield Row(section, "our recorder adds", f"{ours:.1f} µs a step", ours / theirs, "≤ 0.33×", ours <= theirs / 3)


def _car() -> gym.Env:
    return gym.make("MountainCarContinuous-v0")


def _cars() -> VectorEnv:
    return SyncVectorEnv([_car], autoreset_mode=AutoresetMode.SAME_STEP)


def _step_vector(env: VectorEnv, actions: np.ndarray) -> None:
    env.reset(seed=0)
    for action in actions:
        env.step(action)


@contextmanager
def _minari_in(folder: Path) -> Iterator[None]:
    """Makes Minari keep its files in a folder of the benchmark's."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _recording(folder: Path, domain: str, task: str, slots: int, size: _Size) -> Iterator[Row]:
    """Records random play of one game, and steps it without recording in turns."""
    section = f"{domain} {task}, {size.record:,} random steps of {slots} slots"
    missing = _missing(domain)
    if missing:
        yield Row(section, "steps a second", missing)
        return
    plain, recorded = make(domain, task, slots), make(domain, task, slots)
    steps = -(-size.record // slots // size.rounds)
    actions = np.random.default_rng(0).integers(0, plain.single_action_space.n, (steps, slots))  # type: ignore[attr-defined]
    plain.reset()
    with TaskWriter(folder / "random", domain, task, {"bench": "collect"}) as writer:
        recorder = Recorder(writer, domain, task, range(slots), "bench")
        recorder.reset(recorded.reset()[0])

        def step() -> None:
            for row in actions:
                plain.step(row)

        def record() -> None:
            for row in actions:
                states, *rest = recorded.step(row)
                recorder.step(row, states, *rest)

        seconds = _medians({"plain": step, "recorded": record}, size.rounds)
        recorder.close()
        writer.finish()
    plain.close()
    recorded.close()
    for name, words in (("plain", "stepped"), ("recorded", f"recorded, {recorder.episodes:,} trajectories")):
        yield Row(section, words, f"{steps * slots / seconds[name]:,.0f} steps/s", seconds["plain"] / seconds[name])


def _medians(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each way, over rounds in which all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}
