"""The processes that train together, as torchrun starts them; without it, one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lram.datasets.specs import BadInput


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


def device_of(name: str) -> torch.device:
    """Returns the device that `auto`, `cpu` or `cuda` stands for.

    Raises:
        BadInput: There is no CUDA device, or PyTorch was built without.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: PyTorch finds no CUDA device on this machine")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def start_ranks(device: str) -> Ranks:
    """Joins the process group that torchrun describes in the environment, or stands alone."""
    rank, of = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = device_of(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
    if of > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    return Ranks(rank, of, place)
