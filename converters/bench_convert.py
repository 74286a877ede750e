"""Measures converters end to end, from the source's files to trajectories that are synced and indexed, in one table.

    lram bench convert                    # some eight minutes; --quick for a smoke test
    rows = bench_convert(ConvertBenchSettings(quick=True))

DQN-Replay is measured on a checkpoint of full length made of real frames: episodes of the emulator's Seaquest, played
at random, in shuffled order until the buffer is full. Deflate looks back four such frames, so that an episode that
comes again is as hard to compress as one that does not. Each conversion runs in a fresh process, as with `--workers`.
Rates are a core's: transitions over seconds in which the process worked or waited for the disk. Seconds in which it
waited for a core that others had are not counted, where Linux tells them; rates of wall time, which has them, are
given beside.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from zlib_ng import gzip_ng

from lram.converters import composuite, dqn_replay
from lram.converters.dqn_stream import open_array
from lram.converters.run import convert_job
from lram.converters.source import Count, Job
from lram.datasets.bench_data import composuite_maker
from lram.datasets.bench_loader import Row
from lram.datasets.images import shrink
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, encode, write_whole

GAMES = ("Seaquest", "Alien")
"""Two games of 18 actions, so that one recording can stand for both."""
TASK = "IIWA_Box_None_PickPlace"
GZIP_LEVEL = 6
"""zlib-ng's; the recordings were made with zlib's 9, which is as fast to read and slower to write."""
SMALL = {"action": np.int32, "reward": np.float32, "terminal": np.uint8}
"""Files of a checkpoint that hold a number a row."""
SIDE = 84
PADDING = dqn_replay.PADDING


@dataclass(frozen=True)
class ConvertBenchSettings:
    """What to measure the converters on."""

    work: Path | None = None
    """Folder for sources, made there once and used again, and for what is converted; a temporary one by default."""
    part: Literal["all", "sources", "runners"] = "all"
    """Each source with one worker and two, or one source through threads, processes and a Dask cluster."""
    quick: bool = False
    """Little data: shows that it runs, not how fast."""


@dataclass(frozen=True)
class _Size:
    """How much of everything."""

    rows: int
    frames: int
    composuite: int
    sample: int


FULL = _Size(1_000_000, 20_000, 1_000_000, 20_000)
QUICK = _Size(20_000, 2_000, 20_000, 4_000)


@dataclass(frozen=True)
class Run:
    """What one conversion in one process took.

    Attributes:
        transitions: Transitions written.
        episodes: Trajectories written.
        wall: Seconds from beginning to end.
        own: The same without those spent waiting for a core.
        peak: Most resident memory of the process, in bytes, its imports included.
    """

    transitions: int
    episodes: int
    wall: float
    own: float
    peak: int

    @property
    def rate(self) -> float:
        """Transitions a second of a core."""
        return self.transitions / self.own


def bench_convert(settings: ConvertBenchSettings, progress: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Makes the sources and measures everything.

    Args:
        settings: Where the data goes, and how much of it.
        progress: Told what is done now.

    Yields:
        The rows of the table.

    Raises:
        BadInput: The emulator is not installed.
    """
    if importlib.util.find_spec("ale_py") is None:
        raise BadInput("the emulator makes the frames to convert; it is not installed: lram[atari]")
    size = QUICK if settings.quick else FULL
    tell = progress or (lambda text: None)
    place = tempfile.TemporaryDirectory() if settings.work is None else nullcontext(settings.work)
    with place as name:
        source, made = Path(name) / f"source-{size.rows}", Path(name) / "converted"
        shutil.rmtree(made, ignore_errors=True)
        try:
            tell(f"making a checkpoint of {size.rows:,} frames")
            make_dqn_replay(source / "dqn-replay", size.rows, size.frames)
            tell(f"making {size.composuite:,} rows of Composuite")
            make_composuite(source / "composuite", size.composuite)
            yield from _dqn_replay(source / "dqn-replay", made, size, tell)
            yield from _composuite(source / "composuite", made, size, tell)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _dqn_replay(src: Path, made: Path, size: _Size, tell: Callable[[str], None]) -> Iterator[Row]:
    options = dqn_replay.Options(last=0)
    jobs = dqn_replay.jobs(src, options)
    stored = sum(path.stat().st_size for path in jobs[0].files) / size.rows
    section = f"DQN-Replay, a checkpoint of {size.rows:,} × 84 × 84 ({stored:,.0f} bytes a frame, gzip)"
    tell("converting it with one worker")
    (alone,) = run_at_once("dqn_replay", jobs[:1], options, made / "one")
    yield from _rates(section, "one worker", [alone], 10_000)
    memory = f"{alone.peak / 2**30:.2f} GiB"
    yield Row(section, "one worker, peak memory", memory, None, "< 1.5 GiB", alone.peak < 1.5 * 2**30)
    tell("converting two games with two workers")
    both = run_at_once("dqn_replay", jobs, options, made / "two")
    ratio = min(run.rate for run in both) / alone.rate
    yield from _rates(section, "two workers", both, None)
    peak = max(run.peak for run in both)
    yield Row(section, "two workers, memory of each", f"{peak / 2**30:.2f} GiB", None, "< 1.5 GiB", peak < 1.5 * 2**30)
    yield Row(section, "two workers, a core's rate", "against one worker", ratio, "within 20 %", abs(ratio - 1) <= 0.2)
    tell("taking it apart")
    yield from _shares(section, dqn_steps(jobs[0], options, made / "steps", size.sample))


def _composuite(src: Path, made: Path, size: _Size, tell: Callable[[str], None]) -> Iterator[Row]:
    options = composuite.Options(episodes=0)
    jobs = composuite.jobs(src, options)
    section = f"Composuite, {size.composuite:,} × 93 (gzip)"
    tell("converting Composuite")
    (alone,) = run_at_once("composuite", jobs, options, made / "composuite")
    yield from _rates(section, "one worker", [alone], 100_000)
    yield Row(section, "one worker, peak memory", f"{alone.peak / 2**30:.2f} GiB")
    yield from _shares(section, composuite_steps(jobs[0], options, made / "steps", size.sample))


def _rates(section: str, name: str, runs: list[Run], bar: int | None) -> Iterator[Row]:
    rate = min(run.rate for run in runs)
    wall = sum(run.transitions for run in runs) / max(run.wall for run in runs)
    text, met = (f"≥ {bar:,}/s", rate >= bar) if bar else ("", None)
    yield Row(section, f"{name}, a core", f"{rate:,.0f} transitions/s", None, text, met)
    yield Row(section, f"{name}, wall time", f"{wall:,.0f} transitions/s")


def _shares(section: str, steps: dict[str, float]) -> Iterator[Row]:
    """Lays out seconds a transition, by step."""
    total = sum(steps.values())
    for name, seconds in steps.items():
        yield Row(section, f"  {name}", f"{seconds * 1e6:.1f} µs a transition, {seconds / total:.0%}")


# ---- Conversions in processes of their own ----


def run_at_once(source: str, jobs: list[Job], options: Any, root: Path) -> list[Run]:
    """Converts every job in a fresh process, all at the same time."""
    with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
        return [future.result() for future in [pool.submit(convert_one, source, job, options, root) for job in jobs]]


def convert_one(source: str, job: Job, options: Any, root: Path) -> Run:
    """Converts one job here, in a process that does nothing else."""
    began, queued = time.perf_counter(), _queued()
    result = convert_job(source, job, options, root)
    wall = time.perf_counter() - began
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return Run(result.transitions, result.episodes, wall, wall - (_queued() - queued), peak)


def ready() -> None:
    """Imports what a worker runs, and takes long enough that another worker takes the next call."""
    time.sleep(0.5)


def nothing() -> None:
    """Does nothing: what is left is the cost of handing it over."""


def _queued() -> float:
    """Returns the seconds in which this process was ready and had no core; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


# ---- The same work, step by step ----


def dqn_steps(job: Job, options: dqn_replay.Options, folder: Path, rows: int) -> dict[str, float]:
    """Returns seconds a transition of each step of converting the first frames of a recording."""
    path = next(path for path in job.files if "observation" in path.name)
    began = time.process_time()
    held, read = [], 0
    for frames in open_array(path, "observation")[1]:
        held.append(frames)
        read += len(frames)
        if read >= rows:
            break
    decompress = (time.process_time() - began) / read
    frames = np.concatenate(held)
    began = time.process_time()
    shrink(frames)
    resize = (time.process_time() - began) / read
    # Decompressed twice, see the converter.
    return {
        "decompress, twice": 2 * decompress,
        "resize": resize,
        **_out(_some(dqn_replay, job, options, rows), folder),
    }


def composuite_steps(job: Job, options: composuite.Options, folder: Path, rows: int) -> dict[str, float]:
    """Returns seconds a transition of each step of converting the first rows of a file."""
    began = time.process_time()
    made = _some(composuite, job, options, rows)
    read = (time.process_time() - began) / sum(t.length for t in made)
    return {"read": read, **_out(made, folder)}


def _some(converter: Any, job: Job, options: Any, rows: int) -> list[Trajectory]:
    """Returns a converter's first trajectories."""
    made: list[Trajectory] = []
    for trajectory in converter.trajectories(job, options, Count()):
        made.append(trajectory)
        if sum(t.length for t in made) >= rows:
            break
    return made


def _out(made: list[Trajectory], folder: Path) -> dict[str, float]:
    """Measures what is done to a finished trajectory."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(t.length for t in made)
    began = time.process_time()
    images = [encode(trajectory) for trajectory in made]
    compress = (time.process_time() - began) / total
    worked, began, queued = time.process_time(), time.perf_counter(), _queued()
    for image in images:
        write_whole(folder / "trajectory.hdf5", image.data)
    write = time.process_time() - worked
    waited = time.perf_counter() - began - (_queued() - queued) - write
    return {"compress and hash": compress, "write": write / total, "wait for the disk": max(0.0, waited) / total}


# ---- Sources of full length ----


def make_dqn_replay(src: Path, rows: int, frames: int) -> None:
    """Writes the first checkpoint of a recording of Seaquest, and the same once more under another game's name."""
    folders = [src / game / "1" / "replay_logs" for game in GAMES]
    if all((folder / "add_count_ckpt.0.gz").exists() for folder in folders):
        return
    shutil.rmtree(src, ignore_errors=True)
    folders[0].mkdir(parents=True)
    episodes = play(frames)
    order = _until_full(np.array([len(actions) for _, actions, _ in episodes]), rows)
    small = {name: np.zeros(rows, dtype) for name, dtype in SMALL.items()}
    held = gzip_ng.open(folders[0] / "$store$_observation_ckpt.0.gz", "wb", compresslevel=GZIP_LEVEL)
    with held as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (rows, SIDE, SIDE)}
        np.lib.format.write_array_header_1_0(file, header)
        row = 0
        for number in order:
            screens, actions, rewards = episodes[number]
            file.write(bytes(PADDING * SIDE * SIDE))
            kept = min(len(actions), rows - 1 - row - PADDING)
            file.write(screens[:kept].tobytes())
            row += PADDING
            small["action"][row : row + kept] = actions[:kept]
            small["reward"][row : row + kept] = rewards[:kept]
            row += kept
            small["terminal"][row - 1] = kept == len(actions)
        file.write(bytes((rows - row) * SIDE * SIDE))  # The last row, which was never written.
    for name, array in small.items():
        with gzip_ng.open(folders[0] / f"$store$_{name}_ckpt.0.gz", "wb") as file:
            np.save(file, array)
    shutil.copytree(folders[0], folders[1], copy_function=os.link)
    for folder in folders:
        with gzip_ng.open(folder / "add_count_ckpt.0.gz", "wb") as file:
            np.save(file, np.int64(rows - 1))


def _until_full(lengths: np.ndarray, rows: int) -> list[int]:
    """Draws episodes in shuffled rounds until they fill the buffer but for its last row."""
    rng = np.random.default_rng(0)
    order: list[int] = []
    held = 0
    while held + PADDING < rows - 1:
        for number in rng.permutation(len(lengths)).tolist():
            if held + PADDING < rows - 1:
                order.append(number)
                held += PADDING + int(lengths[number])
    return order


def play(frames: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Plays Seaquest at random as DQN-Replay was recorded; returns frames (T, 84, 84), actions and rewards."""
    import ale_py
    import cv2
    from ale_py import roms

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.setInt("random_seed", 0)
    emulator.setFloat("repeat_action_probability", 0.25)
    emulator.loadROM(str(roms.get_rom_path(GAMES[0].lower())))
    choices = emulator.getMinimalActionSet()
    rng = np.random.default_rng(0)
    episodes, made = [], 0
    while made < frames:
        emulator.reset_game()
        screens, actions, rewards = [], [], []
        screen = emulator.getScreenGrayscale()
        while not emulator.game_over():
            action = int(rng.integers(len(choices)))
            screens.append(cv2.resize(screen, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
            actions.append(action)
            reward = sum(emulator.act(choices[action]) for _ in range(3))
            before = emulator.getScreenGrayscale()
            rewards.append(reward + emulator.act(choices[action]))
            screen = np.maximum(before, emulator.getScreenGrayscale())
        made += len(actions)
        episodes.append((np.stack(screens), np.array(actions), np.clip(rewards, -1, 1)))
    return episodes


def make_composuite(src: Path, rows: int) -> None:
    """Writes a file as Composuite's, of synthetic signals in episodes of 500."""
    path = src / "expert" / TASK / "data.hdf5"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    make = composuite_maker(TASK, None)
    length = make(0).length
    with h5py.File(path.with_name("data.part"), "w") as file:
        how: dict[str, Any] = {"compression": "gzip", "chunks": True}
        states = file.create_dataset("observations", (rows, 93), np.float32, **how)
        actions = file.create_dataset("actions", (rows, 8), np.float32, **how)
        rewards = file.create_dataset("rewards", (rows,), np.float32, **how)
        for episode, row in enumerate(range(0, rows, length)):
            trajectory = make(episode % 100)
            states[row : row + length] = trajectory.states
            actions[row : row + length] = trajectory.actions
            rewards[row : row + length] = np.clip(trajectory.rewards, 0, 1)
        ends = np.arange(1, rows + 1) % length == 0
        file.create_dataset("terminals", data=ends, **how)
        file.create_dataset("timeouts", data=ends, **how)
    path.with_name("data.part").rename(path)
