"""Generation: its bookkeeping with a stand-in for an attempt, and MimicGen itself where it is installed."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from lram.collectors import mimicgen
from lram.collectors.mimicgen import Attempt, Recipe, Source, attempt_seed, generate, prepared, source_task
from lram.collectors.robosuite import MimicGen, make
from lram.datasets.check import check_task
from lram.datasets.index import read_index
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, read

DEMOS = Path(__file__).parent / "data/mimicgen/source/stack.hdf5"
RECIPE = Recipe(Source(DEMOS, "0" * 64), "Stack_D0", "IIWA", seed=7)

with_mimicgen = pytest.mark.skipif(
    importlib.util.find_spec("mimicgen") is None, reason="NVlabs/mimicgen is not installed (docs/mimicgen.md)"
)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("**/*.hdf5"))}


def stand_in(recipe: Recipe, number: int) -> Attempt:
    """An attempt without a simulator: as random, as seeded, and a third of them succeed."""
    seed = attempt_seed(recipe.seed, number)
    rng = np.random.default_rng(seed)
    if rng.random() > 1 / 3:
        return Attempt(None, 0.5)
    length = int(rng.integers(3, 9))
    rewards = np.zeros(length, np.float32)
    rewards[-1] = 1
    trajectory = Trajectory(
        "mimicgen",
        recipe.name,
        0,
        seed,
        rng.standard_normal((length, 36), np.float32),
        rng.uniform(-1, 1, (length, 7)).astype(np.float32),
        rewards,
        True,
        False,
        "stand-in",
        success=True,
    )
    return Attempt(trajectory, 0.5)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimicgen, "attempt", stand_in)


@pytest.fixture
def whole(fast: None, tmp_path: Path) -> dict[str, bytes]:
    """The files of 12 demonstrations that were made at once."""
    generate(RECIPE, 12, tmp_path / "whole")
    return files(tmp_path / "whole")


def test_successes_are_kept_and_failures_counted(fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimicgen, "GIVE_UP", 15)  # in a row: it is fewer than fail in all
    seen: list[tuple[int, int]] = []
    result = generate(RECIPE, 12, tmp_path, report=lambda *counts: seen.append(counts))
    solved = [number for number in range(result["attempts"]) if stand_in(RECIPE, number).trajectory]
    assert (result["task"], result["episodes"], result["made"]) == ("Stack_D0-IIWA", 12, 12)
    assert result["attempts"] == result["tried"] == solved[-1] + 1 == len(seen) > 12 + 15
    assert seen[-1] == (12, result["attempts"]) and result["seconds"] == 0.5 * result["tried"]
    index = read_index(tmp_path / "mimicgen/Stack_D0-IIWA")
    assert index.meta["complete"]
    assert index.numpy("seed").tolist() == [attempt_seed(7, number) for number in solved]
    provenance = index.meta["provenance"]
    assert (provenance["robot"], provenance["gripper"], provenance["seed"]) == ("IIWA", "Robotiq85Gripper", 7)
    # Nothing is attempted for what is there.
    again = generate(RECIPE, 10, tmp_path)
    assert again["skipped"] and again["tried"] == 0 and again["attempts"] == result["attempts"]


@pytest.mark.parametrize("ahead", [1, 5])
def test_the_number_of_processes_changes_nothing(whole: dict[str, bytes], tmp_path: Path, ahead: int) -> None:
    with ThreadPoolExecutor(3) as pool:
        result = generate(RECIPE, 12, tmp_path / "pool", pool, ahead)
    assert files(tmp_path / "pool") == whole
    assert result["tried"] == result["attempts"]


def test_a_killed_run_continues_as_if_it_had_not_been(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "killed"
    for stop in (2, 9, 20):

        def dies(recipe: Recipe, number: int, stop: int = stop) -> Attempt:
            if number == stop:
                raise KeyboardInterrupt
            return stand_in(recipe, number)

        monkeypatch.setattr(mimicgen, "attempt", dies)
        with pytest.raises(KeyboardInterrupt):
            generate(RECIPE, 12, root)
        # What a kill leaves: the index lags behind the files.
        for part in root.glob("**/index*.parquet"):
            part.unlink()
    monkeypatch.setattr(mimicgen, "attempt", stand_in)
    result = generate(RECIPE, 12, root)
    assert files(root) == whole
    assert 0 < result["tried"] < result["attempts"]
    assert result["attempts"] == generate(RECIPE, 12, tmp_path / "whole")["attempts"]


def test_more_can_be_asked_for_later_and_gaps_are_filled(whole: dict[str, bytes], tmp_path: Path) -> None:
    root = tmp_path / "more"
    generate(RECIPE, 5, root)
    assert len(files(root)) == 5
    result = generate(RECIPE, 12, root)
    assert (result["made"], result["episodes"]) == (7, 12)
    assert files(root) == whole
    (root / "mimicgen/Stack_D0-IIWA/000/000000003.hdf5").unlink()
    (root / "mimicgen/Stack_D0-IIWA/index.parquet").unlink()
    generate(RECIPE, 12, root)
    assert files(root) == whole


def test_another_recipe_is_refused(whole: dict[str, bytes], tmp_path: Path) -> None:
    other = Recipe(Source(DEMOS, "1" * 64), "Stack_D0", "IIWA", seed=7)
    for recipe, word in ((other, "demonstrations"), (Recipe(RECIPE.source, "Stack_D0", "IIWA", seed=8), "seed")):
        with pytest.raises(BadInput, match=f"made with {word}"):
            generate(recipe, 12, tmp_path / "whole")
    assert files(tmp_path / "whole") == whole


def test_a_hopeless_recipe_ends(fast: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimicgen, "attempt", lambda recipe, number: Attempt(None, 0.0))
    monkeypatch.setattr(mimicgen, "GIVE_UP", 20)
    with pytest.raises(BadInput, match="20 attempts in a row failed"):
        generate(RECIPE, 1, tmp_path)


def test_seeds_of_attempts_and_runs_are_strangers() -> None:
    seeds = {attempt_seed(seed, number) for seed in range(4) for number in range(500)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)


def test_a_source_says_what_it_is_for(tmp_path: Path) -> None:
    assert source_task(DEMOS) == "Stack_D0"
    (tmp_path / "text.hdf5").write_text("no HDF5")
    with h5py.File(tmp_path / "empty.hdf5", "w"):
        pass
    for name in ("text.hdf5", "empty.hdf5", "missing.hdf5"):
        with pytest.raises(BadInput, match=f"{name}: no robomimic file"):
            source_task(tmp_path / name)
    with h5py.File(tmp_path / "lift.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = '{"env_name": "Lift"}'
    with pytest.raises(BadInput, match=r"lift.hdf5: was made in 'Lift'; say which"):
        source_task(tmp_path / "lift.hdf5")


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"robot": "Baxter"}, "robot 'Baxter'"), ({"gripper": "Hook"}, "gripper 'Hook'"), ({"seed": -1}, "seed is -1")],
)
def test_a_wrong_recipe_is_refused_before_anything_starts(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Recipe(RECIPE.source, "Stack_D0", **fields)


@pytest.mark.skipif(importlib.util.find_spec("mimicgen") is not None, reason="MimicGen is installed")
def test_without_mimicgen_the_command_says_so_in_a_sentence(tmp_path: Path) -> None:
    from lram.flows.collect_mimicgen import CollectMimicgenSettings, collect_mimicgen

    with pytest.raises(BadInput, match=r"NVlabs/mimicgen \(known to work: 72bd767\)"):
        collect_mimicgen.fn(CollectMimicgenSettings(DEMOS, tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.fixture(scope="module")
def unprepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four demonstrations with the model that they were made in, as a user has them."""
    slot = MimicGen("Stack_D0")
    path = tmp_path_factory.mktemp("source") / "stack.hdf5"
    shutil.copy(DEMOS, path)
    with h5py.File(path, "a") as file:
        for demo in list(file["data"])[4:]:
            del file["data"][demo]
        for demo in file["data"].values():
            demo.attrs["model_file"] = slot.env.sim.model.get_xml()
    slot.close()
    return path


@pytest.fixture(scope="module")
def source(unprepared: Path) -> Iterator[Source]:
    with prepared(unprepared) as source:
        yield source
    assert not source.path.exists() and unprepared.exists()


@with_mimicgen
def test_preparing_finds_the_objects(source: Source, unprepared: Path) -> None:
    assert source.path != unprepared and source.path.name == unprepared.name
    with h5py.File(source.path) as file, h5py.File(unprepared) as given:
        assert all("datagen_info" not in demo for demo in given["data"].values())
        for demo in file["data"].values():
            info, simulator = demo["datagen_info"], demo["states"]
            assert info.attrs["env_interface_name"] == "MG_Stack"
            # Simulator states are time, then joint positions: 9 of the Panda, 7 of each cube.
            np.testing.assert_allclose(info["object_poses/cubeA"][:, :3, 3], simulator[:, 10:13], atol=1e-9)
            np.testing.assert_allclose(info["object_poses/cubeB"][:, :3, 3], simulator[:, 17:20], atol=1e-9)
            assert info["subtask_term_signals/grasp"][0] == 0 and info["subtask_term_signals/grasp"][:].any()
    with prepared(source.path) as again:
        assert again.path == source.path
    with (
        pytest.raises(BadInput, match="was prepared for MG_Stack, expected MG_Square"),
        prepared(source.path, "Square_D0"),
    ):
        pass
    with pytest.raises(BadInput, match="no model_file or states"), prepared(DEMOS):
        pass


@with_mimicgen
def test_generated_trajectories_are_episodes_of_the_environment(source: Source, tmp_path: Path) -> None:
    recipe = Recipe(source, "Stack_D0", "IIWA", seed=1)
    generate(recipe, 1, tmp_path / "twice")
    result = generate(recipe, 2, tmp_path / "twice")
    assert result["episodes"] == 2 and result["attempts"] <= 6
    # Attempts leave nothing behind: the second is the same in a generator that made other things before.
    folder = tmp_path / "twice/mimicgen/Stack_D0-IIWA"
    second = read(folder / "000/000000001.hdf5")
    tries = mimicgen.attempt(recipe, result["attempts"] - 1).trajectory
    assert tries is not None and np.array_equal(tries.states, second.states)
    for trajectory in (read(folder / "000/000000000.hdf5"), second):
        assert trajectory.terminated and trajectory.success and trajectory.total == trajectory.rewards[-1] == 1
        assert "robosuite 1.4.1" in trajectory.source and "mimicgen" in trajectory.source
        env = make(trajectory.task, seed=trajectory.seed)
        assert env.state_layout == trajectory.state_layout
        states, _ = env.reset()
        for step in range(trajectory.length):
            assert np.array_equal(states[0], trajectory.states[step])
            states, rewards, terminated, truncated, infos = env.step(trajectory.actions[None, step])
            assert rewards[0] == trajectory.rewards[step]
            assert terminated[0] == (step == trajectory.length - 1) and not truncated[0]
        assert np.array_equal(infos["final_obs"][0], trajectory.final_state)
        assert infos["final_info"]["success"].tolist() == [True]
        env.close()
    assert check_task(folder).findings == []
