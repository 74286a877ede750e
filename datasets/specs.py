"""What is known of every domain and task before any file is opened: spaces, scales, reference scores.

    python -c "from lram.datasets.specs import DOMAINS; print(DOMAINS['atari'])"

A domain fixes what the policy sees and may do; a task adds its scores. Both are plain data, so that the
trainer never builds a simulator to learn how wide an action is. What is not in `tasks.csv` (Dark-Room) simply
has no reference scores.
"""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np

IMAGE_SIDE = 64
"""Height and width of every image state, in pixels."""
STATE_WIDTH = 204
"""Width that every vector state is padded to: the 24 DMControl keys end to end."""
NUM_DISCRETE = 18
"""Size of the shared discrete action set, the full Atari one."""
NUM_DIMS = 8
"""Widest continuous action, Composuite's."""
NUM_BINS = 256
"""Bins per continuous action dimension, uniform on [-1, 1]."""
NUM_LOGITS = NUM_DISCRETE + NUM_DIMS * NUM_BINS


class BadInput(ValueError):
    """A user's input is wrong: the message is one sentence that says which file or field, and what was expected."""


@dataclass(frozen=True)
class DomainSpec:
    """The spaces of one domain, and the number its rewards are divided by on their way into the policy.

    Attributes:
        name: Name used in paths, attributes and settings.
        state: "vector" (T, D) float32, or "image" (T, C, 64, 64) uint8.
        action: "discrete" (T,) int64, or "continuous" (T, A) float32 in [-1, 1].
        num_actions: Number of valid discrete actions, or of continuous dimensions at most.
        reward_scale: Rewards and returns-to-go are divided by it (LRAM code, by domain name).
        union: Vector states are scattered into the DMControl union layout instead of padded on the right.
        window_episodes: Whole episodes in a training window; 1 means windows of `context` steps inside one
            episode, more is what in-context learning needs (Algorithm Distillation).
    """

    name: str
    state: Literal["vector", "image"]
    action: Literal["discrete", "continuous"]
    num_actions: int
    reward_scale: float = 1.0
    union: bool = False
    window_episodes: int = 1


DOMAINS: dict[str, DomainSpec] = {
    spec.name: spec
    for spec in (
        DomainSpec("atari", "image", "discrete", 18, reward_scale=20.0),
        DomainSpec("composuite", "vector", "continuous", 8),
        DomainSpec("dmcontrol", "vector", "continuous", 6, reward_scale=100.0, union=True),
        DomainSpec("metaworld", "vector", "continuous", 4, reward_scale=200.0),
        DomainSpec("mimicgen", "vector", "continuous", 7),
        DomainSpec("procgen", "image", "discrete", 15),
        DomainSpec("darkroom", "vector", "discrete", 5, window_episodes=2),
    )
}


@dataclass(frozen=True)
class Task:
    """One row of `tasks.csv`: a task's split and the scores it is normalised by.

    Attributes:
        domain: Its domain's name.
        name: Its name inside the domain.
        split: "train" or "holdout".
        env_id: What its simulator calls it.
        reference: What `score_low` and `score_high` mean; it differs by domain.
        score_low: Score that normalises to 0, None where there is none.
        score_high: Score that normalises to 1, None where there is none.
        target_return: Return to ask for at evaluation, None where the table has none.
    """

    domain: str
    name: str
    split: str
    env_id: str
    reference: str
    score_low: float | None
    score_high: float | None
    target_return: float | None


@functools.cache
def tasks() -> dict[tuple[str, str], Task]:
    """Returns the 432 training and 37 hold-out tasks, keyed by (domain, task)."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    text = resources.files("lram.datasets").joinpath("tasks.csv").read_text()
    return {
        (row["domain"], row["task"]): Task(
            row["domain"],
            row["task"],
            row["split"],
            row["env_id"],
            row["reference"],
            number(row["score_low"]),
            number(row["score_high"]),
            number(row["target_return"]),
        )
        for row in csv.DictReader(text.splitlines())
    }


def reference(domain: str, task: str) -> Task | None:
    """Returns the row of `tasks.csv` that a task is measured by, None where there is none.

    A dot separates a variant from the task it varies: `IIWA_Box_None_PickPlace.medium` holds other trajectories of
    `IIWA_Box_None_PickPlace`, `bigfish.rgb` the same ones in colour.
    """
    return tasks().get((domain, task.split(".")[0]))


@functools.cache
def _union_layout() -> dict[str, list[int]]:
    text = resources.files("lram.datasets").joinpath("dmcontrol_union.json").read_text()
    return json.loads(text)


def state_columns(domain: str, layout: dict[str, list[int]] | None, width: int) -> np.ndarray:
    """Says which of the policy's 204 state columns each native column goes to.

    Args:
        domain: Name of a vector domain.
        layout: `state_layout` of the task, {key: [start, stop]}; needed for DMControl's union only.
        width: Number of native columns.

    Returns:
        Column numbers, shape (width,), int64.

    Raises:
        BadInput: The state does not fit, or a DMControl key is unknown or wider than its place.
    """
    if not DOMAINS[domain].union:
        if width > STATE_WIDTH:
            raise BadInput(f"{domain}: a state of {width} columns does not fit the policy's {STATE_WIDTH}")
        return np.arange(width)
    if layout is None:
        raise BadInput(f"{domain}: trajectories carry no state_layout, needed for the union layout")
    union = _union_layout()
    columns = np.full(width, -1, np.int64)
    for key, (start, stop) in layout.items():
        if key not in union or stop - start > union[key][1] - union[key][0]:
            raise BadInput(f"{domain}: state_layout key {key!r} [{start}, {stop}) has no place in the union")
        columns[start:stop] = np.arange(union[key][0], union[key][0] + stop - start)
    if (columns < 0).any():
        raise BadInput(f"{domain}: state_layout does not cover all {width} columns")
    return columns
