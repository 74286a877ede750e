"""The trajectory and its file, format version 1: one HDF5 file per episode, readable with plain h5py.

    image = encode(trajectory)            # bytes and the place of every array in them
    write_whole(path, image.data)         # temporary name, fsync, rename
    trajectory = read(path)               # checked: names, dtypes, shapes, lengths, derived arrays

The file is built in memory, so that its hash and the byte offsets of its arrays are known before it is
written, and the same trajectory always gives the same bytes. The price is one copy of an episode in memory.
The five dataset names are those of the LRAM code, whose loader reads these files unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import h5py
import hdf5plugin
import numpy as np

from lram.datasets.specs import DOMAINS, IMAGE_SIDE, BadInput

FORMAT = "lram-trajectory"
VERSION = 1
ARRAYS = ("states", "actions", "rewards", "returns_to_go", "dones")
Codec = Literal["gzip", "zstd", "none"]

IMAGE_CHUNK = 64
"""Rows of one compressed chunk of image states."""
VECTOR_CHUNK = 256
"""Rows of one compressed chunk of vector states."""
MEMORY_FILE = "trajectory.hdf5"
"""Name of the in-memory file; it never reaches the disk."""


@dataclass(eq=False)
class Trajectory:
    """One episode, in native layout: unpadded, unscaled.

    Attributes:
        domain: Name of its domain, a key of `DOMAINS`.
        task: Name of its task inside the domain.
        episode: Its number inside the task, from 0, in the order of recording.
        seed: Seed of the environment or of the recording run, -1 where the source does not know it.
        states: (T, D) float32 or (T, C, 64, 64) uint8, observed before each action.
        actions: (T,) int64, or (T, A) float32 in [-1, 1].
        rewards: (T,) float32, raw.
        terminated: The task ended the episode.
        truncated: A time limit ended it. Both False: unfinished.
        source: Who made it, with versions.
        final_state: Observed after the last action, like one row of `states`; None where unknown.
        success: Whether the task was solved; None where the source does not say.
        state_layout: {key: [start, stop]} over the columns of vector states; None where there is one key only.
    """

    domain: str
    task: str
    episode: int
    seed: int
    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool
    source: str
    final_state: np.ndarray | None = None
    success: bool | None = None
    state_layout: dict[str, list[int]] | None = None

    @property
    def length(self) -> int:
        """Number of transitions T."""
        return len(self.rewards)

    @property
    def total(self) -> float:
        """Return: the undiscounted sum of raw rewards, accumulated in float64."""
        return float(np.sum(self.rewards, dtype=np.float64))

    @property
    def returns_to_go(self) -> np.ndarray:
        """(T,) float32: undiscounted sum of the rewards from each step on, accumulated in float64."""
        return np.cumsum(self.rewards[::-1], dtype=np.float64)[::-1].astype(np.float32)

    @property
    def dones(self) -> np.ndarray:
        """(T,) bool: only the last can be true, and is when the episode ended."""
        dones = np.zeros(self.length, bool)
        dones[-1] = self.terminated or self.truncated
        return dones


@dataclass
class FileImage:
    """A trajectory's file before it is written.

    Attributes:
        data: The bytes of the file.
        sha256: Their hash.
        codec: How `states` are stored; "none" means contiguous.
        offsets: Byte offset of every contiguous array in the file.
        chunks: For `states` in chunks, (byte offset, stored bytes) of each, in order of rows.
    """

    data: bytes
    sha256: bytes
    codec: Codec
    offsets: dict[str, int] = field(default_factory=dict)
    chunks: list[tuple[int, int]] = field(default_factory=list)


def validate(trajectory: Trajectory) -> None:
    """Checks dtypes, shapes, lengths and values against the trajectory's domain.

    Raises:
        BadInput: With the field and what was expected of it.
    """
    t = trajectory
    name = f"trajectory {t.domain}/{t.task} episode {t.episode}"
    spec = DOMAINS.get(t.domain)
    if spec is None:
        raise BadInput(f"{name}: unknown domain {t.domain!r}, expected one of {', '.join(DOMAINS)}")

    def expect(ok: bool, what: str) -> None:
        if not ok:
            raise BadInput(f"{name}: {what}")

    expect(t.length > 0, "no transitions, expected at least one")
    shape = t.states.shape
    if spec.state == "image":
        expect(t.states.dtype == np.uint8, f"states are {t.states.dtype}, expected uint8")
        good = len(shape) == 4 and shape[1] in (1, 3) and shape[2:] == (IMAGE_SIDE, IMAGE_SIDE)
        expect(good, f"states have shape {shape}, expected (T, 1 or 3, {IMAGE_SIDE}, {IMAGE_SIDE})")
    else:
        expect(t.states.dtype == np.float32, f"states are {t.states.dtype}, expected float32")
        expect(len(shape) == 2, f"states have shape {shape}, expected (T, D)")
        expect(bool(np.isfinite(t.states).all()), "states hold values that are not finite")
    if spec.action == "discrete":
        expect(t.actions.dtype == np.int64, f"actions are {t.actions.dtype}, expected int64")
        expect(t.actions.ndim == 1, f"actions have shape {t.actions.shape}, expected (T,)")
        inside = bool(((t.actions >= 0) & (t.actions < spec.num_actions)).all())
        expect(inside, f"actions outside 0..{spec.num_actions - 1}")
    else:
        expect(t.actions.dtype == np.float32, f"actions are {t.actions.dtype}, expected float32")
        good = t.actions.ndim == 2 and 0 < t.actions.shape[1] <= spec.num_actions
        expect(good, f"actions have shape {t.actions.shape}, expected (T, at most {spec.num_actions})")
        expect(bool((np.abs(t.actions) <= 1).all()), "actions outside [-1, 1]")
    expect(t.rewards.dtype == np.float32, f"rewards are {t.rewards.dtype}, expected float32")
    expect(t.rewards.ndim == 1, f"rewards have shape {t.rewards.shape}, expected (T,)")
    expect(bool(np.isfinite(t.rewards).all()), "rewards hold values that are not finite")
    lengths = len(t.states), len(t.actions), t.length
    expect(len(set(lengths)) == 1, f"states, actions, rewards have lengths {lengths}, expected equal ones")
    if t.final_state is not None:
        good = t.final_state.shape == shape[1:] and t.final_state.dtype == t.states.dtype
        expect(good, f"final_state is {t.final_state.dtype} {t.final_state.shape}, expected a row of states")


def default_codec(domain: str) -> Codec:
    """Returns how a domain's states are stored unless a dataset chooses otherwise: measured in design.md."""
    return "gzip" if DOMAINS[domain].state == "image" or domain == "composuite" else "none"


def encode(trajectory: Trajectory, codec: Codec | None = None) -> FileImage:
    """Builds the bytes of a trajectory's file; the same trajectory gives the same bytes.

    Args:
        trajectory: What to store; it is validated first.
        codec: How to store `states`, the domain's default when None.

    Returns:
        The file's bytes, with where each array lies in them.

    Raises:
        BadInput: The trajectory breaks the format.
    """
    validate(trajectory)
    t = trajectory
    codec = codec or default_codec(t.domain)
    attributes = {
        "format": FORMAT,
        "version": VERSION,
        "domain": t.domain,
        "task": t.task,
        "episode": t.episode,
        "seed": t.seed,
        "length": t.length,
        "return": t.total,
        "terminated": bool(t.terminated),
        "truncated": bool(t.truncated),
        "source": t.source,
    }
    if t.success is not None:
        attributes["success"] = bool(t.success)
    if t.state_layout is not None:
        attributes["state_layout"] = json.dumps(t.state_layout)
    image = FileImage(b"", b"", codec)
    with h5py.File(MEMORY_FILE, "w", driver="core", backing_store=False) as file:
        for name in ARRAYS[1:]:
            file.create_dataset(name, data=getattr(t, name))
        if t.final_state is not None:
            file.create_dataset("final_state", data=t.final_state)
        # States come last: a chunked array then never moves the offsets of the others.
        states = file.create_dataset("states", data=t.states, **_storage(t.states, codec))
        for key, value in attributes.items():
            file.attrs[key] = value
        file.flush()
        image.offsets, image.chunks = locate(file)
        assert bool(image.chunks) == (states.chunks is not None)
        image.data = file.id.get_file_image()
    image.sha256 = hashlib.sha256(image.data).digest()
    return image


def _storage(states: np.ndarray, codec: Codec) -> dict:
    """Keyword arguments of `create_dataset` for states under a codec."""
    if codec == "none":
        return {}
    rows = min(len(states), IMAGE_CHUNK if states.ndim == 4 else VECTOR_CHUNK)
    options: dict = {"chunks": (rows, *states.shape[1:]), "shuffle": states.ndim == 2}
    if codec == "gzip":
        return {**options, "compression": "gzip", "compression_opts": 4}
    return {**options, **hdf5plugin.Zstd(clevel=3)}


def locate(file: h5py.File) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Reads off where an open trajectory file keeps its arrays.

    Returns:
        Byte offsets of the contiguous arrays by name, and (offset, stored bytes) of each chunk of `states`,
        empty when they are contiguous.
    """
    offsets: dict[str, int] = {}
    chunks: list[tuple[int, int]] = []
    for name in file:
        array = file[name]
        if array.chunks is None:
            offsets[name] = array.id.get_offset()
        else:
            table: list = []
            array.id.chunk_iter(table.append)
            table.sort(key=lambda info: info.chunk_offset)
            chunks = [(info.byte_offset, info.size) for info in table]
    return offsets, chunks


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it exists whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read(path: Path) -> Trajectory:
    """Reads one trajectory file and checks that it keeps to the format.

    Args:
        path: The file.

    Returns:
        The trajectory, in memory.

    Raises:
        BadInput: With the file, the field and what was expected: unreadable or cut file, another format or
            version, missing or foreign datasets, wrong dtypes or shapes, returns-to-go that do not follow
            from the rewards, `dones` elsewhere than at the end, attributes that contradict the arrays.
    """
    return scan(path)[0]


def scan(path: Path) -> tuple[Trajectory, FileImage]:
    """Reads a trajectory file back into what `encode` knew when it was written; checks it as `read` does."""
    try:
        data = Path(path).read_bytes()
        with h5py.File(h5py.h5f.open_file_image(data)) as file:
            trajectory = _decode(file, path)
            offsets, chunks = locate(file)
            codec: Codec = "none"
            if chunks:
                codec = "gzip" if file["states"].compression == "gzip" else "zstd"
    except BadInput as error:
        text = str(error)
        raise BadInput(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: not a whole trajectory file ({str(error).splitlines()[0]})") from error
    return trajectory, FileImage(data, hashlib.sha256(data).digest(), codec, offsets, chunks)


def _decode(file: h5py.File, path: Path) -> Trajectory:
    attributes = dict(file.attrs)
    if attributes.get("format") != FORMAT or attributes.get("version") != VERSION:
        found = f"{attributes.get('format')!r} version {attributes.get('version')!r}"
        raise BadInput(f"{path}: format is {found}, expected {FORMAT!r} version {VERSION}")
    for name in (*ARRAYS, "final_state"):
        link = file.get(name, getlink=True)
        if name == "final_state" and link is None:
            continue
        # A link or a virtual array could make a download read other files of its user.
        if not isinstance(link, h5py.HardLink) or not isinstance(file[name], h5py.Dataset):
            raise BadInput(f"{path}: dataset {name} is missing or a link, expected an array in the file")
        if file[name].is_virtual or file[name].external:
            raise BadInput(f"{path}: dataset {name} points to other files, expected an array in the file")
    arrays = {name: file[name][...] for name in ARRAYS}
    success = attributes.get("success")
    layout = attributes.get("state_layout")
    trajectory = Trajectory(
        domain=str(attributes["domain"]),
        task=str(attributes["task"]),
        episode=int(attributes["episode"]),
        seed=int(attributes["seed"]),
        states=arrays["states"],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminated=bool(attributes["terminated"]),
        truncated=bool(attributes["truncated"]),
        source=str(attributes["source"]),
        final_state=file["final_state"][...] if "final_state" in file else None,
        success=None if success is None else bool(success),
        state_layout=None if layout is None else json.loads(layout),
    )
    validate(trajectory)
    for name in ("returns_to_go", "dones"):
        expected = getattr(trajectory, name)
        if arrays[name].dtype != expected.dtype or not np.array_equal(arrays[name], expected):
            raise BadInput(f"{path}: {name} does not follow from rewards, terminated and truncated")
    if int(attributes["length"]) != trajectory.length or float(attributes["return"]) != trajectory.total:
        raise BadInput(f"{path}: attributes length and return do not agree with rewards")
    return trajectory
