"""Takes in the data sets that LRAM and RA-DT published on the Hub, as downloaded or unpacked.

    lram convert lram ./meta-world/2M ROOT             # <task>-v2.npz: rows end to end
    lram convert lram ./dm_control_10M ROOT            # <domain>_<task>.tar.gz: a file per trajectory
    lram convert lram ./mimicgen59 ROOT --tasks Stack_D0-IIWA
    lram convert lram ./dark_room ROOT                 # 10x10/[0,0]_[2,0].npz, or .pkl: a buffer per goal

Archives are streamed and never unpacked to disk; members that point outside, links and devices are refused, HDF5
members are opened in memory by `safe_hdf5`, pickles by `unpickle`. DMControl's vectors come back from the union of 24
keys to the task's own layout. The data keeps only the final states that it holds: `next_observations` after the last
step, unless that is the first observation of the next episode.

Written after LRAM's code and the cards of the data sets: no published file was at hand, so what is unexpected is
refused and not guessed. The one guess is in Dark-Room's names (`lram_rooms`), and there the rewards decide.
"""

from __future__ import annotations

import importlib.metadata
import io
import math
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py
import numpy as np

from lram.converters import lram_rooms, mimicgen
from lram.converters.npy import Damaged, npz
from lram.converters.safe_hdf5 import array, opened
from lram.converters.source import SELECTS, Count, Job
from lram.converters.unpickle import attributes, load
from lram.datasets.specs import DOMAINS, STATE_WIDTH, BadInput, state_columns, tasks
from lram.datasets.trajectory import Trajectory

VERSION = 1
"""Of this converter: raised when the bytes that it makes change."""
HORIZONS = {"metaworld": 200, "dmcontrol": 1000}
"""Steps after which these domains truncate; neither ever terminates an episode."""
FORMS = (".hdf5", ".npz")
"""Files of one trajectory each."""
LONGEST = 100_000
"""Steps of one trajectory at most: it is read whole."""
LARGEST_MEMBER = 1 << 28
"""Bytes of one trajectory's file at most: a hundred times the largest of 1,000 steps."""
LARGEST_HEADER = 1 << 20
"""Bytes of a long name or other extension header in an archive at most."""
BLOCK = 10_000
"""Rows read at once from files that hold rows end to end."""
UNFINISHED = "unfinished episode"
ROWS = "rows end to end"
"""Detail of a job whose file holds many episodes; a Dark-Room job's is its room."""

_FINGER = {"position": 4, "velocity": 3, "touch": 2}
_TURN = {**_FINGER, "target_position": 2, "dist_to_target": 1}
_WALKER = {"orientations": 14, "height": 1, "velocity": 9}
_CARTPOLE = {"position": 3, "velocity": 2}
_REACHER = {"position": 2, "to_target": 2, "velocity": 2}
DMCONTROL: dict[str, dict[str, int]] = {
    "finger-spin": _FINGER,
    "finger-turn_easy": _TURN,
    "finger-turn_hard": _TURN,
    "fish-upright": {"joint_angles": 7, "upright": 1, "velocity": 13},
    "hopper-stand": {"position": 6, "velocity": 7, "touch": 2},
    "point_mass-easy": {"position": 2, "velocity": 2},
    "walker-stand": _WALKER,
    "walker-run": _WALKER,
    "walker-walk": _WALKER,
    "ball_in_cup-catch": {"position": 4, "velocity": 4},
    "cartpole-swingup": _CARTPOLE,
    "cartpole-balance": _CARTPOLE,
    "cheetah-run": {"position": 8, "velocity": 9},
    "reacher-easy": _REACHER,
    "reacher-hard": _REACHER,
    "pendulum-swingup": {"orientation": 2, "velocity": 1},
}
"""Keys of each task's observations in dm_control's order, with their widths."""
GRIPPERS = {"PandaGripper": 2, "RethinkGripper": 2, "Robotiq85Gripper": 6}
"""Widths of `robot0_gripper_qpos`."""


@dataclass(frozen=True)
class Options:
    """Which of LRAM's published sets to take in."""

    tasks: tuple[str, ...] = field(default=(), metadata={SELECTS: True})
    """Tasks to convert, by their names here; all that SRC holds when empty."""


def jobs(src: Path, options: Options) -> list[Job]:
    """Lists the tasks that a folder, or one file, holds.

    Raises:
        BadInput: Nothing is found, a file's name tells no task, a task is there twice, or an asked one is missing.
    """
    src = Path(src)
    paths = sorted(src.rglob("*")) if src.is_dir() else [src]
    made: dict[str, Job] = {}
    rooms: list[Path] = []
    folders: dict[Path, list[Path]] = {}

    def add(domain: str, task: str, files: tuple[Path, ...], detail: str = "") -> None:
        job = Job(domain, task, src, files, detail)
        if job.name in made:
            raise BadInput(f"{src}: holds {job.name} twice, {made[job.name].files[0]} and {files[0]}: name one of them")
        made[job.name] = job

    for path in paths:
        stem = path.name.removesuffix(".gz").removesuffix(".tar")
        if path.name.endswith((".tar.gz", ".tar")):
            add(*_task_of(path, stem), (path,))
        elif path.suffix in (".npz", ".pkl") and lram_rooms.cells(path):
            rooms.append(path)
        elif path.suffix in (".npz", ".hdf5") and ("metaworld", path.stem) not in tasks():
            folders.setdefault(path.parent, []).append(path)
        elif path.suffix in (".npz", ".pkl"):
            add(*_task_of(path, path.stem), (path,), ROWS)
    for folder, files in folders.items():
        add(*_task_of(folder, folder.resolve().name), tuple(sorted(files, key=_number)))
    for task, path, detail in lram_rooms.named(rooms, lambda path: _blocks(path, "darkroom", Count())):
        add("darkroom", task, (path,), detail)
    if not made:
        raise BadInput(f"{src}: none of LRAM's published files, expected .tar.gz, .npz or .pkl")
    if missing := sorted(set(options.tasks) - {job.task for job in made.values()}):
        raise BadInput(f"--tasks {missing[0]}: {src} does not hold it")
    return [made[name] for name in sorted(made) if not options.tasks or made[name].task in options.tasks]


def _task_of(path: Path, stem: str) -> tuple[str, str]:
    """Returns domain and task that a name stands for; LRAM's DMControl names have "_" where ours have "-"."""
    names = {task.replace("-", "_"): task for task in DMCONTROL}
    if ("metaworld", stem) in tasks():
        return "metaworld", stem
    if stem.replace("-", "_") in names:
        return "dmcontrol", names[stem.replace("-", "_")]
    try:
        task = mimicgen.task_name(Path(f"{stem}.hdf5"))
    except BadInput:
        expected = "reach-v2, walker_stand, stack_D0_robot_IIWA_gripper_Robotiq85Gripper or [0,0]_[2,0]"
        raise BadInput(f"{path}: {stem!r} tells no task of LRAM's, expected a name like {expected}") from None
    return "mimicgen", f"{task}.failed" if stem.endswith("_failed") else task


def _number(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() else -1, path.name)


def trajectories(job: Job, options: Options, count: Count) -> Iterator[Trajectory]:
    """Makes the trajectories of one task.

    Files of one trajectory each keep the number that is their name, the order in which they were recorded; an
    archive holds them as 0, 1, 10, 100, 1000, 1001. Rows end to end are numbered as they come.

    Raises:
        BadInput: A file is unsafe, or is not what LRAM's code writes.
    """
    name, version = DOMAINS[job.domain].name, importlib.metadata.version("lram")
    source = f"LRAM's published {name} data (Schmied et al. 2024), converted by lram {version}"
    read = _rows if job.detail else _files
    for fields in read(job, count):
        trajectory = Trajectory(job.domain, job.task, seed=-1, source=source, **fields)
        count.wrote(trajectory.length)
        yield trajectory


def _rows(job: Job, count: Count) -> Iterator[dict[str, Any]]:
    """Cuts rows that lie end to end at the ends of episodes."""
    path = job.files[0]
    room = lram_rooms.Room.parse(job.detail) if job.domain == "darkroom" else None
    waiting: dict[str, Any] | None = None
    reset = True  # until the data shows that next_observations are not the next episode's
    held: list[dict[str, np.ndarray]] = []
    for block in _blocks(path, job.domain, count):
        ends = np.flatnonzero(block["dones"]) + 1
        for start, stop in zip([0, *ends], [*ends, len(block["dones"])]):
            if start == stop:
                continue
            held.append({key: values[start:stop] for key, values in block.items()})
            if waiting is not None:
                reset = bool(np.array_equal(waiting["final_state"], held[0]["observations"][0]))
                yield {**waiting, "final_state": None if reset else waiting["final_state"]}
                waiting = None
            if block["dones"][stop - 1]:
                waiting = _episode(job, path, held, count, room)
                held = []
    if waiting is not None:
        yield {**waiting, "final_state": None if reset else waiting["final_state"]}
    count.drop(UNFINISHED, sum(len(part["dones"]) for part in held))


def _episode(
    job: Job, path: Path, held: list[dict[str, np.ndarray]], count: Count, room: lram_rooms.Room | None
) -> dict[str, Any]:
    rows = {key: np.concatenate([part[key] for part in held]) for key in held[0]}
    fields = {
        "episode": count.episodes,
        "states": rows["observations"],
        "actions": rows["actions"],
        "rewards": rows["rewards"],
        "terminated": False,
        "truncated": True,
        "final_state": rows["next_observations"][-1],
    }
    if room is not None:
        room.check(path, rows)
        fields["success"] = room.success(rows["rewards"])
    return fields


def _blocks(path: Path, domain: str, count: Count) -> Iterator[dict[str, np.ndarray]]:
    """Yields the rows of a file, some thousands at a time, each array in the type that trajectories store."""
    if path.suffix == ".npz":
        with npz(path) as columns:
            sizes = {key: _column(columns, key, path).shape for key in _KEYS}
            widths = _widths(path, domain, sizes)
            for start in range(0, sizes["dones"][0], BLOCK):
                rows = min(BLOCK, sizes["dones"][0] - start)
                count.read += rows
                yield _typed({key: columns[key].rows(rows) for key in _KEYS}, widths, domain, path)
        return
    record = attributes(load(path), str(path))
    if any(not isinstance(record.get(key), np.ndarray) for key in _KEYS):
        raise BadInput(f"{path}: expected a buffer with arrays {', '.join(_KEYS)}")
    widths = _widths(path, domain, {key: record[key].shape for key in _KEYS})
    size = len(record["dones"])
    full, pos = record.get("full", True), record.get("pos", 0)
    if not isinstance(full, bool | np.bool_) or not isinstance(pos, int | np.integer) or not 0 <= pos <= size:
        raise BadInput(f"{path}: pos {pos!r:.40} and full {full!r:.40}, expected a row number and a truth value")
    if full and pos:
        raise BadInput(
            f"{path}: a ring that went round, whose first episode has lost its start; expected one that fits"
        )
    count.read += size
    count.drop("row never filled", 0 if full else size - int(pos))
    filled = size if full else int(pos)
    for start in range(0, filled, BLOCK):
        stop = min(start + BLOCK, filled)
        yield _typed({key: record[key][start:stop] for key in _KEYS}, widths, domain, path)


_KEYS = ("observations", "next_observations", "actions", "rewards", "dones")


def _column(columns: dict[str, Any], key: str, place: Any) -> Any:
    if key not in columns:
        raise BadInput(f"{place}: has no {key}")
    return columns[key]


def _widths(path: Path, domain: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Checks shapes before anything is read, and returns the columns of each array."""
    widths = {key: math.prod(shape[1:]) for key, shape in shapes.items()}
    if any(len(shape) == 0 or shape[0] != shapes["dones"][0] for shape in shapes.values()):
        raise BadInput(f"{path}: arrays of shapes {shapes}, expected as many rows in each")
    vectors = widths["observations"] == widths["next_observations"] <= STATE_WIDTH
    discrete = DOMAINS[domain].action == "discrete"
    if not vectors or widths["rewards"] != 1 or widths["dones"] != 1 or (discrete and widths["actions"] != 1):
        raise BadInput(
            f"{path}: arrays of shapes {shapes}, expected vectors of {STATE_WIDTH} at most from one environment"
        )
    return widths


def _typed(block: dict[str, np.ndarray], widths: dict[str, int], domain: str, place: Any) -> dict[str, np.ndarray]:
    rows = len(block["dones"])
    typed: dict[str, np.ndarray] = {key: block[key].reshape(rows, widths[key]).astype(np.float32) for key in _KEYS[:2]}
    typed["rewards"] = block["rewards"].reshape(rows).astype(np.float32)
    typed["dones"] = block["dones"].reshape(rows) != 0
    actions = block["actions"].reshape(rows, widths["actions"])
    typed["actions"] = actions.astype(np.float32)
    if DOMAINS[domain].action == "discrete":
        with np.errstate(invalid="ignore"):
            typed["actions"] = actions[:, 0].astype(np.int64)
        if (typed["actions"] != actions[:, 0]).any():
            raise BadInput(f"{place}: actions are not whole numbers")
    return typed


def _files(job: Job, count: Count) -> Iterator[dict[str, Any]]:
    """Reads files of one trajectory each, from an archive or a folder."""
    numbered: set[int] = set()
    by_name: bool | None = None
    others = 0
    for name, data in _members(job, count):
        path = PurePosixPath(name)
        if data is None:
            others += path.suffix not in (".json", ".csv")  # LRAM's statistics
            continue
        named = path.stem.isdecimal() and len(path.stem) <= 9
        by_name = named if by_name is None else by_name
        if named != by_name:
            raise BadInput(f"{job.files[0]}: {name} among files that are named otherwise, expected numbers or none")
        place = name if job.files[0].suffix in FORMS else f"{job.files[0]}: {name}"
        try:
            arrays = _arrays(data, path.suffix, place)
        except Damaged as error:
            count.problems.append(f"{error}: this trajectory is left out")
            continue
        length = len(arrays["rewards"])
        count.read += length
        fields = _trajectory(job, arrays, place, count)
        if fields is None or length == 0:
            count.drop("failed demonstrations" if job.domain == "mimicgen" else UNFINISHED, length)
            continue
        episode = int(path.stem) if by_name else count.episodes
        if episode in numbered:
            raise BadInput(f"{place}: a second trajectory of this number")
        numbered.add(episode)
        yield {"episode": episode, **fields}
    if others:
        count.problems.append(f"{job.files[0]}: {others} files are no trajectories, and are left out")


def _members(job: Job, count: Count) -> Iterator[tuple[str, bytes | None]]:
    """Yields the name and the bytes of each file, None where it is no trajectory."""
    if job.files[0].suffix in FORMS:
        for path in job.files:
            if path.stat().st_size > LARGEST_MEMBER:
                raise BadInput(f"{path}: {path.stat().st_size} bytes, expected one trajectory")
            yield str(path), path.read_bytes()
        return
    archive = job.files[0]
    try:
        with tarfile.open(archive, "r|*", tarinfo=_Member) as tar:
            for member in tar:
                _refuse(archive, member)
                if member.isreg():
                    held = tar.extractfile(member) if PurePosixPath(member.name).suffix in FORMS else None
                    yield member.name, held.read() if held else None
    except BadInput as error:
        raise error if str(error).startswith(str(archive)) else BadInput(f"{archive}: {error}") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        kept = f"the {count.episodes} trajectories before that were kept"
        count.problems.append(f"{archive}: cannot be read to its end ({error}), {kept}")


class _Member(tarfile.TarInfo):
    """A member whose header is looked at before tarfile acts on it: long names are read into memory."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        plain = member.type in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
        if not 0 <= member.size <= (LARGEST_MEMBER if plain else LARGEST_HEADER):
            raise BadInput(f"member {member.name[:100]!r} of {member.size} bytes, expected files of one trajectory")
        return member


def _refuse(archive: Path, member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    what = None
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        what = "points outside the archive"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        what = "is a link, a device or sparse"
    elif not 0 <= member.size <= LARGEST_MEMBER:
        what = f"has {member.size} bytes"
    if what:
        raise BadInput(f"{archive}: unsafe archive: member {member.name[:100]!r} {what}, expected files and folders")


def _arrays(data: bytes, suffix: str, place: str) -> dict[str, np.ndarray]:
    """Reads states, actions, rewards and dones of one trajectory; `returns_to_go` are made anew."""
    try:
        if suffix == ".npz":
            with npz(io.BytesIO(data), place) as columns:
                shapes = {key: _column(columns, key, place).shape for key in _STORED}
                _check(place, shapes)
                return {key: columns[key].whole() for key in _STORED}
        try:
            h5py.File(io.BytesIO(data), "r").close()
        except (OSError, RuntimeError, ValueError) as error:
            raise Damaged(f"{place}: not a whole HDF5 file") from error
        with opened(io.BytesIO(data)) as file:  # type: ignore[arg-type]
            stored = {key: array(file, key, (None,) * rank, "fiub") for key, rank in _RANKS.items()}
            try:
                stored["dones"] = array(file, "dones", (), "fiub")
            except BadInput:
                stored["dones"] = array(file, "dones", (None,), "fiub")
            _check(place, {key: values.shape for key, values in stored.items()})
            return {key: np.asarray(values[()]) for key, values in stored.items()}
    except BadInput as error:
        text = str(error)
        # What was opened from memory has no name of its own.
        raise error if text.startswith(place) else BadInput(f"{place}: {text.partition('>: ')[2] or text}") from error
    except (OSError, ValueError) as error:
        raise Damaged(f"{place}: cannot be read ({error})") from error


_RANKS = {"states": 2, "actions": 2, "rewards": 1}
_STORED = (*_RANKS, "dones")


def _check(place: str, shapes: dict[str, tuple[int, ...]]) -> None:
    states, actions, rewards, dones = (shapes[key] for key in _STORED)
    good = len(states) == len(actions) == 2 and len(rewards) == 1 and dones in ((), rewards, (1,))
    if not good or not states[0] == actions[0] == rewards[0] <= LONGEST or states[1] > STATE_WIDTH:
        raise BadInput(f"{place}: arrays of shapes {shapes}, expected (T, D), (T, A), (T,), and () or (T,)")


def _trajectory(job: Job, arrays: dict[str, np.ndarray], place: str, count: Count) -> dict[str, Any] | None:
    """Makes the fields of a trajectory; None where it is to be left out."""
    dones = arrays["dones"].reshape(-1) != 0
    length = len(arrays["rewards"])
    states, rewards = arrays["states"].astype(np.float32), arrays["rewards"].astype(np.float32)
    fields: dict[str, Any] = {"actions": arrays["actions"].astype(np.float32)}
    if job.domain == "mimicgen":
        # Kept as in `mimicgen`: the last step alone is rewarded, where the demonstration succeeded.
        if not (rewards >= 1).any():
            return None
        sparse = np.zeros(length, np.float32)
        sparse[-1:] = 1
        count.change("reward made sparse", int((sparse != rewards).sum()))
        ends = {"terminated": True, "truncated": False, "success": True}
        return fields | ends | {"states": states, "rewards": sparse, "state_layout": _layout(job.task, states.shape[1])}
    if dones[:-1].any():
        raise BadInput(f"{place}: dones are set before the last step, expected one episode")
    if not dones[-1:].any() and length < HORIZONS[job.domain]:
        return None
    fields |= {"rewards": rewards, "terminated": False, "truncated": True}
    if job.domain == "dmcontrol":
        states, fields["state_layout"] = _native(states, job.task, place)
    return fields | {"states": states}


def _native(states: np.ndarray, task: str, place: str) -> tuple[np.ndarray, dict[str, list[int]]]:
    """Takes DMControl's vectors back from the union to the task's own layout."""
    stops = np.cumsum(list(DMCONTROL[task].values())).tolist()
    layout = {key: [start, stop] for key, start, stop in zip(DMCONTROL[task], [0, *stops], stops)}
    if states.shape[1] != STATE_WIDTH:
        raise BadInput(f"{place}: states of {states.shape[1]} columns, expected the union's {STATE_WIDTH}")
    columns = state_columns("dmcontrol", layout, stops[-1])
    rest = np.delete(states, columns, axis=1)
    if rest.any():
        raise BadInput(f"{place}: values in columns of the union that {task} does not have")
    return states[:, columns], layout


def _layout(task: str, width: int) -> dict[str, list[int]] | None:
    """Returns where MimicGen's four keys lie; None where the gripper's width is not known."""
    name, _, suffix = task.removesuffix(".failed").partition(".")
    arm = name.partition("-")[2] or "Panda"  # Sawyer's gripper, of the tasks without an arm's name, is as wide
    gripper = GRIPPERS.get(suffix or mimicgen.GRIPPERS.get(arm, ""))
    if gripper is None or width <= 7 + gripper:
        return None
    stops = [3, 7, 7 + gripper, width]
    return {key: [start, stop] for key, start, stop in zip(mimicgen.KEYS, [0, *stops], stops)}
