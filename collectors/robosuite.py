"""MimicGen and CompoSuite: the two domains that stand on robosuite 1.4.1.

    from lram.collectors.robosuite import make
    env = make("Stack_D0-IIWA", num_envs=1, seed=0)         # MimicGen: task, and the arm if it is not the usual one
    env = make("IIWA_Box_None_PickPlace")                   # CompoSuite: robot, object, obstacle, objective
    states, infos = env.reset()                             # (1, 36) and (1, 93) float32

A MimicGen state is the gripper's pose, its joints and the objects, as MimicGen's files hold them; the reward is 1 at
the first success, which ends the episode. A CompoSuite state is the 93 numbers of the published data, one-hots of
the task included; the reward is shaped, nothing ends an episode before 500 steps, and a reward of exactly 1 is
success. Neither package is on a package index: `docs/mimicgen.md` says how to install them.
What it trades away: robosuite builds its model anew at every reset, a third of a second. Its "soft" reset is quicker
and leaves traces of the episode before (the gripper's last action, for one).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import gymnasium as gym
import numpy as np

from lram.collectors.slots import Slots
from lram.datasets.specs import BadInput

INSTALL = 'pip install "lram[robosuite]"'
MIMICGEN = (
    f"MimicGen needs robosuite 1.4.1 ({INSTALL}) and the git repositories NVlabs/mimicgen (known to work: 72bd767) and "
    "ARISE-Initiative/robomimic (d309eae), as docs/mimicgen.md says; what an index calls `mimicgen` is another package"
)
COMPOSUITE = (
    f"CompoSuite needs robosuite 1.4.1 ({INSTALL}) and the git repository Lifelong-ML/CompoSuite "
    "(known to work: 1fa36f6), as docs/mimicgen.md says"
)

KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object-state")
"""robosuite's observations that a MimicGen state is made of, in order; files call the last one `object`."""

HORIZONS = {
    "Coffee": 400,
    "CoffeePreparation": 800,
    "HammerCleanup": 800,
    "Kitchen": 800,
    "MugCleanup": 500,
    "NutAssembly": 500,
    "PickPlace": 1000,
    "Square": 400,
    "Stack": 400,
    "StackThree": 400,
    "Threading": 400,
    "ThreePieceAssembly": 500,
}
"""Steps an episode has at most: MimicGen's evaluation horizons, and LRAM's for HammerCleanup (there 500)."""

GRIPPERS = {
    "IIWA": "Robotiq85Gripper",
    "Jaco": "Robotiq85Gripper",
    "Kinova3": "Robotiq85Gripper",
    "Panda": "PandaGripper",
    "Sawyer": "RethinkGripper",
    "UR5e": "Robotiq85Gripper",
}
"""Arms that MimicGen supports, and the gripper each has in the data; robosuite's own choice differs for IIWA."""
OTHER_GRIPPERS = ("PandaGripper", "RethinkGripper", "Robotiq85Gripper", "Robotiq140Gripper")
"""Grippers that MimicGen supports on any of them."""

COMPOSUITE_HORIZON = 500
_AXES = (
    ("IIWA", "Jaco", "Kinova3", "Panda"),
    ("Box", "Dumbbell", "Plate", "Hollowbox"),
    ("None", "GoalWall", "ObjectDoor", "ObjectWall"),
    ("PickPlace", "Push", "Shelf", "Trashcan"),
)
_MIMICGEN_NAME = re.compile(r"((\w+?)_[DO]\d)(?:-(\w+?))?(?:\.(\w+))?")


def make(task: str, num_envs: int = 1, seed: int = 0, first_episode: int | Sequence[int] = 0) -> Slots:
    """Builds `num_envs` slots of one task of either domain.

    Args:
        task: Name, `Stack_D0`, `Stack_D0-IIWA` or `IIWA_Box_None_PickPlace` for example.
        num_envs: Slots.
        seed: Of all episodes: episode k of slot i is a function of (seed, i, k).
        first_episode: Number of the first episode, for all slots or for each.

    Raises:
        BadInput: There is no such task, or its packages are not installed.
    """
    slot = CompoSuite if len(task.split("_")) == len(_AXES) else MimicGen
    return Slots(partial(slot, task), num_envs, seed, first_episode)


class Arm(NamedTuple):
    """What a MimicGen task name stands for.

    Attributes:
        env: MimicGen's name of the environment, `Stack_D0`.
        family: The same without its variant, `Stack`.
        robot: The arm.
        gripper: What it holds things with.
    """

    env: str
    family: str
    robot: str
    gripper: str


def usual_robot(family: str) -> str:
    """Returns the arm of MimicGen's own data, which a task name leaves out."""
    return "Sawyer" if family in ("NutAssembly", "PickPlace") else "Panda"


def task_name(env: str, robot: str, gripper: str = "") -> str:
    """Names a MimicGen task: `Stack_D0` (Panda), `Stack_D0-IIWA`, `Stack_D0-IIWA.PandaGripper`.

    A Sawyer is always named, as in LRAM's data, where it is made anew even for tasks that MimicGen has with it.
    """
    name = env if robot == "Panda" and usual_robot(env.partition("_")[0]) == "Panda" else f"{env}-{robot}"
    return name if gripper in ("", GRIPPERS.get(robot)) else f"{name}.{gripper}"


def parse_task(name: str) -> Arm:
    """Reads a MimicGen task name.

    Raises:
        BadInput: It is none, or names an arm or gripper that MimicGen does not support.
    """
    match = _MIMICGEN_NAME.fullmatch(name)
    if match is None or match[2] not in HORIZONS:
        raise BadInput(
            f"{name!r} is no task of MimicGen or CompoSuite; names are like 'Stack_D0', 'Stack_D0-IIWA' "
            "and 'IIWA_Box_None_PickPlace'"
        )
    env, family, robot, gripper = match.groups()
    robot = robot or usual_robot(family)
    if robot not in GRIPPERS:
        raise BadInput(f"{name!r}: MimicGen does not support robot {robot!r}, only {', '.join(GRIPPERS)}")
    gripper = gripper or GRIPPERS[robot]
    if gripper not in OTHER_GRIPPERS:
        raise BadInput(f"{name!r}: MimicGen does not support gripper {gripper!r}, only {', '.join(OTHER_GRIPPERS)}")
    return Arm(env, family, robot, gripper)


class MimicGen:
    """One MimicGen environment, as `Slots` wants it.

    Attributes:
        env: The robosuite environment.
        observation_space: (D,) float32; D differs by task and gripper.
        action_space: (7,) float32 in [-1, 1]: change of position 3, of rotation 3, gripper 1.
        state_layout: {key: [start, stop]} over the columns of its states.
        success: The task is solved.
    """

    def __init__(self, task: str) -> None:
        arm = parse_task(task)
        self._horizon = HORIZONS[arm.family]
        # Building it draws a first scene, which nobody sees.
        with quiet(), seeded(np.random.SeedSequence(0)):
            self.env = _load_mimicgen(arm)
            observation = self.env._get_observations(force_update=True)
        self.state_layout: dict[str, list[int]] = {}
        width = 0
        for key in KEYS:
            name = key.removesuffix("-state")
            self.state_layout[name] = [width, width := width + len(observation[key])]
        self.observation_space: gym.spaces.Box = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.action_space: gym.Space = gym.spaces.Box(-1.0, 1.0, (self.env.action_dim,), np.float32)
        self.success, self._steps = False, 0

    def start(self, seeds: np.random.SeedSequence, state: np.ndarray) -> None:
        """Starts an episode whose scene is drawn with `seeds`."""
        with seeded(seeds):
            self.env.reset()
        self.success, self._steps = False, 0
        self.observe(state)

    def step(self, action: np.ndarray, state: np.ndarray) -> tuple[float, bool, bool]:
        """Takes one control step, a twentieth of a second."""
        self.env.step(np.asarray(action, np.float64))
        self._steps += 1
        self.observe(state)
        solved = self.env._check_success()
        self.success = bool(solved["task"] if isinstance(solved, dict) else solved)
        return float(self.success), self.success, self._steps >= self._horizon and not self.success

    def observe(self, state: np.ndarray) -> None:
        """Writes the state that belongs to the simulator's as it is now."""
        # After a step, MuJoCo's positions in space are one simulation step (2 ms) older than its joints. Published
        # files were made by setting each of a demonstration's simulator states, where they are not.
        self.env.sim.forward()
        observation = self.env._get_observations(force_update=True)
        for key, (start, stop) in zip(KEYS, self.state_layout.values()):
            state[start:stop] = observation[key]

    def info(self) -> dict[str, bool | float]:
        """Returns whether the task is solved."""
        return {"success": self.success}

    def close(self) -> None:
        """Frees MuJoCo's model and data."""
        self.env.close()


class CompoSuite:
    """One CompoSuite environment, as `Slots` wants it.

    Attributes:
        env: CompoSuite's wrapper of the robosuite environment.
        observation_space: (93,) float32.
        action_space: (8,) float32 in [-1, 1]: 7 joints, gripper 1; Jaco and Kinova3 as well.
        state_layout: {key: [start, stop]} over the columns of its states.
        success: A reward of exactly 1 was given in this episode.
    """

    def __init__(self, task: str) -> None:
        parts = task.split("_")
        for part, axis in zip(parts, _AXES, strict=True):
            if part not in axis:
                raise BadInput(f"{task!r} is no task of CompoSuite: {part!r} is none of {', '.join(axis)}")
        with quiet(), seeded(np.random.SeedSequence(0)):
            try:
                import composuite
            except ImportError as error:
                raise BadInput(f"{COMPOSUITE} ({error})") from error
            # Robot, object, obstacle, objective; the episode's end is counted here, as MimicGen's is.
            self.env = composuite.make(*parts, use_task_id_obs=True, ignore_done=True)
        self.state_layout = {
            key: [int(columns[0]), int(columns[-1]) + 1] for key, columns in self.env.observation_positions.items()
        }
        self.observation_space: gym.spaces.Box = gym.spaces.Box(-np.inf, np.inf, (self.env.obs_dim,), np.float32)
        self.action_space: gym.Space = gym.spaces.Box(-1.0, 1.0, self.env.action_space.shape, np.float32)
        self.success, self._steps = False, 0

    def start(self, seeds: np.random.SeedSequence, state: np.ndarray) -> None:
        """Starts an episode whose scene is drawn with `seeds`."""
        with seeded(seeds):
            state[:] = self.env.reset()[0]
        self.success, self._steps = False, 0

    def step(self, action: np.ndarray, state: np.ndarray) -> tuple[float, bool, bool]:
        """Takes one control step, a twentieth of a second."""
        state[:], reward, *_ = self.env.step(np.asarray(action, np.float64))
        self._steps += 1
        self.success |= reward == 1.0
        return reward, False, self._steps >= COMPOSUITE_HORIZON

    def info(self) -> dict[str, bool | float]:
        """Returns whether the task was solved in this episode."""
        return {"success": self.success}

    def close(self) -> None:
        """Frees MuJoCo's model and data."""
        self.env.env.close()


def import_mimicgen() -> Any:
    """Imports NVIDIA's MimicGen, and nothing else that goes by its name.

    Raises:
        BadInput: It or robosuite is not installed; the message names the repositories and versions.
    """
    spec = importlib.util.find_spec("mimicgen")
    # Looked at before it is imported: importing runs its code.
    if spec is None or spec.origin is None or not Path(spec.origin).with_name("env_interfaces").is_dir():
        raise BadInput(MIMICGEN)
    try:
        with quiet():
            import mimicgen
            import mimicgen.envs.robosuite.stack  # without robosuite, mimicgen itself imports and only prints
    except ImportError as error:
        raise BadInput(f"{MIMICGEN} ({error})") from error
    return mimicgen


def _load_mimicgen(arm: Arm) -> Any:
    """Builds the robosuite environment of a task, with the controller that all of MimicGen's data was made with."""
    import_mimicgen()
    import robosuite

    return environment_class(arm.env)(
        robots=[arm.robot],
        gripper_types=[arm.gripper],
        controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
        control_freq=20,
        has_renderer=False,
        has_offscreen_renderer=False,
        use_camera_obs=False,
        use_object_obs=True,
        reward_shaping=False,
        ignore_done=True,
        hard_reset=True,
    )


def environment_class(env: str) -> Any:
    """Returns robosuite's class of a task, whose models load in MuJoCo 3.

    Raises:
        BadInput: MimicGen has no such environment here.
    """
    from robosuite.environments.base import REGISTERED_ENVS

    original = REGISTERED_ENVS.get(env)
    if original is None:
        zoo = "; HammerCleanup and Kitchen come with the repository ARISE-Initiative/robosuite-task-zoo"
        raise BadInput(f"the installed MimicGen has no environment {env!r}{zoo}")
    if hasattr(original, "lram_original"):
        return original

    def initialize_sim(self: Any, xml_string: str | None = None) -> None:
        original._initialize_sim(self, fit_mujoco_3(xml_string or self.model.get_xml()))

    # robosuite's metaclass registers it in the place of the original, so that MimicGen's own functions get it too.
    return type(original)(env, (original,), {"_initialize_sim": initialize_sim, "lram_original": original})


def fit_mujoco_3(xml: str) -> str:
    """Changes a model so that MuJoCo 3.3 takes a Sawyer; other robots' models come back as they are.

    Some meshes of its head are flat: MuJoCo 3 finds no volume in them and wants to be told that their mass is in
    their surface. And it lets a robot's base touch the first link, which robosuite's model counts on it not to.
    """
    if "robot0_head_0" not in xml:
        return xml
    root = ElementTree.fromstring(xml)
    for mesh in root.iterfind("./asset/mesh"):
        if mesh.get("name", "").startswith("robot0_head_"):
            mesh.set("inertia", "shell")
    pair = {"body1": "robot0_right_arm_base_link", "body2": "robot0_right_l0"}
    # A model that was saved after this change, as MimicGen's files hold it, has the pair already.
    if not any(pair.items() <= exclude.attrib.items() for exclude in root.iterfind("./contact/exclude")):
        ElementTree.SubElement(ElementTree.SubElement(root, "contact"), "exclude", pair)
    return ElementTree.tostring(root, encoding="unicode")


@contextlib.contextmanager
def seeded(seeds: np.random.SeedSequence) -> Iterator[None]:
    """Seeds the random numbers that robosuite and MimicGen draw from, which are the process's; puts them back after."""
    numbers, python = np.random.get_state(), random.getstate()  # noqa: NPY002  (theirs)
    words = seeds.generate_state(8)
    np.random.seed(words)  # noqa: NPY002
    random.seed(words.tobytes())
    try:
        yield
    finally:
        np.random.set_state(numbers)  # noqa: NPY002
        random.setstate(python)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what robosuite and its kin print and log about themselves off the terminal."""
    nowhere = io.StringIO()
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
