"""Trains one SAC, TQC or CrossQ agent per task and records its training, or what it can do at the end of it.

    settings = OffPolicySettings(steps=60_000)
    print(train_off_policy(settings, "dmcontrol", "cartpole-swingup", Path("data")))    # over processes: it pickles
    train_off_policy(OffPolicySettings("tqc", expert=100), "metaworld", "reach-v2", Path("data"))

The agents are those of stable-baselines3 and sb3-contrib, on one slot; what they learn with stands in
`settings/<algorithm>_<domain>.yaml`. Episodes are functions of (seed, episode), so a checkpoint at an episode's start
needs nothing of the simulator, and the replay buffer is read back from the trajectories on disk: a run that is killed
at any moment goes on from its checkpoint, comes to the same numbers, and writes the same files over those that the
killed run wrote after it. `--last` and `--expert` record the training too, out of sight, until the task is complete.
What it trades away: single actions on one core. The simulator waits while the agent learns, which takes 90 % of the
time; an agent on a GPU or many slots would change what it learns from.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lram.collectors.defaults import filled, source
from lram.collectors.environments import ENVIRONMENTS, make
from lram.collectors.recorder import CURVE, Recorder, read_curve, record_once
from lram.datasets.index import task_folder, trajectory_path
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import read, write_whole
from lram.datasets.writer import TaskWriter

if TYPE_CHECKING:
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

HOLD = 10
"""Steps that a random action among an expert's is held: at 0.01 to 0.025 s a step, long enough to lead astray."""
TRAINING = ".training"
"""Folder in a task's folder for a training that is not part of the dataset, while it runs."""


@dataclass(frozen=True)
class OffPolicySettings:
    """Settings of an off-policy specialist; what is not given is as in settings/<algorithm>_<domain>.yaml."""

    algorithm: Literal["sac", "tqc", "crossq"] = "sac"
    """Who learns: stable-baselines3's SAC, or TQC or CrossQ of sb3-contrib."""
    steps: int | None = None
    """Transitions to learn from; when no multiple of an episode's length, the last episode is left out."""
    seed: int = 0
    """Seed of the agent and of the episodes."""
    last: int = 0
    """Keep only trajectories that began in this many last transitions of training; 0 keeps all."""
    expert: int = 0
    """Keep none of training, but this many trajectories of the final policy, without exploration."""
    expert_noise: float = 0.0
    """Share of the final policy's steps, in runs of ten, that take a random action instead: whoever learns from them
    sees how it recovers, while most actions stay its own."""
    checkpoint: int = 1000
    """Transitions between checkpoints, at least; one is made at an episode's start."""
    learning_rate: float | None = None
    """Adam's step size, of all networks and of the entropy coefficient."""
    buffer_size: int | None = None
    """Transitions in the replay buffer."""
    learning_starts: int | None = None
    """Transitions of random actions before the first update."""
    batch_size: int | None = None
    """Transitions in an update."""
    tau: float | None = None
    """Share of the critic that its target takes over with every update (not CrossQ)."""
    gamma: float | None = None
    """Discount."""
    train_freq: int | None = None
    """Transitions between updates."""
    gradient_steps: int | None = None
    """Updates each time."""
    ent_coef: str | None = None
    """Entropy coefficient: a number, or `auto` to learn it."""
    top_quantiles_to_drop_per_net: int | None = None
    """Highest quantiles of each critic's target that are dropped (TQC)."""
    policy_delay: int | None = None
    """Updates of the critic for one of the actor (CrossQ)."""
    actor_hidden: tuple[int, ...] | None = None
    """Widths of the actor's hidden layers."""
    critic_hidden: tuple[int, ...] | None = None
    """Widths of each critic's hidden layers."""


def train_off_policy(settings: OffPolicySettings, domain: str, task: str, root: Path) -> dict[str, Any]:
    """Trains one specialist on one task and records it; goes on where a killed run stopped.

    Args:
        settings: How.
        domain: "dmcontrol" or "metaworld", or another with settings and an environment that starts at any episode.
        task: The task's name in its domain.
        root: The dataset's directory.

    Returns:
        `task`, `skipped` (it was complete on disk), `episodes` and `steps` stored, `last_return` (mean over the last
        ten of them), `left_out` (transitions of a last, unfinished episode), `learned` (transitions of this call's
        training) and `seconds` that it took.

    Raises:
        BadInput: A setting does not fit, the folder was made with other settings, or the task is unknown.
    """
    if settings.last and settings.expert:
        raise BadInput("last and expert are two different recordings, expected one of them")
    if not 0 <= settings.expert_noise < 1 or (settings.expert_noise and not settings.expert):
        raise BadInput(f"--expert-noise {settings.expert_noise}: expected a share below 1, and --expert with it")
    parameters = filled(settings, settings.algorithm, domain)
    provenance = _provenance(settings, domain, parameters)
    collect = partial(_collect, settings, parameters, provenance, domain, task)
    result = record_once(root, domain, task, provenance, collect, recent=10)
    shutil.rmtree(task_folder(root, domain, task) / TRAINING, ignore_errors=True)
    return result


def _collect(
    settings: OffPolicySettings,
    parameters: dict[str, Any],
    provenance: dict[str, Any],
    domain: str,
    task: str,
    writer: TaskWriter,
) -> dict[str, int]:
    if not settings.last and not settings.expert:
        return _learn(settings, parameters, provenance, domain, task, writer)[1]
    from lram.collectors import resume

    with TaskWriter(writer.folder / TRAINING, domain, task, provenance) as training:
        agent, result = _learn(settings, parameters, provenance, domain, task, training)
        for name in (CURVE, resume.CHECKPOINT):
            write_whole(writer.folder / name, (training.folder / name).read_bytes())
        if settings.expert:
            _demonstrate(settings, agent, provenance["source"], domain, task, writer)
            return result
        curve = read_curve(training.folder)
        episodes, ends = curve["episode"].to_numpy(), curve["steps"].to_numpy()
        for episode in episodes[ends - curve["length"].to_numpy() >= parameters["steps"] - settings.last]:
            writer.add(read(training.folder / trajectory_path(int(episode))))
    return result


def _learn(
    settings: OffPolicySettings,
    parameters: dict[str, Any],
    provenance: dict[str, Any],
    domain: str,
    task: str,
    writer: TaskWriter,
) -> tuple[OffPolicyAlgorithm, dict[str, int]]:
    """Trains an agent, from the task's checkpoint where there is one; every episode goes to the writer."""
    import torch

    from lram.collectors import resume
    from lram.collectors.sb3 import RecordVecEnv, VectorToSb3

    # Tasks run in parallel over processes: a second thread would only take another task's core.
    torch.set_num_threads(1)
    state = resume.load(writer.folder)
    first = state["recorder"]["next"] if state else 0
    env = make(domain, task, 1, settings.seed, first)
    recorder = Recorder(
        writer,
        domain,
        task,
        seeds=[settings.seed],
        source=provenance["source"],
        first_episode=0,
        action_space=env.single_action_space,
        state_layout=getattr(env, "state_layout", None),  # Slots have it, a VectorEnv need not
    )
    agent = build(settings, parameters, RecordVecEnv(VectorToSb3(env), recorder))
    if state:
        recorder.restore(state["recorder"])
        resume.restore_agent(agent, state["agent"])
    steps, began = parameters["steps"], agent.num_timesteps
    # With `reset_num_timesteps` off, stable-baselines3 goes on counting; the first reset of the slot is here.
    _, callback = agent._setup_learn(steps, None, reset_num_timesteps=False)
    buffer = agent.replay_buffer
    assert agent.env is not None and buffer is not None
    if state and began < steps:
        resume.refill(buffer, writer.folder, recorder.curve()["length"])
        resume.restore_random(agent, state["random"])
    saved = began
    # The loop of `OffPolicyAlgorithm.learn`, with a place for checkpoints.
    while agent.num_timesteps < steps:
        if not recorder.under_way and agent.num_timesteps - saved >= settings.checkpoint:
            saved = agent.num_timesteps
            _save(agent, recorder, writer.folder)
        agent.collect_rollouts(
            agent.env,
            callback,
            agent.train_freq,  # type: ignore[arg-type]
            buffer,
            learning_starts=agent.learning_starts,
        )
        if agent.num_timesteps > agent.learning_starts:
            agent.train(agent.gradient_steps, agent.batch_size)
    if began < steps:
        recorder.close()
        _save(agent, recorder, writer.folder)
    env.close()
    return agent, {"left_out": recorder.left_out_steps, "learned": agent.num_timesteps - began}


def build(settings: OffPolicySettings, parameters: dict[str, Any], env: Any) -> OffPolicyAlgorithm:
    """Builds the agent: stable-baselines3's, with faster operations underneath."""
    from sb3_contrib import TQC, CrossQ
    from stable_baselines3 import SAC

    from lram.collectors.networks import speed_up

    arguments = dict(parameters)
    arguments.pop("steps")
    architecture = {"pi": arguments.pop("actor_hidden"), "qf": arguments.pop("critic_hidden")}
    agent = {"sac": SAC, "tqc": TQC, "crossq": CrossQ}[settings.algorithm](
        "MlpPolicy",
        env,
        policy_kwargs={"net_arch": architecture, "optimizer_kwargs": {"fused": True}},
        seed=settings.seed,
        device="cpu",
        **arguments,
    )
    speed_up(agent)
    return agent


def _save(agent: OffPolicyAlgorithm, recorder: Recorder, folder: Path) -> None:
    from lram.collectors import resume

    recorder.write_curve()
    state = {"agent": resume.agent_state(agent), "random": resume.random_state(agent), "recorder": recorder.state()}
    resume.save(folder, state)


def _demonstrate(
    settings: OffPolicySettings, agent: OffPolicyAlgorithm, source: str, domain: str, task: str, writer: TaskWriter
) -> None:
    """Records `settings.expert` episodes of the final policy; those on disk are not played again."""
    # Other episodes than those of training, which the seed itself stands for.
    seed = int(np.random.SeedSequence((settings.seed, 1)).generate_state(1)[0])
    first = writer.next_episode
    env = make(domain, task, 1, seed, first)
    layout = getattr(env, "state_layout", None)
    space = env.single_action_space
    recorder = Recorder(writer, domain, task, [seed], source, action_space=space, state_layout=layout)
    states, _ = env.reset()
    recorder.reset(states)
    begin = settings.expert_noise / (1 - settings.expert_noise) / HOLD
    for episode in range(first, settings.expert):
        rng, held = np.random.default_rng((seed, episode)), 0
        while first + recorder.episodes == episode:
            if not held and rng.random() < begin:
                held, random = HOLD, rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            if held:
                actions, held = random, held - 1
            else:
                actions, _ = agent.predict(states, deterministic=True)
            states, *rest = env.step(actions)
            recorder.step(actions, states, *rest)
    env.close()


def _provenance(settings: OffPolicySettings, domain: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the content of a task's files."""
    recorded: dict[str, float] = {"seed": settings.seed, "last": settings.last, "expert": settings.expert}
    if settings.expert:
        recorded["policy_step"] = parameters["steps"]
    if settings.expert_noise:
        recorded["expert_noise"] = settings.expert_noise
    maker = f"{settings.algorithm.upper()} specialist"
    contrib = () if settings.algorithm == "sac" else ("sb3-contrib",)
    names = ("stable-baselines3", *contrib, *ENVIRONMENTS[domain].packages)
    return {
        "collector": domain,
        "algorithm": settings.algorithm,
        **parameters,
        **recorded,
        "source": source(maker, *names),
    }
