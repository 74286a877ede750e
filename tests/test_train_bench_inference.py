from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lram.datasets.specs import BadInput
from lram.train.bench_inference import CACHE, WINDOW, InferenceBenchSettings, as_table, bench_inference

ROOM = "darkroom/room5x5-goal-01-01"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, Path]:
    out = tmp_path_factory.mktemp("bench")
    return list(bench_inference(InferenceBenchSettings(task=ROOM, out=out, quick=True))), out


def test_every_combination_is_measured(measured):
    _, out = measured
    points = json.loads((out / "inference.json").read_text())["points"]
    policies = {"xLSTM [1:0]", "Mamba", CACHE, WINDOW}
    found = {(point["policy"], point["batch"], point["context"]) for point in points}
    assert found == {(policy, batch, context) for policy in policies for batch in (1, 2) for context in (3, 6)}
    for point in points:
        p50, p95, p99 = point["action_ms"]
        assert 0 < p50 <= p95 <= p99
        assert all(a < b for a, b in zip(point["action_ms"], point["with_simulator_ms"]))
        assert point["per_second"][0] > point["per_second"][1] > 0
        assert point["peak_mib"] >= point["held_mib"] > 0.5


def test_memory_is_flat_for_recurrent_policies_and_grows_with_the_context_of_dt(measured):
    _, out = measured
    points = json.loads((out / "inference.json").read_text())["points"]
    held = {(point["policy"], point["batch"], point["context"]): point["held_mib"] for point in points}
    for policy in ("xLSTM [1:0]", "Mamba"):
        assert held[policy, 1, 3] == held[policy, 1, 6] < held[policy, 2, 3]
    # 2 layers, keys and values, the tokens and their positions: 3 steps are 9 tokens of width 64, float32.
    tokens = 9 * 64 * 4 / 2**20
    assert held[CACHE, 1, 6] - held[CACHE, 1, 3] == pytest.approx((2 * 2 + 1 + 1) * tokens)
    assert held[WINDOW, 1, 6] - held[WINDOW, 1, 3] == pytest.approx(2 * tokens)


def test_faster_paths_choose_the_same_actions(measured):
    rows, _ = measured
    same = [row for row in rows if row.reader == "FastPolicy, float32" and "same actions" in row.value]
    assert len(same) == 3
    assert all("100.0% same actions" in row.value for row in same)


def test_the_package_is_compared_and_the_table_and_the_plots_are_there(measured):
    rows, out = measured
    assert [row.reader for row in rows if row.bar == "≥ 2.2×"] == ["FastPolicy, float32"]
    assert "the package, three calls of one token" in as_table(rows)
    for name in ("latency.png", "throughput.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_the_threads_are_given_back(measured):
    assert torch.get_num_threads() == 1  # as the tests' configuration has it, whatever the benchmark set


def test_a_dt_that_would_take_too_long_is_left_out_and_named(tmp_path):
    settings = InferenceBenchSettings(backbones=("dt",), task=ROOM, out=tmp_path, quick=True, give_up=1e-6)
    rows = list(bench_inference(settings))
    assert sum("given up" in row.value for row in rows) == 4  # the longer context of both kinds, both batches
    points = json.loads((tmp_path / "inference.json").read_text())["points"]
    assert [point["note"] != "" for point in points] == [False, True] * 4


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(BadInput, match="nosuch"):
        list(bench_inference(InferenceBenchSettings(task="nosuch/task", out=tmp_path, quick=True)))
