"""Rollouts: the same episodes however they are batched, and simulators that break."""

import importlib
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lram.collectors import environments
from lram.datasets.specs import DOMAINS, BadInput, state_columns
from lram.model.policy import Policy, PolicySettings
from lram.train.rollouts import LOST, Queue, RolloutSettings, check, play, share
from lram.train.simulators import FIRST_SEED, Job, Simulators, _Played

ROOMS = [f"room5x5-h8-goal-00-{column:02d}" for column in range(5)]
ONE = RolloutSettings(slots=8, workers=1)


def policy_of(backbone="xlstm", **settings) -> Policy:
    torch.manual_seed(0)
    policy = Policy(PolicySettings(backbone=backbone, size="tiny", max_steps=4, image=False, **settings)).eval()
    with torch.no_grad():  # an untrained policy hardly tells states apart; this one does
        policy.head.weight.mul_(3)
    return policy


def jobs_of(tasks, episodes, domain="darkroom"):
    return [Job(domain, task, episode) for task in tasks for episode in range(episodes)]


def run(policy, jobs, settings=ONE, target=3.0, **named):
    """Returns results and trajectories by (task, episode)."""
    taken = {}
    found = list(play(policy, jobs, {job.name: target for job in jobs}, settings, record=lambda t: taken.__setitem__(
        (f"{t.domain}/{t.task}", t.episode), t), **named))  # fmt: skip
    return {(result["task"], result["episode"]): result for result in found}, taken


@pytest.fixture(scope="module")
def broken():
    """The module of broken simulators, importable in worker processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield importlib.import_module("broken_simulators")


@pytest.mark.parametrize(
    "policy",
    [policy_of("xlstm", with_actions=True), policy_of("mamba"), policy_of("dt")],
    ids=["xlstm-actions", "mamba", "dt"],
)
def test_an_episode_does_not_depend_on_the_slots_beside_it(policy):
    jobs = jobs_of(ROOMS[:3], 4)
    results, taken = run(policy, jobs, replace(ONE, slots=5))
    assert results.keys() == {(job.name, job.episode) for job in jobs}
    alone, taken_alone = run(policy, jobs[::-1], replace(ONE, slots=1))
    assert alone == results
    for at, trajectory in taken.items():
        assert np.array_equal(trajectory.actions, taken_alone[at].actions)
        assert np.array_equal(trajectory.states, taken_alone[at].states)
    # Episodes do differ from each other: in rooms only the actions drawn can make them.
    assert len({trajectory.actions.tobytes() for trajectory in taken.values()}) > len(jobs) // 2


def test_actions_follow_from_the_whole_history_of_their_own_episode():
    """Each step's action is the argmax of logits over one forward pass plus the episode's noise."""
    policy = policy_of()
    _, taken = run(policy, jobs_of(ROOMS[:2], 2), replace(ONE, slots=2, temperature=0), target=5.0)
    for trajectory in taken.values():
        T = trajectory.length
        states = torch.zeros(1, T, 204)
        states[0, :, :2] = torch.from_numpy(trajectory.states)
        paid = torch.from_numpy(trajectory.rewards)
        before = torch.cat([torch.zeros(1), paid[:-1]])
        with torch.no_grad():
            logits = policy(states, (5.0 - before.cumsum(0))[None], before[None])[0, :, :5]
        assert logits.argmax(-1).tolist() == trajectory.actions.tolist()


@pytest.mark.parametrize(("domain", "task", "package"), [("dmcontrol", "cartpole-swingup", "dm_control"),
                                                         ("metaworld", "reach-v2", "metaworld")])  # fmt: skip
def test_continuous_rollouts_replay_in_the_simulator(domain, task, package):
    pytest.importorskip(package, reason=f"{package} is an optional simulator")
    jobs = jobs_of([task], 2, domain)[1:]
    results, taken = run(policy_of(), jobs, replace(ONE, slots=1))
    result, trajectory = results[f"{domain}/{task}", 1], taken[f"{domain}/{task}", 1]
    env = environments.make(domain, task, 1, FIRST_SEED, 1)
    states, _ = env.reset()
    dims = env.single_action_space.shape[0]
    assert trajectory.actions.shape == (result["length"], dims) and trajectory.state_layout == env.state_layout
    total = 0.0
    for t in range(result["length"]):
        assert np.array_equal(trajectory.states[t], states[0])
        states, rewards, _, truncated, infos = env.step(trajectory.actions[t : t + 1])
        assert rewards[0] == trajectory.rewards[t]
        total += float(rewards[0])
    assert truncated[0] and np.array_equal(infos["final_obs"][0], trajectory.final_state)
    assert result["return"] == pytest.approx(total) and trajectory.total == pytest.approx(total, rel=1e-6)
    assert len(np.unique(trajectory.actions)) > 50 and np.abs(trajectory.actions).max() < 1
    if domain == "metaworld":
        assert result["success"] is bool(infos["final_info"]["success"][0])
    columns = state_columns(domain, env.state_layout, trajectory.states.shape[1])
    assert DOMAINS[domain].union is not np.array_equal(columns, np.arange(len(columns)))
    env.close()


def test_a_slot_goes_from_any_episode_to_any_other():
    pytest.importorskip("dm_control", reason="dm_control is an optional simulator")
    held = _Played(environments.make, Job("dmcontrol", "cartpole-swingup", 0), seed=0)
    for episode in (3, 1, 2):
        assert held.go_to(episode) and held.episode == episode
        fresh = _Played(environments.make, Job("dmcontrol", "cartpole-swingup", episode), seed=0)
        assert np.array_equal(held.first, fresh.first)
    assert not np.array_equal(held.first, _Played(environments.make, Job("dmcontrol", "cartpole-swingup", 2), 1).first)


def test_atari_scores_are_the_game_s_and_images_arrive():
    pytest.importorskip("ale_py", reason="ale-py is an optional simulator")
    torch.manual_seed(0)
    policy = Policy(PolicySettings(size="tiny")).eval()
    results, taken = run(policy, [Job("atari", "breakout", 0)], replace(ONE, slots=1))
    result, trajectory = results["atari/breakout", 0], taken["atari/breakout", 0]
    assert result["score"] >= result["return"] == trajectory.total and result["terminated"]
    assert trajectory.states.shape[1:] == (1, 64, 64) and trajectory.states.std() > 1
    env = environments.make("atari", "breakout", 1, FIRST_SEED, 0)
    states, _ = env.reset()
    assert np.array_equal(states[0], trajectory.states[0])


def test_broken_simulators_cost_their_episode_and_nothing_else(broken):
    policy, jobs = policy_of(), jobs_of([*ROOMS, "room5x5-h8-goal-04-04"], 3)
    whole, _ = run(policy, jobs_of(ROOMS, 3))
    results, _ = run(policy, jobs, replace(ONE, slots=6, workers=2, timeout=6), make=broken.make)
    failed = {at: result for at, result in results.items() if "failed" in result}
    words = {(ROOMS.index(task.split("/")[1]), episode): result["failed"] for (task, episode), result in failed.items()
             if "missing" not in result}  # fmt: skip
    assert words == {
        (1, 1): "RuntimeError: the physics exploded",
        (2, 1): "ValueError: state with NaN or infinity at step 3",
        (3, 1): "it did not answer for 6 s",
        (4, 1): "its process died (exit 7)",
    }
    missing = [result for result in failed.values() if result.get("missing")]
    assert len(missing) == 3 and all("not installed" in result["failed"] for result in missing)
    assert results.keys() == {(job.name, job.episode) for job in jobs}
    for at, result in results.items():
        if at not in failed:
            assert result == whole[at]


def test_a_killed_process_loses_no_other_episode():
    policy, jobs = policy_of(), jobs_of(ROOMS[:4], 4)
    whole, _ = run(policy, jobs)
    killed = []
    starting = Simulators.send

    def send(simulators, half, starts):
        if not killed and simulators.board.beats[0] > 20:
            killed.append(simulators.pids[0])
            os.kill(simulators.pids[0], signal.SIGKILL)
        starting(simulators, half, starts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Simulators, "send", send)
        results, _ = run(policy, jobs)
    assert killed
    lost = [result for result in results.values() if "failed" in result]
    # It was killed between calls or in one; in one, the episode in that call is the one that is given up.
    assert len(lost) <= 1 and all("exit -9" in result["failed"] for result in lost)
    assert {at: result for at, result in whole.items() if results[at] == result}.keys() >= results.keys() - {
        (result["task"], result["episode"]) for result in lost
    }


def test_a_process_that_is_slow_to_start_has_not_hung(broken):
    results, _ = run(policy_of(), jobs_of(ROOMS[:1], 1), replace(ONE, timeout=4), make=broken.SlowToStart())
    assert not [result for result in results.values() if "failed" in result]


def test_processes_that_cannot_start_end_the_run(monkeypatch):
    calls = Counter()
    launch = Simulators._launch

    def dead(simulators, worker):
        calls["launched"] += 1
        launch(simulators, worker)
        simulators._processes[worker].kill()

    monkeypatch.setattr(Simulators, "_launch", dead)
    results, _ = run(policy_of(), jobs_of(ROOMS[:1], 2))
    assert [result["failed"] for result in results.values()] == [f"its process ended {LOST} times"] * 2
    assert calls["launched"] <= 2 * LOST + 1


def test_a_policy_without_an_image_encoder_says_so():
    results, _ = run(policy_of(), [Job("procgen", "coinrun", 0)])
    assert results["procgen/coinrun", 0] == {
        "task": "procgen/coinrun", "episode": 0, "failed": "the policy has no image encoder", "missing": True,
    }  # fmt: skip


def test_temperature_zero_is_greedy_and_seeds_matter():
    policy, jobs = policy_of(), jobs_of(ROOMS[:1], 3)
    _, greedy = run(policy, jobs, replace(ONE, temperature=0))
    assert len({trajectory.actions.tobytes() for trajectory in greedy.values()}) == 1
    drawn = [run(policy, jobs, replace(ONE, seed=seed))[1] for seed in (0, 1)]
    assert any(not np.array_equal(drawn[0][at].actions, drawn[1][at].actions) for at in drawn[0])


def test_draws_have_the_policy_s_probabilities():
    policy = policy_of()
    with torch.no_grad():  # the same probabilities everywhere
        policy.head.weight.zero_()
        policy.head.bias[:5] = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    _, taken = run(policy, jobs_of(ROOMS, 60), replace(ONE, slots=40))
    actions = np.concatenate([trajectory.actions for trajectory in taken.values()])
    shares = np.bincount(actions, minlength=5) / len(actions)
    assert len(actions) == 2400 and np.abs(shares - [0.4, 0.3, 0.15, 0.1, 0.05]).max() < 0.03


def test_a_queue_gives_each_slot_neighbours_and_shares_what_is_left():
    jobs = jobs_of(ROOMS[:2], 8)
    queue = Queue(jobs[::-1], 4)
    assert [queue.next(1) for _ in range(4)] == jobs[4:8]
    assert queue.next(1) == jobs[2]  # half of the longest run, its end
    queue.again(1, jobs[2])
    assert [queue.next(1), queue.next(1)] == jobs[2:4]
    assert len(queue.drop("darkroom/" + ROOMS[1])) == 8
    assert [queue.next(slot) for slot in (0, 3, 2)] == [jobs[0], jobs[1], None]


def test_shares_are_disjoint_and_whole():
    jobs = jobs_of(ROOMS, 3)
    parts = [share(jobs, (part, 4)) for part in range(4)]
    assert sorted(job for part in parts for job in part) == sorted(jobs)
    parts = [share(jobs, (part, 2), whole_tasks=True) for part in range(2)]
    assert sorted(job for part in parts for job in part) == sorted(jobs)
    assert not {job.name for job in parts[0]} & {job.name for job in parts[1]}


@pytest.mark.parametrize("wrong", [{"slots": 0}, {"temperature": -1}, {"seed": -1}, {"timeout": 0}])
def test_numbers_that_mean_nothing_are_refused(wrong):
    with pytest.raises(BadInput, match=f"--{next(iter(wrong))}"):
        check(replace(ONE, **wrong))
