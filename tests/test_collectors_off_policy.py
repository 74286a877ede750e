"""Off-policy specialists: killed at any moment they come to the same files; faster operations learn the same."""

from __future__ import annotations

import dataclasses
import inspect
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("dm_control", reason="DMControl is not installed")

from stable_baselines3 import SAC

from lram.collectors import resume
from lram.collectors.defaults import defaults, filled
from lram.collectors.environments import make
from lram.collectors.off_policy import HOLD, OffPolicySettings, build, train_off_policy
from lram.collectors.recorder import Recorder, read_curve
from lram.collectors.sb3 import VectorToSb3
from lram.datasets.check import check_task
from lram.datasets.index import read_index, trajectory_path
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import read
from lram.datasets.writer import finished

TASK = "cartpole-swingup"
# A buffer that wraps, warm-up that ends within an episode, and updates that are few and small.
TINY = OffPolicySettings(
    steps=4000,
    seed=3,
    buffer_size=1700,
    learning_starts=500,
    train_freq=5,
    batch_size=32,
    actor_hidden=(32, 32),
    critic_hidden=(32, 32),
)
SHORT = dataclasses.replace(TINY, steps=2000, learning_starts=1500, train_freq=10)


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    result = train_off_policy(TINY, "dmcontrol", TASK, root)
    assert (result["episodes"], result["steps"], result["left_out"], result["learned"]) == (4, 4000, 0, 4000)
    return root


def test_all_of_training_is_on_disk_and_in_the_curve(whole: Path) -> None:
    folder = whole / "dmcontrol" / TASK
    index, curve = read_index(folder), read_curve(folder)
    assert index.numpy("episode").tolist() == curve["episode"].to_pylist() == [0, 1, 2, 3]
    assert index.numpy("length").tolist() == curve["length"].to_pylist() == [1000] * 4
    assert curve["steps"].to_pylist() == [1000, 2000, 3000, 4000]
    np.testing.assert_array_equal(curve["return"], index.numpy("return"))
    provenance = finished(whole, "dmcontrol", TASK)
    assert provenance is not None
    assert (provenance["seed"], provenance["tau"], provenance["actor_hidden"]) == (3, 0.005, [32, 32])
    assert "stable-baselines3" in provenance["source"] and "mujoco" in provenance["source"]
    assert check_task(folder).findings == []
    # The agent acts from its policy after the warm-up, and not before.
    first, last = (read(folder / path) for path in (index.table["path"][0].as_py(), index.table["path"][3].as_py()))
    assert first.state_layout == make("dmcontrol", TASK).state_layout and last.truncated
    assert not np.array_equal(first.actions[:100], last.actions[:100])


def test_killed_at_any_moment_it_comes_to_the_same_files(whole: Path, tmp_path: Path) -> None:
    # A server forks the children, so that only it pays for the imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lram.collectors.resume", "lram.collectors.networks", "dm_control.suite"])

    def files() -> int:
        return len(list(tmp_path.rglob("*.hdf5")))

    for kill, delay in enumerate((0.0, 0.0, 0.05, 0.2)):
        child = context.Process(target=train_off_policy, args=(TINY, "dmcontrol", TASK, tmp_path))
        child.start()
        deadline = time.monotonic() + 60
        # At the first sign of life, then after every file: the checkpoint follows, and the next episode.
        while files() < kill or not (tmp_path / "dmcontrol" / TASK / ".lock").exists():
            assert child.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert finished(tmp_path, "dmcontrol", TASK) is None
    result = train_off_policy(TINY, "dmcontrol", TASK, tmp_path)
    assert result["steps"] == 4000 and result["learned"] < 4000
    assert contents(tmp_path) == contents(whole)


class Stop(Exception):
    pass


def interrupted(monkeypatch: pytest.MonkeyPatch, settings: OffPolicySettings, root: Path, steps: int) -> None:
    """Trains until so many transitions have been seen, and no further."""
    step = Recorder.step

    def stop(self: Recorder, *args: Any) -> None:
        step(self, *args)
        if self.steps >= steps:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "step", stop)
        with pytest.raises(Stop):
            train_off_policy(settings, "dmcontrol", TASK, root)


@pytest.mark.parametrize("algorithm", ["tqc", "crossq"])
def test_other_algorithms_resume_too(algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SHORT, algorithm=algorithm, learning_starts=600)
    train_off_policy(settings, "dmcontrol", TASK, tmp_path / "whole")
    interrupted(monkeypatch, settings, tmp_path / "stopped", 1300)
    assert train_off_policy(settings, "dmcontrol", TASK, tmp_path / "stopped")["learned"] == 1000
    assert contents(tmp_path / "whole") == contents(tmp_path / "stopped")


def test_the_replay_buffer_is_read_back_as_it_was(whole: Path) -> None:
    from lram.collectors.sb3 import RecordVecEnv
    from lram.datasets.writer import TaskWriter

    agents = []
    for root in (whole.parent / "again", None):
        env = make("dmcontrol", TASK, 1, 3)
        venv = VectorToSb3(env)
        if root is not None:
            writer = TaskWriter(root, "dmcontrol", TASK, {})
            venv = RecordVecEnv(venv, Recorder(writer, "dmcontrol", TASK, [3], "test", first_episode=0))
        agents.append(build(TINY, filled(TINY, "sac", "dmcontrol"), venv))
    agents[0].learn(3000)
    live, read_back = agents[0].replay_buffer, agents[1].replay_buffer
    writer.sync()
    resume.refill(read_back, writer.folder, np.array([1000] * 3))
    writer.close()
    assert live.full and live.pos == 1300
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "pos", "full"):
        np.testing.assert_array_equal(getattr(read_back, name), getattr(live, name), name)
    assert live.timeouts.sum() == 2 and live.dones.sum() == 2


def test_faster_operations_learn_the_same() -> None:
    losses, weights = [], []
    parameters = defaults("sac", "dmcontrol") | {"learning_starts": 300}
    for faster in (False, True):
        venv = VectorToSb3(make("dmcontrol", TASK, 1, 0))
        if faster:
            agent = build(OffPolicySettings(), parameters, venv)
        else:
            agent = SAC("MlpPolicy", venv, learning_starts=300, seed=0, device="cpu")
        agent.learn(300)
        rows = []
        for _ in range(12):
            agent.train(1, 256)
            values = agent.logger.name_to_value
            names = ("actor_loss", "critic_loss", "ent_coef_loss", "ent_coef")
            rows.append([values[f"train/{name}"] for name in names])
        losses.append(rows)
        weights.append(torch.cat([value.flatten() for value in agent.policy.state_dict().values()]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4, atol=1e-5)
    moved = (weights[1] - weights[0]).abs()
    # Adam's first steps have the gradients' signs, so that a rounding around zero moves a weight by a whole step.
    assert moved.median() < 1e-6 and moved.max() < 2e-2


def test_the_critic_gets_no_gradient_from_the_actors_loss() -> None:
    agent = build(OffPolicySettings(), defaults("sac", "dmcontrol"), VectorToSb3(make("dmcontrol", TASK)))
    states, actions = torch.randn(64, 5), torch.rand(64, 1)
    sum(agent.critic(states, actions)).mean().backward()
    held = [parameter.grad.clone() for parameter in agent.critic.parameters()]
    assert all(grad.abs().sum() > 0 for grad in held)
    asked = actions.requires_grad_()
    sum(agent.critic(states, asked)).mean().backward()
    assert asked.grad.abs().sum() > 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(agent.critic.parameters(), held))
    assert sum(type(module).__name__ == "WideLinear" for module in agent.policy.modules()) == 5


def test_expert_trajectories_are_the_final_policys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(SHORT, expert=3)
    result = train_off_policy(settings, "dmcontrol", TASK, tmp_path / "a")
    assert (result["episodes"], result["learned"], result["skipped"]) == (3, 2000, False)
    folder = tmp_path / "a" / "dmcontrol" / TASK
    assert not (folder / ".training").exists() and check_task(folder).findings == []
    assert read_curve(folder)["steps"].to_pylist() == [1000, 2000]
    assert finished(tmp_path / "a", "dmcontrol", TASK)["policy_step"] == 2000
    trajectories = [read(folder / path) for path in read_index(folder).table["path"].to_pylist()]
    assert len({t.states[0].tobytes() for t in trajectories}) == 3
    # Stopped within the second of them: training is not repeated, and the first is kept.
    interrupted(monkeypatch, settings, tmp_path / "b", 1999)
    with monkeypatch.context() as patched:
        patched.setattr("lram.collectors.off_policy._demonstrate", lambda *args: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            train_off_policy(settings, "dmcontrol", TASK, tmp_path / "b")
    interrupted(monkeypatch, settings, tmp_path / "b", 1500)
    assert len(list(tmp_path.glob("b/dmcontrol/*/000/*.hdf5"))) == 1
    assert train_off_policy(settings, "dmcontrol", TASK, tmp_path / "b")["learned"] == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a == b


def test_random_actions_among_the_experts_are_held_recorded_and_repeatable(tmp_path: Path) -> None:
    led_astray = dataclasses.replace(SHORT, expert=2, expert_noise=0.3)
    for name in "ab":
        train_off_policy(led_astray, "dmcontrol", TASK, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert finished(tmp_path / "a", "dmcontrol", TASK)["expert_noise"] == 0.3
    episodes = [read(tmp_path / "a" / "dmcontrol" / TASK / trajectory_path(number)).actions for number in (0, 1)]
    assert not np.array_equal(*episodes)
    for actions in episodes:
        held = (np.diff(actions, axis=0) == 0).all(1)  # nine of the ten steps of a random action
        assert 0.15 < held.mean() * HOLD / (HOLD - 1) < 0.45
        assert np.abs(actions).max() <= 1 and actions[1:][held].std() > 0.3
    train_off_policy(dataclasses.replace(SHORT, expert=1), "dmcontrol", TASK, tmp_path / "c")
    clean = read(tmp_path / "c" / "dmcontrol" / TASK / trajectory_path(0)).actions
    first = np.flatnonzero((np.diff(episodes[0], axis=0) == 0).all(1))[0]
    # Until the first random action it is the same episode.
    assert np.array_equal(episodes[0][:first], clean[:first]) and first < len(clean) / 2


def test_the_last_transitions_only(whole: Path, tmp_path: Path) -> None:
    result = train_off_policy(dataclasses.replace(TINY, last=2500), "dmcontrol", TASK, tmp_path)
    assert (result["episodes"], result["steps"], result["learned"]) == (2, 2000, 4000)
    for number in (2, 3):
        name = f"dmcontrol/{TASK}/000/{number:09d}.hdf5"
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "dmcontrol" / TASK / ".training").exists()
    assert read_curve(tmp_path / "dmcontrol" / TASK).equals(read_curve(whole / "dmcontrol" / TASK))


def test_a_finished_task_is_left_alone_and_other_settings_are_refused(whole: Path) -> None:
    before = contents(whole)
    result = train_off_policy(TINY, "dmcontrol", TASK, whole)
    assert result["skipped"] and result["seconds"] < 1 and result["learned"] == 0
    with pytest.raises(BadInput, match=rf"{TASK}: was made with gamma = 0.99, not 0.5"):
        train_off_policy(dataclasses.replace(TINY, gamma=0.5), "dmcontrol", TASK, whole)
    assert contents(whole) == before


def test_an_unfinished_episode_is_left_out_and_counted(tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, steps=1250)
    result = train_off_policy(settings, "dmcontrol", TASK, tmp_path)
    assert (result["episodes"], result["steps"], result["left_out"]) == (1, 1000, 250)
    assert read_index(tmp_path / "dmcontrol" / TASK).meta["account"] == {"left_out_steps": 250}


def test_bad_settings_and_checkpoints_are_refused(tmp_path: Path) -> None:
    for settings, domain, words in (
        (OffPolicySettings(last=1, expert=1), "dmcontrol", "expected one of them"),
        (OffPolicySettings(expert_noise=0.1), "dmcontrol", "and --expert with it"),
        (OffPolicySettings(expert=1, expert_noise=1.0), "dmcontrol", "expected a share below 1"),
        (OffPolicySettings("crossq", tau=0.1), "dmcontrol", "crossq has no setting tau"),
        (OffPolicySettings(), "atari", "sac has no settings for atari"),
    ):
        with pytest.raises(BadInput, match=words):
            train_off_policy(settings, domain, TASK, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BadInput, match="no task 'cartpole-fly'"):
        train_off_policy(TINY, "dmcontrol", "cartpole-fly", tmp_path)

    class Harmful:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "harm"),)

    for data in (pickle.dumps(Harmful(), 2), b"", b"PK\3\4 and then nothing"):
        (tmp_path / resume.CHECKPOINT).write_bytes(data)
        with pytest.raises(BadInput, match=r"\.checkpoint\.pt: not a readable checkpoint"):
            resume.load(tmp_path)
    torch.save(Harmful(), tmp_path / resume.CHECKPOINT)
    with pytest.raises(BadInput, match="unsafe content"):
        resume.load(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_settings_files_are_what_they_say() -> None:
    theirs = {name: value.default for name, value in inspect.signature(SAC.__init__).parameters.items()}
    ours = defaults("sac", "dmcontrol")
    for name in ours.keys() - {"steps", "actor_hidden", "critic_hidden"}:
        assert ours[name] == theirs[name], name
    paper = defaults("sac", "metaworld")
    assert (paper["batch_size"], paper["learning_starts"], paper["train_freq"], paper["gradient_steps"]) == (
        128,
        1000,
        50,
        50,
    )
    fields = {field.name for field in dataclasses.fields(OffPolicySettings)}
    for algorithm in ("sac", "tqc", "crossq"):
        for domain in ("dmcontrol", "metaworld"):
            assert defaults(algorithm, domain).keys() <= fields
    assert filled(OffPolicySettings(steps=7, actor_hidden=(8,)), "sac", "dmcontrol")["actor_hidden"] == [8]
