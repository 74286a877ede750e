from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from lram.datasets.export import export_lram, export_minari, from_minari, minari_id
from lram.datasets.shards import shard_task
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, encode, read
from lram.datasets.writer import TaskWriter


def same(one: Trajectory, other: Trajectory) -> None:
    for name, value in vars(one).items():
        assert np.array_equal(getattr(other, name), value), name
        if isinstance(value, np.ndarray):
            assert getattr(other, name).dtype == value.dtype, name
    assert encode(one).data == encode(other).data


@pytest.fixture
def store(make: Callable[..., Trajectory], tmp_path: Path) -> Callable[[str], tuple[Path, list[Trajectory]]]:
    """Writes four trajectories of a domain, in which everything that may be unknown is so once."""

    def store(domain: str) -> tuple[Path, list[Trajectory]]:
        four = [make(domain, episode, length, task="one.two") for episode, length in enumerate((5, 70, 1, 20))]
        four[1] = replace(four[1], final_state=None, seed=-1, truncated=False)
        four[2] = replace(four[2], terminated=True, truncated=False, success=True)
        four[3] = replace(four[3], terminated=True, success=False, source="maker 1.2, with 'quotes'")
        with TaskWriter(tmp_path / "data", domain, "one.two", {"maker": "test"}) as writer:
            for trajectory in four:
                writer.add(trajectory)
            writer.finish()
        return tmp_path / "data" / domain / "one.two", four

    return store


@pytest.mark.parametrize("domain", ["darkroom", "dmcontrol", "composuite", "atari"])
def test_minari_reads_what_was_written_and_gives_it_back(store, tmp_path, monkeypatch, domain):
    minari = pytest.importorskip("minari")
    folder, four = store(domain)
    target = export_minari(folder, tmp_path / "out")
    name = f"lram/{domain}/one_two-v0"
    assert target == tmp_path / "out" / name and minari_id(domain, "one.two") == name
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "out"))
    assert list(minari.list_local_datasets()) == [name]
    dataset = minari.load_dataset(name)
    assert (dataset.total_episodes, dataset.total_steps) == (4, 96)
    for episode, trajectory in zip(dataset.iterate_episodes(), four, strict=True):
        assert len(episode) == trajectory.length
        assert np.array_equal(episode.observations[:-1], trajectory.states)
        last = trajectory.states[-1] if trajectory.final_state is None else trajectory.final_state
        assert np.array_equal(episode.observations[-1], last)
        for mine, theirs in ((trajectory.actions, episode.actions), (trajectory.rewards, episode.rewards)):
            assert np.array_equal(mine, theirs) and mine.dtype == theirs.dtype
        assert episode.terminations.tolist() == [False] * (len(episode) - 1) + [trajectory.terminated]
        assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [trajectory.truncated]
        assert episode.observations.dtype == dataset.observation_space.dtype
        assert dataset.observation_space.contains(episode.observations[0])
        assert dataset.action_space.contains(episode.actions[0])
    seeds = [metadata.get("seed") for metadata in dataset.storage.get_episode_metadata(range(4))]
    assert seeds == [0, None, 2, 3]
    for back, trajectory in zip(from_minari(target), four, strict=True):
        same(replace(trajectory, task="one.two"), back)


def test_an_export_is_whole_or_not_there(store, tmp_path):
    pytest.importorskip("minari")
    folder, _ = store("darkroom")
    (folder / "000/000000002.hdf5").write_bytes(b"")
    with pytest.raises(BadInput, match="000000002"):
        export_minari(folder, tmp_path / "out")
    (folder / "000/000000002.hdf5").unlink()
    with pytest.raises(BadInput, match="missing, but the index names it"):
        export_lram(folder, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_exports_refuse_what_is_there_and_what_is_in_shards(store, tmp_path):
    folder, _ = store("darkroom")
    export_lram(folder, tmp_path / "out")
    with pytest.raises(BadInput, match="exists already"):
        export_lram(folder, tmp_path / "out")
    with pytest.raises(BadInput, match="is stored in shards"):
        export_lram(shard_task(folder, tmp_path / "shards", 10**6), tmp_path / "other")
    TaskWriter(tmp_path / "data", "darkroom", "empty", {}).close()
    with pytest.raises(BadInput, match="holds no trajectory"):
        export_lram(tmp_path / "data/darkroom/empty", tmp_path / "other")


def test_without_minari_the_error_names_what_to_install(store, tmp_path, monkeypatch):
    folder, _ = store("darkroom")
    monkeypatch.setitem(sys.modules, "minari", None)
    for call in (lambda: export_minari(folder, tmp_path / "out"), lambda: next(from_minari(tmp_path))):
        with pytest.raises(BadInput, match=r"pip install lram\[minari\]"):
            call()


@pytest.fixture
def foreign(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Minari dataset as a stranger would: observations in a Dict of float64."""
    pytest.importorskip("minari")
    from gymnasium import spaces
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    def foreign(extra: int = 1, ends: tuple[int, ...] = (6,)) -> Path:
        box = {key: spaces.Box(-np.inf, np.inf, shape, np.float64) for key, shape in (("b", (2,)), ("a", (3, 1)))}
        path = tmp_path / "foreign-v0"
        path.mkdir()
        storage = MinariStorage.new(path / "data", spaces.Dict(box), spaces.Box(-1, 1, (4,), np.float64))
        storage.update_metadata({"dataset_id": "foreign-v0", "minari_version": "0.5.4"})
        rng = np.random.default_rng(0)
        done = np.zeros(7, bool)
        done[list(ends)] = True
        observations = {"a": rng.random((7 + extra, 3, 1)), "b": rng.random((7 + extra, 2))}
        storage.update_episodes(
            [EpisodeBuffer(None, 9, None, observations, rng.random((7, 4)), rng.random(7), done, done & False)]
        )
        return path

    return foreign


def test_foreign_minari_datasets_are_a_source(foreign):
    from minari import MinariDataset

    path = foreign()
    (trajectory,) = from_minari(path, "metaworld", "reach")
    episode = MinariDataset(path / "data")[0]
    flat = np.concatenate([episode.observations["a"].reshape(8, 3), episode.observations["b"]], 1)
    assert np.array_equal(trajectory.states, flat[:7].astype(np.float32))
    assert np.array_equal(trajectory.final_state, flat[7].astype(np.float32))
    assert np.array_equal(trajectory.rewards, episode.rewards.astype(np.float32))
    assert trajectory.state_layout == {"a": [0, 3], "b": [3, 5]}
    assert (trajectory.terminated, trajectory.truncated, trajectory.seed) == (True, False, 9)
    assert (trajectory.episode, trajectory.success, trajectory.source) == (0, None, "Minari foreign-v0")
    encode(trajectory)


@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        ({}, (None, None), "expected a domain and a task"),
        ({}, ("chess", "mate"), "unknown domain 'chess'"),
        ({}, ("atari", "pong"), "observations are dict"),
        ({"extra": 0}, ("metaworld", "reach"), "7 observations of 7 steps"),
        ({"ends": (2, 6)}, ("metaworld", "reach"), "ends before its last step"),
    ],
)
def test_what_is_no_source_is_refused(foreign, tmp_path, made, asked, said):
    with pytest.raises(BadInput, match=said):
        list(from_minari(foreign(**made), *asked))
    with pytest.raises(BadInput, match="not a Minari dataset"):
        list(from_minari(tmp_path / "missing"))


def test_lram_side_cars_say_what_the_files_hold(store, tmp_path):
    folder, four = store("composuite")
    target = export_lram(folder, tmp_path / "out")
    files = sorted(target.glob("*.hdf5"))
    cars = {name: json.loads((target / f"{name}.json").read_text()) for name in (
        "episode_lengths", "episode_returns", "episode_trjids", "stats")}  # fmt: skip
    # As the LRAM code's loader does: files of one folder, looked up by stem and put in order of their numbers.
    for file, trajectory in zip(sorted(files, key=lambda f: cars["episode_trjids"][f.stem]), four, strict=True):
        same(read(file), trajectory)
        assert file.stat().st_ino == (folder / "000" / file.name).stat().st_ino
        with h5py.File(file) as content:
            assert cars["episode_lengths"][file.stem] == len(content["rewards"])
            assert cars["episode_returns"][file.stem] == content["rewards"][...].sum(dtype=np.float64)
    assert {"episodes": 4, "transitions": 96, "episode_len_min": 1, "episode_len_q50": 12.5}.items() <= cars[
        "stats"
    ].items()
    assert cars["stats"]["episode_return_max"] == max(trajectory.total for trajectory in four)
