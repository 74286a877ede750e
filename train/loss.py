"""One update's loss and gradients over the micro-batches of all domains, and validation perplexity.

The loss is the mean over domains of the mean over action tokens, each domain weighted by its share of the update's
windows: equal parts unless `--mix` says otherwise. It does not depend on how the windows lie on ranks.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from lram.datasets.specs import NUM_BINS, NUM_DISCRETE
from lram.datasets.windows import Batch, Windows
from lram.model.policy import Policy, action_loss
from lram.train.ranks import Ranks

EXPLODED = 10 * math.log(NUM_BINS)
"""A domain's loss from which on a run is stopped: ten times that of guessing among the most choices there are."""


def negative_log_likelihood(
    policy: Policy | DistributedDataParallel, batch: Batch, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the summed loss of a batch on this rank, and the number of action tokens in it."""
    plain: Policy = policy.module if isinstance(policy, DistributedDataParallel) else policy

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(ranks.device, non_blocking=True)

    actions = put(batch.actions)
    inputs = put(batch.states), put(batch.returns_to_go), put(batch.previous_rewards)
    before = previous(actions) if plain.settings.with_actions else None
    autocast = torch.autocast("cuda", torch.bfloat16) if ranks.device.type == "cuda" else nullcontext()
    with autocast:
        logits = policy(*inputs, before, first=logits_needed(batch))
    dims = None if batch.action_mask is None else put(batch.action_mask)
    return action_loss(logits, actions, put(batch.mask), batch.domain, dims)


def logits_needed(batch: Batch) -> int:
    """Returns how many logits, from the first, the loss reads; all of them are a fifth of a small policy's work."""
    discrete = batch.domain.action == "discrete"
    return batch.domain.num_actions if discrete else NUM_DISCRETE + batch.actions.shape[2] * NUM_BINS


def previous(actions: torch.Tensor) -> torch.Tensor:
    """Returns the action before each step of windows; before the first there is none (-1, or NaN)."""
    none = math.nan if actions.is_floating_point() else -1
    return torch.cat([torch.full_like(actions[:, :1], none), actions[:, :-1]], dim=1)


@torch.no_grad()
def perplexities(policy: Policy, windows: Windows, per_domain: int, ranks: Ranks) -> dict[str, float]:
    """Measures validation perplexity by domain on windows that are the same at every call."""
    policy.eval()
    sums = torch.zeros(len(windows.tasks), 2, dtype=torch.float64, device=ranks.device)
    order = sorted(windows.tasks)
    for number in range(4):
        part = ranks.rank, ranks.of
        for batch in windows.batches(number, "validation", per_domain, 0, part):
            loss, count = negative_log_likelihood(policy, batch, ranks)
            sums[order.index(batch.domain.name)] += torch.stack([loss, count]).double()
    policy.train()
    ranks.sum(sums)
    found = zip(order, (sums[:, 0] / sums[:, 1]).exp().tolist(), sums[:, 1].tolist())
    return {name: value for name, value, count in found if count}  # a small domain has no validation windows


def do_update(wrapped: Policy | DistributedDataParallel, batches: list[Batch], ranks: Ranks) -> torch.Tensor:
    """Accumulates the gradients of one update.

    Returns:
        The loss on all ranks' windows, by domain.
    """
    sizes = [[_tokens(batch), len(batch.mask)] for batch in batches]
    counts, sizes_D = ranks.sum(torch.tensor(sizes, dtype=torch.float64, device=ranks.device)).T
    # DDP averages over ranks, the loss is a mean over all of them: hence the factor.
    factors = (ranks.of * sizes_D / sizes_D.sum() / counts).float()
    losses = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not last else nullcontext():
            loss, _ = negative_log_likelihood(wrapped, batch, ranks)
            scaled = loss * factors[number]
            if last and ranks.of > 1:
                # DDP sends gradients in the last backward only: let every parameter take part in it.
                scaled = scaled + 0.0 * sum(p.flatten()[0] for p in wrapped.parameters() if p.requires_grad)
            scaled.backward()
        losses.append(loss.detach().double())
    return ranks.sum(torch.stack(losses)) / counts


@torch.no_grad()
def average(acting: Policy, policy: Policy, decay: float) -> None:
    """Moves the averaged weights towards the trained ones, by 1 - decay of the way."""
    torch._foreach_lerp_(list(acting.parameters()), list(policy.parameters()), 1 - decay)


def _tokens(batch: Batch) -> int:
    tokens = batch.mask.sum(1)
    return int(tokens.sum() if batch.action_mask is None else (tokens * batch.action_mask.sum(1)).sum())
