"""Every backbone learns windows of real samples by heart: states, returns, actions and masks line up.

LRAM_LONG=1 takes 64 windows instead of 10, a minute a backbone on two idle cores.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from lram.converters.run import convert_job
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


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_mixed_real_windows_are_learnt_by_heart(samples, backbone):
    settings = TrainSettings(samples, backbone=backbone, size="tiny", context=4, gap=10)
    windows, shares, _ = open_windows(settings)
    assert len(shares) == 5
    ranks = start_ranks("cpu")
    policy, optimizer = build(settings, windows, ranks.device)
    counts = {name: len(range(place, WINDOWS, 5)) for place, name in enumerate(shares)}
    batches = list(windows.batches(0, "train", counts, 0))
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
    assert perplexity.max() < 1.1, dict(zip(sorted(shares), perplexity.tolist()))
