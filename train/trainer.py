"""The trainer: windows in, a policy out; the same loop on a laptop, one GPU, or many through torchrun.

    lram train ROOT --size tiny --backbone xlstm
    torchrun --nproc-per-node 2 -m lram.train ROOT --size 16M

One update sees `per_domain` windows of every domain in equal parts, a micro-batch per domain, gradients summed
before they are sent. "Updates" are optimizer updates, not the micro-batches that the LRAM code counts. A batch
depends on the seed and the update's number alone, so a run started again with the same settings continues the
same curve, on any number of ranks. Traded away: models too large for one device (no sharding).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lram.datasets.ahead import batches_ahead
from lram.datasets.index import fingerprint
from lram.datasets.specs import BadInput
from lram.datasets.windows import Batch, Windows, WindowSettings
from lram.model.policy import Policy, PolicySettings, action_loss, decayed
from lram.train import checkpoint


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run; the defaults are the paper's (Appendix C), the dials are size and backbone."""

    root: Path
    """Dataset directory to train on."""
    out: Path = Path("runs/train")
    """Folder for checkpoints and logs; a run found there is continued."""
    backbone: Literal["xlstm", "mamba", "dt"] = "xlstm"
    """Sequence model."""
    size: Literal["tiny", "16M", "48M", "110M", "206M", "408M"] = "16M"
    """Size of the policy."""
    slstm: bool = False
    """Put sLSTM blocks at the paper's [7:1] places (xLSTM only)."""
    updates: int = 33_300
    """Optimizer updates to do."""
    per_domain: int = 128
    """Windows of each domain in an update, over all ranks."""
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
    seed: int = 0
    """Seed of the initial weights and of the windows drawn."""
    log_every: int = 50
    """Updates between two lines in the log."""
    validate_every: int = 500
    """Updates between two measurements of validation perplexity."""
    save_every: int = 500
    """Updates between two checkpoints; one is also written whenever validation perplexity is the lowest so far."""
    readers: int = 2
    """Processes that read windows ahead; 0 reads them between updates."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes CUDA when there is one."""


def learning_rate(settings: TrainSettings, update: int) -> float:
    """Returns the rate of an update, counted from 0: linear warm-up, then a cosine to the final rate."""
    warmup = min(settings.warmup, settings.updates // 10)
    if update < warmup:
        return settings.learning_rate * (update + 1) / warmup
    progress = (update - warmup) / max(1, settings.updates - warmup)
    height = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.final_learning_rate + (settings.learning_rate - settings.final_learning_rate) * height


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; `of` is 1 without torchrun."""

    rank: int
    of: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a tensor over all ranks."""
        if self.of > 1:
            dist.all_reduce(values)
        return values


def start_ranks(device: str) -> Ranks:
    """Joins the process group that torchrun describes in the environment, or stands alone."""
    rank, of = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if of > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Ranks(rank, of, place)


def describe(windows: Windows) -> dict[str, Any]:
    """Says which data a run saw: tasks, transitions, and one hash over the indices."""
    return {
        "tasks": sorted(f"{task.domain.name}/{task.task}" for task in windows.every_task),
        "transitions": windows.transitions,
        "sha256": fingerprint([task.folder for task in windows.every_task]),
    }


def target_returns(windows: Windows) -> dict[str, float]:
    """Returns the best return in the data, by "<domain>/<task>"."""
    return {f"{task.domain.name}/{task.task}": float(task.returns.max()) for task in windows.every_task}


def negative_log_likelihood(policy: torch.nn.Module, batch: Batch, ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed loss of a batch on this rank, and the number of action tokens in it."""

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(ranks.device, non_blocking=True)

    autocast = torch.autocast("cuda", torch.bfloat16) if ranks.device.type == "cuda" else nullcontext()
    with autocast:
        logits = policy(put(batch.states), put(batch.returns_to_go), put(batch.previous_rewards))
    dims = None if batch.action_mask is None else put(batch.action_mask)
    return action_loss(logits, put(batch.actions), put(batch.mask), batch.domain, dims)


@torch.no_grad()
def perplexities(policy: Policy, windows: Windows, settings: TrainSettings, ranks: Ranks) -> dict[str, float]:
    """Measures validation perplexity by domain on windows that are the same at every call."""
    policy.eval()
    sums = torch.zeros(len(windows.tasks), 2, dtype=torch.float64, device=ranks.device)
    order = sorted(windows.tasks)
    for number in range(4):
        part = ranks.rank, ranks.of
        for batch in windows.batches(number, "validation", settings.per_domain, 0, part):
            loss, count = negative_log_likelihood(policy, batch, ranks)
            sums[order.index(batch.domain.name)] += torch.stack([loss, count]).double()
    policy.train()
    ranks.sum(sums)
    return {
        name: math.exp(loss / count)
        for name, (loss, count) in zip(order, sums.tolist())
        if count  # a domain too small to have validation windows
    }


def do_update(wrapped: torch.nn.Module, batches: list[Batch], settings: TrainSettings, ranks: Ranks) -> torch.Tensor:
    """Accumulates the gradients of one update, the mean over domains of the mean over action tokens.

    Returns:
        The loss on all ranks' windows, by domain.
    """
    counts = torch.tensor([_count(batch) for batch in batches], dtype=torch.float64, device=ranks.device)
    ranks.sum(counts)
    losses = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
            loss, _ = negative_log_likelihood(wrapped, batch, ranks)
            # DDP averages over ranks, the loss is a mean over all of them: hence the factor.
            scaled = loss * (ranks.of / counts[number].item() / len(batches))
            if last and ranks.of > 1:
                # DDP sends gradients in the last backward only: let every parameter take part in it.
                scaled = scaled + 0.0 * sum(p.flatten()[0] for p in wrapped.parameters())
            scaled.backward()
        losses.append(loss.detach().double())
    return ranks.sum(torch.stack(losses)) / counts


def _count(batch: Batch) -> int:
    tokens = batch.mask.sum(1)
    return int(tokens.sum() if batch.action_mask is None else (tokens * batch.action_mask.sum(1)).sum())


Report = Callable[[dict[str, Any]], None]
Item = TypeVar("Item")


def train(settings: TrainSettings, report: Report | None = None) -> Path:
    """Trains a policy, or continues the run found in `settings.out`.

    Args:
        settings: What to train, on which data.
        report: Called on rank 0 with a dict at every log line; what it needs beyond the log is its own business.

    Returns:
        The run's folder.

    Raises:
        BadInput: The data cannot be used, the run in `out` has other settings, or the loss is not finite.
    """
    ranks = start_ranks(settings.device)
    try:
        return _train(settings, ranks, report or (lambda line: None))
    finally:
        if ranks.of > 1:
            dist.destroy_process_group()


def _build(settings: TrainSettings, windows: Windows, device: torch.device) -> tuple[Policy, torch.optim.Optimizer]:
    """Makes the policy that the data calls for, and its optimizer."""
    torch.manual_seed(settings.seed)
    policy = Policy(
        PolicySettings(
            backbone=settings.backbone,
            size=settings.size,
            slstm=settings.slstm,
            max_steps=max(windows.steps(domain) for domain in windows.tasks),
            image=any(group[0].domain.state == "image" for group in windows.tasks.values()),
        )
    ).to(device)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in policy.named_parameters():
        groups[decayed(name, parameter)].append(parameter)
    decays = ((True, settings.weight_decay), (False, 0.0))
    optimizer = torch.optim.AdamW(
        [{"params": groups[matrix], "weight_decay": decay} for matrix, decay in decays],
        lr=settings.learning_rate,
        fused=True,
    )
    return policy, optimizer


def _train(settings: TrainSettings, ranks: Ranks, report: Report) -> Path:
    if settings.per_domain % ranks.of:
        raise BadInput(f"--per-domain {settings.per_domain} does not divide over {ranks.of} processes")
    windows = Windows.open(settings.root, WindowSettings(settings.context, settings.episodes, settings.gap))
    policy, optimizer = _build(settings, windows, ranks.device)
    state = checkpoint.State(
        policy=dataclasses.asdict(policy.settings),
        train=_plain(settings),
        dataset=describe(windows),
        target_returns=target_returns(windows),
    )
    if checkpoint.checkpoints(settings.out):
        state = _resume(settings, state, policy, optimizer)
    wrapped: torch.nn.Module = policy
    if ranks.of > 1:
        places = [ranks.device] if ranks.device.type == "cuda" else None
        wrapped = DistributedDataParallel(policy, device_ids=places)
    log = _Log(settings.out, state.update, report) if ranks.rank == 0 else None
    updates, part = range(state.update, settings.updates), (ranks.rank, ranks.of)
    clock = _Clock()
    with closing(
        batches_ahead(windows, updates, "train", settings.per_domain, settings.seed, part, settings.readers)
    ) as reading:
        for update, batches in clock.waiting(reading):
            rate = learning_rate(settings, update)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            losses = do_update(wrapped, batches, settings, ranks)
            if not torch.isfinite(losses).all():
                raise BadInput(
                    f"loss is not finite at update {update}; the batch is in {_keep(batches, settings, ranks)}"
                )
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip)
            optimizer.step()
            state.update = done = update + 1
            end = done == settings.updates
            measured, better = done % settings.validate_every == 0 or end, False
            if measured:
                state.perplexity = perplexities(policy, windows, settings, ranks)
                mean = sum(state.perplexity.values()) / max(1, len(state.perplexity))
                if state.perplexity and mean < state.best[0]:
                    state.best, better = (mean, done), True
            if log and (done % settings.log_every == 0 or end or update == updates[0]):
                # Made here and not at every update: each number read from the device waits for it.
                line: dict[str, Any] = {"update": done, "updates": settings.updates, "loss": losses.mean().item()}
                line |= {f"loss/{batch.domain.name}": loss.item() for batch, loss in zip(batches, losses)}
                line |= {"learning_rate": rate, "gradient_norm": norm.item()}
                line |= clock.line((done - updates[0]) * settings.per_domain * len(batches))
                if measured:
                    line |= {f"perplexity/{name}": value for name, value in state.perplexity.items()}
                log.write(line)
            if ranks.rank == 0 and (done % settings.save_every == 0 or better or end):
                checkpoint.save(settings.out, state, policy, optimizer)
    if log:
        log.close()
    return settings.out


def _keep(batches: list[Batch], settings: TrainSettings, ranks: Ranks) -> Path:
    """Saves the batches of an update that went wrong."""
    path = settings.out / f"bad-batch-rank{ranks.rank}.npz"
    arrays = {f"{batch.domain.name}/{k}": v for batch in batches for k, v in vars(batch).items() if k != "domain"}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


class _Clock:
    """Seconds since the start, and how many of them went by waiting for windows."""

    def __init__(self) -> None:
        self.began, self.waited = time.monotonic(), 0.0

    def waiting(self, reading: Iterator[Item]) -> Iterator[Item]:
        """Passes items on, counting the time until each is there."""
        asked = time.monotonic()
        for item in reading:
            self.waited += time.monotonic() - asked
            yield item
            asked = time.monotonic()

    def line(self, windows: int) -> dict[str, float]:
        """Returns what the log says of `windows` windows trained on so far."""
        seconds = time.monotonic() - self.began
        return {
            "seconds": seconds,
            "windows_per_second": windows / seconds,
            "waiting_for_data": self.waited / seconds,
        }


def _plain(settings: TrainSettings) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}


# Settings that may change when a run is continued: they do not touch the curve.
FREE = {"root", "out", "readers", "log_every", "validate_every", "save_every", "device"}


def _resume(
    settings: TrainSettings, fresh: checkpoint.State, policy: Policy, optimizer: torch.optim.Optimizer
) -> checkpoint.State:
    folder = checkpoint.find(settings.out)
    state = checkpoint.read_state(folder)
    for key, value in fresh.train.items():
        if key not in FREE and state.train.get(key) != value:
            found = f"was trained with {key} = {state.train.get(key)}, not {value}"
            raise BadInput(f"{folder}: {found}; choose another --out")
    if state.dataset["sha256"] != fresh.dataset["sha256"]:
        found = f"was trained on other data than {settings.root} holds now"
        raise BadInput(f"{folder}: {found}; choose another --out")
    checkpoint.load_weights(policy, folder)
    checkpoint.load_optimizer(optimizer, folder)
    return state


class _Log:
    """Writes every line to OUT/log.jsonl and TensorBoard, and hands it to the caller."""

    def __init__(self, out: Path, update: int, report: Report) -> None:
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.jsonl"
        old = path.read_text().splitlines() if path.exists() else []
        # Lines after the checkpoint will be written again.
        kept = [line for line in old if line.endswith("}") and json.loads(line)["update"] <= update]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=update + 1)
        self._report = report

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for key, value in line.items():
            if key not in ("update", "updates"):
                self._board.add_scalar(key, value, line["update"])
        self._report(line)

    def close(self) -> None:
        self._file.close()
        self._board.close()
