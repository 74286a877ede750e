"""Draws an episode that a policy plays: what it saw or where its robot was, the return asked for, the action chosen.

    lram watch RUN dmcontrol/cartpole-swingup                 # RUN/evaluation/watch/dmcontrol-cartpole-swingup-0.gif
    lram watch RUN atari/breakout --out breakout.mp4
    path, result = watch(WatchSettings(Path("RUN"), "atari/breakout"))

The episode is one of an evaluation with the same settings. Image domains show the frames the policy saw, Dark-Room its
grid. Vectors are no pictures: DMControl and Meta-World are simulated a second time with the actions that were played,
since an episode follows from its number, and rendered without a display (EGL, or OSMesa where MUJOCO_GL says so).
What it trades away: CompoSuite and MimicGen are not drawn.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from lram.collectors import darkroom
from lram.datasets.specs import DOMAINS, BadInput
from lram.datasets.trajectory import Trajectory
from lram.train import checkpoint
from lram.train.evaluate import targets
from lram.train.ranks import device_of
from lram.train.render import RenderError, render
from lram.train.results import WATCH, label_of
from lram.train.rollouts import RolloutSettings, check, play
from lram.train.settings import DeviceName
from lram.train.simulators import Job

SIDE, PANEL = 256, 64
"""Pixels of a picture's sides, and of what is written below it."""
INK, QUIET, ACCENT = (230, 230, 225), (120, 125, 130), (134, 180, 223)
RENDERED = ("dmcontrol", "metaworld")


@dataclass(frozen=True)
class WatchSettings:
    """Which episode to draw."""

    checkpoint: Path
    """A checkpoint's folder, or a run's folder: then its best checkpoint."""
    task: str
    """Task, as <domain>/<task>."""
    out: Path | None = None
    """File to write, .gif or .mp4; by default a GIF in `evaluation/watch` inside the run's folder."""
    episode: int = 0
    """Number of the episode."""
    target: str = "best"
    """Return to ask for: best (in the data), table, or a number."""
    temperature: float = 1.0
    """Temperature of the actions' distribution; 0 takes the likeliest action."""
    seed: int = 0
    """Seed of the episode and of the actions drawn."""
    every: int = 2
    """Draw one step in so many."""
    speed: int = 20
    """Pictures a second."""
    device: DeviceName = "auto"
    """Where the policy is; auto takes CUDA when there is one."""


def watch(settings: WatchSettings) -> tuple[Path, dict[str, Any]]:
    """Plays the episode and draws it.

    Returns:
        The file, and the episode's result as an evaluation has it.

    Raises:
        BadInput: The task cannot be played or drawn here, or the file is neither GIF nor mp4.
    """
    domain, _, task = settings.task.partition("/")
    if domain not in DOMAINS or not task:
        raise BadInput(f"task {settings.task!r}: expected <domain>/<task>, domains are {', '.join(DOMAINS)}")
    if settings.every < 1 or settings.speed < 1 or settings.episode < 0:
        raise BadInput("--every and --speed have to be at least 1, and --episode at least 0")
    folder = checkpoint.best(settings.checkpoint)
    out = settings.out or folder.parent / WATCH / f"{domain}-{task}-{settings.episode}.gif"
    if out.suffix not in (".gif", ".mp4"):
        raise BadInput(f"{out}: expected a name that ends in .gif or .mp4")
    how = RolloutSettings(1, 1, settings.temperature, settings.seed)
    check(how)
    policy, state = checkpoint.load_policy(folder, device_of(settings.device))
    asked = targets(state, [settings.task], settings.target)
    taken: list[Trajectory] = []
    job = Job(domain, task, settings.episode)
    result = next(play(policy, [job], asked, how, record=taken.append))
    if "failed" in result:
        raise BadInput(f"{settings.task}: {result['failed']}")
    title = f"{settings.task}, {label_of(state.policy)}"
    pictures = list(draw(taken[0], asked[settings.task], title, settings))
    out.parent.mkdir(parents=True, exist_ok=True)
    (write_gif if out.suffix == ".gif" else write_mp4)(pictures, out, settings.speed)
    return out, result


def draw(trajectory: Trajectory, target: float, title: str, settings: WatchSettings) -> Iterator[np.ndarray]:
    """Yields the pictures of an episode, (SIDE + PANEL, SIDE, 3) uint8, one in `settings.every` steps."""
    paid = np.concatenate([[0.0], np.cumsum(trajectory.rewards, dtype=np.float64)])
    for t, scene in enumerate(_scenes(trajectory, settings)):
        if t % settings.every:
            continue
        picture = Image.new("RGB", (SIDE, SIDE + PANEL), (22, 24, 27))
        picture.paste(Image.fromarray(scene), (0, 0))
        pen = ImageDraw.Draw(picture)
        pen.text((6, SIDE + 4), title[:42], fill=QUIET)
        pen.text((6, SIDE + 18), f"step {t}   return-to-go {target - paid[t]:.1f}   so far {paid[t]:.1f}", fill=INK)
        _action(pen, trajectory.actions[t], DOMAINS[trajectory.domain].num_actions)
        yield np.array(picture)


def _action(pen: ImageDraw.ImageDraw, action: Any, count: int) -> None:
    """Draws an action: the one chosen among all, or a bar a dimension from -1 to 1."""
    top, bottom = SIDE + 38, SIDE + PANEL - 6
    continuous = np.ndim(action) == 1
    count = len(action) if continuous else count
    width = (SIDE - 12) / count
    for i in range(count):
        left, right = 6 + i * width, 6 + (i + 1) * width - 2
        if continuous:
            middle = (top + bottom) / 2
            height = float(action[i]) * (bottom - top) / 2
            pen.line((left, middle, right, middle), fill=QUIET)
            pen.rectangle((left, min(middle, middle - height), right, max(middle, middle - height)), fill=ACCENT)
        else:
            pen.rectangle((left, top, right, bottom), outline=QUIET, fill=ACCENT if i == action else None)
            if width > 11:
                pen.text((left + 2, top + 4), str(i), fill=(22, 24, 27) if i == action else QUIET)


def _scenes(trajectory: Trajectory, settings: WatchSettings) -> Iterator[np.ndarray]:
    """Yields what is seen at every step, (SIDE, SIDE, 3) uint8."""
    if trajectory.states.dtype == np.uint8:
        for state in trajectory.states:
            frame = np.broadcast_to(state.transpose(1, 2, 0), (*state.shape[1:], 3))
            yield cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    elif trajectory.domain == "darkroom":
        room = darkroom.parse_task(trajectory.task)
        for state in trajectory.states:
            yield _room(room, state)
    elif trajectory.domain in RENDERED:
        yield from _rendered(trajectory, settings)
    else:
        raise BadInput(
            f"{trajectory.domain} cannot be drawn; these can: atari, procgen, darkroom, {', '.join(RENDERED)}"
        )


def _room(room: darkroom.Room, state: np.ndarray) -> np.ndarray:
    """Draws the grid, the goal or door, the key, and the agent."""
    picture = Image.new("RGB", (SIDE, SIDE), (22, 24, 27))
    pen = ImageDraw.Draw(picture)
    cell = SIDE / max(room.rows, room.cols)

    def box(place: Any, margin: float) -> tuple[float, float, float, float]:
        row, col = float(place[0]), float(place[1])
        return (col + margin) * cell, (row + margin) * cell, (col + 1 - margin) * cell, (row + 1 - margin) * cell

    for row in range(room.rows):
        for col in range(room.cols):
            pen.rectangle(box((row, col), 0), outline=(60, 64, 70))
    pen.rectangle(box(room.goal, 0.1), fill=(44, 110, 73))
    if room.key is not None:
        pen.rectangle(box(room.key, 0.25), fill=(190, 160, 60))
    pen.ellipse(box(state, 0.25), fill=ACCENT)
    return np.array(picture)


def _rendered(trajectory: Trajectory, settings: WatchSettings) -> Iterator[np.ndarray]:
    """Simulates an episode again in a process of its own: a graphics driver that fails may take its process with it."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            scenes = pool.submit(render, trajectory, settings.seed, settings.every, SIDE).result()
    except (BrokenProcessPool, RenderError) as error:
        raise BadInput(
            f"{trajectory.domain}: MuJoCo cannot render here with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); "
            "install libegl1 or libosmesa6 and set MUJOCO_GL to egl or osmesa"
        ) from error
    for t in range(trajectory.length):
        yield scenes[t // settings.every]


def write_gif(pictures: list[np.ndarray], path: Path, speed: int) -> None:
    """Writes an animation that repeats."""
    first, *others = (Image.fromarray(picture).quantize(64) for picture in pictures)
    first.save(path, save_all=True, append_images=others, duration=1000 // speed, loop=0)


def write_mp4(pictures: list[np.ndarray], path: Path, speed: int) -> None:
    """Writes a film.

    Raises:
        BadInput: OpenCV has no encoder for it here.
    """
    height, width = pictures[0].shape[:2]
    film = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), speed, (width, height))
    if not film.isOpened():
        raise BadInput(f"{path}: OpenCV cannot write mp4 here; take a name that ends in .gif")
    for picture in pictures:
        film.write(picture[..., ::-1].copy())
    film.release()
