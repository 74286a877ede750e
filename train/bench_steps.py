"""The comparisons of `lram bench inference`: one environment step at batch 1, computed in every way there is.

Contestants take turns, step by step. Beside the wall's clock stands the processor time of this process: neighbours
stretch it less, so that on a shared machine its ratios are the ones to trust.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lram.collectors.environments import make
from lram.datasets.bench_loader import Row
from lram.datasets.specs import DOMAINS, STATE_WIDTH, state_columns
from lram.model.policy import Policy, choose_action
from lram.model.state import State
from lram.train.bench_backbones import package_stack, wait
from lram.train.fast import FastPolicy, Graphed, Weights

WARM_UP = 5
"""Steps of every contestant that do not count."""
EQUAL_STEPS = 200
"""Steps over which actions are compared."""
Times = tuple[tuple[float, float, float], float]
"""50th, 95th and 99th percentile of the time of a step, and its median processor time, in milliseconds."""


class Game:
    """Environments that act together, between tensors and actions.

    Attributes:
        spec: Their domain's spec.
    """

    def __init__(self, task: str, batch: int, device: torch.device) -> None:
        domain, name = task.split("/", 1)
        self.spec, self._device = DOMAINS[domain], device
        self._env = make(domain, name, num_envs=batch, seed=0)
        space: Any = self._env.single_action_space
        self._num_actions = int(space.n) if self.spec.action == "discrete" else space.shape[0]
        self._states, _ = self._env.reset()
        self._rewards, self._asked = np.zeros(batch, np.float32), np.full(batch, 100.0, np.float32)
        layout = getattr(self._env, "state_layout", None)
        vector = self.spec.state == "vector"
        self._columns = state_columns(domain, layout, self._states.shape[1]) if vector else None

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns states, returns-to-go and previous rewards as the policy takes them."""
        states = self._states[:, None]
        if self._columns is not None:
            states = np.zeros((len(self._states), 1, STATE_WIDTH), np.float32)
            states[:, 0, self._columns] = self._states
        scale = np.float32(self.spec.reward_scale)
        arrays = states, (self._asked / scale)[:, None], (self._rewards / scale)[:, None]
        a, b, c = (torch.from_numpy(array).to(self._device) for array in arrays)
        return a, b, c

    def actions(self, logits_BKV: Tensor) -> np.ndarray:
        """Returns the likeliest actions."""
        return choose_action(logits_BKV[:, -1].float(), self.spec, self._num_actions, greedy=True).cpu().numpy()

    def play(self, actions: np.ndarray) -> None:
        """Takes one step in every environment."""
        self._states, rewards, *_ = self._env.step(actions)
        self._rewards = np.asarray(rewards, np.float32)
        self._asked = self._asked - self._rewards


def percentiles(seconds: list[float]) -> tuple[float, float, float]:
    """Returns the 50th, 95th and 99th percentile in milliseconds."""
    p50, p95, p99 = (float(value) * 1e3 for value in np.percentile(seconds, [50, 95, 99]))
    return p50, p95, p99


def turns(runs: dict[str, Callable[[], Any]], steps: int, device: torch.device) -> dict[str, Times]:
    """Lets all run in turn, some steps of warm-up first."""
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(WARM_UP + steps):
        for name, run in runs.items():
            wait(device)
            began, worked = time.perf_counter(), time.process_time()
            run()
            wait(device)
            if step >= WARM_UP:
                wall[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - worked)
    return {name: (percentiles(wall[name]), float(np.median(processor[name])) * 1e3) for name in runs}


def _again(step: Callable[..., tuple[Any, State]], *inputs: Tensor) -> Callable[[], None]:
    """Returns a function that takes a step with the same inputs, each from the state after the one before."""
    state: State = None

    @torch.inference_mode()
    def run() -> None:
        nonlocal state
        _, state = step(*inputs, state)

    return run


def kinds(device: torch.device) -> tuple[Weights, ...]:
    """Returns what weights can be kept in."""
    return ("float32", "bfloat16", "int8") if device.type == "cpu" else ("float32", "bfloat16")


def against_package(policy: Policy, size: str, steps: int, device: torch.device) -> Iterator[Row]:
    """An xLSTM backbone alone, in our ways and in those of the `xlstm` package, with the same weights."""
    theirs: Any = package_stack(policy.backbone, 3).to(device).eval().requires_grad_(False)
    tokens = torch.randn(1, 3, policy.head.in_features, generator=torch.Generator().manual_seed(0)).to(device)

    def one_by_one(tokens: Tensor, state: State) -> tuple[Any, State]:
        for token in tokens.split(1, dim=1):
            _, state = theirs.step(token) if state is None else theirs.step(token, state)
        return None, state

    base, judged = "the package, three calls of one token", "FastPolicy, float32"
    runs = {
        base: _again(one_by_one, tokens),
        "the package, three tokens, no state": _again(lambda x, state: (theirs(x), None), tokens),
        "Policy.step": _again(policy.backbone.step, tokens),
    }
    for weights in kinds(device):
        runs[f"FastPolicy, {weights}"] = _again(FastPolicy(policy, weights).backbone.step, tokens)
    results = turns(runs, steps, device)
    section = f"xLSTM backbone, {size}, batch 1, three tokens; in brackets the ratio of processor times"
    for name, (wall, processor) in results.items():
        ratio, steady = results[base][0][0] / wall[0], results[base][1] / processor
        text = f"p50 {wall[0]:.2f}, p95 {wall[1]:.2f} ms, processor {processor:.2f} ms ({steady:.2f}×)"
        bar = "≥ 2.2×" if name == judged else ""
        yield Row(section, name, text, ratio, bar, ratio >= 2.2 if bar else None)


def ways(
    plain: Policy, label: str, task: str, steps: int, device: torch.device, compiling: bool, equal_steps: int
) -> Iterator[Row]:
    """A whole policy, plain and prepared: the time of a step, and the share of its greedy actions that stay the same.

    Args:
        plain: The policy.
        label: What to call it.
        task: Where it acts, as <domain>/<task>.
        steps: Steps to measure.
        device: Where it lies.
        compiling: Whether to try `torch.compile`, which takes up to a minute.
        equal_steps: Steps over which actions are compared.
    """
    game = Game(task, 1, device)
    inputs = game.inputs()
    steppers: dict[str, Callable[..., Any]] = {"Policy.step": plain.step}
    for weights in kinds(device):
        steppers[f"FastPolicy, {weights}"] = FastPolicy(plain, weights).step
    recurrent = plain.settings.backbone != "dt"
    if recurrent and device.type == "cuda":
        steppers["FastPolicy, CUDA graph"] = Graphed(FastPolicy(plain), *inputs[:2]).step
    if recurrent and compiling:
        compiled = FastPolicy(plain)
        for block in compiled.backbone.blocks:
            block.compile(dynamic=False)
        with suppress(Exception):  # no compiler here: one line less
            compiled.step(*inputs)
            steppers["FastPolicy, torch.compile"] = compiled.step
    equal = _equal_actions(steppers, game, equal_steps)
    results = turns({name: _again(step, *inputs) for name, step in steppers.items()}, steps, device)
    millions = sum(parameter.numel() for parameter in plain.parameters()) / 1e6
    window = "" if recurrent else f", the cache of its first {steps} steps"
    section = f"{label}, {millions:.1f} M parameters, batch 1, one step of logits{window}"
    bars = {"FastPolicy, float32": 15, "FastPolicy, int8": 10} if plain.settings.size == "16M" else {}
    for name, ((p50, p95, p99), processor) in results.items():
        times = f"p50 {p50:.2f}, p95 {p95:.2f}, p99 {p99:.2f} ms, processor {processor:.2f} ms"
        text = f"{times}, {equal[name]:.1%} same actions"
        bar = bars.get(name)
        ratio = results["Policy.step"][0][0] / p50
        yield Row(section, name, text, ratio, f"p50 < {bar} ms" if bar else "", p50 < bar if bar else None)


@torch.inference_mode()
def _equal_actions(steppers: dict[str, Callable[..., Any]], game: Game, count: int) -> dict[str, float]:
    """Plays what the first of all chooses; returns how often each chooses that too, every dimension by itself."""
    states: dict[str, State] = dict.fromkeys(steppers)
    equal: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(count):
        inputs, first = game.inputs(), None
        for name, step in steppers.items():
            logits, states[name] = step(*inputs, states[name])
            actions = game.actions(logits)
            first = actions if first is None else first
            equal[name].append(float((actions == first).mean()))
        game.play(first)  # type: ignore[arg-type]
    return {name: float(np.mean(shares)) for name, shares in equal.items()}
