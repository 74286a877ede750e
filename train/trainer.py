"""The trainer: windows in, a policy out; the same loop on a laptop, one GPU, or many through torchrun.

    lram train ROOT --size tiny --backbone xlstm
    torchrun --nproc-per-node 2 -m lram.train ROOT --size 16M

One update sees `per_domain` windows of every domain in equal parts, a micro-batch per domain, gradients summed
before they are sent. "Updates" are optimizer updates, not the micro-batches that the LRAM code counts. A batch
depends on the seed and the update's number alone, so a run started again with the same settings continues the
same curve, on any number of ranks. On several machines OUT is a disk that all see. Traded away: models too large
for one device (no sharding).
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lram.datasets.ahead import batches_ahead
from lram.datasets.index import fingerprint
from lram.datasets.specs import DOMAINS, BadInput
from lram.datasets.windows import Batch, Windows, WindowSettings
from lram.model.policy import Policy, PolicySettings, decayed
from lram.train import checkpoint
from lram.train.evaluate import chosen, play_in_training
from lram.train.log import Clock, Log, Report, keep
from lram.train.loss import EXPLODED, average, do_update, perplexities
from lram.train.ranks import Ranks, start_ranks
from lram.train.selection import choose, read_mix, share_out
from lram.train.settings import FREE, TrainSettings, check, learning_rate, plain


def train(settings: TrainSettings, report: Report | None = None, say: Callable[[str], None] | None = None) -> Path:
    """Trains a policy, or continues the run found in `settings.out`.

    Args:
        settings: What to train, on which data.
        report: Called on rank 0 with a dict at every log line; what it needs beyond the log is its own business.
        say: Called on rank 0 with a sentence on what is left out; by default it goes to standard error.

    Returns:
        The run's folder.

    Raises:
        BadInput: The data or a setting cannot be used, the run in `out` has other settings, the checkpoint in `init`
            is of another policy, or a loss is not finite or above `EXPLODED`.
    """
    check(settings)
    report = report or (lambda line: None)
    say = say or (lambda text: print(text, file=sys.stderr))
    ranks = start_ranks(settings.device)
    try:
        return _train(settings, ranks, report, say)
    finally:
        if ranks.of > 1:
            dist.destroy_process_group()


def open_windows(settings: TrainSettings) -> tuple[Windows, dict[str, int], dict[str, int]]:
    """Opens the tasks to train on.

    Returns:
        Their windows, how many of each domain an update sees over all ranks, and how many tasks are left out, by kind.
    """
    mix = read_mix(settings.mix)
    folders, left_out = choose(settings.root, settings.tasks, settings.holdout, mix)
    cut = WindowSettings(settings.context, settings.episodes, settings.gap, settings.top)
    windows = Windows.open(settings.root, cut, folders)
    return windows, share_out(settings.per_domain, list(windows.tasks), mix), left_out


def describe(windows: Windows, left_out: dict[str, int]) -> dict[str, Any]:
    """Says which data a run saw: tasks, transitions, one hash over the content, and how many tasks it left out."""
    return {
        "tasks": sorted(f"{task.domain.name}/{task.task}" for task in windows.every_task),
        "transitions": windows.transitions,
        "sha256": fingerprint([task.folder for task in windows.every_task]),
        "left_out": left_out,
    }


def target_returns(windows: Windows) -> dict[str, float]:
    """Returns the best return in the data, by "<domain>/<task>"."""
    return {f"{task.domain.name}/{task.task}": float(task.returns.max()) for task in windows.every_task}


def build(
    settings: TrainSettings, windows: Windows, device: torch.device, source: Path | None = None
) -> tuple[Policy, torch.optim.Optimizer]:
    """Makes the policy that the data calls for, and its optimizer.

    Args:
        settings: Its backbone, size and inputs.
        windows: The data.
        device: Where to put it.
        source: Checkpoint whose weights it will get, and which may have seen domains that are not in the data.

    Raises:
        BadInput: The checkpoint's policy does not take the data.
    """
    domains = [DOMAINS[name] for name in windows.tasks]
    steps = max(windows.steps(domain.name) for domain in domains)
    image = any(domain.state == "image" for domain in domains)
    if source:
        saved = PolicySettings(**checkpoint.read_state(source).policy)
        if image and not saved.image:
            raise BadInput(f"{source}: a policy that has no image encoder, which the data calls for")
        if settings.backbone == "dt" and steps > saved.max_steps:
            raise BadInput(f"{source}: a policy for windows of {saved.max_steps} steps, not the data's {steps}")
        steps, image = saved.max_steps, saved.image
    # The dials of a policy have the same names here and there; the rest of it follows from the data.
    dials = {key: value for key, value in vars(settings).items() if key in vars(PolicySettings())}
    torch.manual_seed(settings.seed)
    policy = Policy(PolicySettings(**dials, max_steps=steps, image=image)).to(device)
    # What no domain goes through keeps its weights: else they would decay, and on several ranks only.
    if all(domain.state == "image" for domain in domains):
        policy.encode_vector.requires_grad_(False)
    if policy.encode_image and all(domain.state == "vector" for domain in domains):
        policy.encode_image.requires_grad_(False)
    if policy.encode_action and all(domain.action == "discrete" for domain in domains):
        policy.encode_action.continuous.requires_grad_(False)
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in trained if decayed(name, parameter)]
    others = [parameter for name, parameter in trained if not decayed(name, parameter)]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return policy, torch.optim.AdamW(groups, settings.learning_rate, fused=True)


@dataclass
class _Run:
    """What a run holds: data, the policy in training, the one that acts (its average, with EMA), where the run is."""

    windows: Windows
    shares: dict[str, int]
    policy: Policy
    acting: Policy
    optimizer: torch.optim.Optimizer
    state: checkpoint.State


def _prepare(settings: TrainSettings, ranks: Ranks, say: Callable[[str], None]) -> _Run:
    """Opens the data and makes the policy, as new, of `settings.init`, or where the run in `settings.out` stopped."""
    windows, shares, left_out = open_windows(settings)
    if left_out and ranks.rank == 0:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        say(f"trains on {len(windows.every_task)} tasks; left out: {kinds}")
    for domain, count in shares.items():
        if count < ranks.of:
            raise BadInput(f"{domain} has {count} windows an update, too few for {ranks.of} processes")
    state = checkpoint.State(
        train=plain(settings), dataset=describe(windows, left_out), target_returns=target_returns(windows)
    )
    found = checkpoint.find(settings.out) if checkpoint.checkpoints(settings.out) else None
    if found:
        state = _continued(found, state, settings)
    source = found or (checkpoint.best(settings.init) if settings.init else None)
    policy, optimizer = build(settings, windows, ranks.device, source)
    state.policy = dataclasses.asdict(policy.settings)
    if source:
        checkpoint.load_weights(policy, source, checkpoint.TRAINED if found and settings.ema else checkpoint.WEIGHTS)
    acting = copy.deepcopy(policy).requires_grad_(False) if settings.ema else policy
    if found and settings.ema:
        checkpoint.load_weights(acting, found)
    if found:
        checkpoint.load_optimizer(optimizer, found)
    if settings.compile:
        policy.backbone.compile()
    return _Run(windows, shares, policy, acting, optimizer, state)


def _train(settings: TrainSettings, ranks: Ranks, report: Report, say: Callable[[str], None]) -> Path:
    run = _prepare(settings, ranks, say)
    policy, state = run.policy, run.state
    tasks = chosen(state.dataset["tasks"], "training", settings.evaluate_tasks) if settings.evaluate_every else []
    wrapped: Policy | DistributedDataParallel = policy
    if ranks.of > 1:
        places = [ranks.device] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(policy, device_ids=places)
    opened = closing(Log(settings, state.update, report)) if ranks.rank == 0 else nullcontext()
    updates, part = range(state.update, settings.updates), (ranks.rank, ranks.of)
    ahead = batches_ahead(run.windows, updates, "train", run.shares, settings.seed, part, settings.readers)
    with opened as log, closing(ahead) as reading:
        clock, windows_each = Clock(), sum(run.shares.values())
        for update, batches in clock.waiting(reading):
            rate = learning_rate(settings, update)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.zero_grad(set_to_none=True)
            losses = do_update(wrapped, batches, ranks)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip)
            if not (losses < EXPLODED).all() & norm.isfinite():  # & and not `and`: the device is waited for once
                path = keep(batches, settings.out, ranks.rank)
                raise BadInput(f"{_wrong(update, batches, losses, norm)}; the batch is in {path}")
            run.optimizer.step()
            if run.acting is not policy:
                average(run.acting, policy, settings.ema)
            state.update = done = update + 1
            end = done == settings.updates
            better, measured = False, {}
            if end or done % settings.validate_every == 0:
                better = _validate(run, settings, ranks)
                measured = {f"perplexity/{name}": value for name, value in state.perplexity.items()}
            if tasks and (end or done % settings.evaluate_every == 0):
                measured |= play_in_training(run.acting, tasks, state.target_returns, settings, ranks, say)
            if log and (measured or end or done % settings.log_every == 0 or update == updates[0]):
                by_domain = {batch.domain.name: loss for batch, loss in zip(batches, losses.tolist())}
                line: dict[str, Any] = {"update": done, "updates": settings.updates}
                line |= {"loss": sum(loss * run.shares[name] for name, loss in by_domain.items()) / windows_each}
                line |= {f"loss/{name}": loss for name, loss in by_domain.items()}
                line |= {"learning_rate": rate, "gradient_norm": norm.item()}
                log.write(line | clock.line((done - updates[0]) * windows_each) | measured)
            if ranks.rank == 0 and (end or better or done % settings.save_every == 0):
                trained = None if run.acting is policy else policy
                checkpoint.save(settings.out, state, run.acting, run.optimizer, trained)
    return settings.out


def _wrong(update: int, batches: list[Batch], losses: torch.Tensor, norm: torch.Tensor) -> str:
    """Says what is wrong with the losses, by domain, or with the norm of the gradient."""
    wrong = "has exploded" if losses.isfinite().all() and norm.isfinite() else "or gradient is not finite"
    said = ", ".join(f"{batch.domain.name} {loss:.4g}" for batch, loss in zip(batches, losses.tolist()))
    return f"loss {wrong} at update {update} ({said}, gradient {norm:.4g})"


def _validate(run: _Run, settings: TrainSettings, ranks: Ranks) -> bool:
    """Measures validation perplexity; returns whether its mean over the domains is the lowest so far."""
    state = run.state
    state.perplexity = perplexities(run.acting, run.windows, settings.per_domain, ranks)
    mean = sum(state.perplexity.values()) / max(1, len(state.perplexity))
    better = bool(state.perplexity) and mean < state.best[0]
    if better:
        state.best = mean, state.update
    return better


def _continued(folder: Path, fresh: checkpoint.State, settings: TrainSettings) -> checkpoint.State:
    """Returns the state of a run to continue, if it is one of these settings and this data.

    Raises:
        BadInput: It is not.
    """
    state = checkpoint.read_state(folder)
    before = plain(TrainSettings(settings.root)) | state.train  # settings that came later had their default
    for key, value in fresh.train.items():
        if key not in FREE and before[key] != value:
            raise BadInput(f"{folder}: was trained with {key} = {before[key]}, not {value}; choose another --out")
    if state.dataset.get("sha256") != fresh.dataset["sha256"]:
        raise BadInput(f"{folder}: was trained on other data than {settings.root} holds now; choose another --out")
    return state
