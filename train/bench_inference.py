"""Measures how fast a policy acts: against the `xlstm` package, and after contexts of 50 to 25,600 steps.

    lram bench inference                                   # 16M, some minutes; --quick for a smoke test
    lram bench inference --half --sizes 206M --task atari/freeway --contexts 50 1600 25600     # the paper's test
    rows = list(bench_inference(InferenceBenchSettings(quick=True)))

An action's time is from states and rewards in NumPy to actions in NumPy. The simulator's step is timed beside it, so
that one run gives both figures. Contexts take turns, each after steps that do not count. Policies have their initial
weights, from a fixed seed: trained ones cost the same. The results are also in `inference.json`, `latency.png` and
`throughput.png`, drawn as the paper's Figures 6 and 7.

A recurrent policy reads its context, random steps, before it is measured. DT is measured in two ways: with a window
that is not full yet, so that a step reads a cache as long as the context, and with a window of exactly the context,
which slides: since its positions are learned and absolute, every step then encodes the window afresh. Its cache and
its window are filled with one number instead of read, which costs a step the same.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lram.collectors.environments import make
from lram.datasets.bench_loader import Row, as_table
from lram.datasets.specs import DOMAINS, STATE_WIDTH, BadInput
from lram.datasets.trajectory import write_whole
from lram.model.policy import Policy, PolicySettings
from lram.model.state import State, select_state
from lram.train.bench_backbones import wait
from lram.train.bench_steps import EQUAL_STEPS, WARM_UP, Game, against_package, percentiles, ways
from lram.train.fast import FastPolicy, Weights, tensors_of
from lram.train.ranks import device_of
from lram.train.settings import BackboneName, DeviceName, SizeName

__all__ = ["InferenceBenchSettings", "Point", "as_table", "bench_inference"]

NAMES = {"xlstm": "xLSTM [1:0]", "mamba": "Mamba", "dt": "DT"}
CACHE, WINDOW = "DT, cache", "DT, window slides"
ROUNDS = 5
"""Turns that every context takes."""


@dataclass(frozen=True)
class InferenceBenchSettings:
    """What to measure acting on."""

    backbones: tuple[BackboneName, ...] = ("xlstm", "mamba", "dt")
    """Sequence models."""
    sizes: tuple[SizeName, ...] = ("16M",)
    """Sizes of the policies."""
    slstm: bool = False
    """Put sLSTM blocks at the paper's [7:1] places (xLSTM only)."""
    half: bool = False
    """Half the depth and wider, as in the paper's latency test (xLSTM and Mamba)."""
    batches: tuple[int, ...] = (1, 16)
    """Environments that act together."""
    contexts: tuple[int, ...] = (50, 200, 800, 1600, 6400, 25600)
    """Environment steps that lie before the measured ones."""
    steps: int = 100
    """Steps to measure at each context, and of each comparison."""
    weights: Weights = "float32"
    """What the weights are kept in while contexts and batches are measured."""
    task: str = "dmcontrol/cartpole-swingup"
    """Simulator, as <domain>/<task>; Dark-Room where it is not installed."""
    give_up: float = 5.0
    """Seconds that a step may take: a DT that would take longer is left out, and the table says so."""
    threads: int = 1
    """Threads of PyTorch on a CPU."""
    device: DeviceName = "auto"
    """Where to act; auto takes CUDA when there is one."""
    out: Path = Path("runs/bench-inference")
    """Folder for the results."""
    quick: bool = False
    """Tiny policies, two contexts, few steps: shows that it runs, not how fast."""


@dataclass(frozen=True)
class Point:
    """One combination that was measured, or given up.

    Attributes:
        policy: Backbone, and how its context is kept.
        size: Size of the policy.
        weights: What its weights are kept in.
        batch: Environments that act together.
        context: Environment steps before the measured ones.
        action_ms: 50th, 95th and 99th percentile of the time of an action, without the simulator.
        with_simulator_ms: The same with the simulator's step.
        processor_ms: Median processor time of an action.
        per_second: Actions a second over all environments, without the simulator and with it.
        held_mib: Memory of weights and state.
        peak_mib: The most memory during a step: what is held, and what the step takes beside it.
        note: Why nothing was measured; else empty.
    """

    policy: str
    size: str
    weights: str
    batch: int
    context: int
    action_ms: tuple[float, float, float] | None = None
    with_simulator_ms: tuple[float, float, float] | None = None
    processor_ms: float | None = None
    per_second: tuple[float, float] | None = None
    held_mib: float = 0.0
    peak_mib: float = 0.0
    note: str = ""


def bench_inference(settings: InferenceBenchSettings, progress: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Measures every backbone and size, and writes the results.

    Args:
        settings: What to measure.
        progress: Told what is done now.

    Yields:
        The rows of the table.

    Raises:
        BadInput: There is no such task.
    """
    tell = progress or (lambda text: None)
    device = device_of(settings.device)
    if settings.quick:
        settings = dataclasses.replace(settings, sizes=("tiny",), batches=(1, 2), contexts=(3, 6), steps=5)
    settings = dataclasses.replace(settings, task=_installed(settings.task))
    rows: list[Row] = []
    points: list[Point] = []

    def measure() -> Iterator[Row]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        yield Row("machine", name, f"{os.cpu_count()} cores, {settings.threads} used, torch {torch.__version__}")
        yield Row("machine", "simulator", settings.task)
        for size in settings.sizes:
            for backbone in settings.backbones:
                # A DT has a position for every token that it is to hold.
                policy = _policy(settings, backbone, size, max(EQUAL_STEPS, WARM_UP + settings.steps)).to(device)
                label = f"{_name(settings, backbone)}, {size}"
                if backbone == "xlstm":
                    tell(f"{label} against the xlstm package")
                    yield from against_package(policy, size, settings.steps, device)
                tell(f"{label}, ways to compute a step")
                compared = 10 if settings.quick else EQUAL_STEPS
                yield from ways(policy, label, settings.task, settings.steps, device, not settings.quick, compared)
                tell(f"{label}, contexts")
                if backbone == "dt":
                    policy = _policy(settings, backbone, size, max(settings.contexts) + 1).to(device)
                found = list(_contexts(settings, policy, size, device))
                points.extend(found)
                yield from _rows(found)

    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for row in measure():
            rows.append(row)
            yield row
    finally:
        torch.set_num_threads(threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    result = {"settings": plain, "rows": [vars(row) for row in rows], "points": [vars(point) for point in points]}
    write_whole(settings.out / "inference.json", json.dumps(result, indent=1).encode())
    plot(points, settings.out)


def _installed(task: str) -> str:
    """Returns the task, or a room where its simulator is not installed."""
    domain, _, name = task.partition("/")
    try:
        make(domain, name).close()
    except BadInput as error:
        if isinstance(error.__cause__, ImportError):
            return "darkroom/room10x10-goal-07-03"
        raise
    return task


def _name(settings: InferenceBenchSettings, backbone: str) -> str:
    return "xLSTM [7:1]" if backbone == "xlstm" and settings.slstm else NAMES[backbone]


def _policy(settings: InferenceBenchSettings, backbone: Any, size: str, max_steps: int) -> Policy:
    """Makes a policy with its initial weights, the same every time."""
    torch.manual_seed(0)
    image = DOMAINS[settings.task.split("/")[0]].state == "image"
    half, slstm = settings.half and backbone != "dt", settings.slstm and backbone == "xlstm"
    made = PolicySettings(backbone, size, slstm=slstm, max_steps=max_steps, image=image, half=half)
    return Policy(made).eval().requires_grad_(False)


# Contexts ---------------------------------------------------------------------------------------------------------


class _Times:
    """What the steps after one context took, in seconds and bytes."""

    def __init__(self) -> None:
        self.action: list[float] = []
        self.simulator: list[float] = []
        self.processor: list[float] = []
        self.held = self.taken = 0
        self.slow = False  # one turn is enough


def _contexts(settings: InferenceBenchSettings, policy: Policy, size: str, device: torch.device) -> Iterator[Point]:
    """Measures every batch and context of one policy."""
    backbone = policy.settings.backbone
    read = {} if backbone == "dt" else _read(policy, settings.contexts, device)
    fast = FastPolicy(policy, settings.weights)
    weights = sum(_bytes(part) for part in policy.state_dict().values())
    if settings.weights != "float32":
        weights = sum(_bytes(part) for part in _stored(fast))
    for batch in settings.batches:
        game = Game(settings.task, batch, device)
        for kind in (CACHE, WINDOW) if backbone == "dt" else (_name(settings, backbone),):
            timed: dict[int, _Times] = {}
            notes: dict[int, str] = {}
            for turn in range(ROUNDS):
                before = 0
                for context in settings.contexts:
                    if turn == 0 and backbone == "dt":
                        notes[context] = _too_much(kind, fast, batch, context, before, timed, settings.give_up)
                    if notes.get(context) or (turn and timed[context].slow):
                        continue
                    before = context
                    state = _cached(kind, fast, batch, context) if backbone == "dt" else None
                    if state is None:
                        state = select_state(read[context], torch.zeros(batch, dtype=torch.int64, device=device))
                    _turn(timed.setdefault(context, _Times()), fast, state, game, settings, device)
            for context in settings.contexts:
                point = Point(kind, size, settings.weights, batch, context, note=notes.get(context, ""))
                if not point.note:
                    point = _filled_in(point, timed[context], weights - _unused(fast, context))
                yield point


def _read(policy: Policy, contexts: tuple[int, ...], device: torch.device, piece: int = 100) -> dict[int, State]:
    """Returns the state of one slot after each context of random steps, read in pieces."""
    generator = torch.Generator().manual_seed(0)
    states, state, read = {}, None, 0
    with torch.inference_mode():
        for context in sorted(set(contexts)):
            while read < context:
                count = min(piece, context - read)
                returns, rewards = torch.randn(2, 1, count, generator=generator).to(device)
                # Vectors for every policy: what was read decides nothing about the time.
                vectors = torch.randn(1, count, STATE_WIDTH, generator=generator).to(device)
                _, state = policy.step(vectors, returns, rewards, state)
                read += count
            states[context] = state
    return states


def _cached(kind: str, fast: FastPolicy, batch: int, context: int) -> State:
    """Returns the state of a DT after `context` steps, of one number throughout, and sets how long its window is."""
    backbone, tokens = fast.backbone, fast.settings.tokens_per_step * context
    width, like = backbone.ln_f.weight.shape[0], backbone.ln_f.weight
    slides = kind == WINDOW
    backbone.max_tokens = tokens + (0 if slides else fast.settings.tokens_per_step)
    shape = (batch, 2, backbone.heads, 0 if slides else tokens, width // backbone.heads)
    return {
        "length": torch.full((batch,), tokens, device=like.device),
        "tokens": like.new_full((batch, tokens, width), 0.1),
        "kv": [like.new_full(shape, 0.1) for _ in backbone.h],
    }


def _too_much(
    kind: str, fast: FastPolicy, batch: int, context: int, before: int, timed: dict[int, _Times], give_up: float
) -> str:
    """Says why a DT is not measured at a context: it would not fit, or a step would take too long; else ''."""
    backbone, like = fast.backbone, fast.backbone.ln_f.weight
    tokens, width = fast.settings.tokens_per_step * context, like.shape[0]
    layers = 1 if kind == WINDOW else 1 + 2 * len(backbone.h)
    needed = 2 * batch * tokens * width * layers * like.element_size()  # before and after a step
    free = torch.cuda.mem_get_info()[0] if like.is_cuda else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * free:
        return f"does not fit: {needed / 2**30:.0f} GiB"
    if before:
        grown = context / before
        expected = float(np.median(timed[before].action)) * (grown if kind == CACHE else grown**1.5)
        if expected > give_up:
            return f"given up: a step would take {expected:.0f} s or more"
    return ""


def _turn(
    times: _Times,
    fast: FastPolicy,
    state: State,
    game: Game,
    settings: InferenceBenchSettings,
    device: torch.device,
) -> None:
    """Acts for a number of steps, the first of which do not count; slow steps end the turn early, and for good."""
    moves = fast.settings.backbone != "dt"  # DT stays at its context, the others' steps cost the same everywhere
    count, until = -(-settings.steps // ROUNDS), time.perf_counter() + settings.give_up
    if not times.held:
        times.held = sum(_bytes(part) for part in tensors_of(state))
        times.taken = _taken(lambda: fast.step(*game.inputs(), state), device)
    for step in range(WARM_UP + count):
        wait(device)
        began, worked = time.perf_counter(), time.process_time()
        logits, after = fast.step(*game.inputs(), state)
        actions = game.actions(logits)  # on the CPU: whatever ran on a device has ended
        acted, worked = time.perf_counter(), time.process_time() - worked
        game.play(actions)
        state = after if moves else state
        times.slow = acted > until
        if step >= WARM_UP or times.slow:
            times.action.append(acted - began)
            times.simulator.append(time.perf_counter() - acted)
            times.processor.append(worked)
        if times.slow:
            return


def _filled_in(point: Point, times: _Times, weights: int) -> Point:
    """Returns a point with what was measured."""
    both = [a + b for a, b in zip(times.action, times.simulator)]
    return dataclasses.replace(
        point,
        action_ms=percentiles(times.action),
        with_simulator_ms=percentiles(both),
        processor_ms=float(np.median(times.processor)) * 1e3,
        per_second=(point.batch / float(np.mean(times.action)), point.batch / float(np.mean(both))),
        held_mib=(weights + times.held) / 2**20,
        peak_mib=(weights + times.held + times.taken) / 2**20,
    )


# Memory -----------------------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _stored(module: torch.nn.Module) -> list[Tensor]:
    """Returns the tensors of a module, those of quantised layers too."""
    found: list[Tensor] = list(module.parameters())
    for part in module.modules():
        if callable(getattr(part, "weight", None)):  # a quantised layer packs its tensors
            found.append(part.weight().int_repr())  # type: ignore[operator]
    return found


def _unused(fast: FastPolicy, context: int) -> int:
    """Returns the bytes of a DT's positions that a window of this context does not have."""
    if fast.settings.backbone != "dt":
        return 0
    positions = fast.backbone.wpe.weight
    return (positions.shape[0] - fast.settings.tokens_per_step * context) * positions.shape[1] * 4


def _taken(step: Callable[[], Any], device: torch.device) -> int:
    """Returns the most bytes that a step takes beside what is held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before

    def read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    with suppress(OSError):  # a system that forbids it, or has no such file: 0
        Path("/proc/self/clear_refs").write_text("5")
        before = read("VmRSS")
        step()
        return max(0, read("VmHWM") - before)
    return 0


# Results ----------------------------------------------------------------------------------------------------------


def _rows(points: list[Point]) -> Iterator[Row]:
    """Lays points out as rows, and says of every recurrent policy whether its context costs it anything."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point.policy, point.batch), []).append(point)
    for (policy, batch), group in groups.items():
        section = f"{policy}, {group[0].size}, {group[0].weights}, batch {batch}, by context"
        base: float | None = None
        for point in group:
            if point.action_ms is None or point.per_second is None or point.with_simulator_ms is None:
                yield Row(section, f"{point.context:,} steps", point.note)
                continue
            cost = point.processor_ms or 0.0
            base = base or cost
            p50, p95, p99 = point.action_ms
            text = (
                f"p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f} ms, processor {cost:.2f} ms; with the simulator p50 "
                f"{point.with_simulator_ms[0]:.2f} ms; {point.per_second[0]:,.0f} actions/s; {point.peak_mib:,.0f} MiB"
            )
            yield Row(section, f"{point.context:,} steps", text, cost / base)
        measured = [point.processor_ms for point in group if point.processor_ms]
        if policy not in (CACHE, WINDOW) and len(measured) > 1:
            apart = max(measured) / min(measured)
            yield Row(section, "dearest over cheapest", f"{apart:.3f}", None, "within 10 %", apart < 1.1)


COLOURS = {"xLSTM [1:0]": "#2166ac", "xLSTM [7:1]": "#67a9cf", "Mamba": "#1b7837", CACHE: "#b2182b", WINDOW: "#ef8a62"}


def plot(points: list[Point], folder: Path) -> None:
    """Draws latency and memory against context (`latency.png`), and actions a second against batch (`throughput.png`).

    The first size is drawn.
    """
    from matplotlib.figure import Figure

    points = [point for point in points if point.size == points[0].size and point.action_ms]
    batches = sorted({point.batch for point in points})
    figure = Figure(figsize=(4.2 * (len(batches) + 1), 3.6), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(batches) + 1, squeeze=False)[0]
    for axis, batch in zip(axes, batches):
        _lines(axis, points, "context", _latency, partial(_of, batch=batch))
        axis.set(title=f"latency, batch {batch}", xlabel="context, environment steps", ylabel="p50 of an action, ms")
    _lines(axes[-1], points, "context", lambda p: p.peak_mib, partial(_of, batch=batches[0]))
    axes[-1].set(title=f"memory, batch {batches[0]}", xlabel="context, environment steps", ylabel="peak, MiB")
    axes[-1].legend(fontsize=8)
    figure.savefig(folder / "latency.png", metadata={"Software": None})

    contexts = sorted({point.context for point in points})
    context = min(contexts, key=lambda context: abs(context - 1600))
    figure = Figure(figsize=(4.6, 3.6), layout="constrained", dpi=150)
    axis = figure.subplots()
    _lines(axis, points, "batch", lambda p: p.per_second[0], lambda p: p.context == context)
    axis.set(title=f"throughput after {context:,} steps", xlabel="batch", ylabel="actions a second")
    axis.legend(fontsize=8)
    figure.savefig(folder / "throughput.png", metadata={"Software": None})


def _latency(point: Point) -> float:
    return point.action_ms[0] if point.action_ms else 0.0


def _of(point: Point, batch: int) -> bool:
    return point.batch == batch


def _lines(axis: Any, points: list[Point], x: str, y: Callable[[Any], float], chosen: Callable[[Point], bool]) -> None:
    """Draws one line a policy on logarithmic axes."""
    for policy in dict.fromkeys(point.policy for point in points):
        line = [point for point in points if point.policy == policy and chosen(point)]
        places = [getattr(point, x) for point in line]
        axis.plot(places, [y(point) for point in line], marker="o", markersize=4, color=COLOURS[policy], label=policy)
    axis.set(xscale="log", yscale="log")
    low, high = axis.get_ylim()
    axis.set_ylim(low / 2, high * 2)  # lines that are flat shall look it
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter("")
    axis.grid(alpha=0.3)
