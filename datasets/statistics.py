"""Describes one task's data: what the quality report says of it, as plain JSON values.

    statistics = task_statistics(ROOT / "darkroom" / "room10x10-goal-07-03")
    statistics["returns"]["mean"], statistics["learning_curve"]["mean"]

Returns, lengths and endings come from the index and cover every trajectory. What needs the arrays (actions,
rewards, states) is computed from at most 200 trajectories, evenly spaced over the episodes and read one at a
time, so memory and time do not grow with the task; the result says how many were read. Floats keep eight
significant digits. Nothing is verified here, that is the business of `lram check`.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lram.datasets.index import VALIDATION, TaskIndex, read_index
from lram.datasets.reader import TaskReader
from lram.datasets.specs import BadInput, reference

SAMPLE = 200
"""Trajectories read per task, at most."""
CURVE_BINS = 50
"""Points of a learning curve, at most."""
HISTOGRAM_BINS = 30
"""Bins of a histogram of returns or lengths, at most."""
ACTION_BINS = 21
"""Bins of a continuous action dimension: odd, so that 0 lies in the middle of one."""
SATURATED = 0.99
"""Beyond this absolute value an action counts as saturated."""
FILM_FRAMES = 6
"""Frames of a film strip."""
QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


def task_statistics(folder: Path, duplicates: int | None = None) -> dict[str, Any]:
    """Describes one task, as far as what is on disk allows.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.
        duplicates: Trajectories that repeat an earlier one, from the check; None where it has not run.

    Returns:
        JSON values only. `error` is None, or says what could not be read; then what depends on it is None.
    """
    folder = Path(folder)
    domain, task = folder.parent.name, folder.name
    known = reference(domain, task)
    result: dict[str, Any] = {
        "task": f"{domain}/{task}",
        "domain": domain,
        "name": task,
        "split": known.split if known else None,
        "error": None,
        "complete": False,
        "trajectories": 0,
        "transitions": 0,
        "bytes": 0,
        "duplicates": duplicates,
    }
    try:
        index = read_index(folder)
        result |= _index_statistics(index)
        if index.table.num_rows:
            result["scores"] = _scores(domain, task, result["returns"], result["success_rate"])
            result |= _array_statistics(TaskReader(index))
    except BadInput as error:
        result["error"] = str(error)
    except KeyError as error:
        result["error"] = f"{folder}: the index's metadata lacks {error}"
    if result["error"]:
        result["error"] = result["error"].replace(f"{folder.parent.parent}/", "")
    return _plain(result)


def sample_rows(count: int) -> np.ndarray:
    """Returns the positions of at most `SAMPLE` trajectories out of `count`, evenly spaced, ends included."""
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).round().astype(np.int64))


def _index_statistics(index: TaskIndex) -> dict[str, Any]:
    """Describes all trajectories of a task from its index alone."""
    meta, table = index.meta, index.table
    result: dict[str, Any] = {
        "complete": meta["complete"],
        "provenance": meta["provenance"],
        "account": meta.get("account"),
        "trajectories": table.num_rows,
    }
    if table.num_rows == 0:
        return result
    lengths, returns = index.numpy("length").astype(np.int64), index.numpy("return")
    terminated, truncated = index.numpy("terminated"), index.numpy("truncated")
    success = table["success"].drop_null().to_numpy()
    return result | {
        "transitions": int(lengths.sum()),
        "bytes": int(index.numpy("size").sum()),
        "validation": int((index.numpy("split") == VALIDATION).sum()),
        "codec": meta["codec"],
        "state": {"shape": meta["state_shape"], "dtype": meta["state_dtype"], "layout": meta["state_layout"]},
        "action": {"shape": meta["action_shape"]},
        "terminated": int(terminated.sum()),
        "truncated": int((truncated & ~terminated).sum()),
        "unfinished": int((~truncated & ~terminated).sum()),
        "success_known": len(success),
        "success_rate": success.mean() if len(success) else None,
        "returns": describe(returns),
        "lengths": describe(lengths),
        "learning_curve": learning_curve(index.numpy("episode"), returns),
    }


def describe(values: np.ndarray) -> dict[str, Any]:
    """Returns mean, std, extremes, quantiles and a histogram of values; {} when none is finite."""
    values = values[np.isfinite(values)].astype(np.float64)
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {
        "mean": values.mean(),
        "std": values.std(),
        "min": values.min(),
        **dict(zip(QUANTILES, quantiles)),
        "max": values.max(),
        "histogram": histogram(values),
    }


def histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts values in at most `HISTOGRAM_BINS` equal bins: bin i is [start + i × width, start + (i+1) × width).

    Whole numbers get bins of a whole width around them: others would hold now two of them, now three.
    """
    low, high = float(values.min()), float(values.max())
    if np.array_equal(values, np.rint(values)):
        width = float(math.ceil((high - low + 1) / HISTOGRAM_BINS))
        bins, start = math.ceil((high - low + 1) / width), low - 0.5
    else:
        bins = HISTOGRAM_BINS if high > low else 1
        width, start = (high - low) / bins or 1.0, low
    # The largest value closes the last bin.
    place = np.minimum((values - start) // width, bins - 1).astype(np.int64)
    return {"start": start, "width": width, "counts": np.bincount(place, minlength=bins)}


def learning_curve(episodes: np.ndarray, returns: np.ndarray) -> dict[str, Any]:
    """Averages returns over equal ranges of the episode number; ranges without an episode are left out.

    Returns:
        Lists of equal length: `episode` (mean number in the range), `mean`, `q25`, `q75`, `count`.
    """
    first = int(episodes.min())
    span = int(episodes.max()) - first + 1
    place = (episodes - first) * min(CURVE_BINS, span) // span
    curve: dict[str, list[Any]] = {key: [] for key in ("episode", "mean", "q25", "q75", "count")}
    for i in np.unique(place):
        inside = returns[place == i]
        q25, q75 = np.quantile(inside, [0.25, 0.75])
        values = episodes[place == i].mean(), inside.mean(), q25, q75, len(inside)
        for key, value in zip(curve, values):
            curve[key].append(value)
    return curve


def _scores(domain: str, task: str, returns: dict[str, Any], success: float | None) -> dict[str, Any] | None:
    """Returns reference scores and what they make of the data's mean; None where the task has none."""
    known = reference(domain, task)
    if known is None or not returns:
        return None
    low, high, normalised = known.score_low, known.score_high, None
    if low is not None and high is not None and high != low:
        # MimicGen's score is its success rate, not its return.
        score = success if known.reference == "success" else returns["mean"]
        normalised = None if score is None else (score - low) / (high - low)
    return {
        "reference": known.reference,
        "low": low,
        "high": high,
        "target_return": known.target_return,
        "normalised_mean": normalised,
    }


def _array_statistics(reader: TaskReader) -> dict[str, Any]:
    """Describes actions, rewards and states of a sample, and takes a film strip of image tasks."""
    discrete = reader.domain.action == "discrete"
    actions = _Discrete(reader.domain.num_actions) if discrete else _Continuous(reader.num_dims)
    vectors = _Vectors(reader.state_shape[0]) if reader.domain.state == "vector" else None
    steps = nonzero = 0
    low, high = math.inf, -math.inf
    readable: list[int] = []
    error, rows = None, sample_rows(len(reader))
    for row in rows.tolist():
        whole = row, 0, int(reader.lengths[row])
        try:
            rewards = reader.slice("rewards", *whole)
            taken = reader.slice("actions", *whole)
            states = reader.slice("states", *whole) if vectors else None
        except BadInput as problem:
            error = error or str(problem)
            continue
        readable.append(row)
        steps += len(rewards)
        nonzero += int(np.count_nonzero(rewards))
        low, high = min(low, float(rewards.min())), max(high, float(rewards.max()))
        actions.add(taken)
        if vectors and states is not None:
            vectors.add(states)
    result: dict[str, Any] = {"sampled": {"trajectories": len(readable), "transitions": steps}}
    if error:
        missing = f"{len(rows) - len(readable)} of {len(rows)} sampled trajectories are unreadable"
        result["error"] = f"{missing}; the first: {error}"
    if not readable:
        return result
    result["rewards"] = {"nonzero_share": nonzero / steps, "min": low, "max": high}
    result["actions"] = actions.result()
    result["states"] = vectors.result() if vectors else None
    result["film"] = None if vectors else _film(reader, readable)
    return result


class _Discrete:
    """Counts discrete actions."""

    def __init__(self, num_actions: int) -> None:
        self._counts = np.zeros(num_actions, np.int64)
        self._outside = 0

    def add(self, actions_T: np.ndarray) -> None:
        inside = actions_T[(actions_T >= 0) & (actions_T < len(self._counts))]
        self._counts += np.bincount(inside, minlength=len(self._counts))
        self._outside += len(actions_T) - len(inside)

    def result(self) -> dict[str, Any]:
        return {"kind": "discrete", "counts": self._counts, "outside": self._outside}


class _Continuous:
    """Counts continuous actions by dimension and bin, and measures how smoothly they change."""

    def __init__(self, num_dims: int) -> None:
        self._counts = np.zeros((num_dims, ACTION_BINS), np.int64)
        self._saturated = np.zeros(num_dims, np.int64)
        self._steps = self._outside = 0
        self._mse: list[float] = []

    def add(self, actions_TA: np.ndarray) -> None:
        inside = np.abs(actions_TA) <= 1
        place = np.floor((np.where(inside, actions_TA, 0).astype(np.float64) + 1) / 2 * ACTION_BINS)
        place = np.minimum(place, ACTION_BINS - 1).astype(np.int64)
        for dim, counts in enumerate(self._counts):
            counts += np.bincount(place[inside[:, dim], dim], minlength=ACTION_BINS)
        self._saturated += (np.abs(actions_TA) > SATURATED).sum(axis=0)
        self._steps += len(actions_TA)
        self._outside += int((~inside).sum())
        if len(actions_TA) > 1:
            self._mse.append(float(np.mean(np.diff(actions_TA.astype(np.float64), axis=0) ** 2)))

    def result(self) -> dict[str, Any]:
        return {
            "kind": "continuous",
            "counts": self._counts,
            "outside": self._outside,
            "saturated_share": self._saturated / self._steps,
            # The paper's Table 7: per trajectory over steps and dimensions, then over trajectories.
            "mse_mean": np.mean(self._mse) if self._mse else None,
            "mse_std": np.std(self._mse) if self._mse else None,
        }


class _Vectors:
    """Finds columns of vector states that never change."""

    def __init__(self, width: int) -> None:
        self._low = np.full(width, np.inf)
        self._high = np.full(width, -np.inf)
        self._moves = np.zeros(width, bool)

    def add(self, states_TD: np.ndarray) -> None:
        low, high = states_TD.min(axis=0), states_TD.max(axis=0)
        self._low, self._high = np.fmin(self._low, low), np.fmax(self._high, high)
        self._moves |= low != high

    def result(self) -> dict[str, Any]:
        constant = self._low == self._high
        dead = constant & (self._low == 0)
        return {
            "columns": len(constant),
            "dead": np.flatnonzero(dead),
            "constant": np.flatnonzero(constant & ~dead),
            # A goal, for example: it differs between trajectories only.
            "constant_in_trajectory": np.flatnonzero(~self._moves & ~constant),
        }


def _film(reader: TaskReader, rows: list[int]) -> dict[str, Any] | None:
    """Takes evenly spaced frames of the trajectory with the highest return, as one PNG in base64."""
    row = max(rows, key=lambda row: float(reader.returns[row]))
    steps = np.unique(np.linspace(0, reader.lengths[row] - 1, FILM_FRAMES).round().astype(np.int64))
    try:
        frames = [reader.slice("states", row, step, step + 1)[0] for step in steps.tolist()]
    except BadInput:
        return None
    gap = np.full((*frames[0].shape[:2], 1), 128, np.uint8)
    strip_CHW = np.concatenate([part for frame in frames for part in (gap, frame)][1:], axis=2)
    return {
        "episode": int(reader.episodes[row]),
        "steps": steps,
        "png": base64.b64encode(png(strip_CHW.transpose(1, 2, 0))).decode(),
    }


def png(image_HWC: np.ndarray) -> bytes:
    """Encodes a uint8 image, gray or RGB, as PNG; no library, so the bytes depend on zlib only."""
    height, width, channels = image_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row starts with its filter, 0
    rows[:, 1:] = image_HWC.reshape(height, -1)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def _plain(value: Any) -> Any:
    """Makes JSON values: arrays become lists, floats keep eight significant digits, NaN and inf become None."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value
