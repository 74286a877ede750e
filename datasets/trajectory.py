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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lram.datasets.disk import whole
from lram.datasets.hdf5 import IMAGE_CHUNK, VECTOR_CHUNK, Codec, build, parse
from lram.datasets.specs import DOMAINS, IMAGE_SIDE, BadInput

__all__ = [
    "ARRAYS", "FORMAT", "IMAGE_CHUNK", "VECTOR_CHUNK", "VERSION", "Codec", "FileImage", "Trajectory",
    "default_codec", "encode", "read", "scan", "scan_bytes", "validate", "write_whole",
]  # fmt: skip

FORMAT = "lram-trajectory"
VERSION = 1
ARRAYS = ("states", "actions", "rewards", "returns_to_go", "dones")
REQUIRED: dict[str, type] = {
    "format": str,
    "version": int,
    "domain": str,
    "task": str,
    "episode": int,
    "seed": int,
    "length": int,
    "return": float,
    "terminated": bool,
    "truncated": bool,
    "source": str,
}
"""Attributes of every file, with their types."""
OPTIONAL: dict[str, type] = {"success": bool, "state_layout": str}
"""Attributes of some files."""


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
    expect(t.episode >= 0, "a negative episode number")
    text = t.task + t.source
    expect("\0" not in text and text == text.encode(errors="ignore").decode(), "a text that UTF-8 cannot hold")
    shape = t.states.shape
    if spec.state == "image":
        expect(t.states.dtype == np.uint8, f"states are {t.states.dtype}, expected uint8")
        good = len(shape) == 4 and shape[1] in (1, 3) and shape[2:] == (IMAGE_SIDE, IMAGE_SIDE)
        expect(good, f"states have shape {shape}, expected (T, 1 or 3, {IMAGE_SIDE}, {IMAGE_SIDE})")
    else:
        expect(t.states.dtype == np.float32, f"states are {t.states.dtype}, expected float32")
        expect(len(shape) == 2, f"states have shape {shape}, expected (T, D)")
        expect(bool(np.isfinite(t.states).all()), "states hold values that are not finite")
    if t.state_layout is not None:
        good = spec.state == "vector" and _tiles(t.state_layout, shape[1])
        expect(good, "state_layout is not {key: [start, stop]} with every column of states in one key at most")
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
        expect(bool(np.isfinite(t.final_state).all()), "final_state holds values that are not finite")


def _tiles(layout: Any, width: int) -> bool:
    """Says whether a state_layout names ranges of columns that do not overlap."""
    if not isinstance(layout, dict) or not all(isinstance(key, str) for key in layout):
        return False
    at = 0
    for span in sorted(layout.values(), key=lambda span: span if isinstance(span, list) else []):
        whole = isinstance(span, list) and len(span) == 2 and all(type(edge) is int for edge in span)
        if not whole or not at <= span[0] <= span[1] <= width:
            return False
        at = span[1]
    return True


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
    attributes: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "domain": t.domain,
        "task": t.task,
        "episode": int(t.episode),
        "seed": int(t.seed),
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
    arrays = {name: getattr(t, name) for name in ARRAYS[1:]}
    if t.final_state is not None:
        arrays["final_state"] = t.final_state
    # States come last: a chunked array then never moves the offsets of the others.
    data, offsets, chunks = build({**arrays, "states": t.states}, attributes, codec)
    return FileImage(data, hashlib.sha256(data).digest(), codec, offsets, chunks)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it exists whole or not at all: temporary name, fsync, rename.

    Raises:
        DiskFull: There is no room for it.
    """
    with whole(path) as file:
        file.write(data)


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
    except OSError as error:
        raise BadInput(f"{path}: not a whole trajectory file ({error.strerror})") from error
    return scan_bytes(data, str(path))


def scan_bytes(data: bytes, name: str) -> tuple[Trajectory, FileImage]:
    """Does what `scan` does for a file that is in memory; `name` is what errors call it."""
    try:
        content = parse(data, REQUIRED, OPTIONAL, {*ARRAYS, "final_state"})
        trajectory = _decode(content.attributes, content.arrays)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise BadInput(f"{name}: not a whole trajectory file ({said[0]})") from error
    sha256 = hashlib.sha256(data).digest()
    return trajectory, FileImage(data, sha256, content.codec, content.offsets, content.chunks)


def _decode(attributes: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trajectory:
    if attributes["format"] != FORMAT or attributes["version"] != VERSION:
        found = f"{attributes['format']!r} version {attributes['version']!r}"
        raise BadInput(f"format is {found}, expected {FORMAT!r} version {VERSION}")
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise BadInput(f"dataset {missing[0]} is missing")
    layout = attributes.get("state_layout")
    try:
        state_layout = None if layout is None else json.loads(layout)
    except ValueError as error:
        raise BadInput(f"attribute state_layout is no JSON ({error})") from error
    trajectory = Trajectory(
        domain=attributes["domain"],
        task=attributes["task"],
        episode=attributes["episode"],
        seed=attributes["seed"],
        states=arrays["states"],
        actions=arrays["actions"],
        rewards=arrays["rewards"],
        terminated=attributes["terminated"],
        truncated=attributes["truncated"],
        source=attributes["source"],
        final_state=arrays.get("final_state"),
        success=attributes.get("success"),
        state_layout=state_layout,
    )
    validate(trajectory)
    for name in ("returns_to_go", "dones"):
        expected = getattr(trajectory, name)
        if arrays[name].dtype != expected.dtype or not np.array_equal(arrays[name], expected):
            raise BadInput(f"{name} does not follow from rewards, terminated and truncated")
    if attributes["length"] != trajectory.length or attributes["return"] != trajectory.total:
        raise BadInput("attributes length and return do not agree with rewards")
    return trajectory
