"""Every backbone learns windows of real samples by heart: states, returns, actions and masks line up.

LRAM_LONG=1 takes 64 windows instead of 10, a minute a backbone on two idle cores.
"""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lram.converters.run import convert_job
from lram.datasets.windows import Batch, Windows
from lram.train.loss import do_update
from lram.train.ranks import start_ranks
from lram.train.trainer import TrainSettings, build, open_windows

WINDOWS = 64 if "LRAM_LONG" in os.environ else 10
SAMPLES = Path(__file__).parent / "data"
SOURCES = {"dqn_replay": "", "composuite": "", "mimicgen": "", "procgen": "buffers"}


@pytest.fixture(scope="module")
def samples(rooms, tmp_path_factory) -> Path:
    """Real Atari, Procgen, Composuite, MimicGen and Dark-Room trajectories."""
    root = tmp_path_factory.mktemp("samples")
    for source, folder in SOURCES.items():
        converter = importlib.import_module(f"lram.converters.{source}")
        options = converter.Options()
        for job in converter.jobs(SAMPLES / source / folder, options):
            convert_job(source, job, options, root)
    shutil.copytree(rooms / "darkroom", root / "darkroom")
    return root


def learnable(windows: Windows, domain: str, count: int) -> Batch:
    """Draws windows of which none begins like another and goes on otherwise: no policy could learn both by heart."""
    batch = windows.read(domain, windows.draw(domain, 0, "train", 400 * count, 0), "train")
    taken: dict[bytes, bytes] = {}
    rows: list[int] = []
    for row, mask in enumerate(batch.mask):
        if len(rows) == count:
            break
        seen, steps = b"", {}
        for step in np.flatnonzero(mask):
            for array in (batch.states, batch.returns_to_go, batch.previous_rewards):
                seen += array[row, step].tobytes()
            steps[seen] = batch.actions[row, step].tobytes()
        if seen not in taken and all(taken.get(key, action) == action for key, action in steps.items()):
            taken |= steps
            rows.append(row)
    assert len(rows) == count
    arrays = {name: array[rows] for name, array in vars(batch).items() if isinstance(array, np.ndarray)}
    return replace(batch, **arrays)


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_mixed_real_windows_are_learnt_by_heart(samples, backbone):
    settings = TrainSettings(samples, backbone=backbone, size="tiny", context=4, gap=10)
    windows, shares, _ = open_windows(settings)
    assert len(shares) == 5
    ranks = start_ranks("cpu")
    policy, optimizer = build(settings, windows, ranks.device)
    counts = {name: len(range(place, WINDOWS, 5)) for place, name in enumerate(sorted(shares))}
    batches = [learnable(windows, name, count) for name, count in counts.items()]
    assert sum(len(batch.mask) for batch in batches) == WINDOWS
    perplexity = torch.full((5,), 99.0)
    for update in range(800):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (update + 1) / 60)
        optimizer.zero_grad()
        perplexity = do_update(policy, batches, ranks).exp()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if perplexity.max() < 1.1:
            break
    print(f"{backbone}: {update + 1} updates")
    assert perplexity.max() < 1.1, dict(zip(sorted(shares), perplexity.tolist()))
