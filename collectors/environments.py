"""Every domain's environments behind one function, and which of them this machine can build.

    env = make("dmcontrol", "walker-stand", num_envs=1, seed=0)
    env = make("procgen", "coinrun", num_envs=64, seed=0)
    status("atari")                                     # Status(works=True, words="ale-py 0.12.1")

All are `gymnasium.vector` environments in AutoresetMode.SAME_STEP that return what trajectories store: states (N, D)
float32 or (N, 1, 64, 64) uint8, rewards (N,) float32, the real last states in `infos["final_obs"]`, and where the
domain knows success `infos["final_info"]["success"]`. `env.state_layout` is {key: [start, stop]} or None. A slot's
episodes follow from the seed and their numbers: `first_episode` starts at a later one.
What it trades away: nothing is registered; a new domain is a module with a `make` and a line here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from gymnasium.vector import VectorEnv

from lram.datasets.specs import BadInput


@dataclass(frozen=True)
class Environment:
    """Where a domain's environments come from.

    Attributes:
        module: Module of `lram.collectors` whose `make` builds them.
        packages: Distributions that decide what they do.
        example: A task, the one that `status` builds.
    """

    module: str
    packages: tuple[str, ...]
    example: str


ENVIRONMENTS: dict[str, Environment] = {
    "atari": Environment("atari", ("ale-py",), "breakout"),
    "composuite": Environment("robosuite", ("robosuite", "mujoco"), "IIWA_Box_None_PickPlace"),
    "darkroom": Environment("darkroom", (), "room10x10-goal-07-03"),
    "dmcontrol": Environment("dmcontrol", ("dm-control", "mujoco"), "walker-stand"),
    "metaworld": Environment("metaworld", ("metaworld", "mujoco"), "reach-v2"),
    "mimicgen": Environment("robosuite", ("robosuite", "mujoco"), "Stack_D0"),
    "procgen": Environment("procgen", ("envpool",), "coinrun"),
}


def make(domain: str, task: str, num_envs: int = 1, seed: int = 0, first_episode: int | Sequence[int] = 0) -> VectorEnv:
    """Builds `num_envs` slots of one task of any domain.

    Args:
        domain: Name of the domain.
        task: Name of the task inside it.
        num_envs: Slots.
        seed: Of all episodes.
        first_episode: Number of the first episode, for all slots or for each.

    Raises:
        BadInput: There is no such domain or task, or its simulator is not installed; the message says what to install.
    """
    if domain not in ENVIRONMENTS:
        raise BadInput(f"unknown domain {domain!r}, expected one of {', '.join(ENVIRONMENTS)}")
    module = importlib.import_module(f"lram.collectors.{ENVIRONMENTS[domain].module}")
    if domain == "darkroom":
        # Nothing in a room is random: one episode starts like another.
        return module.make(task, num_envs, seed)
    return module.make(task, num_envs, seed, first_episode)


@dataclass(frozen=True)
class Status:
    """Whether a domain's environments can be built here.

    Attributes:
        works: They can.
        words: The versions they are built from, or what is missing and how to install it.
    """

    works: bool
    words: str


def status(domain: str) -> Status:
    """Builds one environment of a domain, which is the only way to know; takes a second or two.

    Raises:
        BadInput: There is no such domain.
    """
    if domain not in ENVIRONMENTS:
        raise BadInput(f"unknown domain {domain!r}, expected one of {', '.join(ENVIRONMENTS)}")
    environment = ENVIRONMENTS[domain]
    try:
        make(domain, environment.example).close()
    except BadInput as error:
        return Status(False, str(error))
    except Exception as error:  # a package that is installed and broken is news for a table, not its end
        return Status(False, f"installed, but does not run: {type(error).__name__}: {error}")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in environment.packages)
    return Status(True, ", ".join(versions))
