"""The training benchmark: what it counts, and that it runs on synthetic data and on a dataset."""

import time

import numpy as np
import pytest
import torch

from lram.datasets import bench_data
from lram.datasets.specs import DOMAINS
from lram.datasets.windows import Batch
from lram.model.mamba import selective_scan
from lram.model.policy import Policy, PolicySettings
from lram.model.xlstm import XLSTM
from lram.train import bench_backbones, bench_train
from lram.train.bench_backbones import BACKBONES, compiled, loop, package_stack
from lram.train.bench_train import TrainBenchSettings, as_table, window_flops


@pytest.fixture(scope="module")
def rows():
    """A --quick run on synthetic data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_data, "has_emulator", lambda: False)
        told: list[str] = []
        return list(bench_train.bench_train(TrainBenchSettings(context=10, quick=True), told.append)), told


def test_the_table_has_every_backbone_and_every_measurement(rows):
    rows, told = rows
    training = [row for row in rows if row.section.startswith("training")]
    assert len(training) == 5 * len(BACKBONES) and "tiny, 1 windows of each of atari, dmcontrol" in training[0].section
    for label, row in zip(BACKBONES, training[::5], strict=True):
        assert row.reader.startswith(f"{label}, 0.4 M" if label != "DT" else "DT, 0.5 M")
        windows, tokens = (float(word.replace(",", "")) for word in row.value.split() if word[0].isdigit())
        assert tokens == pytest.approx(30 * windows, rel=0.05)
    compared = {row.section.split(",")[0]: row for row in rows if row.ratio and row.ratio != 1}
    assert set(compared) == {"xLSTM [1:0]", "xLSTM [7:1]", "Mamba's scan"}
    assert all(row.met is not None for row in rows if row.bar)
    assert told[0] == "making data" and all(row.reader in as_table(rows) for row in rows)


def test_both_stacks_have_the_same_loss(rows):
    for label in ("[1:0]", "[7:1]"):
        ours, theirs = (float(row.value.split()[-1]) for row in rows[0] if row.section.startswith(f"xLSTM {label}"))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_trains_on_a_dataset(write, tmp_path, monkeypatch):
    write(tmp_path, "metaworld", length=60)
    nothing = lambda *args: iter(())  # noqa: E731
    monkeypatch.setattr(bench_train, "against_package", nothing)
    monkeypatch.setattr(bench_train, "against_loop", nothing)
    rows = list(bench_train.bench_train(TrainBenchSettings(tmp_path, context=10, quick=True)))
    assert {row.section for row in rows[1:]} == {"training, tiny, 1 windows of each of metaworld"}


def batch(steps, image=False):
    states = np.zeros((1, steps, 1, 64, 64), np.uint8) if image else np.zeros((1, steps, 204), np.float32)
    numbers, mask = np.zeros((1, steps), np.float32), np.ones((1, steps), bool)
    return Batch(DOMAINS["darkroom"], states, mask.astype(np.int64), numbers, numbers, mask, None)


def test_flops_of_a_window():
    """By hand, for DT of two layers of width 64, 5 steps of three tokens."""
    policy = Policy(PolicySettings("dt", "tiny", max_steps=5))
    matrices = 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    backbone = 15 * (2 * matrices + 2 * 2 * 15 * 64)
    around = 5 * 2 * 64 * (204 + 1 + 1 + 5)
    assert window_flops(policy, batch(5)) == 3 * (backbone + around)
    # An image of 64 x 64 costs 3 x 3 filters at 64, 32 and 16 pixels, and a projection in place of the vector's.
    stages = (64**2 * 16 + 4 * 32**2 * 256) + (32**2 * 512 + 4 * 16**2 * 1024) + (16**2 * 1024 + 4 * 8**2 * 1024)
    extra = 5 * 2 * (9 * stages + 64 * (2048 - 204))
    assert window_flops(policy, batch(5, image=True)) == 3 * (backbone + around + extra)


@pytest.mark.parametrize(("backbone", "slstm"), [(name, flag) for name, flag in BACKBONES.values() if name != "dt"])
def test_flops_grow_with_the_length_only_for_recurrent_backbones(backbone, slstm):
    policy = Policy(PolicySettings(backbone, "tiny", slstm))
    assert window_flops(policy, batch(60)) == 2 * window_flops(policy, batch(30))
    dt = Policy(PolicySettings("dt", "tiny"))
    assert window_flops(dt, batch(20)) > 2 * window_flops(dt, batch(10))


def test_flops_are_about_six_a_parameter_and_token():
    """The rule of thumb, for the largest model, where all else is small; on no memory at all."""
    with torch.device("meta"):
        policy = Policy(PolicySettings("xlstm", "206M", image=False))
    numbers = sum(p.numel() for p in policy.backbone.parameters())
    assert window_flops(policy, batch(50)) == pytest.approx(6 * numbers * 150, rel=0.1)


def test_what_is_compared_is_the_same():
    torch.manual_seed(0)
    model, x = XLSTM(3, 64, (1,)), torch.randn(2, 12, 64)
    with torch.no_grad():
        torch.testing.assert_close(package_stack(model, 12)(x), model(x), rtol=1e-5, atol=1e-5)
    u, dt, b, c = torch.randn(2, 12, 8), torch.rand(2, 12, 8), *torch.randn(2, 2, 12, 16)
    a = -torch.rand(8, 16)
    torch.testing.assert_close(loop(u, dt, a, b, c), selective_scan(u, dt, a, b, c)[0], rtol=1e-5, atol=1e-5)


def test_turns_are_taken_and_the_best_counts():
    order, naps = [], {"slow": [0.0, 0.3, 0.1], "fast": [0.0, 0.0, 0.0]}

    def run(name):
        def step():
            order.append(name)
            time.sleep(naps[name][order.count(name) - 1])
            return float(len(order))

        return step

    results = bench_backbones._turns({"slow": run("slow"), "fast": run("fast")}, 0.0, torch.device("cpu"))
    assert order == ["slow", "fast"] * 3
    assert results["slow"][1] == 5 and results["fast"][1] == 6
    assert 0.1 <= results["slow"][0] < 0.3 and 0 < results["fast"][0] < 0.1


def test_compiling_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(bench_backbones, "COMPILE_SECONDS", 0.5)
    (row,) = compiled("DT", "tiny", 5, 0.0, torch.device("cpu"))
    assert "given up" in row.value
