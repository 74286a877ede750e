from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lram.datasets.index import find_tasks, read_index, task_folder
from lram.datasets.pack import pack_task
from lram.datasets.shards import shard_task
from lram.datasets.specs import DOMAINS, BadInput, state_columns
from lram.datasets.trajectory import read
from lram.datasets.windows import Batch, Windows, WindowSettings
from lram.datasets.writer import TaskWriter

STORAGES = ("files", "shards", "packed.zarr")
LENGTHS = (1, 7, 63, 64, 65, 129, 300)


@pytest.fixture(scope="module")
def stored(make, tmp_path_factory) -> Path:
    """The same trajectories of five domains in all codecs and storages, of lengths around those of chunks."""
    folder = tmp_path_factory.mktemp("stored")
    for domain in ("atari", "composuite", "dmcontrol", "metaworld", "procgen"):
        for codec in ("gzip", "zstd", "none"):
            with TaskWriter(folder / "files", domain, codec, {}, codec) as writer:
                for episode, length in enumerate(LENGTHS):
                    fields = {}
                    if domain == "dmcontrol" and codec == "zstd":  # another layout and fewer dimensions
                        rng = np.random.default_rng(episode)
                        fields["states"] = rng.standard_normal((length, 7), np.float32)
                        fields["state_layout"] = {"height": [0, 1], "touch": [1, 4], "position": [4, 7]}
                        fields["actions"] = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
                        fields["final_state"] = None
                    writer.add(make(domain, episode, length, codec, **fields))
                writer.finish()
            shard_task(folder / "files" / domain / codec, folder / "shards", 50_000)
            pack_task(folder / "files" / domain / codec, folder / "packed.zarr")
    return folder


@pytest.fixture(scope="module")
def opened(stored) -> dict[str, Windows]:
    return {storage: Windows.open(stored / storage, WindowSettings(context=20)) for storage in STORAGES}


def expected_window(path: Path, stop: int, context: int, dims: int) -> dict[str, np.ndarray]:
    """Cuts a window out of a whole trajectory, step by step, the slow and plain way."""
    trajectory = read(path)
    spec = DOMAINS[trajectory.domain]
    start = max(stop - context, 0)
    image = spec.state == "image"
    window = {
        "states": np.zeros((context, *trajectory.states.shape[1:]), np.uint8)
        if image
        else np.zeros((context, 204), np.float32),
        "actions": np.zeros((context, dims), np.float32) if dims else np.zeros(context, np.int64),
        "previous_rewards": np.zeros(context, np.float32),
        "returns_to_go": np.zeros(context, np.float32),
        "mask": np.zeros(context, bool),
    }
    for i, t in enumerate(range(start, stop)):
        if image:
            window["states"][i] = trajectory.states[t]
        else:
            columns = state_columns(spec.name, trajectory.state_layout, trajectory.states.shape[1])
            window["states"][i, columns] = trajectory.states[t]
        if dims:
            window["actions"][i, : trajectory.actions.shape[1]] = trajectory.actions[t]
        else:
            window["actions"][i] = trajectory.actions[t]
        window["previous_rewards"][i] = trajectory.rewards[t - 1] / np.float32(spec.reward_scale) if t else 0
        window["returns_to_go"][i] = trajectory.returns_to_go[t] / np.float32(spec.reward_scale)
        window["mask"][i] = True
    return window


def assert_same(one: Batch, two: Batch) -> None:
    for name, value in vars(one).items():
        other = getattr(two, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype, name
            np.testing.assert_array_equal(value, other, name)
        else:
            assert value == other, name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    domain=st.sampled_from(["atari", "composuite", "dmcontrol", "metaworld", "procgen"]),
    storage=st.sampled_from(STORAGES),
    update=st.integers(0, 10_000),
    context=st.sampled_from([1, 2, 20, 64, 400]),
)
def test_windows_are_slices_of_trajectories(stored, opened, domain, storage, update, context):
    windows = Windows([reader for group in opened[storage].tasks.values() for reader in group], WindowSettings(context))
    pieces = windows.draw(domain, update, "train", 4, seed=0)
    batch = windows.read(domain, pieces, "train", lambda shape, kind: np.full(shape, 7, kind))
    dims = max(task.num_dims for task in windows.tasks[domain])
    for b, piece in enumerate(pieces):
        path = stored / "files" / domain / piece.task.task / f"000/{piece.task.episodes[piece.row]:09d}.hdf5"
        for name, value in expected_window(path, piece.last, context, dims).items():
            np.testing.assert_array_equal(getattr(batch, name)[b], value, f"{path} {name}")
        if batch.action_mask is not None:
            assert batch.action_mask[b].tolist() == [d < piece.task.num_dims for d in range(dims)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_all_storages_give_the_same_batches(opened, split):
    for update in range(3):
        batches = {name: list(windows.batches(update, split, 16, seed=3)) for name, windows in opened.items()}
        assert len(batches["files"]) == 5
        for storage in STORAGES[1:]:
            for one, two in zip(batches["files"], batches[storage], strict=True):
                assert_same(one, two)


def test_every_step_is_an_end_with_the_same_chance(write, tmp_path):
    write(tmp_path, "metaworld", count=3, length=5)
    windows = Windows.open(tmp_path, WindowSettings(context=3))
    pieces = [p for update in range(200) for p in windows.draw("metaworld", update, "train", 64, seed=0)]
    task = windows.tasks["metaworld"][0]
    train = np.flatnonzero(~task.validation)
    counts = np.zeros((len(task), 6))
    for piece in pieces:
        counts[piece.row, piece.last] += 1
    assert counts[:, 0].sum() == 0 and counts[task.validation].sum() == 0
    share = counts[train, 1:] / len(pieces) * len(train) * 5
    assert (np.abs(share - 1) < 0.2).all()  # five standard deviations; the last step is among them
    assert all(piece.first == max(0, piece.last - 3) for piece in pieces)


def test_trajectories_are_drawn_by_length(make, tmp_path):
    with TaskWriter(tmp_path, "metaworld", "one", {}) as writer:
        writer.add(make("metaworld", 0, 10, "one"))
        writer.add(make("metaworld", 1, 90, "one"))
        writer.finish()
    with TaskWriter(tmp_path, "metaworld", "two", {}) as writer:
        writer.add(make("metaworld", 0, 100, "two"))
        writer.finish()
    windows = Windows.open(tmp_path, WindowSettings(context=3))
    tasks = windows.tasks["metaworld"]
    assert windows.transitions == 200
    counts = {(task.task, int(row)): 0 for task in tasks for row in np.flatnonzero(~task.validation)}
    for update in range(100):
        for piece in windows.draw("metaworld", update, "train", 50, seed=1):
            counts[piece.task.task, piece.row] += 1
    total = sum(int(task.lengths[~task.validation].sum()) for task in tasks)
    for (name, row), count in counts.items():
        length = next(int(task.lengths[row]) for task in tasks if task.task == name)
        assert abs(count / 5000 - length / total) < 0.03


def test_a_batch_depends_on_seed_update_and_split_alone(opened, stored):
    windows = opened["files"]
    again = Windows.open(stored / "files", WindowSettings(context=20))
    [list(again.batches(update, "train", 4, seed=9)) for update in (5, 2)]  # what was read before does not matter
    for one, two in zip(windows.batches(7, "train", 8, seed=0), again.batches(7, "train", 8, seed=0), strict=True):
        assert_same(one, two)
    drawn = [
        [(p.task.task, p.row, p.last) for p in windows.draw("metaworld", update, split, 8, seed)]
        for update, split, seed in ((7, "train", 0), (8, "train", 0), (7, "train", 1), (7, "validation", 0))
    ]
    assert len({tuple(pieces) for pieces in drawn}) == 4


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_ranks_interleave_to_the_whole_batch(opened, ranks):
    windows = opened["shards"]
    whole = list(windows.batches(3, "train", 8, seed=0))
    parts = [list(windows.batches(3, "train", 8, seed=0, part=(rank, ranks))) for rank in range(ranks)]
    for number, batch in enumerate(whole):
        for field in dataclasses.fields(batch)[1:]:
            value = getattr(batch, field.name)
            for rank in range(ranks):
                part = getattr(parts[rank][number], field.name)
                assert (value is None and part is None) or np.array_equal(value[rank::ranks], part)


def test_validation_windows_are_those_of_validation_trajectories(opened):
    windows = opened["files"]
    seen = set()
    for update in range(40):
        for split in ("train", "validation"):
            for piece in windows.draw("composuite", update, split, 8, seed=0):
                assert bool(piece.task.validation[piece.row]) == (split == "validation")
                seen.add(split)
    assert seen == {"train", "validation"}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_chains_hold_whole_episodes_in_order(make, tmp_path, storage, split):
    lengths = [3, 5, 2, 6, 4, 1, 7, 2, 5, 3]
    with TaskWriter(tmp_path / "files", "darkroom", "room", {}) as writer:
        for episode, length in enumerate(lengths):
            rewards = np.arange(1, length + 1, dtype=np.float32) + 10 * episode
            writer.add(make("darkroom", episode, length, "room", rewards=rewards))
        writer.finish()
    shard_task(tmp_path / "files" / "darkroom" / "room", tmp_path / "shards", 40_000)
    pack_task(tmp_path / "files" / "darkroom" / "room", tmp_path / "packed.zarr")
    windows = Windows.open(tmp_path / storage, WindowSettings(episodes=3, gap=2))
    C = windows.steps("darkroom")
    assert 3 * max(lengths) == C
    task = windows.tasks["darkroom"][0]
    pieces = windows.draw("darkroom", 0, split, 16, seed=0)
    batch = windows.read("darkroom", pieces, split)
    assert len(pieces) == 48
    for b in range(16):
        chain = [piece for piece in pieces if piece.window == b]
        last = int(task.episodes[chain[-1].row])
        assert [int(task.episodes[piece.row]) for piece in chain] == [last - 4, last - 2, last]
        assert bool(task.validation[chain[-1].row]) == (split == "validation")
        whole = [read(tmp_path / f"files/darkroom/room/000/{last - back:09d}.hdf5") for back in (4, 2, 0)]
        rewards = np.concatenate([episode.rewards for episode in whole])
        n = len(rewards)
        assert batch.previous_rewards[b].tolist() == [0, *rewards[:-1], *[0] * (C - n)]
        joined = {name: np.concatenate([getattr(episode, name) for episode in whole]) for name in ("states", "actions")}
        assert np.array_equal(batch.states[b, :n, :2], joined["states"]) and not batch.states[b, n:].any()
        assert np.array_equal(batch.actions[b, :n], joined["actions"])
        returns = np.concatenate([episode.returns_to_go for episode in whole])
        assert batch.returns_to_go[b].tolist() == [*returns, *[0] * (C - n)]
        counted = np.zeros(C, bool)
        counted[0 if split == "train" else n - len(whole[-1].rewards) : n] = True
        assert np.array_equal(batch.mask[b], counted)


def test_only_the_best_trajectories_of_each_task_are_drawn(make, tmp_path):
    returns = {"one": [3, 9, 9, 1, 9, 5, 2, 8, 0, 4] * 6, "two": [1, 0, 0, 0]}
    for name, values in returns.items():
        with TaskWriter(tmp_path, "metaworld", name, {}) as writer:
            for episode, value in enumerate(values):
                rewards = np.array([value, 0, 0], np.float32)
                writer.add(make("metaworld", episode, 3, name, rewards=rewards))
            writer.finish()
    windows = Windows.open(tmp_path, WindowSettings(context=3, top=0.05))
    for split in ("train", "validation"):
        pieces = [piece for update in range(40) for piece in windows.draw("metaworld", update, split, 16, seed=0)]
        for task in windows.tasks["metaworld"]:
            ours = np.flatnonzero(task.validation == (split == "validation"))
            ranked = sorted(ours, key=lambda row: (-task.returns[row], task.episodes[row]))
            best = ranked[: max(1, round(0.05 * len(ours)))]
            assert {piece.row for piece in pieces if piece.task is task} == set(best)
    assert windows.transitions == 3 * 64


def test_chains_end_in_the_best_of_those_that_have_a_history(make, tmp_path):
    with TaskWriter(tmp_path, "darkroom", "room", {}) as writer:
        for episode in range(40):  # the best of all have nothing before them
            writer.add(make("darkroom", episode, 2, "room", rewards=np.array([40 - episode, 0], np.float32)))
        writer.finish()
    windows = Windows.open(tmp_path, WindowSettings(gap=10, top=0.1))
    ends = {piece.row for update in range(20) for piece in windows.draw("darkroom", update, "train", 16, 0) if piece.at}
    task = windows.tasks["darkroom"][0]
    train = [row for row in range(10, 40) if not task.validation[row]]
    assert ends == set(train[: round(0.1 * len(train))])


def test_each_domain_has_its_own_number_of_windows(opened):
    counts = {"atari": 1, "composuite": 5, "dmcontrol": 2, "metaworld": 3, "procgen": 4}
    batches = list(opened["files"].batches(0, "train", counts, seed=0))
    assert {batch.domain.name: len(batch.mask) for batch in batches} == counts


def test_chosen_folders_alone_are_opened(stored):
    folders = [stored / "files" / "atari" / "gzip"]
    windows = Windows.open(stored / "files", WindowSettings(context=3), folders)
    assert [task.folder for task in windows.every_task] == folders


def test_histories_too_short_for_the_gap_are_refused(write, tmp_path):
    write(tmp_path, "darkroom", count=5)
    with pytest.raises(BadInput, match="no windows of 2 episodes 100 apart, the longest history has 5 episodes"):
        Windows.open(tmp_path, WindowSettings())


def test_images_of_two_shapes_are_refused(write, make, tmp_path):
    write(tmp_path, "procgen", "gray", count=3)
    colour = np.zeros((20, 3, 64, 64), np.uint8)
    write(tmp_path, "procgen", "colour", count=3, states=colour, final_state=None)
    with pytest.raises(BadInput, match=r"procgen: states of shapes \[\(1, 64, 64\), \(3, 64, 64\)\]"):
        Windows.open(tmp_path, WindowSettings())


def test_a_domain_without_validation_is_left_out_of_it(make, tmp_path):
    with TaskWriter(tmp_path, "metaworld", "single", {}) as writer:
        writer.add(make("metaworld", 0, 10, "single"))
        writer.finish()
    assert read_index(find_tasks(tmp_path)[0]).table["split"].to_pylist() == ["train"]
    windows = Windows.open(tmp_path, WindowSettings())
    assert list(windows.batches(0, "validation", 8, seed=0)) == []
    assert [len(batch.mask) for batch in windows.batches(0, "train", 8, seed=0)] == [8]


def test_a_dataset_without_tasks_or_index_is_refused(write, tmp_path):
    with pytest.raises(BadInput, match="no such dataset directory"):
        Windows.open(tmp_path / "missing", WindowSettings())
    task_folder(tmp_path, "metaworld", "empty").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"empty/index.parquet: no index"):
        Windows.open(tmp_path, WindowSettings())
