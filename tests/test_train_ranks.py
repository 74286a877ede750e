"""Training on several ranks: forked for speed, and once as a user starts them, by torchrun."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lram.datasets.specs import BadInput
from lram.train import checkpoint, trainer
from lram.train.ranks import Ranks, device_of, start_ranks
from lram.train.trainer import TrainSettings, train

# At 5e-5 the kinks of the image encoder and AdamW have made 5e-5 of the last bit within 50 updates.
SETTINGS = TrainSettings(
    root=Path("unset"),
    size="tiny",
    per_domain=4,
    context=4,
    gap=10,
    updates=50,
    learning_rate=2e-5,
    log_every=1,
    save_every=20,
    validate_every=50,
)


def logged(out: Path, key: str) -> np.ndarray:
    return np.array([json.loads(line)[key] for line in (out / "log.jsonl").read_text().splitlines()])


def work(rank: int, ranks: int, port: int, settings: TrainSettings, stop: int | None) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))

    def report(line: dict) -> None:
        if line["update"] == stop:
            os._exit(9)

    train(settings, report)


def train_on(ranks: int, settings: TrainSettings, stop: int | None = None) -> None:
    """Trains in processes that find what torchrun tells; at update `stop` all of them die."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, ranks, port, settings, stop)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if stop:
            for other in processes:
                other.kill()
        else:
            assert process.exitcode == 0


@pytest.fixture
def mixed(rooms, write, tmp_path) -> Path:
    """Images and vectors, discrete and continuous: no micro-batch goes through all of the policy."""
    root = tmp_path / "mixed"
    # Noise: in flat images max-pooling would break ties by the last bit.
    noise = np.random.default_rng(0).integers(0, 256, (20, 1, 64, 64), np.uint8)
    write(root, "procgen", "bigfish", count=4, states=noise, final_state=None)
    write(root, "metaworld", "reach-v2", count=6)
    shutil.copytree(rooms / "darkroom", root / "darkroom")
    return root


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_two_ranks_and_one_after_two_train_like_one_with_twice_the_batch(mixed, tmp_path, backbone):
    one = replace(SETTINGS, root=mixed, out=tmp_path / "one", backbone=backbone, with_actions=True)
    train(one)
    two = replace(one, out=tmp_path / "two")
    train_on(2, two)
    cut = replace(one, out=tmp_path / "cut")
    train_on(2, cut, stop=30)
    assert checkpoint.read_state(checkpoint.find(cut.out)).update == 20
    train(cut)
    for run in (two, cut):
        assert len(logged(run.out, "loss")) == 50
        assert np.abs(logged(run.out, "loss") - logged(one.out, "loss")).max() < 1e-5
        assert np.allclose(logged(run.out, "gradient_norm"), logged(one.out, "gradient_norm"), rtol=1e-3)


def test_ranks_share_the_episodes_played_in_training(rooms, tmp_path):
    one = replace(SETTINGS, root=rooms, out=tmp_path / "one", updates=1, evaluate_every=1)
    two = replace(one, out=tmp_path / "two")
    train(one)
    train_on(2, two)
    assert logged(two.out, "return/darkroom") == logged(one.out, "return/darkroom")


def test_torchrun_starts_ranks(write, tmp_path):
    write(tmp_path / "data", "procgen", "bigfish", count=4)
    root, one, two = tmp_path / "data", tmp_path / "one", tmp_path / "two"
    train(replace(SETTINGS, root=root, out=one, updates=3, weight_decay=1e3))
    flags = "--size tiny --per-domain 4 --context 4 --updates 3 --learning-rate 2e-5 --weight-decay 1e3 --log-every 1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*torchrun, "-m", "lram.train", root, "--out", two, *flags.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == str(two)
    assert np.allclose(logged(two, "loss"), logged(one, "loss"), rtol=0, atol=1e-5)
    # Vectors are not in the data: their encoder does not even decay, on any number of ranks.
    weights = [checkpoint.load_policy(out)[0].encode_vector.weight for out in (one, two)]
    assert torch.equal(*weights) and weights[0].std() > 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    assert device_of("auto") == device_of("cpu") == torch.device("cpu")
    with pytest.raises(BadInput, match="--device cuda: PyTorch finds no CUDA device"):
        start_ranks("cuda")


def test_too_few_windows_for_the_ranks_are_refused(rooms, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "start_ranks", lambda device: Ranks(0, 2, torch.device("cpu")))
    monkeypatch.setattr(trainer.dist, "destroy_process_group", lambda: None)
    with pytest.raises(BadInput, match="darkroom has 1 windows an update, too few for 2 processes"):
        train(replace(SETTINGS, root=rooms, out=tmp_path, per_domain=1))
