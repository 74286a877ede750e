"""Where a policy puts its tasks: windows of each, embedded by the last layer, projected to a plane.

    points = embedding(RUN, torch.device("cpu"), seed=0)
    points["tasks"][0]                          # {"task": "atari/breakout", "points": [[x, y], …]}

As in figure 5 of arXiv 2410.22391: 32 windows a task, the last layer averaged over the tokens. The paper
projects with UMAP; this is PCA, which needs no package and gives the same map every time, but shows only what two
directions can: the share of the variance they hold is part of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lram.datasets.specs import BadInput
from lram.datasets.windows import Batch, Windows, WindowSettings
from lram.model.policy import Policy
from lram.train import checkpoint
from lram.train.loss import previous

WINDOWS = 32
"""Windows of each task."""


def embedding(run: Path, device: torch.device, seed: int, root: Path | None = None) -> dict[str, Any]:
    """Embeds windows of all tasks that a policy was trained on.

    Args:
        run: A checkpoint's folder or a run's.
        device: Where to compute.
        seed: Of the windows drawn.
        root: The dataset; where the run had it by default.

    Returns:
        `tasks`, each with its `task` and `points` (32, 2), and `variance`, the share of each of the two directions.

    Raises:
        BadInput: The dataset is not there any more.
    """
    policy, state = checkpoint.load_policy(checkpoint.best(run), device)
    root = Path(root or state.train["root"])
    if not root.exists():
        raise BadInput(f"{root}: the dataset that the policy was trained on is not there, which --embedding reads")
    train = state.train
    settings = WindowSettings(train["context"], train["episodes"], train["gap"], train.get("top", 1.0))
    names, pooled = [], []
    for name, batch in _windows(root, state.dataset["tasks"], settings, seed):
        names.append(name)
        pooled.append(embed(policy, batch, device))
    points_MD = np.concatenate(pooled)
    plane_M2, variance = project(points_MD)
    ends = np.cumsum([len(part) for part in pooled])[:-1]
    tasks = [
        {"task": name, "points": np.round(part, 4).tolist()} for name, part in zip(names, np.split(plane_M2, ends))
    ]
    return {"tasks": tasks, "variance": variance}


def _windows(root: Path, names: list[str], settings: WindowSettings, seed: int) -> Iterator[tuple[str, Batch]]:
    for name in names:
        windows = Windows.open(root, settings, [root / name])
        for batch in windows.batches(0, "train", WINDOWS, seed):
            yield name, batch


@torch.no_grad()
def embed(policy: Policy, batch: Batch, device: torch.device) -> np.ndarray:
    """Returns the mean of the backbone's outputs over the tokens of each window, (B, D) float32."""
    arrays = batch.states, batch.returns_to_go, batch.previous_rewards, batch.actions
    states, returns, rewards, actions = (torch.from_numpy(array).to(device) for array in arrays)
    before = previous(actions) if policy.settings.with_actions else None
    y_BLD = policy.backbone(policy.tokens(states, returns, rewards, before)).float().cpu()
    tokens = y_BLD.shape[1] // batch.mask.shape[1]
    mask_BL1 = torch.from_numpy(batch.mask.copy()).repeat_interleave(tokens, dim=1)[..., None]
    return ((y_BLD * mask_BL1).sum(1) / mask_BL1.sum(1)).numpy()


def project(points_MD: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """Returns the two principal components, (M, 2), and the share of the variance in each.

    Signs are chosen so that the largest number of each is positive.
    """
    centred = points_MD.astype(np.float64) - points_MD.mean(axis=0, dtype=np.float64)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    plane = np.zeros((len(centred), 2))
    count = min(2, len(sizes))
    plane[:, :count] = centred @ directions[:count].T
    largest = np.abs(plane).argmax(axis=0)
    plane *= np.where(plane[largest, [0, 1]] < 0, -1.0, 1.0)
    total = float((sizes**2).sum()) or 1.0
    return plane, [float(size**2 / total) for size in sizes[:2]]
