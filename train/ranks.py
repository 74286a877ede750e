"""The processes that train together, as torchrun starts them; without it, one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


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
