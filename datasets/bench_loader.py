"""Measures how fast windows are read, from every storage and as the LRAM code does, all in one run.

    lram bench loader                     # about ten minutes; --quick for a smoke test
    rows = bench_loader(LoaderBenchSettings(quick=True))

Everything is read from the page cache, so what is measured is the reader, not the disk. Rates are the best of
several interleaved rounds, which leaves out what other programs took. The LRAM reader opens the file and slices
it; ours is charged for whole batches as the trainer gets them: drawn, padded, masked, scaled and in the policy's
columns. Both see the same windows.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from lram.datasets.ahead import batches_ahead
from lram.datasets.bench_data import (
    GAMES,
    atari,
    composuite_maker,
    has_emulator,
    read_lram_window,
    vector_maker,
    write_lram_file,
    write_synthetic_index,
)
from lram.datasets.pack import pack_task
from lram.datasets.shards import shard_task
from lram.datasets.trajectory import Codec, Trajectory
from lram.datasets.windows import Windows, WindowSettings
from lram.datasets.writer import TaskWriter, finished

PER_DOMAIN = 128
"""Windows of a domain in a batch, as in training."""
LRAM = "h5py, gzip-1, automatic chunks (LRAM)"
LRAM_RGB = "the same, gray frames stored three times"


@dataclass(frozen=True)
class LoaderBenchSettings:
    """What to measure the readers on."""

    folder: Path | None = None
    """Folder for the data, made there once and used again; a temporary one by default."""
    samples: Path | None = None
    """Folder with Composuite's own files, <kind>/<task>/data.hdf5; synthetic signals by default."""
    quick: bool = False
    """Little data and few repetitions: shows that it runs, not how fast."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        section: What was read.
        reader: By whom.
        value: The measurement, with its unit.
        ratio: Times the LRAM reader's, None where that is not the question.
        bar: What was asked for, empty where nothing was.
        met: Whether it was met, None where nothing was asked for.
    """

    section: str
    reader: str
    value: str
    ratio: float | None = None
    bar: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class _Size:
    """How much of everything: (full, quick)."""

    walkers: int
    composuite: int
    short: int
    games: int
    frames: int
    rounds: int
    batches: int
    updates: int
    indexed: int


FULL = _Size(1000, 400, 200, 10, 10_000, 9, 8, 2000, 3_400_000)
QUICK = _Size(30, 6, 10, 2, 700, 2, 1, 12, 43_200)


def bench_loader(settings: LoaderBenchSettings, progress: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Makes the data and measures everything.

    Args:
        settings: Where the data goes, and how much of it.
        progress: Told what is done now.

    Yields:
        The rows of the table.

    Raises:
        BadInput: The samples cannot be used.
    """
    size = QUICK if settings.quick else FULL
    tell = progress or (lambda text: None)
    place = tempfile.TemporaryDirectory() if settings.folder is None else nullcontext(settings.folder)
    with place as name:
        folder = Path(name)
        tell("making data")
        make_data(folder, size, settings.samples)
        tell("reading on one core")
        with _one_core():
            yield from _rates(folder, size)
        tell("batches of mixed domains")
        yield from _mixed(folder, size)
        yield from _disk(folder)
        tell(f"index of {size.indexed:,} trajectories")
        yield from _index(folder, size)


def make_data(folder: Path, size: _Size, samples: Path | None) -> None:
    """Writes all datasets that are not there yet: ours, the same as the LRAM code stores it, shards and Zarr."""

    def made(make: Callable[[int], Trajectory], count: int) -> Iterator[Trajectory]:
        return (make(episode) for episode in range(count))

    walker = vector_maker("dmcontrol", "walker-walk", 1000, 24, 6)
    _write(folder, "dmcontrol", "walker-walk", made(walker, size.walkers))
    composuite = "IIWA_Box_None_PickPlace"
    _write(folder, "composuite", composuite, made(composuite_maker(composuite, samples), size.composuite))
    for domain, task, width, dims in (("metaworld", "reach-v3", 39, 4), ("mimicgen", "stack_d0", 32, 7)):
        maker = vector_maker(domain, task, 200, width, dims)
        _write(folder, domain, task, made(maker, size.short))
    for game in GAMES[: size.games]:
        _write(folder, "atari", game, atari(game, size.frames), also="zstd")
    _write(folder, "procgen", GAMES[0], atari(GAMES[0], size.frames, "procgen"))
    for task in [
        *(f"atari/{game}" for game in GAMES[: size.games]),
        "dmcontrol/walker-walk",
        f"composuite/{composuite}",
    ]:
        if not (folder / "shards" / task / "index.parquet").exists():
            shard_task(folder / "files" / task, folder / "shards", 2**28)
        pack_task(folder / "files" / task, folder / "packed.zarr")


def _write(folder: Path, domain: str, task: str, trajectories: Iterable[Trajectory], also: Codec | None = None) -> None:
    if finished(folder / "files", domain, task):
        return
    lram = [(folder / "lram" / domain / task, 1)] + ([(folder / "lram-rgb" / domain / task, 3)] if also else [])
    for place, _ in lram:
        place.mkdir(parents=True, exist_ok=True)
    with TaskWriter(folder / "files", domain, task, {"bench": "loader"}) as writer:
        for trajectory in trajectories:
            writer.add(trajectory)
            for place, times in lram:
                write_lram_file(place / f"{trajectory.episode:09d}.hdf5", trajectory, times)
            if also:
                with TaskWriter(folder / also, domain, task, {"bench": "loader"}, also) as other:
                    other.add(trajectory)
        writer.finish()


def _rates(folder: Path, size: _Size) -> Iterator[Row]:
    """Measures every reader on every kind of window, on one core."""
    settings = WindowSettings()
    opened = {
        "our files": Windows.open(folder / "files", settings),
        "our files, zstd": Windows.open(folder / "zstd", settings),
        "tar shards": Windows.open(folder / "shards", settings),
        "Zarr": Windows.open(folder / "packed.zarr", settings),
    }
    frames = "real Atari frames" if has_emulator() else "synthetic frames, the emulator is not installed"
    sections = {
        "dmcontrol": (
            "state windows, DMControl walker (T=1000, 24+6, contiguous)",
            {"our files": 25, "tar shards": 25},
        ),
        "composuite": ("state windows, Composuite (T=500, 93+8, compressed)", {"our files": 6, "tar shards": 6}),
        "atari": (f"image windows (1×64×64, {frames})", {"our files": 8, "tar shards": 8}),
    }
    for domain, (section, bars) in sections.items():
        windows = {name: each for name, each in opened.items() if domain in each.tasks}
        readers = {LRAM: _lram_reader(folder / "lram", opened["our files"], domain)}
        if domain == "atari":
            readers[LRAM_RGB] = _lram_reader(folder / "lram-rgb", opened["our files"], domain)
        readers |= {name: _our_reader(each, domain) for name, each in windows.items()}
        counts = {name: size.batches if name in opened else 1 for name in readers}
        rates = _best(readers, counts, size.rounds)
        for name, rate in rates.items():
            ratio, bar = rate / rates[LRAM], bars.get(name)
            text = f"≥ {bar}×" if bar else ""
            met = ratio >= bar if bar else None
            if domain == "atari" and bar:
                text, met = f"{text}, ≥ 3,000/s", bool(met and rate >= 3000)
            yield Row(section, name, f"{rate:,.0f} windows/s", ratio, text, met)


def _lram_reader(root: Path, windows: Windows, domain: str) -> Callable[[int], None]:
    def read(update: int) -> None:
        for piece in windows.draw(domain, update, "train", PER_DOMAIN, 0):
            episode = int(piece.task.episodes[piece.row])
            read_lram_window(f"{root}/{domain}/{piece.task.task}/{episode:09d}.hdf5", piece.first, piece.last)

    return read


def _our_reader(windows: Windows, domain: str) -> Callable[[int], None]:
    def read(update: int) -> None:
        windows.read(domain, windows.draw(domain, update, "train", PER_DOMAIN, 0), "train")

    return read


def _best(readers: dict[str, Callable[[int], None]], counts: dict[str, int], rounds: int) -> dict[str, float]:
    """Returns windows a second of each reader, the best of several rounds in which all take turns."""
    best = dict.fromkeys(readers, 0.0)
    for round_number in range(rounds):
        for name, read in readers.items():
            updates = range(round_number * counts[name], (round_number + 1) * counts[name])
            began = time.perf_counter()
            for update in updates:
                read(update)
            best[name] = max(best[name], len(updates) * PER_DOMAIN / (time.perf_counter() - began))
    return best


def _mixed(folder: Path, size: _Size) -> Iterator[Row]:
    """Reads updates of all domains with one and two workers, and watches memory."""
    windows = Windows.open(folder / "files", WindowSettings())
    per_update = PER_DOMAIN * len(windows.tasks)
    section = f"batches of {per_update} windows, {len(windows.tasks)} domains"
    for workers, updates in ((1, max(12, size.updates // 10)), (2, size.updates)):
        held: dict[int, float] = {}
        marks = [max(5, updates // 20), updates // 2, updates - 1]
        first, began = 3, 0.0  # by then all are forked and have touched their memory
        # More than are measured, so that no worker is at its end before.
        with closing(batches_ahead(windows, range(updates + 20), "train", PER_DOMAIN, 0, workers=workers)) as reading:
            for update, _ in reading:
                if update in marks:
                    held[update] = resident()
                if update == first:
                    began = time.perf_counter()
                if update == updates - 1:
                    break
            rate = (updates - 1 - first) * per_update / (time.perf_counter() - began)
        plural = "worker" if workers == 1 else "workers"
        yield Row(section, f"{workers} {plural}", f"{rate:,.0f} windows/s")
        megabytes = [f"{held[mark] / 2**20:,.0f}" for mark in marks]
        grown = held[marks[-1]] / held[marks[0]]
        text = f"{' → '.join(megabytes)} MiB after {', '.join(f'{mark:,}' for mark in marks)} updates"
        yield Row(section, f"{workers} {plural}, memory of all processes", text, None, "flat", grown < 1.05)


def resident() -> float:
    """Returns the bytes of memory of this process and its workers, what they share counted once."""
    total = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total * 1024


def _disk(folder: Path) -> Iterator[Row]:
    """Compares the sizes of the same frames in three stores."""
    windows = Windows.open(folder / "files", WindowSettings())
    frames = sum(int(task.lengths.sum()) for task in windows.tasks["atari"])
    section = f"size of {frames:,} Atari frames (64×64), whole files"
    stores = {
        f"{LRAM}, three times": "lram-rgb",
        f"{LRAM}, gray once": "lram",
        "our files (64-frame chunks, gzip-4)": "files",
        "our files, zstd": "zstd",
    }
    base = 0.0
    for name, store in stores.items():
        stored = sum(path.stat().st_size for path in (folder / store / "atari").glob("**/*.hdf5")) / frames
        base = base or stored
        bar = "≤ 0.5×" if store == "files" else ""
        yield Row(
            section, name, f"{stored:,.0f} bytes a frame", stored / base, bar, stored <= base / 2 if bar else None
        )


def _index(folder: Path, size: _Size) -> Iterator[Row]:
    """Opens an index of many trajectories in a process of its own."""
    root = folder / f"index-{size.indexed}"
    if not root.exists():
        write_synthetic_index(root, size.indexed)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds, peak, draw, count = pool.submit(open_index, root).result()
    section = f"index of {count:,} trajectories in 432 tasks"
    yield Row(section, "opened, first windows drawn", f"{seconds:.1f} s", None, "< 20 s", seconds < 20)
    yield Row(section, "peak memory", f"{peak / 2**30:.2f} GiB", None, "< 4 GiB", peak < 4 * 2**30)
    yield Row(section, "drawing", f"{draw * 1e6:.2f} µs a window", None, "< 20 µs", draw < 20e-6)


def open_index(root: Path) -> tuple[float, int, float, int]:
    """Opens a dataset and draws windows; returns seconds to the first, peak bytes, seconds a draw, trajectories."""
    began = time.perf_counter()
    windows = Windows.open(root, WindowSettings())
    domains = sorted(windows.tasks)
    for domain in domains:
        windows.draw(domain, 0, "train", PER_DOMAIN, 0)
    seconds = time.perf_counter() - began
    rounds = 50
    began = time.perf_counter()
    for update in range(rounds):
        for domain in domains:
            windows.draw(domain, update, "train", PER_DOMAIN, 0)
    draw = (time.perf_counter() - began) / (rounds * PER_DOMAIN * len(domains))
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return seconds, peak, draw, sum(len(task) for tasks in windows.tasks.values() for task in tasks)


@contextmanager
def _one_core() -> Iterator[None]:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def as_table(rows: list[Row]) -> str:
    """Lays the rows out as one table of plain text."""
    lines: list[str] = []
    section = ""
    widths = [max(len(getattr(row, name)) for row in rows) for name in ("reader", "value", "bar")]
    for row in rows:
        if row.section != section:
            section = row.section
            lines.append(f"\n{section}" if lines else section)
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}×" if row.ratio < 10 else f"{row.ratio:.0f}×"
        met = {None: "", True: "met", False: "NOT MET"}[row.met]
        reader, value, bar = (f"{text:{width}}" for text, width in zip((row.reader, row.value, row.bar), widths))
        lines.append(f"  {reader}  {value}  {ratio:>6}  {bar}  {met}".rstrip())
    return "\n".join(lines)
