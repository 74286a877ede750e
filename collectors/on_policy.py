"""Trains one PPO agent with the IMPALA network per task and records its training, or what it can do at the end of it.

    settings = OnPolicySettings(steps=1_000_000)
    print(train_on_policy(settings, "procgen", "coinrun", Path("data")))        # over processes: it pickles

The agent is stable-baselines3's PPO; what it learns with stands in `settings/ppo_<domain>.yaml`. Training goes in
segments of a fixed number of updates, and every segment begins with environments and random generators made anew
from (seed, segment): an emulator in C++ cannot be asked for its state, and so it need not be. A checkpoint between
two segments is all that a killed run needs to come to the same files as one that was not.
What it trades away: the episodes under way at the end of a segment are left out and counted (of 64 slots, one in
4,096 transitions each), and a kill costs the segment it falls into. On a GPU the same run need not give the same
bits: cuDNN adds in an order of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lram.collectors.defaults import filled, source
from lram.collectors.environments import ENVIRONMENTS, make
from lram.collectors.recorder import Recorder, record_once
from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter

if TYPE_CHECKING:
    from stable_baselines3 import PPO

NOTHING = 2**62
"""A step that no training comes to."""


@dataclass(frozen=True)
class OnPolicySettings:
    """Settings of an on-policy specialist; what is not given is as in settings/ppo_<domain>.yaml."""

    steps: int | None = None
    """Transitions to learn from, rounded up to whole updates."""
    seed: int = 0
    """Seed of the agent and of the environments."""
    last: int = 0
    """Keep only trajectories that began in this many last transitions of training; 0 keeps all."""
    expert: int = 0
    """Keep none of training, but this many trajectories of the final policy."""
    device: str = "auto"
    """Where the network computes: cpu, cuda, or auto for the GPU where there is one."""
    num_envs: int | None = None
    """Slots that the agent acts in at once."""
    n_steps: int | None = None
    """Transitions of each slot in an update."""
    batch_size: int | None = None
    """Transitions in a minibatch."""
    n_epochs: int | None = None
    """Passes over the transitions of an update."""
    learning_rate: float | None = None
    """Adam's step size."""
    gamma: float | None = None
    """Discount."""
    gae_lambda: float | None = None
    """Lambda of the generalised advantage estimate."""
    ent_coef: float | None = None
    """Weight of the entropy bonus."""
    vf_coef: float | None = None
    """Weight of the value's loss."""
    clip_range: float | None = None
    """How far an update may move the probability of an action, as a ratio."""
    max_grad_norm: float | None = None
    """Norm that gradients are clipped to."""
    normalize_rewards: bool | None = None
    """Divide what the agent learns from, and not what is recorded, by the deviation of its discounted returns."""
    features: int | None = None
    """Width of the network's last layer."""
    segment: int | None = None
    """Updates between checkpoints."""


def train_on_policy(settings: OnPolicySettings, domain: str, task: str, root: Path) -> dict[str, Any]:
    """Trains one specialist on one task and records it; goes on where a killed run stopped.

    Args:
        settings: How.
        domain: "procgen", or another with settings and images.
        task: The task's name in its domain.
        root: The dataset's directory.

    Returns:
        `task`, `skipped` (it was complete on disk), `episodes` and `steps` stored, `last_return` (mean over the last
        hundred of them), `left_out` (transitions of training that were not stored, because their episodes did not
        end or were not asked for), `learned` (transitions of this call's training) and `seconds` that it took.

    Raises:
        BadInput: A setting does not fit, the folder was made with other settings, or the task is unknown.
    """
    if settings.last and settings.expert:
        raise BadInput("last and expert are two different recordings, expected one of them")
    parameters = filled(settings, "ppo", domain)
    provenance = _provenance(settings, domain, parameters)
    learn = partial(_learn, settings, parameters, provenance, domain, task)
    return record_once(root, domain, task, provenance, learn, recent=100)


def _learn(
    settings: OnPolicySettings,
    parameters: dict[str, Any],
    provenance: dict[str, Any],
    domain: str,
    task: str,
    writer: TaskWriter,
) -> dict[str, int]:
    """Trains an agent segment by segment, from the task's checkpoint where there is one."""
    import torch
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

    from lram.collectors import resume
    from lram.collectors.sb3 import RecordVecEnv, VectorToSb3, slot_seeds

    torch.set_num_threads(1)
    slots, per_update = parameters["num_envs"], parameters["num_envs"] * parameters["n_steps"]
    updates = -(-parameters["steps"] // per_update)
    segments = -(-updates // parameters["segment"])
    state = resume.load(writer.folder)
    first = state["segment"] if state else 0
    from_step = updates * per_update - settings.last if settings.last else NOTHING if settings.expert else 0
    recorder = Recorder(
        writer, domain, task, range(slots), provenance["source"], first_episode=0, from_step=max(0, from_step)
    )

    def environment(segment: int) -> VecEnv:
        seed = _seed(settings.seed, segment)
        recorder.seeds = list(slot_seeds(seed, slots))
        venv: VecEnv = RecordVecEnv(VectorToSb3(make(domain, task, slots, seed)), recorder)
        if parameters["normalize_rewards"]:
            venv = VecNormalize(venv, norm_obs=False, gamma=parameters["gamma"])
        return venv

    agent = build(settings, parameters, environment(first))
    if state:
        recorder.restore(state["recorder"])
        resume.restore_agent(agent, state["agent"])
    began = agent.num_timesteps
    for segment in range(first, segments):
        if segment > first:
            _next_environment(agent, environment(segment))
        # Python's, NumPy's and torch's generators, too: a checkpoint here needs none of their states.
        agent.set_random_seed(_seed(settings.seed, segment))
        length = min(parameters["segment"], updates - segment * parameters["segment"])
        agent.learn(length * per_update, log_interval=segments * updates, reset_num_timesteps=False)
        recorder.close()
        recorder.write_curve()
        done = {"agent": resume.agent_state(agent), "recorder": recorder.state(), "segment": segment + 1}
        resume.save(writer.folder, done)
    assert agent.env is not None
    agent.env.close()
    if settings.expert:
        _demonstrate(settings, agent, provenance["source"], domain, task, slots, writer)
    return {"left_out": recorder.left_out_steps, "learned": agent.num_timesteps - began}


def build(settings: OnPolicySettings, parameters: dict[str, Any], env: Any) -> PPO:
    """Builds the agent: stable-baselines3's, with the IMPALA network."""
    from stable_baselines3 import PPO

    from lram.collectors.networks import Impala, speed_up

    rest = {"steps", "num_envs", "normalize_rewards", "features", "segment"}
    agent = PPO(
        "CnnPolicy",
        env,
        policy_kwargs={
            "features_extractor_class": Impala,
            "features_extractor_kwargs": {"features_dim": parameters["features"]},
            # Policy and value are one layer each on the features; epsilon is stable-baselines3's for PPO.
            "net_arch": [],
            "optimizer_kwargs": {"eps": 1e-5, "fused": True},
        },
        seed=settings.seed,
        device=settings.device,
        **{key: value for key, value in parameters.items() if key not in rest},
    )
    speed_up(agent)
    return agent


def _next_environment(agent: PPO, env: Any) -> None:
    """Gives an agent new environments, which know what the old ones did of the rewards' deviation."""
    from lram.collectors.resume import normaliser_state, restore_normaliser

    assert agent.env is not None
    agent.env.close()
    old = agent.get_vec_normalize_env()
    agent.set_env(env)
    new = agent.get_vec_normalize_env()
    if old is not None and new is not None:
        restore_normaliser(new, normaliser_state(old))


def _demonstrate(
    settings: OnPolicySettings, agent: PPO, source: str, domain: str, task: str, slots: int, writer: TaskWriter
) -> None:
    """Records `settings.expert` episodes of the final policy, as many of every slot.

    Actions are drawn from the policy, as in the evaluations of Procgen's authors: the likeliest ones alone would play
    a level twice in the same way, and there are 200.
    """
    from lram.collectors.sb3 import slot_seeds

    slots = min(slots, settings.expert)
    # No training has this many segments.
    seed = _seed(settings.seed, 2**32 - 1)
    env = make(domain, task, slots, seed)
    quota = [settings.expert // slots + (slot < settings.expert % slots) for slot in range(slots)]
    recorder = Recorder(writer, domain, task, slot_seeds(seed, slots), source, first_episode=0, quota=quota)
    agent.set_random_seed(seed)
    states, _ = env.reset()
    recorder.reset(states)
    while recorder.episodes < settings.expert:
        actions, _ = agent.predict(states, deterministic=False)
        states, *rest = env.step(actions)
        recorder.step(actions, states, *rest)
    env.close()


def _seed(seed: int, segment: int) -> int:
    """Returns the seed of a segment: less than the 32 bits that NumPy takes, with room for the slots'."""
    return int(np.random.SeedSequence((seed, segment)).generate_state(1)[0] >> 2)


def _provenance(settings: OnPolicySettings, domain: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the content of a task's files."""
    recorded = {"seed": settings.seed, "last": settings.last, "expert": settings.expert}
    if settings.expert:
        recorded["policy_step"] = parameters["steps"]
    return {
        "collector": domain,
        "algorithm": "ppo",
        **parameters,
        **recorded,
        "source": source("PPO specialist", "stable-baselines3", *ENVIRONMENTS[domain].packages),
    }
