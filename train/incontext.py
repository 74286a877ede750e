"""In-context learning: a policy plays a task again and again without weight updates, and gets better or does not.

    result = evaluate(InContextSettings(RUN, trials=20))
    returns_NST = in_context_returns(actor, tasks, settings, target_return)

In-context protocol (Laskin et al. 2022, paper Section 4.3): on each task the policy plays N trials without any
weight update and keeps its context across them; a rising curve is learning. Each environment step is one call
of three tokens: r_{t-1}, s_t, R_t. A random policy plays the same tasks for comparison.

The context is either the recurrent state carried through all trials (`context_episodes=0`, the paper's way), or
the last few episodes encoded afresh at each trial's start with the returns they really had, which is how the
training windows look; the second costs one chunked forward pass a trial and never leaves the trained length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lram.collectors import darkroom
from lram.datasets.specs import DOMAINS, STATE_WIDTH, BadInput
from lram.datasets.trajectory import write_whole
from lram.model.policy import Policy, choose_action
from lram.model.state import State
from lram.train import checkpoint
from lram.train.metrics import bootstrap_mean
from lram.train.results import label_of


@dataclass(frozen=True)
class InContextSettings:
    """Settings of an in-context evaluation on Dark-Room."""

    checkpoint: Path
    """A checkpoint's folder, or a run's folder: then its best checkpoint."""
    out: Path | None = None
    """Folder for the results; by default `evaluation` inside the run's folder."""
    goals: Literal["training", "holdout", "both"] = "both"
    """In-context: which goals to play, those the policy was trained on, those it never saw, or both."""
    trials: int = 40
    """In-context: episodes on each goal, with the context kept."""
    seeds: int = 3
    """In-context: independent repetitions of every goal."""
    context_episodes: int = 2
    """In-context: episodes in the context, the running one included; 0 carries one recurrent state through all."""
    target: str = "best"
    """Return to ask for: best (in the data of each task; in-context the median over goals), table, or a number."""
    temperature: float = 1.0
    """Temperature of the actions' distribution; of rollouts 0 takes the likeliest action."""
    seed: int = 0
    """Seed of the episodes and of the actions drawn."""


Act = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""States (N, D), returns-to-go (N,) and previous rewards (N,), unscaled, to actions (N,)."""


class Actor:
    """A policy acting in N slots at once, with one recurrent state a slot.

    Attributes:
        state: The recurrent state of all slots; None at the start.
    """

    def __init__(self, policy: Policy, domain: str, generator: torch.Generator, temperature: float) -> None:
        self.policy, self.spec = policy, DOMAINS[domain]
        self.generator, self.temperature = generator, temperature
        self.device = next(policy.parameters()).device
        self.state: State = None

    def _encode(self, states_NKD: np.ndarray, returns_NK: np.ndarray, rewards_NK: np.ndarray) -> torch.Tensor:
        padded_NKS = np.zeros((*states_NKD.shape[:2], STATE_WIDTH), np.float32)
        padded_NKS[..., : states_NKD.shape[2]] = states_NKD
        scale = np.float32(self.spec.reward_scale)
        states, returns, rewards = (
            torch.from_numpy(array.astype(np.float32)).to(self.device)
            for array in (padded_NKS, returns_NK / scale, rewards_NK / scale)
        )
        logits, self.state = self.policy.step(states, returns, rewards, self.state)
        return logits

    @torch.no_grad()
    def act(self, states_ND: np.ndarray, returns_N: np.ndarray, rewards_N: np.ndarray) -> np.ndarray:
        """Advances all slots by one environment step and draws their actions."""
        logits = self._encode(states_ND[:, None], returns_N[:, None], rewards_N[:, None])
        actions = choose_action(
            logits[:, -1].float(), self.spec, self.spec.num_actions, self.generator, self.temperature
        )
        return actions.cpu().numpy()

    @torch.no_grad()
    def remember(self, states_NKD: np.ndarray, returns_NK: np.ndarray, rewards_NK: np.ndarray) -> None:
        """Starts all slots afresh from K past steps, encoded in one chunk."""
        self.state = None
        self._encode(states_NKD, returns_NK, rewards_NK)


@dataclass
class _Episode:
    """What all slots saw during one trial: (N, T, D), (N, T), (N, T)."""

    states: np.ndarray
    rewards: np.ndarray

    def context(self, before: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns states, true returns-to-go and previous rewards; `before` (N,) precedes the first step."""
        returns = np.cumsum(self.rewards[:, ::-1], axis=1)[:, ::-1]
        return self.states, returns, np.concatenate([before[:, None], self.rewards[:, :-1]], axis=1)


def in_context_returns(
    act: Actor | Act, tasks: list[str], settings: InContextSettings, target_return: float
) -> Iterator[np.ndarray]:
    """Plays `settings.trials` episodes on every task and seed, all slots at once.

    Args:
        act: An actor, or any function of (states, returns-to-go, previous rewards).
        tasks: Dark-Room tasks of one horizon.
        settings: Trials, seeds, context.
        target_return: Return asked for at the start of each trial.

    Yields:
        The returns of one trial after the other, each (len(tasks), seeds).
    """
    env = darkroom.DarkRoomVector([task for task in tasks for _ in range(settings.seeds)])
    if len({room.horizon for room in env.rooms}) > 1:
        raise BadInput("in-context evaluation needs tasks of one horizon")
    horizon, N = env.rooms[0].horizon, env.num_envs
    past: list[_Episode] = []
    states, _ = env.reset()
    previous = np.zeros(N)
    for _ in range(settings.trials):
        if isinstance(act, Actor) and settings.context_episodes:
            previous = _encode_past(act, past, N)
        asked = np.full(N, float(target_return))
        seen, paid = np.empty((N, horizon, states.shape[1]), np.float32), np.empty((N, horizon))
        for t in range(horizon):
            seen[:, t] = states
            actions = (act.act if isinstance(act, Actor) else act)(states, asked, previous)
            states, rewards, _, _, _ = env.step(actions)
            asked -= rewards
            previous = paid[:, t] = rewards
        past = [*past, _Episode(seen, paid)][max(0, len(past) + 2 - settings.context_episodes) :]
        yield paid.sum(1).reshape(len(tasks), settings.seeds)


def _encode_past(actor: Actor, past: list[_Episode], slots: int) -> np.ndarray:
    """Encodes past episodes afresh; returns the reward before the first step of the next one."""
    before = np.zeros(slots)
    pieces = []
    for episode in past:
        pieces.append(episode.context(before))
        before = episode.rewards[:, -1]
    actor.state = None
    if pieces:
        actor.remember(*(np.concatenate(parts, axis=1) for parts in zip(*pieces)))
    return before


def goals_of(tasks: list[str], which: str) -> dict[str, list[str]]:
    """Returns the Dark-Room tasks to play by goal set: "training" as given, "holdout" of the same rooms.

    Raises:
        BadInput: There is no Dark-Room task among them.
    """
    rooms = [darkroom.parse_task(name.split("/", 1)[1]) for name in tasks if name.startswith("darkroom/")]
    if not rooms:
        raise BadInput("the checkpoint was not trained on Dark-Room, the one domain this evaluation plays")
    first = rooms[0]
    size = (first.rows, first.cols)
    holdout = darkroom.rooms(size, first.key is not None, first.sparse, first.horizon)[1]
    sets = {
        "training": sorted(darkroom.task_name(room) for room in rooms),
        "holdout": sorted(darkroom.task_name(room) for room in holdout if room not in rooms),
    }
    return sets if which == "both" else {which: sets[which]}


def summarise(returns_TNS: np.ndarray, seed: int) -> dict[str, list[float]]:
    """Returns the mean of every trial with its 95 % bootstrap interval over tasks and seeds."""
    rng = np.random.default_rng(seed)
    rows = [bootstrap_mean(trial, rng) for trial in returns_TNS]
    mean, low, high = (list(column) for column in zip(*rows))
    return {"mean": mean, "low": low, "high": high}


def playing(settings: InContextSettings) -> dict[str, Any]:
    """Returns the settings that decide how is played: all but what plays and where the results go."""
    names = {field.name for field in fields(InContextSettings)} - {"checkpoint", "out"}
    return {key: value for key, value in vars(settings).items() if key in names}


def results_folder(settings: InContextSettings) -> Path:
    """Returns the folder for the results: `settings.out`, or `evaluation` inside the run's folder."""
    run = Path(settings.checkpoint)
    return settings.out or (run.parent if (run / checkpoint.STATE).is_file() else run) / "evaluation"


Progress = Callable[[str, int, int], None]
"""What is played, trials done, trials in all."""


def evaluate(settings: InContextSettings, progress: Progress | None = None) -> dict[str, Any]:
    """Plays the in-context protocol and writes `in_context.json` and `in_context.png`.

    Args:
        settings: The checkpoint and how to play.
        progress: Called after every trial.

    Returns:
        The content of the JSON file: every return, curves with intervals, the random policy's mean.

    Raises:
        BadInput: There is no usable checkpoint, or it was not trained on Dark-Room.
    """
    folder = checkpoint.best(settings.checkpoint)
    policy, state = checkpoint.load_policy(folder)
    target = target_return(state, settings.target)
    result: dict[str, Any] = {
        "checkpoint": folder.name,
        "update": state.update,
        "policy": state.policy,
        "target_return": target,
        "settings": playing(settings),
        "curves": {},
    }
    torch.manual_seed(settings.seed)
    for which, tasks in goals_of(state.dataset["tasks"], settings.goals).items():
        if not tasks:
            continue
        actor = Actor(policy, "darkroom", torch.Generator().manual_seed(settings.seed), settings.temperature)
        rng = np.random.default_rng(settings.seed)
        players: dict[str, Actor | Act] = {
            "policy": actor,
            "random": lambda states, returns, rewards, rng=rng: rng.integers(5, size=len(states)),  # type: ignore[misc]
        }
        curves: dict[str, Any] = {"tasks": tasks}
        for name, player in players.items():
            trials = []
            for returns_NS in in_context_returns(player, tasks, settings, target):
                trials.append(returns_NS)
                if progress and name == "policy":
                    progress(f"{which} goals", len(trials), settings.trials)
            returns_TNS = np.stack(trials)
            curves[name] = summarise(returns_TNS, settings.seed)
            curves[name]["returns"] = returns_TNS.transpose(1, 2, 0).tolist()  # task, seed, trial
        best = [darkroom.parse_task(task).best_return for task in tasks]
        curves["best_possible"] = float(np.mean(best))
        result["curves"][which] = curves | key_figures(curves)
    out = results_folder(settings)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "in_context.json", json.dumps(result).encode())
    plot(result, out / "in_context.png")
    return result


def key_figures(curves: dict[str, Any]) -> dict[str, float | None]:
    """Returns the first trial's mean, the last fifth's, their ratio (None over 0), and the random policy's mean."""
    mean = np.array(curves["policy"]["mean"])
    last = float(mean[-max(1, len(mean) // 5) :].mean())
    random = float(np.mean(curves["random"]["mean"]))
    first = float(mean[0])
    return {"first_trial": first, "last_fifth": last, "rise": last / first if first else None, "random_mean": random}


def target_return(state: checkpoint.State, target: str) -> float:
    """Returns the return to ask for: the median over training goals of the best in the data, or a number.

    Raises:
        BadInput: It is neither.
    """
    if target == "best":
        return float(np.median([best for name, best in state.target_returns.items() if name.startswith("darkroom/")]))
    try:
        return float(target)
    except ValueError:
        raise BadInput(f"--target {target}: in-context evaluation takes best or a number, no table has rooms") from None


GOALS = {"training": "training", "holdout": "hold-out"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws return over trial with intervals, one panel a goal set, with the random policy's line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = result["curves"]
    figure = Figure(figsize=(4.6 * len(curves), 3.6), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axis, (which, curve) in zip(axes, curves.items()):
        trials = np.arange(1, len(curve["policy"]["mean"]) + 1)
        label = label_of(result["policy"])
        for name, colour, text in (("policy", "#2166ac", label), ("random", "#888888", "random policy")):
            axis.plot(trials, curve[name]["mean"], color=colour, label=text)
            axis.fill_between(trials, curve[name]["low"], curve[name]["high"], color=colour, alpha=0.2, linewidth=0)
        axis.axhline(curve["best_possible"], color="#444444", linestyle=":", linewidth=1, label="best possible")
        axis.set(title=f"{len(curve['tasks'])} {GOALS[which]} goals", xlabel="trial", xlim=(1, trials[-1]))
        axis.set_ylim(0, 1.08 * max(curve["best_possible"] for curve in curves.values()))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("return")
    axes[0].legend(loc="center right", bbox_to_anchor=(1, 0.3), fontsize=8)
    figure.savefig(path, metadata={"Software": None})
