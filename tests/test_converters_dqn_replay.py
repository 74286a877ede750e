from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lram.converters import dqn_replay
from lram.converters.dqn_replay import Options, jobs, trajectories
from lram.converters.run import convert_job
from lram.converters.source import Count
from lram.datasets.images import shrink
from lram.datasets.specs import BadInput, tasks
from lram.datasets.trajectory import Trajectory, encode, read, validate

ale_py = pytest.importorskip("ale_py", reason="the games' action sets come from ale-py")

SAMPLE = Path(__file__).parent / "data" / "dqn_replay"
CAPACITY = 2000
SMALL = ("action", "reward", "terminal")
EPISODES = [e for e in json.loads((SAMPLE / "Breakout/1/truth.json").read_text())["episodes"] if e["complete"]]


def place(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{'' if kind == 'add_count' else '$store$_'}{kind}_ckpt.{number}.gz"


def load(path: Path) -> np.ndarray:
    return np.load(io.BytesIO(gzip.decompress(path.read_bytes())))


def store(path: Path, array: np.ndarray, **how) -> None:
    held = io.BytesIO()
    np.save(held, array, **how)
    path.write_bytes(gzip.compress(held.getvalue(), 1))


def convert(src: Path, block: int = dqn_replay.BLOCK, **options) -> tuple[list[Trajectory], Count]:
    chosen, count = Options(**options), Count()
    (job,) = jobs(src, chosen)
    made = list(trajectories(job, chosen, count, block))
    count.check()
    assert [t.episode for t in made] == list(range(len(made))) and count.episodes == len(made)
    for trajectory in made:
        validate(trajectory)
    return made, count


@pytest.fixture
def sample(tmp_path) -> Path:
    """A copy of the sample to damage; its replay_logs folder."""
    shutil.copytree(SAMPLE / "Breakout", tmp_path / "src/Breakout")
    return tmp_path / "src/Breakout/1/replay_logs"


def survivors(lost: set[int]) -> list[int]:
    """Episodes of the sample with no row lost, padding included; rows are numbered in order of time."""
    starts = [0, *itertools.accumulate(3 + e["length"] for e in EPISODES)]
    return [i for i, (a, b) in enumerate(itertools.pairwise(starts)) if not lost & set(range(a, b))]


def in_time(number: int, rows: range) -> set[int]:
    """Numbers in order of time of rows of a checkpoint: its last row comes first."""
    return {number * CAPACITY + (row if row < CAPACITY - 1 else -1) for row in rows}


@functools.cache
def whole() -> tuple[list[Trajectory], Count]:
    return convert(SAMPLE)


def same_as(made: list[Trajectory], episodes: list[int]) -> bool:
    """Says whether the trajectories are these episodes of the sample, but for their numbers."""
    expected = [vars(replace(whole()[0][episode], episode=number)) for number, episode in enumerate(episodes)]
    return len(made) == len(expected) and all(
        np.array_equal(getattr(t, name), value) for t, e in zip(made, expected) for name, value in e.items()
    )


# ---- The sample ----


def test_the_sample_is_converted_to_its_28_complete_episodes():
    made, count = whole()
    assert len(made) == len(EPISODES) == 28 and sum(t.length for t in made) == 5193
    assert [t.length for t in made] == [e["length"] for e in EPISODES]
    assert [t.total for t in made] == [e["ret"] for e in EPISODES]
    full = np.array([0, 1, 3, 4])  # Breakout: NOOP, FIRE, RIGHT, LEFT
    assert [int(np.searchsorted(full, t.actions).sum()) for t in made] == [e["action_sum"] for e in EPISODES]
    assert set(np.concatenate([t.actions for t in made])) == set(full)
    assert all(t.terminated and not t.truncated and t.final_state is None and t.seed == -1 for t in made)
    assert (made[0].domain, made[0].task) == ("atari", "breakout")
    assert all(words in made[0].source for words in ("Breakout run 1", "sticky actions 0.25", "clipped", "lram "))
    assert count.dropped == {
        "all-zero padding before an episode": 87,  # Also before the unfinished one.
        "of the unfinished episode at the end of the recording": 107,
        "stale or never written": 613,
    }
    assert count.read == 6000 and count.written == 5193 and not count.problems


def test_every_frame_is_where_the_raw_arrays_have_it():
    folder = SAMPLE / "Breakout/1/replay_logs"
    raw = {kind: [load(place(folder, kind, n)) for n in range(3)] for kind in ("observation", *SMALL)}

    def ordered(kind: str) -> np.ndarray:
        a, b, c = raw[kind]
        return np.concatenate([a[:1999], b[1999:], b[:1999], c[1999:], c[:1387]])

    frames, actions, rewards = (ordered(kind) for kind in ("observation", "action", "reward"))
    at = 0
    for trajectory, truth in zip(whole()[0], EPISODES):
        rows = slice(at + 3, at + 3 + truth["length"])
        assert not frames[at : at + 3].any()
        assert frames[rows][0].sum() == truth["first_obs_sum"] and frames[rows][-1].sum() == truth["last_obs_sum"]
        assert np.array_equal(trajectory.states[:, 0], shrink(frames[rows]))
        assert np.array_equal(trajectory.actions, np.array([0, 1, 3, 4])[actions[rows]])
        assert np.array_equal(trajectory.rewards, rewards[rows])
        at = rows.stop
    assert len(frames) == at + 3 + 107


def test_it_is_written_as_a_task(tmp_path):
    options = Options()
    result = convert_job("dqn_replay", jobs(SAMPLE, options)[0], options, tmp_path)
    assert (result.name, result.episodes, result.transitions) == ("atari/breakout", 28, 5193)
    assert result.dropped["of the unfinished episode at the end of the recording"] == 107
    files = sorted(tmp_path.glob("atari/breakout/*/*.hdf5"))
    assert [read(file).length for file in files] == [e["length"] for e in EPISODES]


@pytest.mark.parametrize("block", [1, 777, 1 << 20])
def test_the_block_size_changes_nothing(block, sample):
    path = place(sample, "observation", 1)
    path.write_bytes(path.read_bytes()[:90_000])
    made, count = convert(sample, block)
    expected, expected_count = convert(sample)
    assert [encode(t).sha256 for t in made] == [encode(t).sha256 for t in expected]
    assert count == expected_count


def test_memory_is_bounded_by_an_episode_not_by_a_checkpoint():
    options = Options()
    (job,) = jobs(SAMPLE, options)
    list(trajectories(job, options, Count()))
    tracemalloc.start()
    for _ in trajectories(job, options, Count(), block=1024):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6  # A checkpoint's frames are 14 MB, the longest episode's 1.2.


# ---- Any recording: Dopamine's buffer, written down again from its description ----


def record(folder: Path, lengths: list[int], capacity: int, unfinished: int = 0) -> list[list[int]]:
    """Records episodes as Dopamine's logged buffer does; returns the values of the frames of each episode.

    A checkpoint is written when the cursor stands at the last row after a step was added. A step that begins an
    episode adds four rows, so that the cursor may jump over that moment: a whole round is then never written.
    """
    folder.mkdir(parents=True)
    arrays = {
        "observation": np.zeros((capacity, 84, 84), np.uint8),
        "action": np.zeros(capacity, np.int32),
        "reward": np.full(capacity, np.nan, np.float32),  # Never written: anything.
        "terminal": np.zeros(capacity, np.uint8),
    }
    added, logged, step = 0, 0, itertools.count(1)
    values: list[list[int]] = []

    def write(add_count: int) -> None:
        nonlocal logged
        for kind, array in (*arrays.items(), ("add_count", np.int64(add_count))):
            store(place(folder, kind, logged), array)
        logged += 1

    for number, length in enumerate([*lengths, unfinished]):
        values.append([])
        for t in range(length):
            rows = [(0, 0, 0.0, 0)] * 3 if t == 0 else []
            value = next(step) % 255 + 1
            values[-1].append(value)
            rows.append((value, value % 4, float(value % 3 - 1), int(t == length - 1 and number < len(lengths))))
            for row in rows:
                for array, entry in zip(arrays.values(), row):
                    array[added % capacity] = entry
                added += 1
            if added % capacity == capacity - 1:
                write(added)
    write(added % capacity)
    return values[: len(lengths)]


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    capacity=st.integers(20, 60),
    unfinished=st.integers(0, 9),
    last=st.sampled_from([0, 1, 13, 40, 10_000]),
    block=st.integers(1, 4000),
)
def test_any_recording_is_read_back(tmp_path_factory, lengths, capacity, unfinished, last, block):
    folder = tmp_path_factory.mktemp("any") / "Breakout/1/replay_logs"
    values = record(folder, lengths, capacity, unfinished)
    made, count = convert(folder, block, last=last)
    found = [t.states[:, 0, 0, 0].tolist() for t in made]
    rows = sum(length + 3 for length in (*lengths, unfinished) if length)
    # Some round was overwritten before it was written: as many checkpoints are missing as the rows fill.
    gap = (rows + 1) // capacity > len(list(folder.glob("add_count*"))) - 1
    if not gap:
        fits = [i for i in range(len(lengths)) if not last or sum(lengths[i:]) <= last]
        assert found == [values[i] for i in fits]
        assert not count.problems
        assert count.dropped.get("of the unfinished episode at the end of the recording", 0) == unfinished
    else:
        assert all(episode in values for episode in found)
        assert found == sorted(found, key=values.index) and (not last or sum(map(len, found)) <= last)
    for trajectory in made:
        frames = trajectory.states[:, 0, 0, 0].astype(int)
        assert np.array_equal(trajectory.actions, np.array([0, 1, 3, 4])[frames % 4])
        assert np.array_equal(trajectory.rewards, frames % 3 - 1.0)


def test_a_round_that_was_never_written_is_a_gap(tmp_path):
    # 3 + 14 rows; the next episode's four rows carry the cursor from 17 to 21, over the moment at 19.
    folder = tmp_path / "Breakout/1/replay_logs"
    values = record(folder, [14, 15, 16, 17, 18, 19], 20)
    counts = [int(load(path)) for path in sorted(folder.glob("add_count*"))]
    assert counts == [39, 59, 79, 99, 17]
    made, count = convert(folder)
    assert [t.states[:, 0, 0, 0].tolist() for t in made] == values[2:]
    assert count.dropped["of an episode whose beginning is missing"] == 15
    assert not count.problems  # What was never written is not damage.


def test_a_final_checkpoint_may_repeat_the_one_before(tmp_path):
    folder = tmp_path / "Breakout/1/replay_logs"
    values = record(folder, [4], 20, unfinished=9)
    assert [int(load(path)) for path in sorted(folder.glob("add_count*"))] == [19, 19]
    (episode,), count = convert(folder)
    assert episode.states[:, 0, 0, 0].tolist() == values[0] and not count.problems and count.read == 20
    assert count.dropped["of the unfinished episode at the end of the recording"] == 9


# ---- Damage: what is kept and what is said ----


def test_an_episode_is_never_joined_across_a_gap(tmp_path):
    # Rows 0-18 are written; at row 37 the cursor jumps over 39; 39-58 and 59-78 are written, and what follows.
    folder = tmp_path / "Breakout/1/replay_logs"
    values = record(folder, [27, 4, 25, 16, 6], 20)
    assert [int(load(path)) for path in sorted(folder.glob("add_count*"))] == [19, 59, 79, 13]
    made, count = convert(folder)
    assert [t.states[:, 0, 0, 0].tolist() for t in made] == values[3:]
    assert count.problems == [
        f"{place(folder, 'observation', 1)}: add_count goes from 19 to 59, expected a step of 20; "
        "no episode is joined across"
    ]
    assert count.dropped["of an episode whose end is missing"] == 19 - 3
    assert count.dropped["of an episode whose beginning is missing"] == 25


def test_an_episode_that_begins_behind_a_gap_is_kept(sample):
    store(place(sample, "add_count", 1), np.int64(5999))
    made, count = convert(sample)
    assert same_as(made, list(range(28)))  # The last row of checkpoint 0 ends an episode.
    assert "add_count goes from 1,999 to 5,999" in count.problems[0]
    lengths = [e["length"] for e in EPISODES]
    assert same_as(convert(sample, last=sum(lengths[10:]))[0], list(range(10, 28)))
    assert same_as(convert(sample, last=sum(lengths[10:]) - 1)[0], list(range(11, 28)))


def test_stale_rows_that_are_not_those_of_the_checkpoint_before_are_a_gap(sample):
    path = place(sample, "action", 2)
    actions = load(path)
    actions[1900] ^= 1
    store(path, actions)
    made, count = convert(sample)
    assert len(made) == 27 and "the rows behind its end are not those of the checkpoint before" in count.problems[0]


@pytest.mark.parametrize("kinds", [("observation", "action", "reward", "terminal", "add_count"), ("reward",)])
def test_a_missing_middle_checkpoint_costs_its_episodes(sample, kinds):
    for kind in kinds:
        place(sample, kind, 1).unlink()
    made, count = convert(sample)
    assert same_as(made, survivors(in_time(1, range(CAPACITY))))
    said = "holds no checkpoint 1; no" if len(kinds) > 1 else "checkpoint 1 has no reward file; it is left out"
    assert len(count.problems) == 1 and said in count.problems[0] and str(sample) in count.problems[0]
    assert count.read == 4000


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_truncated_file_of_observations_keeps_what_comes_before(sample, number):
    path = place(sample, "observation", number)
    path.write_bytes(path.read_bytes()[:60_000])
    made, count = convert(sample)
    (problem,) = count.problems
    rows = int(problem.split("; ")[1].split(" of ")[0].replace(",", ""))
    assert problem == f"{path}: is cut; {rows:,} of 2,000 frames could be read" and 500 < rows < 1500
    assert same_as(made, survivors(in_time(number, range(rows, CAPACITY))))
    stop = 1387 if number == 2 else CAPACITY - 1
    assert count.dropped["unreadable"] == stop - rows + (number > 0)


def test_a_truncated_small_file_keeps_what_comes_before(sample):
    path = place(sample, "action", 1)
    path.write_bytes(path.read_bytes()[:600])
    made, count = convert(sample)
    (problem,) = count.problems
    rows = int(problem.split("; ")[1].split(" of ")[0].replace(",", ""))
    assert problem.startswith(f"{path}: is cut; ") and 500 < rows < 1500
    assert same_as(made, survivors(in_time(1, range(rows, CAPACITY))))


@pytest.mark.parametrize("kind", ["observation", "terminal", "add_count"])
def test_of_a_damaged_file_nothing_is_believed(sample, kind):
    path = place(sample, kind, 1)
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # In the checksum: all rows can be read, and some may be wrong.
    path.write_bytes(data)
    made, count = convert(sample)
    assert same_as(made, survivors(in_time(1, range(CAPACITY))))
    assert len(count.problems) == 1 and f"{path}: is no gzip file, or damaged" in count.problems[0]


@pytest.mark.parametrize("kind", ["observation", "action", "reward"])
def test_padding_that_is_not_zero_costs_its_episode(sample, kind):
    array = load(place(sample, kind, 0))
    array.reshape(CAPACITY, -1)[143, -1] = 1  # The second of the three rows before episode 1.
    store(place(sample, kind, 0), array)
    made, count = convert(sample)
    assert same_as(made, [0, *range(2, 28)])
    path = place(sample, "observation", 0)
    assert count.problems == [
        f"{path}: row 143 is of an episode without three all-zero rows before it; all such episodes are left out"
    ]
    assert count.dropped["of an episode without three all-zero rows before it"] == 2 + EPISODES[1]["length"]


def test_a_file_that_holds_less_than_it_declares_is_cut(sample):
    path = place(sample, "observation", 1)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[: 128 + 1000 * 84 * 84 + 5], 1))
    made, count = convert(sample)
    assert count.problems == [f"{path}: ends early; 1,000 of 2,000 frames could be read"]
    assert same_as(made, survivors(in_time(1, range(1000, CAPACITY))))


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray], **how) -> None:
    store(path, edit(load(path)), **how)


def many_dimensions(path: Path, dimensions: int) -> None:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({'1, ' * dimensions}), }}\n".encode()
    size = len(text).to_bytes(4, "little")
    path.write_bytes(gzip.compress(b"\x93NUMPY\x02\x00" + size + text + b"\0"))


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "dtype": ("action", lambda p: change(p, lambda a: a.astype(np.int64)), "holds numbers of type <i8, expected <i4"),
    "pickled": (
        "reward",
        lambda p: change(p, lambda a: a.astype(object), allow_pickle=True),
        "holds numbers of type |O, expected <f4",
    ),
    "frames": ("observation", lambda p: change(p, lambda a: a[:, :, :83]), "shape (2000, 84, 83), expected 1 to"),
    "flat": ("observation", lambda p: change(p, lambda a: a[:, 0]), "shape (2000, 84), expected 1 to"),
    "order": ("observation", lambda p: change(p, np.asfortranarray), "holds numbers of type |u1 in Fortran order"),
    "capacity": ("terminal", lambda p: change(p, lambda a: a[:1999]), "holds 1,999 rows, expected 2,000 as"),
    "empty": ("terminal", lambda p: change(p, lambda a: a[:0]), "declares an array of shape (0,), expected 1 to"),
    "more": (
        "terminal",
        lambda p: p.write_bytes(gzip.compress(gzip.decompress(p.read_bytes()) + b"\1")),
        "holds more than the 2,000 rows that its header declares",
    ),
    "count": (
        "add_count",
        lambda p: change(p, lambda a: a.reshape(1)),
        "array of shape (1,), expected a single number",
    ),
    "negative": ("add_count", lambda p: store(p, np.int64(-1)), "add_count is -1, expected the number of rows"),
    "huge header": (
        "observation",
        lambda p: many_dimensions(p, 100_000),
        "declares a header of 300,068 bytes, expected at most 4,096",
    ),
    "dimensions": ("observation", lambda p: many_dimensions(p, 1000), "array of 1000 dimensions, expected 1 to"),
    "huge": (
        "observation",
        lambda p: p.write_bytes(
            gzip.compress(
                gzip.decompress(p.read_bytes())[:128].replace(b"(2000, 84, 84), }    ", b"(20000000, 84, 84), }")
            )
        ),
        "array of shape (20000000, 84, 84), expected 1 to 16,777,216 rows of shape (84, 84)",
    ),
    "no npy": ("action", lambda p: p.write_bytes(gzip.compress(pickle.dumps([1] * 9))), "holds no .npy array"),
    "nothing": ("action", lambda p: p.write_bytes(gzip.compress(b"")), "holds 0 bytes, expected a .npy array"),
    "nested": (
        "action",
        lambda p: p.write_bytes(gzip.compress(b"\x93NUMPY\x01\x00\xa0\x0f" + b"(" * 4000)),
        "its .npy header cannot be read",
    ),
    "actions": (
        "action",
        lambda p: change(p, lambda a: a + 3 * (a == 2).astype(a.dtype)),
        "actions are 0 to 5, expected 0 to 3",
    ),
    "rewards": ("reward", lambda p: change(p, lambda a: a * 7), "rewards lie outside [-1, 1], expected clipped ones"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_recording_is_refused_by_name(sample, case):
    kind, damage, said = REFUSED[case]
    path = place(sample, kind, 1)
    damage(path)
    with pytest.raises(BadInput) as error:
        convert(sample)
    named = path if case not in ("actions", "rewards") else place(sample, "observation", 1)
    assert str(error.value).startswith(f"{named}:") and said in str(error.value)
    assert len(str(error.value)) < len(str(named)) + 120


def test_all_headers_are_checked_before_the_first_trajectory(sample):
    change(place(sample, "observation", 2), lambda a: a.astype(np.uint16))
    options = Options()
    (job,) = jobs(sample, options)
    with pytest.raises(BadInput, match="holds numbers of type <u2"):
        next(trajectories(job, options, Count()))


# ---- Long episodes ----


def test_an_episode_of_27000_steps_was_cut_by_the_limit(tmp_path):
    folder = tmp_path / "Breakout/1/replay_logs"
    folder.mkdir(parents=True)
    length, capacity = 27_000, 27_020
    terminals = np.zeros(capacity, np.uint8)
    terminals[[length + 2, length + 3 + 5]] = 1
    used = length + 3 + 6
    frames = np.zeros((capacity, 84, 84), np.uint8)
    frames[3:used] = 9
    frames[length + 3 : length + 6] = 0
    zeros = np.zeros(capacity)
    arrays = (frames, zeros.astype(np.int32), zeros.astype(np.float32), terminals, np.int64(used))
    for kind, array in zip(("observation", *SMALL, "add_count"), arrays):
        store(place(folder, kind, 0), array)
    (long, short), count = convert(folder)
    assert (long.length, long.terminated, long.truncated) == (length, False, True)
    assert (short.length, short.terminated, short.truncated) == (3, True, False)
    assert count.dropped["stale or never written"] == capacity - used


@pytest.mark.parametrize("block", [1, 5000])
def test_a_longer_one_than_there_can_be_is_left_out(tmp_path, monkeypatch, block):
    monkeypatch.setattr(dqn_replay, "LONGEST", 20)
    folder = tmp_path / "Breakout/1/replay_logs"
    values = record(folder, [20, 21, 5], 100)
    made, count = convert(folder, block)
    assert [t.states[:, 0, 0, 0].tolist() for t in made] == [values[0], values[2]]
    assert [t.truncated for t in made] == [True, False]
    assert count.dropped["of an episode of more than 20 steps"] == 21
    assert count.problems[0].startswith(f"{place(folder, 'observation', 0)}: row {23 + 3 + 20} is of an episode")


# ---- The last transitions ----


@pytest.mark.parametrize("last", [50, 151, 1000, 2500, 5192, 5193])
def test_the_last_transitions_are_the_latest_whole_episodes(last):
    made, count = convert(SAMPLE, last=last)
    lengths = [e["length"] for e in EPISODES]
    first = next(i for i in range(29) if sum(lengths[i:]) <= last)
    assert same_as(made, list(range(first, 28)))
    before = sum(3 + length for length in lengths[:first])
    skipped = (before + 1) // CAPACITY * CAPACITY
    assert count.dropped.get(dqn_replay.NOT_ASKED, 0) == before - (skipped - 1 if skipped else 0)


def test_checkpoints_before_them_are_not_opened(sample):
    place(sample, "observation", 0).write_bytes(b"damaged")
    place(sample, "action", 0).write_bytes(b"damaged")
    made, count = convert(sample, last=1000)
    assert sum(t.length for t in made) == 858 and not count.problems and count.read == 2000
    (job,) = jobs(sample, Options(last=1000))
    assert [path.name.split(".")[-2] for path in job.files] == ["2"] * 5


def test_they_are_found_across_a_gap(sample):
    for kind in ("observation", "action"):
        place(sample, kind, 1).unlink()
    whole, _ = convert(sample)
    made, count = convert(sample, last=sum(t.length for t in whole[-9:]))
    assert [t.length for t in made] == [t.length for t in whole[-9:]]
    assert "checkpoint 1 has no action file" in count.problems[0]


# ---- What there is to convert ----


@pytest.mark.parametrize("level", [".", "Breakout", "Breakout/1", "Breakout/1/replay_logs"])
def test_any_level_of_folders_will_do(level):
    (job,) = jobs(SAMPLE / level, Options())
    assert (job.name, job.detail, len(job.files)) == ("atari/breakout", "Breakout, run 1", 15)
    assert all(path.is_relative_to(job.src) for path in job.files)


@pytest.fixture
def many(tmp_path) -> Iterator[Path]:
    for place_ in ("SpaceInvaders/1", "UpNDown/1", "UpNDown/2", "Asterix/1", "Asterix/2"):
        shutil.copytree(SAMPLE / "Breakout/1/replay_logs", tmp_path / place_ / "replay_logs")
    yield tmp_path


def test_games_and_runs_are_chosen(many):
    def found(**options) -> list[tuple[str, str]]:
        return [(job.task, job.detail) for job in jobs(many, Options(**options))]

    assert found() == [
        ("asterix", "Asterix, run 2"),  # The first is suspect.
        ("space-invaders", "SpaceInvaders, run 1"),
        ("up-n-down", "UpNDown, run 1"),
    ]
    assert found(run=1)[0] == ("asterix", "Asterix, run 1")
    assert found(games=("UpNDown", "space-invaders")) == found()[1:]
    assert found(games=("up-n-down",), run=2) == [("up-n-down", "UpNDown, run 2")]
    with pytest.raises(BadInput, match=r"SpaceInvaders has no run 2, only 1; choose one with --run"):
        found(run=2)
    with pytest.raises(BadInput, match="holds no game 'Pong', only Asterix, SpaceInvaders, UpNDown"):
        found(games=("Pong",))
    with pytest.raises(BadInput, match="last is -1"):
        found(last=-1)
    shutil.rmtree(many / "Asterix/2")
    with pytest.raises(BadInput, match="Asterix has no run 2, only 1"):
        found()
    with pytest.raises(BadInput, match="Asterix has no run 2, only 1"):
        jobs(many / "Asterix/1", Options(run=2))
    assert jobs(many / "Asterix/1", Options())[0].detail == "Asterix, run 1"
    for path in (many / "SpaceInvaders/1/replay_logs").iterdir():
        path.unlink()
    with pytest.raises(BadInput, match="SpaceInvaders/1/replay_logs: holds no checkpoint"):
        found(games=("SpaceInvaders",))
    (many / "UpNDown/2").rename(many / "UpNDown/old")
    with pytest.raises(BadInput, match="lies in UpNDown/old, expected <Game>/<number of the run>/replay_logs"):
        found()
    with pytest.raises(BadInput, match="no DQN-Replay recording found"):
        jobs(many / "Asterix/1/replay_logs/none", Options())


def test_a_game_that_nobody_knows_is_refused(many):
    (many / "SpaceInvaders").rename(many / "Breakoutt")
    with pytest.raises(BadInput, match="ale-py knows no game 'Breakoutt'"):
        convert(many / "Breakoutt")


def test_every_game_is_called_what_the_table_of_tasks_calls_it():
    known = [task for (domain, _), task in tasks().items() if domain == "atari"]
    assert len(known) == 46
    for task in known:
        game = task.env_id.removeprefix("ALE/").removesuffix("-v5")
        assert dqn_replay._spelled(game, "-") == task.name
        assert dqn_replay._spelled(game, "_") in ale_py.roms.get_all_rom_ids()
    expected = {
        "Breakout": [0, 1, 3, 4],
        "Freeway": [0, 2, 5],
        "SpaceInvaders": [0, 1, 3, 4, 11, 12],
        "Hero": [*range(18)],
    }
    for game, actions in expected.items():
        assert dqn_replay._action_set(game, SAMPLE).tolist() == actions
