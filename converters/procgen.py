"""Takes in RA-DT's Procgen recordings, of either kind: one file per episode, or replay buffers in splits.

    lram convert procgen SRC ROOT                    # gray 64x64, task procgen/bigfish
    lram convert procgen SRC ROOT --rgb              # as recorded, task procgen/bigfish.rgb

    SRC/.../bigfish/<datetime>_<id>_<length>_<seed>_<return>.npy      pickled dict of one episode
    SRC/.../bigfish_<k>.gz                                            pickled buffer, arrays [rows, environments, ...]

Pickles are read by `unpickle`, which runs nothing. Episodes of buffers run on from split to split in each
environment; they come out in the order in which they ended (the lower environment first), which is also the order of
the ids in the single files. An episode is never joined across a split that is missing, unreadable, or does not begin
with the observation that the one before ended on: what lies around such a gap is left out and counted, as is the
last episode of each environment, which nothing ended.

Neither kind holds the last observation of an episode: Procgen starts the next level within the same step, so that
both the last of T+1 observations and `next_observations` at an end show the next episode. `final_state` is left out.

One split is in memory at a time, and what is open of each environment: measured, 430 MB for 3,360 rows of 5
environments, whose two arrays of frames are 413 MB. The two kinds hold the same episodes, so a SRC with both for one
game is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lram.converters.npy import Damaged
from lram.converters.source import SELECTS, Count, Job
from lram.converters.unpickle import attributes, load
from lram.datasets.images import gray
from lram.datasets.specs import DOMAINS, IMAGE_SIDE, BadInput, tasks
from lram.datasets.trajectory import Trajectory

VERSION = 1
"""Of this converter: raised when the bytes that it makes change."""
BLOCK = 1024
"""Frames turned gray at once."""
EXACT = 1 << 24
"""Seeds in buffers are float32, which holds whole numbers exactly below this."""
CUT = "episode cut by a gap"
UNFINISHED = "unfinished episode"

_EPISODE = re.compile(r"[^_]+_(\d+)_(\d+)_(-?\d+)_(-?[\d.]+)\.npy")
_SPLIT = re.compile(r"([a-z]+)_(\d+)\.gz")


@dataclass(frozen=True)
class Options:
    """How Procgen recordings are taken in."""

    rgb: bool = False
    """Keep the colours: (T, 3, 64, 64), as the task bigfish.rgb."""
    games: tuple[str, ...] = field(default=(), metadata={SELECTS: True})
    """Games to convert; all that SRC holds when empty."""


def games() -> list[str]:
    """Returns the names of the 16 games."""
    return [name for domain, name in tasks() if domain == "procgen"]


def jobs(src: Path, options: Options) -> list[Job]:
    """Lists the games that a folder holds recordings of.

    Args:
        src: The folder; recordings may lie any number of levels below it, single episodes inside a folder named
            after their game.
        options: Which games, and in which colours.

    Raises:
        BadInput: Nothing is found, a game is unknown or recorded twice, or a file's name says too little.
    """
    known = games()
    if unknown := sorted(set(options.games) - set(known)):
        raise BadInput(f"--games {unknown[0]}: no such game, expected some of {', '.join(known)}")
    singles: dict[str, list[Path]] = {}
    splits: dict[str, dict[int, Path]] = {}
    for path in sorted(Path(src).rglob("*")):
        match = _SPLIT.fullmatch(path.name)
        if match and match[1] in known:
            numbered = splits.setdefault(match[1], {})
            if int(match[2]) in numbered:
                raise BadInput(f"{path}: a second {path.name} beside {numbered[int(match[2])]}, expected one recording")
            numbered[int(match[2])] = path
        elif path.suffix == ".npy":
            inside = Path(Path(src).resolve().name) / path.relative_to(src)
            folders = [part for part in reversed(inside.parent.parts) if part in known]
            if not folders or not _EPISODE.fullmatch(path.name):
                named = "<game>/.../<datetime>_<id>_<length>_<seed>_<return>.npy"
                raise BadInput(f"{path}: neither game nor episode can be told from its name, expected {named}")
            singles.setdefault(folders[0], []).append(path)
    made = []
    for game in known:
        if options.games and game not in options.games:
            continue
        if game in singles and game in splits:
            raise BadInput(f"{src}: holds {game} as single episodes and as buffers, name one of the two as the source")
        if game in singles:
            files = sorted(singles[game], key=lambda path: (int(_EPISODE.fullmatch(path.name)[1]), path))  # type: ignore[index]
        elif game in splits:
            files = [splits[game][k] for k in sorted(splits[game])]
        else:
            continue
        made.append(Job("procgen", f"{game}.rgb" if options.rgb else game, Path(src), tuple(files)))
    if not made:
        raise BadInput(f"{src}: no Procgen recordings, expected <game>/*.npy or <game>_<k>.gz below it")
    return sorted(made, key=lambda job: job.task)


def trajectories(job: Job, options: Options, count: Count) -> Iterator[Trajectory]:
    """Makes the episodes of one game.

    Args:
        job: One of `jobs`.
        options: The same as there.
        count: Its account, filled in.

    Raises:
        BadInput: A file is unsafe, or is not what RA-DT records.
    """
    read = _episodes if job.files[0].suffix == ".npy" else _buffers
    for episode in read(job, options.rgb, count):
        trajectory = Trajectory(
            domain="procgen",
            task=job.task,
            episode=count.episodes,
            source=f"Procgen (RA-DT, Schmied et al. 2024), converted by lram {importlib.metadata.version('lram')}",
            **episode,
        )
        count.wrote(trajectory.length)
        yield trajectory


def _episodes(job: Job, rgb: bool, count: Count) -> Iterator[dict[str, Any]]:
    for path in job.files:
        try:
            value = load(path)
        except Damaged as error:
            count.problems.append(f"{error}: this episode is left out")
            continue
        record = attributes(value.item() if isinstance(value, np.ndarray) and value.size == 1 else value, str(path))
        arrays = [_array(path, record, key) for key in ("observations", "actions", "rewards", "dones")]
        observations, actions, rewards, dones = (arrays[0], *(array.reshape(-1) for array in arrays[1:]))
        length = len(actions)
        count.read += length
        if len(rewards) != length or len(dones) != length or len(observations) not in (length, length + 1):
            lengths = [len(observations), len(actions), len(rewards), len(dones)]
            raise BadInput(
                f"{path}: observations, actions, rewards, dones have lengths {lengths}, expected T+1, T, T, T"
            )
        _check_frames(path, observations, 4)
        if not length or not dones[-1]:
            count.drop(UNFINISHED, length)
            continue
        if dones[:-1].any():
            raise BadInput(f"{path}: dones are set before the last step, expected one episode")
        _, said, seed, total = _EPISODE.fullmatch(path.name).groups()  # type: ignore[union-attr]
        if int(said) != length or abs(float(total) - float(rewards.sum())) > 0.01 * max(1.0, abs(float(total))):
            found = f"{length} steps and a return of {rewards.sum():g}"
            count.problems.append(f"{path}: its name says {said} steps and a return of {total}, but it holds {found}")
        timeouts = record.get("timeouts")
        truncated = bool(np.asarray(timeouts).reshape(-1)[-1]) if isinstance(timeouts, np.ndarray) else False
        yield {
            "seed": int(seed),
            "states": _frames(observations[:length], _scale(path, observations), rgb),
            "actions": _actions(path, actions),
            "rewards": rewards.astype(np.float32),
            "terminated": not truncated,
            "truncated": truncated,
        }


@dataclass
class _Open:
    """What is known of one environment's episode that no row has ended yet."""

    frames: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[np.ndarray] = field(default_factory=list)
    rows: int = 0
    whole: bool = True
    """Its first rows are known; False after a gap, up to the next end."""


def _buffers(job: Job, rgb: bool, count: Count) -> Iterator[dict[str, Any]]:
    numbered = [(int(_SPLIT.fullmatch(path.name)[2]), path) for path in job.files]  # type: ignore[index]
    opened: list[_Open] = []
    expected, begun = 0, True
    last: np.ndarray | None = None
    before = ""
    for k, path in numbered:
        if k != expected:
            missing = f"{k - expected} before it" if k - expected > 1 else "the one before it"
            count.problems.append(f"{path}: {missing} missing, episodes were not joined across the gap")
            _cut(opened, range(len(opened)), count)
            begun = False
        expected = k + 1
        try:
            split = _Split.of(path, attributes(load(path), str(path)))
        except Damaged as error:
            count.problems.append(f"{error}; episodes were not joined across it")
            _cut(opened, range(len(opened)), count)
            begun = False
            continue
        rows, envs = split.dones.shape
        opened = opened or [_Open(whole=begun) for _ in range(envs)]
        if envs != len(opened):
            raise BadInput(f"{path}: {envs} environments, expected {len(opened)} as in the files before it")
        count.read += rows * envs
        if split.digest == before:
            count.problems.append(f"{path}: holds the same rows as the file before it, and is left out")
            count.drop("file repeated", rows * envs)
            continue
        before = split.digest
        spans = [(0, split.pos)]
        if split.full:
            # A ring that went round: the oldest row is at `pos`, and what came before is overwritten.
            spans = [(split.pos, rows), (0, split.pos)]
            if split.pos:
                count.problems.append(f"{path}: went round, and holds only its last {rows} rows of each environment")
                _cut(opened, range(envs), count)
        else:
            count.drop("row never filled", (rows - split.pos) * envs)
        spans = [span for span in spans if span[0] < span[1]]
        if spans and last is not None:
            first = split.observations[spans[0][0]]
            torn = [e for e in range(envs) if opened[e].rows and opened[e].whole and (first[e] != last[e]).any()]
            if torn:
                count.problems.append(f"{path}: does not continue the file before it in {len(torn)} environments")
                _cut(opened, torn, count)
        for start, stop in spans:
            yield from _split(split, start, stop, opened, rgb, count)
        if spans:
            last = None if split.following is None else split.following[spans[-1][1] - 1].copy()
        del split  # before the next one is read
    for episode in opened:
        count.drop(UNFINISHED if episode.whole else CUT, episode.rows)


def _cut(opened: list[_Open], envs: Iterable[int], count: Count) -> None:
    """Gives up what is open: its rest is not known, and neither is the start of what comes next."""
    for env in envs:
        count.drop(CUT, opened[env].rows)
        opened[env] = _Open(whole=False)


@dataclass
class _Split:
    """The arrays of one buffer, [rows, environments, ...], checked."""

    path: Path
    observations: np.ndarray
    following: np.ndarray | None
    actions: np.ndarray
    rewards: np.ndarray
    dones: np.ndarray
    timeouts: np.ndarray
    seeds: np.ndarray | None
    scale: float
    pos: int
    full: bool
    digest: str

    @classmethod
    def of(cls, path: Path, record: dict[str, Any]) -> _Split:
        observations = _array(path, record, "observations")
        _check_frames(path, observations, 5)
        shape = observations.shape[:2]
        flat = {key: _array(path, record, key, shape) for key in ("actions", "rewards", "dones")}
        for key in ("timeouts", "seeds"):
            flat[key] = _array(path, record, key, shape) if key in record else np.zeros(shape, np.float32)
        following = record.get("next_observations")
        if isinstance(following, np.ndarray) and following.shape != observations.shape:
            raise BadInput(f"{path}: next_observations have shape {following.shape}, expected {observations.shape}")
        pos, full = record.get("pos"), record.get("full")
        if not isinstance(pos, int | np.integer) or not isinstance(full, bool | np.bool_) or not 0 <= pos <= shape[0]:
            raise BadInput(f"{path}: pos {pos!r:.40} and full {full!r:.40}, expected a row number and a truth value")
        digest = hashlib.sha256()
        for part in (flat["actions"], flat["rewards"], flat["seeds"], observations[:1], observations[-1:]):
            digest.update(np.ascontiguousarray(part).data)
        return cls(
            path=path,
            observations=observations,
            following=following if isinstance(following, np.ndarray) else None,
            actions=flat["actions"],
            rewards=flat["rewards"],
            dones=(flat["dones"] != 0) | (flat["timeouts"] != 0),
            timeouts=flat["timeouts"] != 0,
            # All zero is how a buffer starts: its environment did not tell.
            seeds=flat["seeds"] if flat["seeds"].any() else None,
            scale=_scale(path, observations),
            pos=int(pos),
            full=bool(full),
            digest=digest.hexdigest(),
        )

    def seed(self, row: int, env: int) -> int:
        if self.seeds is None or not 0 <= self.seeds[row, env] < EXACT:
            return -1
        return int(self.seeds[row, env])


def _split(split: _Split, start: int, stop: int, opened: list[_Open], rgb: bool, count: Count) -> Iterator[dict]:
    """Cuts rows start..stop at the ends of episodes, and yields those in the order in which they end."""
    begins = [start] * len(opened)
    # argwhere goes row by row: by time, then by environment.
    for ahead, env in np.argwhere(split.dones[start:stop]).tolist():
        row = start + ahead
        episode = opened[env]
        _extend(episode, split, begins[env], row + 1, env, rgb)
        begins[env] = row + 1
        opened[env] = _Open()
        if not episode.whole:
            count.drop(CUT, episode.rows)
            continue
        truncated = bool(split.timeouts[row, env])
        yield {
            "seed": split.seed(row, env),
            "states": np.concatenate(episode.frames),
            "actions": np.concatenate(episode.actions),
            "rewards": np.concatenate(episode.rewards),
            "terminated": not truncated,
            "truncated": truncated,
        }
    for env, episode in enumerate(opened):
        _extend(episode, split, begins[env], stop, env, rgb)


def _extend(episode: _Open, split: _Split, start: int, stop: int, env: int, rgb: bool) -> None:
    episode.rows += stop - start
    if episode.whole and start < stop:
        episode.frames.append(_frames(split.observations[start:stop, env], split.scale, rgb))
        episode.actions.append(_actions(split.path, split.actions[start:stop, env]))
        episode.rewards.append(split.rewards[start:stop, env].astype(np.float32))


def _array(path: Path, record: dict[str, Any], key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Returns an array of numbers by name, reshaped to `shape` where one is expected."""
    array = record.get(key)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise BadInput(f"{path}: {key} is {_kind(array)}, expected an array of numbers")
    if shape is None:
        return array
    if array.size != shape[0] * shape[1] or array.shape[:2] != shape:
        raise BadInput(f"{path}: {key} has shape {array.shape}, expected {shape}")
    return array.reshape(shape)


def _kind(value: Any) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"of type {type(value).__name__}"


def _check_frames(path: Path, frames: np.ndarray, dimensions: int) -> None:
    if frames.ndim != dimensions or frames.shape[-3:] != (3, IMAGE_SIDE, IMAGE_SIDE):
        raise BadInput(f"{path}: observations have shape {frames.shape}, expected (..., 3, {IMAGE_SIDE}, {IMAGE_SIDE})")


def _scale(path: Path, frames: np.ndarray) -> float:
    """Returns what makes 0..255 of frames: 255 where they are floats in [0, 1], else 1."""
    if frames.dtype == np.uint8 or not frames.size:
        return 1.0
    low, high = float(frames.min()), float(frames.max())
    if frames.dtype.kind != "f" or not (low >= 0 and high <= 1):
        raise BadInput(f"{path}: observations are {frames.dtype} in [{low:g}, {high:g}], expected uint8 or [0, 1]")
    return 255.0


def _frames(frames_N3HW: np.ndarray, scale: float, rgb: bool) -> np.ndarray:
    """Makes (N, 1 or 3, 64, 64) uint8 of recorded frames; always a copy."""
    out = np.empty((len(frames_N3HW), 3 if rgb else 1, IMAGE_SIDE, IMAGE_SIDE), np.uint8)
    for start in range(0, len(out), BLOCK):
        block = frames_N3HW[start : start + BLOCK]
        if block.dtype != np.uint8:
            block = np.rint(block * scale).astype(np.uint8)
        out[start : start + BLOCK] = block if rgb else gray(block.transpose(0, 2, 3, 1))[:, None]
    return out


def _actions(path: Path, actions: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        whole = actions.astype(np.int64)
    if (whole != actions).any() or (whole < 0).any() or (whole >= DOMAINS["procgen"].num_actions).any():
        raise BadInput(f"{path}: actions outside 0..{DOMAINS['procgen'].num_actions - 1}")
    return whole
