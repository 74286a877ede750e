"""What a training run is told: data, policy, optimisation, and where the results go.

    lram train ROOT --size tiny --backbone xlstm
    lram train ROOT --holdout --init RUN --top 0.05 --updates 25000        # fine-tuning, as in the paper
    lram train ROOT --mix atari=2 darkroom=0 --tasks 'atari/*' 'dmcontrol/*'

The same fields are the flags of `lram train` and of `torchrun -m lram.train`. A run is continued only with the
settings it began with, but for those in `FREE`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lram.datasets.specs import BadInput

BackboneName = Literal["xlstm", "mamba", "dt"]
SizeName = Literal["tiny", "16M", "48M", "110M", "206M", "408M"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run; the defaults are the paper's (Appendix C), the dials are size and backbone."""

    root: Path
    """Dataset to train on: a directory of files, a folder of tar shards, or a Zarr store."""
    out: Path = Path("runs/train")
    """Folder for checkpoints and logs; a run found there is continued."""
    backbone: BackboneName = "xlstm"
    """Sequence model."""
    size: SizeName = "16M"
    """Size of the policy."""
    slstm: bool = False
    """Put sLSTM blocks at the paper's [7:1] places (xLSTM only)."""
    half: bool = False
    """Half the depth and wider, as in the paper's latency test."""
    with_actions: bool = False
    """Give the policy the previous action too, the paper's ablation."""
    without_return: bool = False
    """Leave returns-to-go out: behaviour cloning."""
    without_reward: bool = False
    """Leave rewards out."""
    tasks: tuple[str, ...] = ()
    """Tasks to train on, as patterns of <domain>/<task> such as 'dmcontrol/*'; all by default."""
    holdout: bool = False
    """Train on the hold-out tasks, which are left out otherwise."""
    top: float = 1.0
    """Share of each task's trajectories to train on, those of the highest returns, at least one."""
    mix: tuple[str, ...] = ()
    """Shares of an update's windows, such as atari=2 procgen=0; a domain not named has 1."""
    init: Path | None = None
    """Checkpoint whose weights to start from, or a run's folder: then its best."""
    updates: int = 33_300
    """Optimizer updates to do."""
    per_domain: int = 128
    """Windows of each domain in an update, over all ranks; with `mix`, the mean over domains."""
    context: int = 50
    """Environment steps in a window, for domains whose windows lie inside one episode."""
    episodes: int | None = None
    """Whole episodes in a window; by default the domain's own: 2 for Dark-Room, else windows of `context`."""
    gap: int = 100
    """Distance between the episodes of a window, in episodes of the specialist's training."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: int = 4000
    """Updates of linear warm-up; a run shorter than 40,000 takes a tenth of itself."""
    final_learning_rate: float = 1e-6
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.01
    """Decay of weight matrices; biases, norms and gains have none."""
    clip: float = 0.25
    """Largest norm of the gradient."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999; it is then what is validated and saved
    as the policy."""
    seed: int = 0
    """Seed of the initial weights and of the windows drawn."""
    log_every: int = 50
    """Updates between two lines in the log; one is also written whenever perplexity or scores were measured."""
    validate_every: int = 500
    """Updates between two measurements of validation perplexity."""
    evaluate_every: int = 0
    """Updates between evaluations in the simulators, five episodes a task, scores in the log; 0 plays nothing."""
    evaluate_tasks: tuple[str, ...] = ()
    """Tasks to play then, as patterns of <domain>/<task>; all that are trained on by default."""
    save_every: int = 500
    """Updates between two checkpoints; one is also written whenever validation perplexity is the lowest so far."""
    readers: int = 2
    """Processes that read windows ahead; 0 reads them between updates."""
    device: DeviceName = "auto"
    """Where to train; auto takes CUDA when there is one."""
    compile: bool = False
    """Compile the backbone with torch.compile: a minute or more to start, the same losses to float tolerance."""
    wandb: str | None = None
    """Project on Weights & Biases to log to as well."""


FREE = {
    *("root", "out", "log_every", "validate_every", "save_every"),
    *("evaluate_every", "evaluate_tasks", "readers", "device", "compile", "wandb"),
}
"""Settings that may change when a run is continued: they do not touch the curve."""


def plain(settings: TrainSettings) -> dict[str, Any]:
    """Returns the settings as JSON keeps them."""

    def simple(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return {key: simple(value) for key, value in vars(settings).items()}


def check(settings: TrainSettings) -> None:
    """Refuses settings that mean nothing.

    Raises:
        BadInput: One of them does.
    """
    if settings.wandb and find_spec("wandb") is None:
        raise BadInput("--wandb needs a package that is not installed: pip install wandb")
    if settings.slstm and settings.backbone != "xlstm":
        raise BadInput(f"--slstm: {settings.backbone} has no sLSTM blocks, only xlstm does")
    if not 0 < settings.top <= 1:
        raise BadInput(f"--top {settings.top}: expected a share above 0 and up to 1")
    if not 0 <= settings.ema < 1:
        raise BadInput(f"--ema {settings.ema}: expected a decay from 0 to below 1")
    if not settings.clip > 0:
        raise BadInput(f"--clip {settings.clip}: expected a norm above 0")
    ones = ("updates", "per_domain", "context", "episodes", "gap", "log_every", "validate_every", "save_every")
    zeros = ("learning_rate", "final_learning_rate", "weight_decay", "warmup", "seed", "readers", "evaluate_every")
    for name, least in {**dict.fromkeys(ones, 1), **dict.fromkeys(zeros, 0)}.items():
        value = getattr(settings, name)
        if value is not None and not value >= least:  # NaN is not
            raise BadInput(f"--{name.replace('_', '-')} {value}: expected at least {least}")


def learning_rate(settings: TrainSettings, update: int) -> float:
    """Returns the rate of an update, counted from 0: linear warm-up, then a cosine to the final rate."""
    warmup = min(settings.warmup, settings.updates // 10)
    if update < warmup:
        return settings.learning_rate * (update + 1) / warmup
    progress = (update - warmup) / max(1, settings.updates - warmup)
    height = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.final_learning_rate + (settings.learning_rate - settings.final_learning_rate) * height
