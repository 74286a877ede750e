"""Data to measure readers on: like the real in length, width, smoothness and compressibility.

    for trajectory in atari("breakout", frames=10_000): ...
    write_lram_file(path, trajectory)       # as the LRAM code stores it

Atari's frames come from the emulator itself (`pip install lram[atari]`), played at random; Composuite's episodes
from its own files where a folder of them is given. Everything else is a sum of slow waves with a little noise:
smooth as motion is, and as hard to compress as measured signals are.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa

from lram.datasets.index import SCHEMA, task_folder, trajectory_path, write_index
from lram.datasets.specs import BadInput, tasks
from lram.datasets.trajectory import IMAGE_CHUNK, IMAGE_SIDE, VECTOR_CHUNK, Trajectory

GAMES = (
    *("breakout", "pong", "seaquest", "space_invaders", "qbert"),
    *("ms_pacman", "asterix", "freeway", "enduro", "boxing"),
)
"""Atari games whose frames are measured."""
STEPS_PER_FRAME = 4
WALKER = {"orientations": [0, 14], "height": [14, 15], "velocity": [15, 24]}
"""State layout of DMControl's walker."""

Make = Callable[[int], Trajectory]
"""Makes a trajectory from its episode number."""


def waves(rng: np.random.Generator, length: int, width: int) -> np.ndarray:
    """Returns (length, width) float32 signals of slow waves and 2 % of noise."""
    seconds_T1 = np.arange(length)[:, None] / 50
    total_TD = 0.02 * rng.standard_normal((length, width))
    for _ in range(4):
        heights, speeds, phases = rng.standard_normal(width), rng.uniform(0.5, 6, width), rng.uniform(0, 6, width)
        total_TD += heights * np.sin(seconds_T1 * speeds + phases)
    return total_TD.astype(np.float32)


def vector_maker(domain: str, task: str, length: int, width: int, dims: int) -> Make:
    """Returns a maker of smooth trajectories of one width."""

    def make(episode: int) -> Trajectory:
        rng = np.random.default_rng([episode, length, width])
        return Trajectory(
            domain,
            task,
            episode,
            seed=episode,
            states=waves(rng, length, width),
            actions=np.clip(waves(rng, length, dims) / 3, -1, 1),
            rewards=np.abs(waves(rng, length, 1)[:, 0]),
            terminated=False,
            truncated=True,
            source="synthetic",
            state_layout=WALKER if domain == "dmcontrol" else None,
        )

    return make


def composuite_maker(task: str, samples: Path | None) -> Make:
    """Returns a maker of Composuite's trajectories: whole episodes of its own files in turn, else synthetic ones.

    Raises:
        BadInput: The folder of samples holds no such file.
    """
    synthetic = vector_maker("composuite", task, 500, 93, 8)
    if samples is None:

        def make_synthetic(episode: int) -> Trajectory:
            trajectory = synthetic(episode)
            # Obstacle, goal and one-hots stand still in the real ones, too.
            trajectory.states[:, 14:61] = trajectory.states[0, 14:61].round()
            return trajectory

        return make_synthetic
    episodes = []
    for path in sorted(Path(samples).glob("**/*_*_*_*/data.hdf5")):
        with h5py.File(path) as file:
            arrays = [np.asarray(file[name], np.float32) for name in ("observations", "actions", "rewards")]
            ends = np.flatnonzero(np.asarray(file["terminals"], bool) | np.asarray(file["timeouts"], bool)) + 1
        episodes += [[array[a:b] for array in arrays] for a, b in zip([0, *ends], ends)]
    if not episodes:
        raise BadInput(f"{samples}: holds no <Robot>_<Object>_<Obstacle>_<Objective>/data.hdf5")

    def make(episode: int) -> Trajectory:
        states, actions, rewards = episodes[episode % len(episodes)]
        actions = np.clip(actions, -1, 1)
        return Trajectory(
            "composuite", task, episode, episode, states, actions, rewards, False, True, "CompoSuite's own files"
        )

    return make


def _area(size: int, to: int) -> np.ndarray:
    """Returns the matrix (to, size) that averages neighbours, as area interpolation does."""
    edges = np.linspace(0, size, to + 1)
    low, high = edges[:-1, None], edges[1:, None]
    at = np.arange(size)
    overlap = np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, 1)
    return (overlap / overlap.sum(1, keepdims=True)).astype(np.float32)


def has_emulator() -> bool:
    """Says whether Atari's frames can come from the emulator."""
    return importlib.util.find_spec("ale_py") is not None


def _blocks(domain: str, game: str, frames: int) -> Iterator[Trajectory]:
    rng = np.random.default_rng(len(game))
    background = rng.integers(0, 255, (8, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    for episode, start in enumerate(range(0, frames, 1000)):
        length = min(1000, frames - start)
        states = np.broadcast_to(background, (length, 1, IMAGE_SIDE, IMAGE_SIDE)).copy()
        for path_T2 in (waves(rng, length, 2) for _ in range(6)):
            for frame, (y, x) in zip(states[:, 0], np.abs(path_T2 * 16).astype(int) % 58):
                frame[y : y + 6, x : x + 6] = 255
        actions, rewards = rng.integers(0, 15, length), np.zeros(length, np.float32)
        yield Trajectory(domain, game, episode, 0, states, actions, rewards, False, True, "synthetic frames")


def atari(game: str, frames: int, domain: str = "atari") -> Iterator[Trajectory]:
    """Plays a game at random and yields its episodes, `frames` transitions in all.

    As in DQN-Replay: frame skip 4, sticky actions, the brighter of two frames, 84×84, then 64×64. Without the
    emulator (`has_emulator`) blocks move over a still background instead.
    """
    if not has_emulator():
        yield from _blocks(domain, game, frames)
        return
    import ale_py
    from ale_py import roms

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    emulator = ale_py.ALEInterface()
    emulator.setInt("random_seed", 0)
    emulator.setFloat("repeat_action_probability", 0.25)
    rom = roms.get_rom_path(game)
    assert rom is not None
    emulator.loadROM(rom)
    choices = emulator.getMinimalActionSet()
    height, width = emulator.getScreenDims()
    down, right = ((_area(84, IMAGE_SIDE) @ _area(size, 84)) for size in (height, width))
    rng = np.random.default_rng(0)
    made = episode = 0
    while made < frames:
        emulator.reset_game()
        states, actions, rewards = [], [], []
        screen = emulator.getScreenGrayscale()
        while not emulator.game_over() and made < frames:
            action = int(rng.integers(len(choices)))
            states.append(np.rint(down @ screen.astype(np.float32) @ right.T).astype(np.uint8))
            actions.append(action)
            rewards.append(sum(emulator.act(choices[action]) for _ in range(STEPS_PER_FRAME - 1)))
            before = emulator.getScreenGrayscale()
            rewards[-1] += emulator.act(choices[action])
            screen = np.maximum(before, emulator.getScreenGrayscale())
            made += 1
        over = emulator.game_over()
        yield Trajectory(
            domain,
            game,
            episode,
            seed=0,
            states=np.stack(states)[:, None],
            actions=np.array(actions, np.int64) % 15 if domain == "procgen" else np.array(actions, np.int64),
            rewards=np.clip(np.array(rewards, np.float32), -1, 1),
            terminated=over,
            truncated=not over,
            source=f"ale-py {ale_py.__version__}, random actions",
        )
        episode += 1


def write_lram_file(path: Path, trajectory: Trajectory, times: int = 1) -> None:
    """Writes a trajectory as the LRAM code does: every array gzip-1 in h5py's automatic chunks.

    Args:
        path: The file.
        trajectory: What to write.
        times: How often each gray frame is stored; the LRAM code makes RGB of it, three times the same.
    """
    with h5py.File(path, "w") as file:
        for name in ("states", "actions", "rewards", "dones", "returns_to_go"):
            data = getattr(trajectory, name)
            data = data.repeat(times, axis=1) if name == "states" and times > 1 else data
            file.create_dataset(name, data=data, compression="gzip", compression_opts=1)


def read_lram_window(path: str, start: int, stop: int) -> list[np.ndarray]:
    """Reads a window as the LRAM code does: opens the file, slices each array."""
    with h5py.File(path, "r") as file:
        return [file[name][start:stop] for name in ("states", "actions", "rewards", "returns_to_go", "dones")]


TABLE_1 = {
    "atari": (136_000, 205e6, 240),
    "composuite": (480_000, 240e6, 300),
    "dmcontrol": (110_000, 110e6, 130),
    "metaworld": (450_000, 90e6, 190),
    "mimicgen": (83_000, 25e6, 190),
    "procgen": (2_185_000, 224e6, 1000),
}
"""Trajectories and transitions of each domain (arXiv 2410.22391, Table 1), and about how many bytes a transition of
ours takes in its file (our samples)."""


def write_synthetic_index(root: Path, trajectories: int) -> None:
    """Writes the indices of a dataset of the 432 training tasks, without its files, in the proportions of Table 1.

    Args:
        root: The dataset's directory.
        trajectories: About how many there are in all; every task has at least one.
    """
    names = [key for key, task in tasks().items() if task.split == "train"]
    share = trajectories / sum(count for count, _, _ in TABLE_1.values())
    rng = np.random.default_rng(0)
    for domain, name in names:
        count, transitions, width = TABLE_1[domain]
        per_task = max(1, round(count * share / sum(other == domain for other, _ in names)))
        episodes = np.arange(per_task)
        paths = pa.array([trajectory_path(episode) for episode in range(per_task)])
        none = pa.nulls(per_task)
        mean = transitions / count
        image = domain in ("atari", "procgen")
        chunked = image or domain == "composuite"
        lengths = rng.integers(max(1, int(mean / 2)), int(mean * 3 / 2), per_task)
        counts = -(-lengths // (IMAGE_CHUNK if image else VECTOR_CHUNK)) if chunked else np.zeros(per_task, np.int64)
        lists = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        sizes = rng.integers(1000, 40_000, lists[-1])
        offsets = pa.array(rng.integers(2048, 10**6, per_task))
        columns = {
            "episode": episodes,
            "path": paths,
            "length": lengths,
            "return": rng.uniform(0, 1000, per_task),
            "success": none,
            "terminated": pa.repeat(False, per_task),
            "truncated": pa.repeat(True, per_task),
            "seed": rng.integers(2**31, size=per_task),
            "split": pa.array(np.where(rng.random(per_task) < 0.025, "validation", "train")),
            "size": (4096 + lengths * width * rng.uniform(0.8, 1.2, per_task)).astype(np.int64),
            "sha256": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), per_task, [None, pa.py_buffer(rng.bytes(32 * per_task))]
            ),
            **{f"{array}_offset": offsets for array in ("actions", "rewards", "returns_to_go", "dones")},
            "states_offset": none if chunked else offsets,
            "chunk_offsets": pa.ListArray.from_arrays(lists, np.cumsum(sizes)) if chunked else none,
            "chunk_sizes": pa.ListArray.from_arrays(lists, sizes.astype(np.int32)) if chunked else none,
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
        shape = {"composuite": 93, "dmcontrol": 24, "metaworld": 39}.get(domain, 32)
        meta = {
            "domain": domain,
            "task": name,
            "complete": True,
            "provenance": {},
            "codec": "gzip" if chunked else "none",
            "state_shape": [1, IMAGE_SIDE, IMAGE_SIDE] if image else [shape],
            "state_dtype": "uint8" if image else "float32",
            "action_shape": [] if image else [4],
            "state_layout": WALKER if domain == "dmcontrol" else None,
        }
        folder = task_folder(root, domain, name)
        folder.mkdir(parents=True)
        table = pa.Table.from_arrays(arrays, schema=SCHEMA)
        write_index(folder, table.replace_schema_metadata({"lram": json.dumps(meta)}))
