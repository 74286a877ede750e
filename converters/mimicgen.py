"""MimicGen's and robomimic's demonstrations: one HDF5 file per task, a group per demonstration.

    lram convert mimicgen SRC ROOT
    lram convert mimicgen SRC ROOT --failed

SRC is a folder tree or one file, in any of the forms that their programs write:

* straight from the generator: `demo_src_stack_task_D0_robot_IIWA_gripper_Robotiq85Gripper/demo.hdf5`, with
  `demo_failed.hdf5` beside it; no rewards, the file's name says whether its demonstrations succeeded;
* post-processed (robomimic's `dataset_states_to_obs`): `stack_D0_robot_Sawyer_gripper_RethinkGripper.hdf5`;
* published: `stack_d0.hdf5`, `square_d0_iiwa.hdf5`, and `stack.hdf5`, the prepared source of the others. A source
  usually holds simulator states but no observations: it is left out and counted, refused where it is all of SRC.

The state is what LRAM's is: end-effector position and rotation, gripper, objects. The reward is sparse: 1 on the last
step of a demonstration that succeeded, which is where it terminates, as its task would under evaluation. Where rewards
exist, success is one of 1 among them (partial ones, of NutAssembly and PickPlace, are none). The five or so steps after
success are kept, as LRAM keeps them: files without rewards cannot tell them apart, and one task should not come in two
lengths. A failed demonstration ends where its plan does, by truncation.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from lram.converters.safe_hdf5 import array, group, opened
from lram.converters.source import Count, Job
from lram.datasets.specs import STATE_WIDTH, BadInput, tasks
from lram.datasets.trajectory import Trajectory

VERSION = 1
KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "object")
"""Observations that make up the state, in this order."""
NUM_ACTIONS = 7
GRIPPERS = {
    "Panda": "PandaGripper",
    "Sawyer": "RethinkGripper",
    "IIWA": "Robotiq85Gripper",
    "UR5e": "Robotiq85Gripper",
}
"""The arms of the paper, each with the gripper that its tasks have; another one becomes a suffix of the task."""
SAWYER_TASKS = ("NutAssembly", "PickPlace")
"""Tasks whose published demonstrations, those without an arm in their name, are Sawyer's instead of Panda's."""
DEPTH = 4
"""Folders between SRC and a file at most."""
LONGEST = 100_000
"""Steps of a demonstration at most: it is read whole. The longest horizon of the published ones is 1,400."""
SOURCE = "source"
"""Detail and suffix of prepared source files."""
_ARM = r"(?:_robot_(?P<arm>[A-Za-z0-9]+)_gripper_(?P<gripper>[A-Za-z0-9]+))?"
GENERATED = re.compile(r"demo_src_(?P<family>\w+?)_task_(?P<variant>[A-Z]\d)" + _ARM)
"""The folder of a generator's run."""
PROCESSED = re.compile(r"(?P<family>[a-z_]+?)_(?P<variant>[A-Z]\d)" + _ARM + r"(?P<failed>_failed)?")
PUBLISHED = re.compile(rf"(?P<family>[a-z_]+?)_(?P<variant>[a-z]\d)(?:_(?P<arm>{'|'.join(GRIPPERS).lower()}))?")


@dataclass(frozen=True)
class Options:
    """What to take of MimicGen's data."""

    failed: bool = False
    """Keep failed demonstrations too, marked as such; by default they are left out and counted."""


@dataclass(frozen=True)
class _Demo:
    """What is read of a demonstration; `rewards` and `final_state` are None where the file has none."""

    parts: list[np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray | None
    final_state: np.ndarray | None


def jobs(src: Path, options: Options) -> list[Job]:
    """Lists the tasks of a source, sorted by name; demonstrations that failed belong to the task that they failed at.

    Raises:
        BadInput: Nothing is found, or a file's name tells no task.
    """
    paths = [src] if src.is_file() else [p for d in range(DEPTH + 1) for p in src.glob("*/" * d + "*.hdf5")]
    if not paths:
        raise BadInput(f"{src}: holds no .hdf5 files")
    sets: dict[Path, list[Path]] = {}
    for path in sorted(paths, key=lambda path: (_is_failed(path), path)):
        sets.setdefault(path.with_name(path.stem.removesuffix("_failed")), []).append(path)
    made = []
    for files in sets.values():
        task = task_name(files[0])
        made.append(Job("mimicgen", task, src, tuple(files), SOURCE if task.endswith(f".{SOURCE}") else ""))
    return sorted(made, key=lambda job: (job.task, job.files))


def task_name(path: Path) -> str:
    """Returns the task that a file's name, or that of its folder, tells.

    Raises:
        BadInput: It tells none.
    """
    families = _families()
    if path.stem in families:
        return f"{families[path.stem]}_D0.{SOURCE}"
    if path.stem in ("demo", "demo_failed"):
        match = GENERATED.fullmatch(path.absolute().parent.name)
    else:
        match = PROCESSED.fullmatch(path.stem) or PUBLISHED.fullmatch(path.stem)
    if match is None or match["family"] not in families:
        expected = "stack_d0.hdf5, stack_D0_robot_X_gripper_Y.hdf5 or demo_src_stack_task_D0/demo.hdf5"
        raise BadInput(f"{path}: its name tells no MimicGen task, expected one like {expected}")
    family, groups = families[match["family"]], match.groupdict()
    task = f"{family}_{match['variant'].upper()}"
    arm = groups["arm"]
    if arm is None:
        return task
    arm = {name.lower(): name for name in GRIPPERS}.get(arm.lower(), arm)
    if arm != "Panda" or family in SAWYER_TASKS:
        task += f"-{arm}"
    gripper = groups.get("gripper") or GRIPPERS[arm]
    return task if gripper == GRIPPERS.get(arm) else f"{task}.{gripper}"


def _families() -> dict[str, str]:
    """Returns {"stack_three": "StackThree", …}: how files and simulators call the tasks."""
    names = {task.split("_")[0] for domain, task in tasks() if domain == "mimicgen"}
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): name for name in names}


def _is_failed(path: Path) -> bool:
    return path.stem.endswith("_failed")


def trajectories(job: Job, options: Options, count: Count) -> Iterator[Trajectory]:
    """Makes the trajectories of one task: those of each file by the numbers of its demonstrations.

    Raises:
        BadInput: A file is unsafe or not whole, is of another task than its name tells, has no observations, has
            actions outside [-1, 1] (of another action space, then), or has states of different widths.
    """
    source = f"MimicGen demonstrations (Mandlekar et al. 2023), converted by lram {importlib.metadata.version('lram')}"
    layout = None
    for path in job.files:
        with opened(path) as file:
            data = group(file, "data")
            _check_task(path, data, job)
            for name in _demo_names(path, data):
                demo = _read(path, group(data, name), job, count)
                if demo is None:
                    continue
                stops = np.cumsum([part.shape[1] for part in demo.parts]).tolist()
                spans = {key: [start, stop] for key, start, stop in zip(KEYS, [0, *stops], stops)}
                layout = layout or spans
                if spans != layout:
                    raise BadInput(f"{path}: data/{name} has state columns {spans}, others of its task {layout}")
                length = len(demo.actions)
                success = not _is_failed(path) if demo.rewards is None else bool((demo.rewards >= 1).any())
                if not success and not options.failed:
                    count.drop("failed demonstrations", length)
                    continue
                rewards = np.zeros(length, np.float32)
                rewards[-1] = success
                trajectory = Trajectory(
                    domain="mimicgen",
                    task=job.task,
                    episode=count.episodes,
                    seed=-1,
                    states=np.concatenate(demo.parts, 1),
                    actions=demo.actions,
                    rewards=rewards,
                    terminated=success,
                    truncated=not success,
                    source=source,
                    final_state=demo.final_state,
                    success=success,
                    state_layout=layout,
                )
                count.wrote(length)
                yield trajectory


def _check_task(path: Path, data: h5py.Group, job: Job) -> None:
    """Checks that the simulator which the file names is the one that its name tells, where it names one."""
    try:
        text = data.attrs.get("env_args")
        args = json.loads(text) if text else {}
        env, robots = args.get("env_name"), args.get("env_kwargs", {}).get("robots")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: attribute env_args of data is no JSON object") from error
    task, _, arm = job.task.split(".")[0].partition("-")
    if env is not None and env != task:
        raise BadInput(f"{path}: its name tells {task}, its env_args {env!r}")
    if arm and robots is not None and arm not in robots:
        raise BadInput(f"{path}: its name tells the arm {arm}, its env_args {robots}")


def _demo_names(path: Path, data: h5py.Group) -> list[str]:
    names = list(data)
    for name in names:
        if not re.fullmatch(r"demo_\d+", name):
            raise BadInput(f"{path}: data holds {name!r}, expected demo_0, demo_1, …")
    return sorted(names, key=lambda name: int(name.removeprefix("demo_")))


def _read(path: Path, demo: h5py.Group, job: Job, count: Count) -> _Demo | None:
    """Reads a demonstration; one that is damaged is counted as left out, and None returned."""
    name = demo.name.strip("/")
    stored = array(demo, "actions", (None, NUM_ACTIONS))
    length = len(stored)
    if length > LONGEST:
        raise BadInput(f"{path}: {name} declares {length} steps, expected {LONGEST} at most")
    count.read += length
    if "obs" not in demo:
        if job.detail == SOURCE and job.src != path:
            count.drop("source demonstrations without observations", length)
            return None
        hint = "robomimic's dataset_states_to_obs makes observations of them"
        raise BadInput(f"{path}: {name} has no obs, only the simulator's states: {hint}")
    columns = [array(group(demo, "obs"), key, (None, None)) for key in KEYS]
    following = [array(group(demo, "next_obs"), key, (None, None)) for key in KEYS] if "next_obs" in demo else []
    rewards = array(demo, "rewards", (None,), "fiu") if "rewards" in demo else None
    for places in (columns, following):
        if (width := sum(column.shape[1] for column in places)) > STATE_WIDTH:
            raise BadInput(f"{path}: {name} has a state of {width} columns, expected {STATE_WIDTH} at most")

    def leave_out(reason: str, told: str) -> None:
        count.drop(reason, length)
        count.problems.append(f"{path}: {name} is left out, {told}")

    lengths = {column.name.removeprefix(f"{demo.name}/"): len(column) for column in (*columns, *following)}
    lengths["num_samples"] = demo.attrs.get("num_samples")
    lengths["rewards"] = length if rewards is None else len(rewards)
    for key, other in lengths.items():
        if length == 0 or not np.array_equal(other, length):
            leave_out("demonstrations of unequal lengths", f"it has {length} actions and {key} {other}")
            return None
    try:
        read = _Demo(
            [column[:].astype(np.float32) for column in columns],
            stored[:].astype(np.float32),
            None if rewards is None else rewards[:],
            np.concatenate([column[-1].astype(np.float32) for column in following]) if following else None,
        )
    except OSError:
        leave_out("unreadable demonstrations", "it cannot be read")
        return None
    values = [*read.parts, read.actions, read.rewards, read.final_state]
    if not all(np.isfinite(part).all() for part in values if part is not None):
        leave_out("values that are not finite", "it holds values that are not finite")
        return None
    if (worst := np.abs(read.actions).max()) > 1:
        raise BadInput(f"{path}: {name} has actions to {worst:.3g}, expected [-1, 1]")
    return read
