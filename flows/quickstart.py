"""From nothing to an agent that learns in context: the product's own flows on a small Dark-Room.

    lram quickstart                # minutes on two cores
    lram quickstart --thorough     # a larger room, more goals, more updates

Specialists learn, their training is recorded, the dataset is checked and reported on, a policy is trained on the
histories by Algorithm Distillation, and plays goals it was and was not trained on, without weight updates. Run
again after a kill, it continues; what is complete is not made again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefect import flow

from lram.collectors.specialists import DarkRoomSettings
from lram.datasets.index import find_tasks, fingerprint
from lram.flows.collect import CollectSettings, collect_darkroom
from lram.flows.evaluate import evaluate_policy, show
from lram.flows.progress import console
from lram.flows.report import ReportSettings, report_dataset
from lram.flows.train import train_policy
from lram.train import checkpoint
from lram.train.evaluate import EvaluateSettings, playing, results_folder
from lram.train.settings import BackboneName
from lram.train.trainer import TrainSettings


@dataclass(frozen=True)
class QuickstartSettings:
    """The whole way on Dark-Room. The defaults take minutes on two cores."""

    out: Path = Path("runs/quickstart")
    """Folder for the dataset, the report, the checkpoint and the evaluation."""
    thorough: bool = False
    """Twice the goals in a larger room, and three times the updates; sets size, horizon, steps, updates, trials."""
    backbone: BackboneName = "xlstm"
    """Sequence model of the policy."""
    size: int = 5
    """Side of the room, in cells; four fifths of its cells are training goals."""
    horizon: int = 20
    """Steps per episode."""
    steps: int = 10_000
    """Transitions that each goal's specialist learns from."""
    gap: int = 100
    """Distance between the two episodes of a training window, in episodes of the specialist's training."""
    updates: int = 1000
    """Optimizer updates of the policy."""
    trials: int = 20
    """Episodes that the policy plays on each goal, keeping its context."""
    seed: int = 0
    """Seed of specialists, policy and evaluation."""


THOROUGH: dict[str, Any] = {"size": 7, "horizon": 30, "steps": 30_000, "updates": 3000, "trials": 30}


def train_settings(settings: QuickstartSettings) -> TrainSettings:
    """Returns how the policy is trained."""
    return TrainSettings(
        root=settings.out / "dataset",
        out=settings.out / f"policy-{settings.backbone}",
        backbone=settings.backbone,
        size="tiny",
        updates=settings.updates,
        per_domain=64,
        gap=settings.gap,
        learning_rate=3e-3,
        seed=settings.seed,
        log_every=25,
        validate_every=200,
        save_every=100,
        readers=1,
    )


@flow(name="quickstart")
def quickstart(settings: QuickstartSettings) -> dict[str, Any]:
    """Collects, checks, reports, trains and evaluates.

    Returns:
        Paths of `dataset`, `report`, `checkpoint`, `curves` and `plot`, and the evaluation's `result`.
    """
    if settings.thorough:
        settings = replace(settings, **THOROUGH)
    training = train_settings(settings)
    evaluation = EvaluateSettings(training.out, trials=settings.trials, seed=settings.seed)
    specialist = DarkRoomSettings(settings.size, settings.horizon, steps=settings.steps, seed=settings.seed)
    root, report = training.root, settings.out / "report"
    collect_darkroom(CollectSettings(root, "training", specialist=specialist))
    if _reported(report) == fingerprint(find_tasks(root)):
        console.print("report     is of this dataset already")
    else:
        report_dataset(ReportSettings(root, report))
    train_policy(training)
    folder = results_folder(evaluation)
    result = _evaluated(folder / "in_context.json", evaluation)
    if result is None:
        result = evaluate_policy(evaluation)
    return {
        "dataset": root,
        "report": report / "report.html",
        "checkpoint": checkpoint.best(training.out),
        "curves": folder / "in_context.json",
        "plot": folder / "in_context.png",
        "result": result,
    }


def _reported(folder: Path) -> str | None:
    """Returns the fingerprint of the dataset that the report in a folder is about."""
    try:
        return json.loads((folder / "report.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


def _evaluated(path: Path, settings: EvaluateSettings) -> dict[str, Any] | None:
    """Returns the results in a file when they are of this checkpoint and these settings."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    same = result["checkpoint"] == checkpoint.best(settings.checkpoint).name
    return result if same and result["settings"] == playing(settings) else None


def main(settings: QuickstartSettings) -> int:
    """Runs the flow, prints the key figures and where everything is."""
    made = quickstart(settings)
    show(made["result"])
    for name in ("dataset", "report", "checkpoint", "curves", "plot"):
        print(f"{name:<11}{made[name]}")
    return 0
