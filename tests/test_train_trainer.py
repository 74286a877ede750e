from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lram.datasets.specs import BadInput
from lram.train import checkpoint
from lram.train.trainer import TrainSettings, learning_rate, train

QUICK = {"size": "tiny", "per_domain": 16, "gap": 10, "learning_rate": 3e-3, "log_every": 1}


def settings_for(root: Path, out: Path, **fields) -> TrainSettings:
    return TrainSettings(root=root, out=out, **(QUICK | {"updates": 12, "save_every": 5, "validate_every": 6} | fields))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_every_backbone_lowers_validation_perplexity(rooms, tmp_path, backbone):
    lines = []
    train(settings_for(rooms, tmp_path, backbone=backbone, updates=60, validate_every=10), lines.append)
    measured = [line["perplexity/darkroom"] for line in lines if "perplexity/darkroom" in line]
    assert len(measured) == 6
    assert measured[-1] < 0.9 * measured[0] < 5


def test_an_interrupted_run_continues_the_same_curve(rooms, tmp_path):
    train(settings_for(rooms, tmp_path / "whole"))

    def interrupt(line):
        if line["update"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings_for(rooms, tmp_path / "cut"), interrupt)
    # Every fifth update is saved, and the sixth, whose validation was the best so far.
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["update-000000006"]
    train(settings_for(rooms, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights = [(checkpoint.find(tmp_path / run) / checkpoint.WEIGHTS).read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


def torchrun(processes: int, settings: TrainSettings) -> subprocess.Popen:
    changed = {key: value for key, value in vars(settings).items() if value != TrainSettings.__dict__.get(key)}
    root = changed.pop("root")
    flags = [text for key, value in changed.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*run, "-m", "lram.train", str(root), *flags]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def mixed(rooms, write, tmp_path) -> Path:
    """Images and vectors: the last micro-batch leaves one of the encoders without a gradient."""
    root = tmp_path / "mixed"
    write(root, "procgen", "bigfish", count=4)
    shutil.copytree(rooms / "darkroom", root / "darkroom")
    return root


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_two_processes_train_like_one_with_twice_the_batch(mixed, tmp_path, backbone):
    one = settings_for(mixed, tmp_path / "one", backbone=backbone, context=8)
    train(one)
    two = replace(one, out=tmp_path / "two")
    process = torchrun(2, two)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.splitlines()[-1] == str(two.out)
    assert len(losses(two.out)) == 12
    assert np.allclose(losses(two.out), losses(one.out), atol=1e-5)


def test_one_process_continues_a_run_of_two(mixed, tmp_path):
    # At a higher rate AdamW makes 1e-5 of the last bit within 40 updates.
    fields = {"context": 8, "updates": 40, "save_every": 5, "validate_every": 40, "learning_rate": 2e-4}
    settings = settings_for(mixed, tmp_path / "one", **fields)
    train(settings)
    cut = replace(settings, out=tmp_path / "cut")
    process = torchrun(2, cut)
    while not checkpoint.checkpoints(cut.out):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert 5 <= checkpoint.read_state(checkpoint.find(cut.out)).update < 40
    train(cut)
    assert len(losses(cut.out)) == 40
    assert np.allclose(losses(cut.out), losses(settings.out), atol=1e-5)


def test_all_kinds_of_domains_train_together(write, tmp_path):
    for domain, task in (("darkroom", "a"), ("dmcontrol", "b"), ("procgen", "c"), ("metaworld", "d")):
        write(tmp_path / "data", domain, task, count=60 if domain == "darkroom" else 15)
    lines = []
    out = train(settings_for(tmp_path / "data", tmp_path / "run", updates=3, gap=5, context=10), lines.append)
    names = [key for key in lines[-1] if key.startswith("loss/")]
    assert names == ["loss/darkroom", "loss/dmcontrol", "loss/metaworld", "loss/procgen"]
    assert np.isclose(lines[-1]["loss"], np.mean([lines[-1][name] for name in names]))
    # Untrained, every domain is as wrong as guessing among its valid choices.
    guesses = {"darkroom": 5, "dmcontrol": 256, "metaworld": 256, "procgen": 15}
    for domain, choices in guesses.items():
        assert abs(lines[0][f"loss/{domain}"] - np.log(choices)) < 0.7
    state = checkpoint.read_state(checkpoint.find(out))
    assert set(state.perplexity) == set(guesses)
    assert set(state.target_returns) == {"darkroom/a", "dmcontrol/b", "metaworld/d", "procgen/c"}


def test_other_settings_or_data_do_not_continue_a_run(rooms, write, tmp_path):
    settings = settings_for(rooms, tmp_path / "run", updates=2)
    train(settings)
    with pytest.raises(BadInput, match="was trained with size = tiny, not 16M; choose another --out"):
        train(replace(settings, size="16M"))
    write(tmp_path / "other", count=25)
    with pytest.raises(BadInput, match="was trained on other data"):
        train(replace(settings, root=tmp_path / "other"))


def test_a_loss_that_is_not_finite_stops_with_the_batch(rooms, tmp_path):
    settings = settings_for(rooms, tmp_path, learning_rate=1e30, clip=1e30)
    with pytest.raises(BadInput, match="loss is not finite at update"):
        train(settings)
    saved = np.load(tmp_path / "bad-batch-rank0.npz")
    assert saved["darkroom/states"].shape == (16, 12, 204)


def test_data_that_cannot_be_used_is_refused(rooms, tmp_path):
    with pytest.raises(BadInput, match="no such dataset directory"):
        train(settings_for(tmp_path / "missing", tmp_path / "run"))
    with pytest.raises(BadInput, match="no windows of 2 episodes 200 apart, the longest history has 200 episodes"):
        train(settings_for(rooms, tmp_path / "run", gap=200))
    assert not (tmp_path / "run").exists()


def test_the_rate_warms_up_and_falls_along_a_cosine():
    settings = TrainSettings(root=Path("x"), updates=100_000)
    assert learning_rate(settings, 0) == pytest.approx(1e-4 / 4000)
    assert learning_rate(settings, 3999) == pytest.approx(1e-4)
    assert learning_rate(settings, 52_000) == pytest.approx((1e-4 + 1e-6) / 2)
    assert learning_rate(settings, 99_999) == pytest.approx(1e-6, rel=1e-3)
    short = replace(settings, updates=100)
    rates = [learning_rate(short, update) for update in range(100)]
    assert max(rates) == rates[10] == pytest.approx(1e-4)


def test_the_same_seed_gives_the_same_weights(rooms, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(ord(name))  # whatever was drawn before does not matter
        train(settings_for(rooms, tmp_path / name, updates=2, seed=seed))
    first, second, other = (losses(tmp_path / name) for name in "abc")
    assert first == second != other
