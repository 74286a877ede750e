"""Trains a policy on a dataset.

    lram train ROOT --size 16M --backbone xlstm
    lram train ROOT --holdout --init RUN --top 0.05 --updates 25000
    train_policy(TrainSettings(root=Path("ROOT")))

This is the trainer of `lram.train.trainer` with a progress bar, in this process. For several processes or
machines start `torchrun -m lram.train` with the same settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from lram.flows.progress import bar, console
from lram.train.trainer import TrainSettings, train


@flow(name="train")
def train_policy(settings: TrainSettings) -> Path:
    """Trains a policy, or continues the run in `settings.out`.

    Returns:
        The run's folder.
    """
    with bar("train", settings.updates, "updates") as step:
        done = 0

        def report(line: dict[str, Any]) -> None:
            nonlocal done
            note = f"loss {line['loss']:.3f}, {line['windows_per_second']:.0f} windows/s"
            step(line["update"] - done, note)
            done = line["update"]

        out = train(settings, report, console.print)
        if not done:  # the run was complete already
            step(settings.updates, "complete")
        return out


def main(settings: TrainSettings) -> int:
    """Runs the flow, prints the validation perplexities and the run's folder."""
    from lram.train import checkpoint

    out = train_policy(settings)
    state = checkpoint.read_state(checkpoint.find(out))
    for domain, perplexity in state.perplexity.items():
        print(f"validation perplexity on {domain}: {perplexity:.3f}")
    print(checkpoint.find(out))
    return 0
