"""On-policy specialists: a run in segments is the same whether it was stopped between them, within one, or never."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lram.collectors import resume
from lram.collectors.defaults import defaults
from lram.collectors.environments import status
from lram.collectors.networks import Impala
from lram.collectors.on_policy import OnPolicySettings, train_on_policy
from lram.collectors.recorder import Recorder, read_curve
from lram.datasets.check import check_task
from lram.datasets.index import read_index
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import read
from lram.datasets.writer import finished

procgen = pytest.mark.skipif(not status("procgen").works, reason=status("procgen").words)
TASK = "bigfish"
TINY = OnPolicySettings(
    steps=700, seed=1, num_envs=2, n_steps=192, batch_size=192, n_epochs=1, segment=1, features=16, device="cpu"
)


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    result = train_on_policy(TINY, "procgen", TASK, root)
    assert result["learned"] == 768  # rounded up to whole updates
    assert result["steps"] + result["left_out"] == 768 and result["episodes"] > 3
    return root


@procgen
def test_training_is_recorded_raw_and_counted(whole: Path) -> None:
    folder = whole / "procgen" / TASK
    index, curve = read_index(folder), read_curve(folder)
    assert index.numpy("episode").tolist() == curve["episode"].to_pylist() == list(range(len(curve)))
    assert (np.diff(curve["steps"]) >= 0).all() and curve["steps"].to_numpy().max() <= 768
    np.testing.assert_array_equal(curve["return"], index.numpy("return"))
    assert check_task(folder).findings == []
    trajectories = [read(folder / path) for path in index.table["path"].to_pylist()]
    assert all(t.states.shape[1:] == (1, 64, 64) and t.terminated for t in trajectories)
    # Bigfish pays whole fish; what the agent learns from is divided by a deviation.
    assert {float(reward) for t in trajectories for reward in np.unique(t.rewards)} <= {0.0, 1.0}
    assert np.ptp(index.numpy("seed")) > 4  # two segments, whose slots have nothing to do with each other
    state = resume.load(folder)
    assert state is not None and state["segment"] == 2 and state["agent"]["normaliser"]["count"] > 700
    assert finished(whole, "procgen", TASK)["normalize_rewards"] is True


class Stop(Exception):
    pass


@procgen
@pytest.mark.parametrize("steps", [200, 600])
def test_stopped_within_a_segment_it_comes_to_the_same_files(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    step = Recorder.step

    def stop(self: Recorder, *args: Any) -> None:
        step(self, *args)
        if self.steps >= steps:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "step", stop)
        with pytest.raises(Stop):
            train_on_policy(TINY, "procgen", TASK, tmp_path)
    assert list(tmp_path.rglob("*.hdf5"))
    result = train_on_policy(TINY, "procgen", TASK, tmp_path)
    assert result["learned"] == (768 if steps < 384 else 384)
    assert contents(tmp_path) == contents(whole)


@procgen
def test_expert_and_last(whole: Path, tmp_path: Path) -> None:
    short = dataclasses.replace(TINY, steps=256, n_steps=128, batch_size=128)
    result = train_on_policy(dataclasses.replace(short, expert=7), "procgen", TASK, tmp_path / "expert")
    assert (result["episodes"], result["left_out"]) == (7, 256)
    folder = tmp_path / "expert" / "procgen" / TASK
    seeds = read_index(folder).numpy("seed")
    # As many of every slot: taking the first that end would prefer short ones.
    assert sorted(np.unique(seeds, return_counts=True)[1].tolist()) == [3, 4]
    assert check_task(folder).findings == []
    result = train_on_policy(dataclasses.replace(TINY, last=500), "procgen", TASK, tmp_path / "last")
    curve = read_curve(tmp_path / "last" / "procgen" / TASK)
    assert curve.equals(read_curve(whole / "procgen" / TASK))
    index = read_index(tmp_path / "last" / "procgen" / TASK)
    assert 0 < len(index.table) < len(curve) and result["steps"] <= 500
    kept = set(index.numpy("episode").tolist())
    assert all(
        steps > 268 for episode, steps in zip(*(curve[c].to_pylist() for c in ("episode", "steps"))) if episode in kept
    )


def test_impala_has_the_published_shape() -> None:
    import gymnasium as gym

    network = Impala(gym.spaces.Box(0, 255, (1, 64, 64), np.uint8), 256)
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16] * 5 + [32] * 10
    assert network.layers[-2].weight.shape == (256, 32 * 8 * 8)
    assert network(torch.rand(3, 1, 64, 64)).shape == (3, 256)


def test_settings_are_the_papers_and_bad_ones_are_refused(tmp_path: Path) -> None:
    paper = defaults("ppo", "procgen")
    assert (paper["num_envs"], paper["n_steps"], paper["batch_size"], paper["n_epochs"]) == (64, 256, 2048, 3)
    assert (paper["learning_rate"], paper["gamma"], paper["gae_lambda"], paper["ent_coef"]) == (5e-4, 0.999, 0.95, 0.01)
    assert paper.keys() <= {field.name for field in dataclasses.fields(OnPolicySettings)}
    with pytest.raises(BadInput, match="expected one of them"):
        train_on_policy(OnPolicySettings(last=1, expert=1), "procgen", TASK, tmp_path)
    with pytest.raises(BadInput, match="ppo has no settings for dmcontrol"):
        train_on_policy(TINY, "dmcontrol", TASK, tmp_path)
