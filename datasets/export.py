"""Gives a dataset to other libraries, and takes one from Minari.

    export_minari(ROOT / "darkroom" / "room10x10-goal-07-03", OUT)
    MINARI_DATASETS_PATH=OUT python -c "import minari; minari.load_dataset('lram/darkroom/room10x10-goal-07-03-v0')"
    for trajectory in from_minari(OUT / "lram/darkroom/room10x10-goal-07-03-v0"): ...
    export_lram(ROOT / "darkroom" / "room10x10-goal-07-03", OUT)

Minari keeps one more observation than actions. Where a trajectory's final state is unknown, its last state is
repeated in that place, and the episode's metadata say so; taken back, the final state is unknown again. What
Minari has no field for (episode number, success, source, layout) stands in the metadata too, so that the way there
and back loses nothing. Images are stored as they are, not as JPEG: exact, and several times larger.
For the LRAM code the files stay as they are: hard links, or copies where OUT is on another disk, beside the JSON
files that its loader reads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lram.datasets.disk import whole_folder
from lram.datasets.index import SCHEMA, TaskIndex, fingerprint, read_index
from lram.datasets.specs import DOMAINS, BadInput
from lram.datasets.trajectory import Trajectory, read

NAMESPACE = "lram"
KEY = "lram"
"""Name under which Minari's metadata keep what it has no field for."""
MARK = ".lram"
"""File in an exported folder that holds the fingerprint of the task it was made from."""


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise BadInput("Minari is not installed, install it with `pip install lram[minari]`") from error
    return minari


def minari_id(domain: str, task: str) -> str:
    """Returns the name of a task's Minari dataset; Minari allows letters, digits, '_' and '-' only."""
    return f"{NAMESPACE}/{domain}/{re.sub(r'[^-_A-Za-z0-9]', '_', task)}-v0"


def state_of(folder: Path, target: Path) -> Literal["missing", "same", "old"]:
    """Says whether a task's export is there, and whether it is of what the task holds now.

    Raises:
        BadInput: The folder `target` is no export.
    """
    if not target.exists():
        return "missing"
    mark = target / MARK
    if not mark.is_file():
        raise BadInput(f"{target}: exists already and was not exported by lram, choose another folder")
    return "same" if mark.read_text() == fingerprint([Path(folder)]) else "old"


@contextmanager
def _whole(target: Path, folder: Path) -> Iterator[Path]:
    """Gives a folder to fill from a task, and marks it as made from that."""
    if target.exists():
        raise BadInput(f"{target}: exists already, expected a folder that does not")
    with whole_folder(target) as partial:
        yield partial
        (partial / MARK).write_text(fingerprint([folder]))


def _index_of_files(folder: Path) -> TaskIndex:
    index = read_index(folder)
    if index.table.num_rows == 0:
        raise BadInput(f"{folder}: holds no trajectory")
    if index.table.column_names != SCHEMA.names:
        raise BadInput(f"{folder}: is stored in shards, expected trajectory files")
    return index


def export_minari(folder: Path, out: Path) -> Path:
    """Writes one task as a Minari dataset that `minari.load_dataset` opens.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.
        out: What MINARI_DATASETS_PATH is to be.

    Returns:
        The dataset's folder.

    Raises:
        BadInput: Minari is missing, the dataset exists already, or the task cannot be read.
    """
    minari = _minari()
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    index = _index_of_files(Path(folder))
    meta, domain = index.meta, DOMAINS[index.meta["domain"]]
    shape = tuple(meta["state_shape"])
    observations: spaces.Space = spaces.Box(-np.inf, np.inf, shape, np.float32)
    if domain.state == "image":
        observations = spaces.Box(0, 255, shape, np.uint8)
    actions: spaces.Space = spaces.Discrete(domain.num_actions)
    if domain.action == "continuous":
        actions = spaces.Box(-1, 1, tuple(meta["action_shape"]), np.float32)
    paths = [index.folder / path for path in index.table["path"].to_pylist()]

    def episodes() -> Iterator[Any]:
        for number, path in enumerate(paths):
            t = read(path)
            last = t.states[-1] if t.final_state is None else t.final_state
            ends = np.zeros((2, t.length), bool)
            ends[:, -1] = t.terminated, t.truncated
            yield EpisodeBuffer(
                id=number,
                seed=t.seed if t.seed >= 0 else None,
                observations=np.concatenate([t.states, last[None]]),
                actions=t.actions,
                rewards=t.rewards,
                terminations=ends[0],
                truncations=ends[1],
                infos={},
            )
            known: dict[str, Any] = {"episode": t.episode, "seed": t.seed, "success": t.success, "source": t.source}
            known |= {"final_state": t.final_state is not None, "state_layout": t.state_layout}
            extras.append({KEY: json.dumps(known)})

    extras: list[dict[str, str]] = []
    name = minari_id(meta["domain"], meta["task"])
    target = Path(out) / name
    with _whole(target, Path(folder)) as partial:
        partial = partial.absolute()  # Minari reads a relative path from its own folder
        storage = MinariStorage.new(partial / "data", observations, actions, jpeg_encoding=False)
        storage.update_metadata(
            {
                "dataset_id": name,
                "minari_version": minari.__version__,
                "description": f"{meta['task']} of {meta['domain']}, exported by lram",
                KEY: json.dumps({key: meta[key] for key in ("domain", "task", "provenance")}),
            }
        )
        storage.update_episodes(episodes())
        storage.update_episode_metadata(extras)
    for level in (NAMESPACE, f"{NAMESPACE}/{meta['domain']}"):
        described = Path(out) / level / "namespace_metadata.json"
        if not described.exists():
            described.write_text("{}")
    return target


def from_minari(path: Path, domain: str | None = None, task: str | None = None) -> Iterator[Trajectory]:
    """Reads a Minari dataset as trajectories.

    Args:
        path: The dataset's folder, the one that holds `data`.
        domain: Domain of the trajectories; None where `export_minari` made the dataset, which then says.
        task: Their task; None likewise.

    Yields:
        One trajectory per episode. Vectors, rewards and continuous actions become float32; a Dict of vectors is
        laid end to end by key, as `state_layout` says.

    Raises:
        BadInput: Minari is missing, the dataset cannot be read, or has spaces that no domain has.
    """
    minari = _minari()
    path = Path(path)
    try:
        dataset = minari.MinariDataset(path / "data")
        said = json.loads(dataset.storage.metadata.get(KEY, "{}"))
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise BadInput(f"{path}: not a Minari dataset ({error})") from error
    domain, task = domain or said.get("domain"), task or said.get("task")
    if domain is None or task is None:
        raise BadInput(f"{path}: was not made by lram, expected a domain and a task for it")
    if domain not in DOMAINS:
        raise BadInput(f"{path}: unknown domain {domain!r}, expected one of {', '.join(DOMAINS)}")
    metadata = dataset.storage.get_episode_metadata(dataset.episode_indices)
    for episode, extra in zip(dataset.iterate_episodes(), metadata):
        known = json.loads(extra.get(KEY, "{}"))
        states, layout = _states(path, episode.observations, DOMAINS[domain].state)
        if len(states) != len(episode.rewards) + 1:
            raise BadInput(f"{path}: episode {episode.id} has {len(states)} observations of {len(episode)} steps")
        if np.any(episode.terminations[:-1]) or np.any(episode.truncations[:-1]):
            raise BadInput(f"{path}: episode {episode.id} ends before its last step")
        seed = extra.get("seed")
        yield Trajectory(
            domain=domain,
            task=task,
            episode=known.get("episode", int(episode.id)),
            seed=known.get("seed", -1 if seed is None else int(seed)),
            states=states[:-1],
            actions=_actions(path, episode.actions, DOMAINS[domain].action),
            rewards=np.asarray(episode.rewards, np.float32),
            terminated=bool(episode.terminations[-1]),
            truncated=bool(episode.truncations[-1]),
            source=known.get("source", f"Minari {dataset.id}"),
            final_state=states[-1] if known.get("final_state", True) else None,
            success=known.get("success"),
            state_layout=known.get("state_layout", layout),
        )


def _states(path: Path, observations: Any, kind: str) -> tuple[np.ndarray, dict[str, list[int]] | None]:
    if isinstance(observations, np.ndarray):
        return np.asarray(observations, np.uint8 if kind == "image" else np.float32), None
    if kind == "image" or not isinstance(observations, dict) or not observations:
        raise BadInput(f"{path}: observations are {type(observations).__name__}, expected an array or a Dict of them")
    parts, layout, at = [], {}, 0
    for key in sorted(observations):
        part = observations[key]
        if not isinstance(part, np.ndarray):
            raise BadInput(f"{path}: observation {key!r} is {type(part).__name__}, expected an array")
        parts.append(part.reshape(len(part), -1).astype(np.float32))
        layout[key] = [at, at + parts[-1].shape[1]]
        at = layout[key][1]
    return np.concatenate(parts, 1), layout


def _actions(path: Path, actions: Any, kind: str) -> np.ndarray:
    if not isinstance(actions, np.ndarray):
        raise BadInput(f"{path}: actions are {type(actions).__name__}, expected an array")
    return np.asarray(actions, np.int64 if kind == "discrete" else np.float32)


def export_lram(folder: Path, out: Path) -> Path:
    """Lays a task out as the LRAM code's loader wants it: its files in one folder, and four JSON files.

    Args:
        folder: The task's folder, ROOT/<domain>/<task>.
        out: Where to make <domain>/<task>.

    Returns:
        The folder made.

    Raises:
        BadInput: The folder exists already, the task cannot be read, or a file that the index names is missing.
    """
    index = _index_of_files(Path(folder))
    names = [Path(path).stem for path in index.table["path"].to_pylist()]
    lengths, returns = index.numpy("length").astype(np.float64), index.numpy("return")
    target = Path(out) / index.meta["domain"] / index.meta["task"]
    sidecars: dict[str, Any] = {
        "episode_lengths": dict(zip(names, lengths.tolist())),
        "episode_returns": dict(zip(names, returns.tolist())),
        "episode_trjids": dict(zip(names, index.table["episode"].to_pylist())),
        "stats": {
            "episodes": len(names),
            "transitions": float(lengths.sum()),
            **_describe("episode_len", lengths),
            **_describe("episode_return", returns),
        },
    }
    with _whole(target, Path(folder)) as partial:
        for name, path in zip(names, index.table["path"].to_pylist()):
            _link(index.folder / path, partial / f"{name}.hdf5")
        for name, content in sidecars.items():
            (partial / f"{name}.json").write_text(json.dumps(content))
    return target


def _describe(prefix: str, values: np.ndarray) -> dict[str, float]:
    numbers = {"min": values.min(), "max": values.max(), "mean": values.mean(), "std": values.std()}
    numbers |= {f"q{share}": np.quantile(values, share / 100) for share in (25, 50, 75, 90, 99)}
    return {f"{prefix}_{name}": round(float(number), 4) for name, number in numbers.items()}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise BadInput(f"{source}: missing, but the index names it") from error
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
