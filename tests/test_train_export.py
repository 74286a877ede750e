from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lram.datasets.specs import DOMAINS, BadInput, state_columns
from lram.model.policy import Policy, PolicySettings, choose_action
from lram.train import checkpoint
from lram.train.export import ExportPolicySettings, export_policy, load_policy
from lram.train.rollouts import RolloutSettings, play
from lram.train.simulators import Job

ROOM = "room3x3-goal-01-02"
CARTPOLE = "cartpole-swingup"


@pytest.fixture
def run(tmp_path, write):
    """A dataset of four domains, and a run with the checkpoint of a policy for it that was not trained."""

    def run(**more) -> Path:
        root = tmp_path / "data"
        write(root, "darkroom", ROOM, count=2)
        rng = np.random.default_rng(0)
        write(root, "dmcontrol", CARTPOLE, count=2, actions=rng.uniform(-1, 1, (20, 1)).astype(np.float32))
        write(root, "metaworld", "reach-v2", count=2)
        write(root, "atari", "breakout", count=2)
        torch.manual_seed(0)
        policy = Policy(PolicySettings(size="tiny", max_steps=20, **more)).eval()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        names = [f"darkroom/{ROOM}", f"dmcontrol/{CARTPOLE}", "metaworld/reach-v2", "atari/breakout"]
        state = checkpoint.State(
            update=7,
            policy=dataclasses.asdict(policy.settings),
            train={"root": str(root)},
            dataset={"tasks": sorted(names), "sha256": "00"},
            target_returns=dict(zip(names, (3.0, 800.0, 1500.0, 40.0))),
        )
        checkpoint.save(tmp_path / "run", state, policy, torch.optim.AdamW(policy.parameters()))
        return tmp_path / "run"

    return run


def by_hand(policy: Policy, task: str, states: np.ndarray, rewards: np.ndarray, target: float, count: int, layout):
    """The likeliest actions by `Policy.step` and `choose_action`, a step at a time, and their logits' inputs."""
    domain = DOMAINS[task.split("/")[0]]
    if domain.state == "vector":
        padded = np.zeros((len(states), 204), np.float32)
        padded[:, state_columns(domain.name, layout, states.shape[1])] = states
        states = padded
    paid, asked, state, actions = 0.0, target, None, []
    for t, seen in enumerate(states):
        asked -= paid
        scaled = (torch.tensor([[value / domain.reward_scale]], dtype=torch.float32) for value in (asked, paid))
        with torch.no_grad():
            logits, state = policy.step(torch.from_numpy(seen[None, None]), *scaled, state)
        actions.append(choose_action(logits[:, -1], domain, count, greedy=True)[0].numpy())
        paid = float(rewards[t])
    return np.stack(actions)


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_actions_are_those_of_the_policy_in_every_domain(run, tmp_path, make, backbone):
    folder = export_policy(ExportPolicySettings(run(backbone=backbone), tmp_path / "out"))
    policy, _ = checkpoint.load_policy(tmp_path / "run")
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "run")
    exported = load_policy(folder, temperature=0)
    for task, target, count in (
        (f"darkroom/{ROOM}", 3.0, 5),
        (f"dmcontrol/{CARTPOLE}", 800.0, 1),
        ("metaworld/reach-v2", 1500.0, 4),
        ("atari/breakout", 40.0, 18),
    ):
        episode = make(task.split("/")[0], 3, length=12)
        rewards = np.linspace(-1, 2, 12)
        for asked in (None, 0.5 * target):  # the second time from a state that had been used
            exported.reset(task, asked)
            actions = [
                exported.act(state, reward) for state, reward in zip(episode.states, [0, *rewards[:-1].tolist()])
            ]
            expected = by_hand(
                policy, task, episode.states, rewards, asked or target, count, {"position": [0, 3], "velocity": [3, 5]}
            )
            np.testing.assert_array_equal(np.stack(actions), expected)
        assert actions[0].dtype == (np.int64 if expected.ndim == 1 else np.float32)
        assert actions[0].shape == expected.shape[1:]


@pytest.mark.parametrize(
    ("domain", "task", "episodes", "with_actions"),
    [("darkroom", ROOM, (0, 1), True), ("dmcontrol", CARTPOLE, (3,), True), ("darkroom", ROOM, (0, 1), False)],
)
def test_actions_are_those_of_the_evaluator(run, tmp_path, domain, task, episodes, with_actions):
    if domain == "dmcontrol":
        pytest.importorskip("dm_control", reason="needs the extra dmcontrol")
    folder = export_policy(ExportPolicySettings(run(with_actions=with_actions), tmp_path / "out"))
    policy, _ = checkpoint.load_policy(tmp_path / "run")
    name, seed, played = f"{domain}/{task}", 5, []
    jobs = [Job(domain, task, episode) for episode in episodes]
    settings = RolloutSettings(slots=1, workers=1, seed=seed, overlap=False)
    results = list(play(policy, jobs, {name: 3.0}, settings, record=played.append))
    exported = load_policy(folder, seed=seed)
    for trajectory, result in zip(played, results, strict=True):
        exported.reset(name, 3.0, result["episode"])
        rewards = [0.0, *trajectory.rewards.tolist()]
        actions = [exported.act(state, reward) for state, reward in zip(trajectory.states, rewards)]
        np.testing.assert_array_equal(np.stack(actions), trajectory.actions)
    assert len(played) == 1 or not np.array_equal(played[0].actions, played[1].actions)


def example(folder: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "example.py"), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_plays_without_the_run_and_its_data(run, tmp_path):
    export_policy(ExportPolicySettings(run(), tmp_path / "out"))
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(tmp_path / "run")
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert example(moved, f"darkroom/{ROOM}", "2.5").startswith(f"darkroom/{ROOM}: return ")
    assert sorted(path.name for path in moved.iterdir()) == ["example.py", "policy.json", "policy.safetensors"]


def test_the_example_plays_cartpole(run, tmp_path):
    pytest.importorskip("dm_control", reason="needs the extra dmcontrol")
    folder = export_policy(ExportPolicySettings(run(), tmp_path / "out"))
    assert example(folder, f"dmcontrol/{CARTPOLE}").startswith(f"dmcontrol/{CARTPOLE}: return ")


def test_the_folder_says_what_acting_takes(run, tmp_path):
    folder = export_policy(ExportPolicySettings(run(), tmp_path / "out"))
    task = json.loads((folder / "policy.json").read_text())["tasks"][f"dmcontrol/{CARTPOLE}"]
    assert task == {
        "state_shape": [5],
        "columns": state_columns("dmcontrol", {"position": [0, 3], "velocity": [3, 5]}, 5).tolist(),
        "num_actions": 1,
        "discrete": False,
        "reward_scale": 100.0,
        "target_return": 800.0,
    }
    assert len((folder / "example.py").read_text().splitlines()) <= 30


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_lighter_weights_act(run, tmp_path, weights):
    folder = export_policy(ExportPolicySettings(run(), tmp_path / "out"))
    policy = load_policy(folder, weights=weights)
    policy.reset(f"dmcontrol/{CARTPOLE}")
    action = policy.act(np.zeros(5))
    assert action.shape == (1,)
    assert np.abs(action) <= 1


def test_a_dataset_that_moved_is_asked_for_and_nothing_half_written_stays(run, tmp_path):
    settings = ExportPolicySettings(run(), tmp_path / "out")
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(BadInput, match="--root"):
        export_policy(settings)
    assert not (tmp_path / "out").exists()
    export_policy(dataclasses.replace(settings, root=tmp_path / "moved"))
    with pytest.raises(BadInput, match="exists"):
        export_policy(settings)
    shutil.rmtree(tmp_path / "moved" / "atari" / "breakout")
    with pytest.raises(BadInput, match="atari/breakout"):
        export_policy(dataclasses.replace(settings, root=tmp_path / "moved", out=tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "out", "run"]


def test_damage_is_one_sentence(run, tmp_path):
    folder = export_policy(ExportPolicySettings(run(), tmp_path / "out"))
    whole = (folder / "policy.json").read_text()
    task = f"dmcontrol/{CARTPOLE}"
    for damage in (
        lambda text: text[:100],
        lambda text: text.replace("lram-policy", "other"),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"tiny"', '"huge"'),
        lambda text: text.replace('"backbone"', '"bone"'),
        lambda text: text.replace('"reward_scale": 100.0', '"reward_scale": 0'),
        lambda text: text.replace('"num_actions": 1,', '"num_actions": 9,'),
        lambda text: text.replace('"target_return"', '"targets"'),
        lambda text: json.dumps(json.loads(text) | {"tasks": []}),
        lambda text: json.dumps(edited(json.loads(text), task, columns=[0, 1, 2, 3, 204])),
        lambda text: json.dumps(edited(json.loads(text), task, columns=[0, 1, 2, 3])),
    ):
        assert damage(whole) != whole
        (folder / "policy.json").write_text(damage(whole))
        with pytest.raises(BadInput, match=r"policy.json: expected an exported policy"):
            load_policy(folder)
    (folder / "policy.json").write_text(whole)
    weights = (folder / "policy.safetensors").read_bytes()
    (folder / "policy.safetensors").write_bytes(weights[:1000])
    with pytest.raises(BadInput, match=r"policy.safetensors"):
        load_policy(folder)
    (folder / "policy.json").write_text(whole.replace('"xlstm"', '"mamba"'))
    (folder / "policy.safetensors").write_bytes(weights)
    with pytest.raises(BadInput, match=r"policy.safetensors"):
        load_policy(folder)


def edited(description: dict, task: str, **fields) -> dict:
    description["tasks"][task] |= fields
    return description


def test_wrong_use_is_one_sentence(run, tmp_path):
    policy = load_policy(export_policy(ExportPolicySettings(run(), tmp_path / "out")))
    with pytest.raises(BadInput, match="reset"):
        policy.act(np.zeros(5))
    with pytest.raises(BadInput, match=r"dmcontrol/walker-walk.*trained on atari/breakout"):
        policy.reset("dmcontrol/walker-walk")
    policy.reset(f"dmcontrol/{CARTPOLE}")
    with pytest.raises(BadInput, match=r"\(6,\), expected \(5,\)"):
        policy.act(np.zeros(6))
