"""MimicGen: from ten demonstrations of a task to any number, on any supported arm and gripper.

    with prepared(Path("stack.hdf5"), "Stack_D0") as source:
        recipe = Recipe(source, task="Stack_D0", robot="IIWA")
        print(generate(recipe, demos=1000, root=Path("data")))

An attempt draws a scene, cuts demonstrations into pieces at their subtasks, moves each piece to where the object is
now, and plays it with noise (NVlabs/mimicgen's `DataGenerator`, its task settings, and its choice of settings for the
published core data). It runs in our environment and ends with it, at the first success: what is on disk is an episode
of `lram.collectors.robosuite.make(task, seed=trajectory.seed)`, and its actions replay it bit for bit.
Attempt n is a function of (seed, n). Successes are kept and numbered in order of attempts, failures are counted, and
both can be told from the seeds on disk: a run that was killed, or that is asked for more demonstrations than before,
continues with the files it would have made at once, whatever the number of processes.
What it trades away: attempts that were ahead in other processes when the last demonstration came are thrown away.
"""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import json
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lram.collectors.robosuite import (
    MIMICGEN,
    MimicGen,
    environment_class,
    import_mimicgen,
    parse_task,
    quiet,
    seeded,
    task_name,
)
from lram.datasets.disk import sha256_of
from lram.datasets.index import read_index, task_folder
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter, finished, same_provenance

DOMAIN = "mimicgen"
GIVE_UP = 300
"""Attempts in a row without a success, after which a recipe is taken to be hopeless: one that succeeds in 2 of 100
fails as often once in 400 times."""
PIECEWISE = ("Stack", "StackThree", "PickPlace")
"""Tasks whose subtasks are each taken from another demonstration (MimicGen's generate_core_configs.py)."""


class Source(NamedTuple):
    """A file of demonstrations that MimicGen can generate from.

    Attributes:
        path: The file.
        sha256: Of what the user gave: of `path`, or of the file that it was prepared from.
    """

    path: Path
    sha256: str


@dataclass(frozen=True)
class Recipe:
    """What decides the content of one task's files.

    Attributes:
        source: The demonstrations, prepared.
        task: MimicGen's environment, `Stack_D0`.
        robot: The arm.
        gripper: What it holds things with; empty takes what the arm has in the published data.
        seed: From which every attempt's own is derived.

    Raises:
        BadInput: MimicGen has no such task, arm or gripper, or the seed is negative.
    """

    source: Source
    task: str
    robot: str = "Panda"
    gripper: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        parse_task(self.name)
        if self.seed < 0:
            raise BadInput(f"seed is {self.seed}, expected 0 or more")

    @property
    def name(self) -> str:
        """Name of the task in the dataset, `Stack_D0-IIWA`."""
        return task_name(self.task, self.robot, self.gripper)


class Attempt(NamedTuple):
    """How an attempt went.

    Attributes:
        trajectory: It, numbered 0, if the task was solved; None if not.
        seconds: What it took of one core.
    """

    trajectory: Trajectory | None
    seconds: float


@contextmanager
def prepared(path: Path, task: str = "") -> Iterator[Source]:
    """Gives a source that MimicGen can generate from, preparing a temporary copy where it is not prepared.

    Preparing adds to every step the poses of gripper and objects and which subtasks are over.

    Args:
        path: robomimic file with demonstrations: `data/demo_i` with `states`, `actions` and a `model_file`.
        task: Environment to generate for; it says how to look at the demonstrations.

    Raises:
        BadInput: MimicGen is not installed, the file is no robomimic file, or was prepared for another task.
    """
    import h5py

    path = Path(path)
    import_mimicgen()
    task = task or source_task(path)
    wanted = f"MG_{parse_task(task).family}"
    env = _env_name(path)
    sha256 = sha256_of(path)
    with h5py.File(path) as file:
        infos = [demo.get("datagen_info") for demo in file["data"].values()]
        # Some preparers leave the name out.
        names = {str(info.attrs.get("env_interface_name", wanted)) for info in infos if info is not None}
        whole = all("model_file" in demo.attrs and "states" in demo for demo in file["data"].values())
    if names - {wanted}:
        raise BadInput(f"{path}: was prepared for {', '.join(sorted(names))}, expected {wanted} for {task}")
    if None not in infos:
        yield Source(path, sha256)
        return
    if not whole:
        raise BadInput(f"{path}: a demonstration has no model_file or states, which preparing it for MimicGen takes")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with quiet():
            from mimicgen.scripts.prepare_src_dataset import prepare_src_dataset

            environment_class(env)
            prepare_src_dataset(str(path), wanted, "robosuite", output_path=str(copy))
        yield Source(copy, sha256)


def source_task(path: Path) -> str:
    """Returns the environment that a source's demonstrations were made in.

    Raises:
        BadInput: It is no robomimic file, or that environment is none to generate for.
    """
    env = _env_name(path)
    try:
        parse_task(env)
    except BadInput as error:
        raise BadInput(f"{path}: was made in {env!r}; say which of MimicGen's tasks to generate for") from error
    return env


def _env_name(path: Path) -> str:
    import h5py

    try:
        with h5py.File(path) as file:
            return str(json.loads(file["data"].attrs["env_args"])["env_name"])
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: no robomimic file, which has an attribute env_args at its group data") from error


def attempt(recipe: Recipe, number: int) -> Attempt:
    """Tries once to generate a trajectory; a function of its arguments.

    Args:
        recipe: What to generate.
        number: The attempt, from 0.
    """
    generator, interface, slot, config = _generator(recipe)
    started = time.process_time()
    seed = attempt_seed(recipe.seed, number)
    # As `Slots` draws the first episode of its first slot; MimicGen's own draws are another stream.
    scene = np.random.SeedSequence((seed, 0, 0))
    stage = _Stage(slot, scene)
    with seeded(scene.spawn(1)[0]):
        generator.generate(
            env=stage,
            env_interface=interface,
            select_src_per_subtask=parse_task(recipe.task).family in PIECEWISE,
            transform_first_robot_pose=config.transform_first_robot_pose,
            interpolate_from_last_target_pose=config.interpolate_from_last_target_pose,
        )
    return Attempt(stage.trajectory(recipe.name, seed) if slot.success else None, time.process_time() - started)


def attempt_seed(seed: int, number: int) -> int:
    """Returns the seed of an attempt's environment: 63 bits, so that no two attempts share one."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Stage:
    """Our environment as MimicGen's generator wants it, for one attempt: records, and stands still when it is over."""

    def __init__(self, slot: MimicGen, scene: np.random.SeedSequence) -> None:
        self._slot, self._scene, self._over = slot, scene, False
        self._states = [np.empty(slot.observation_space.shape, np.float32)]
        self._actions: list[np.ndarray] = []
        self._rewards: list[float] = []

    def reset(self) -> None:
        self._slot.start(self._scene, self._states[0])

    def step(self, action: np.ndarray) -> None:
        if self._over:
            return
        # Rounded before it is played: what is stored is what was executed.
        action = action.clip(-1.0, 1.0).astype(np.float32)
        state = np.empty_like(self._states[0])
        reward, terminated, truncated = self._slot.step(action, state)
        self._states.append(state)
        self._actions.append(action)
        self._rewards.append(reward)
        self._over = terminated or truncated

    def is_success(self) -> dict[str, bool]:
        return {"task": self._slot.success}

    def get_state(self) -> dict[str, None]:
        # MimicGen only keeps these for its own file, which is not written; with the model they take 1.5 ms a step.
        return {"states": None}

    def get_observation(self) -> dict[str, np.ndarray]:
        return {}

    def trajectory(self, task: str, seed: int) -> Trajectory:
        return Trajectory(
            domain=DOMAIN,
            task=task,
            episode=0,
            seed=seed,
            states=np.stack(self._states[:-1]),
            actions=np.stack(self._actions),
            rewards=np.array(self._rewards, np.float32),
            terminated=True,
            truncated=False,
            source=_made_by(),
            final_state=self._states[-1],
            success=True,
            state_layout=self._slot.state_layout,
        )


@lru_cache(maxsize=8)
def _generator(recipe: Recipe) -> tuple[Any, Any, MimicGen, Any]:
    """Builds MimicGen's generator and interface for a recipe, our environment, and the settings of its generation."""
    import_mimicgen()
    with quiet():
        try:
            from mimicgen.configs import MG_TaskSpec, config_factory
            from mimicgen.datagen.data_generator import DataGenerator
            from mimicgen.env_interfaces.base import make_interface
            from mimicgen.utils.file_utils import get_all_demos_from_dataset
        except ImportError as error:
            raise BadInput(f"{MIMICGEN} ({error})") from error
        family = parse_task(recipe.task).family
        config = config_factory(re.sub(r"(?<!^)(?=[A-Z])", "_", family).lower(), "robosuite")
        demos = get_all_demos_from_dataset(str(recipe.source.path))
        spec = MG_TaskSpec.from_json(json_string=config.task.task_spec.dump())
        generator = DataGenerator(spec, str(recipe.source.path), demos)
        slot = MimicGen(recipe.name)
        interface = make_interface(f"MG_{family}", "robosuite", slot.env)
    # robosuite collects garbage at every reset: 0.3 of 0.85 s go by in what MimicGen has imported, torch among it.
    gc.freeze()
    return generator, interface, slot, config.experiment.generation


@cache
def _made_by() -> str:
    """Says who makes the trajectories, with versions, and with commits where pip knows them."""
    said = []
    for name in ("lram", "mimicgen", "robomimic", "robosuite", "mujoco", "numpy"):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # On the path without having been installed.
            said.append(f"{name} of unknown version")
            continue
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id", "")[:7]
        said.append(f"{name} {distribution.version}" + (f" ({commit})" if commit else ""))
    return "MimicGen: " + ", ".join(said)


def generate(
    recipe: Recipe,
    demos: int,
    root: Path,
    pool: Executor | None = None,
    ahead: int = 1,
    report: Callable[[int, int], None] = lambda successes, attempts: None,
) -> dict[str, Any]:
    """Generates until a task has `demos` trajectories on disk, starting from what is there.

    Args:
        recipe: What to generate.
        demos: Successes to keep.
        root: The dataset's directory.
        pool: Where attempts run; None for here.
        ahead: Attempts under way at once in the pool. It changes nothing but the time.
        report: Called after every attempt with the successes on disk and the attempts so far.

    Returns:
        `task`, `skipped` (as many were on disk), `episodes` and `attempts` (in all), `made` and `tried` (now),
        `seconds` (of one core for what was tried, building the model not counted).

    Raises:
        BadInput: `demos` is none, the folder was made with another recipe, or `GIVE_UP` attempts in a row failed.
    """
    if demos < 1:
        raise BadInput(f"demos is {demos}, expected at least 1")
    folder = task_folder(root, DOMAIN, recipe.name)
    provenance = _provenance(recipe)
    old = finished(root, DOMAIN, recipe.name)
    if old is not None:
        # What is finished stays so when a library is updated: only settings count.
        same_provenance(old, provenance, folder, free=frozenset({"source"}))
    made = tried = failed = 0
    seconds = 0.0
    skipped = old is not None and len(read_index(folder).table) >= demos
    if not skipped:
        # Opened and closed, so that the index knows what a kill left behind.
        TaskWriter(root, DOMAIN, recipe.name, provenance).close()
    episodes, attempts = _on_disk(folder, recipe)
    if not skipped:
        with TaskWriter(root, DOMAIN, recipe.name, provenance) as writer:
            coming = _attempts(recipe, attempts, pool, ahead)
            while episodes < demos:
                tries = next(coming)
                attempts, tried, seconds = attempts + 1, tried + 1, seconds + tries.seconds
                if tries.trajectory is None:
                    failed += 1
                else:
                    writer.add(replace(tries.trajectory, episode=episodes))
                    episodes, made, failed = episodes + 1, made + 1, 0
                report(episodes, attempts)
                if failed == GIVE_UP:
                    raise BadInput(f"{recipe.name}: {GIVE_UP} attempts in a row failed; these demonstrations do not do")
            coming.close()
            writer.finish()
    return {
        "task": recipe.name,
        "skipped": skipped,
        "episodes": episodes,
        "attempts": attempts,
        "made": made,
        "tried": tried,
        "seconds": seconds,
    }


def _attempts(recipe: Recipe, first: int, pool: Executor | None, ahead: int) -> Generator[Attempt]:
    """Gives the outcomes of attempts from `first` on, in their order."""
    numbers = itertools.count(first)
    if pool is None:
        yield from (attempt(recipe, number) for number in numbers)
        return
    under_way: deque[Future[Attempt]] = deque()
    try:
        while True:
            while len(under_way) < max(1, ahead):
                under_way.append(pool.submit(attempt, recipe, next(numbers)))
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _on_disk(folder: Path, recipe: Recipe) -> tuple[int, int]:
    """Counts the trajectories without a gap from episode 0, and the attempts up to the last of them."""
    index = read_index(folder, columns=["episode", "seed"])
    here = index.numpy("episode") == np.arange(len(index.table))
    episodes = len(here) if here.all() else int(here.argmin())
    attempts = 0
    for seed in index.numpy("seed")[:episodes].tolist():
        wanted = (n for n in range(attempts, attempts + GIVE_UP) if attempt_seed(recipe.seed, n) == seed)
        number = next(wanted, None)
        if number is None:
            raise BadInput(f"{folder}: holds a trajectory of seed {seed}, which no attempt has; remove this folder")
        attempts = number + 1
    return episodes, attempts


def _provenance(recipe: Recipe) -> dict[str, Any]:
    """Returns what decides the content of a task's files."""
    arm = parse_task(recipe.name)
    return {
        "collector": "mimicgen",
        "environment": arm.env,
        "robot": arm.robot,
        "gripper": arm.gripper,
        "seed": recipe.seed,
        "demonstrations": recipe.source.sha256,
        "source": _made_by(),
    }
