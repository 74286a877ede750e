import gzip
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from lram.converters.procgen import CUT, UNFINISHED, Options, jobs, trajectories
from lram.converters.source import Count
from lram.converters.unpickle import attributes, load
from lram.datasets.images import gray
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import encode

DATA = Path(__file__).parent / "data" / "procgen"
# Length, level seed, return of each complete episode, in the order in which they ended; see the data's README.
EPISODES = [(12, 137, 0), (43, 73, 0), (59, 106, 0), (47, 10, 0), (50, 4, 1), (124, 37, 4)]


def convert(src: Path, **options):
    (job,) = jobs(src, Options(**options))
    count = Count()
    made = list(trajectories(job, Options(**options), count))
    count.check()
    assert count.episodes == len(made) and [t.episode for t in made] == list(range(len(made)))
    for trajectory in made:
        encode(trajectory)  # keeps to the format
    return made, count


def told(made):
    return [(t.length, t.seed, t.total) for t in made]


def recorded() -> list[dict]:
    return [attributes(load(DATA / "buffers" / f"bigfish_{k}.gz")) for k in range(3)]


def record(src: Path, splits, numbers=None) -> Path:
    src.mkdir(exist_ok=True)
    for k, split in zip(numbers or range(len(splits)), splits):
        arrays = {key: value for key, value in split.items() if "space" not in key and key != "device"}
        (src / f"bigfish_{k}.gz").write_bytes(gzip.compress(pickle.dumps(arrays), 1))
    return src


def resplit(lengths, **changes) -> list[dict]:
    """The recorded rows in splits of other lengths."""
    parts = recorded()
    keys = [key for key, value in parts[0].items() if isinstance(value, np.ndarray)]
    rows = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    stops = np.cumsum(lengths)
    return [
        {"pos": 0, "full": True} | {key: rows[key][a:b] for key in keys} | changes for a, b in zip([0, *stops], stops)
    ]


def test_buffers_become_their_episodes():
    made, count = convert(DATA / "buffers")
    assert told(made) == EPISODES
    assert (count.read, count.written, count.dropped, count.problems) == (360, 335, {UNFINISHED: 25}, [])
    rows = {key: np.concatenate([part[key] for part in recorded()]) for key in ("observations", "actions", "rewards")}
    for t, (env, stop) in zip(made, [(1, 12), (1, 55), (0, 59), (0, 106), (0, 156), (1, 179)]):
        frames = rows["observations"][stop - t.length : stop, env]
        assert np.array_equal(t.states[:, 0], gray(frames.transpose(0, 2, 3, 1)))
        assert np.array_equal(t.actions, rows["actions"][stop - t.length : stop, env, 0])
        assert np.array_equal(t.rewards, rows["rewards"][stop - t.length : stop, env])
        assert t.terminated and not t.truncated and t.final_state is None and "RA-DT" in t.source
    # What follows an end is the next episode, so it is no final state.
    assert (recorded()[0]["next_observations"][11, 1] == recorded()[0]["observations"][12, 1]).all()


@pytest.mark.parametrize("rgb", [False, True])
def test_both_recordings_give_the_same_episodes(rgb):
    buffers, _ = convert(DATA / "buffers", rgb=rgb)
    singles, count = convert(DATA / "episodes", rgb=rgb)
    assert told(singles) == [EPISODES[0], EPISODES[3]] and not count.problems
    for single, buffer in zip(singles, [buffers[0], buffers[3]]):
        assert single.task == buffer.task == ("bigfish.rgb" if rgb else "bigfish")
        assert single.states.shape[1] == (3 if rgb else 1)
        for name in ("states", "actions", "rewards", "terminated", "truncated", "seed", "final_state"):
            assert np.array_equal(getattr(single, name), getattr(buffer, name))


def test_the_cut_into_splits_does_not_matter(tmp_path):
    expected, _ = convert(DATA / "buffers")
    for n, lengths in enumerate([(180,), (59, 1, 120), (12, 100, 3, 65)]):
        made, count = convert(record(tmp_path / str(n), resplit(lengths)))
        assert told(made) == EPISODES and count.dropped == {UNFINISHED: 25} and not count.problems
        assert all(np.array_equal(a.states, b.states) for a, b in zip(made, expected))


@pytest.mark.parametrize("damage", ["missing", "truncated", "no gzip", "shorter"])
def test_episodes_are_not_joined_across_a_gap(tmp_path, damage):
    src = record(tmp_path / "src", recorded())
    middle = src / "bigfish_1.gz"
    data = middle.read_bytes()
    if damage == "missing":
        middle.unlink()
    else:
        middle.write_bytes({"truncated": data[: len(data) // 2], "no gzip": b"junk", "shorter": data[:-4]}[damage])
    made, count = convert(src)
    # Rows 0..59 hold three episodes; what began before the gap, or ends after it without a known start, is left out.
    assert told(made) == EPISODES[:3]
    # 1 and 5 rows before the gap, 36 and 59 after it; then the rest that nothing ended.
    assert (count.read, count.dropped) == (240, {CUT: 1 + 5 + 36 + 59, UNFINISHED: 24 + 1})
    assert len(count.problems) == 1 and "not joined" in count.problems[0]
    assert ("bigfish_2.gz" if damage == "missing" else "bigfish_1.gz") in count.problems[0]


def test_a_first_split_other_than_0_begins_inside_episodes(tmp_path):
    made, count = convert(record(tmp_path / "src", recorded()[1:], [1, 2]))
    assert told(made) == [EPISODES[4]] and len(count.problems) == 1


def test_what_does_not_continue_is_a_gap_and_what_repeats_is_left_out(tmp_path):
    first, second, third = recorded()
    made, count = convert(record(tmp_path / "order", [first, third]))
    assert told(made) == EPISODES[:3] and "does not continue" in count.problems[0]
    made, count = convert(record(tmp_path / "twice", [first, first, second, third]))
    assert told(made) == EPISODES and count.dropped == {"file repeated": 120, UNFINISHED: 25}
    assert "bigfish_1.gz: holds the same rows" in count.problems[0]


def test_a_partial_last_split_ends_at_pos(tmp_path):
    splits = recorded()
    splits[2] |= {"pos": 40, "full": False}
    made, count = convert(record(tmp_path / "src", splits))
    assert told(made) == EPISODES[:5]
    assert count.dropped == {"row never filled": 40, UNFINISHED: 4 + 105}
    splits[2] |= {"pos": 0}
    _, count = convert(record(tmp_path / "src", splits))
    assert count.dropped["row never filled"] == 120
    # A ring that went round begins with its oldest row, in the middle of episodes.
    (ring,) = resplit((180,))
    for key, value in ring.items():
        if isinstance(value, np.ndarray):
            ring[key] = np.roll(value, 30, 0)
    made, count = convert(record(tmp_path / "ring", [ring | {"pos": 30}]))
    assert told(made) == [EPISODES[1], *EPISODES[3:]]
    assert "went round" in count.problems[0]


def test_timeouts_truncate_and_seeds_may_be_unknown(tmp_path):
    splits = recorded()
    splits[0] = splits[0] | {"timeouts": splits[0]["dones"].copy(), "seeds": np.zeros_like(splits[0]["seeds"])}
    splits[1] = splits[1] | {"seeds": splits[1]["seeds"] + np.float32(1 << 24)}
    made, _ = convert(record(tmp_path / "src", splits))
    assert [t.truncated for t in made] == [True] * 3 + [False] * 3 == [not t.terminated for t in made]
    assert [t.seed for t in made] == [-1, -1, -1, -1, 4, 37]


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_floats_become_the_pixels_they_were(tmp_path, kind):
    expected, _ = convert(DATA / "buffers", rgb=True)
    splits = recorded()
    for split in splits:
        for key in ("observations", "next_observations"):
            # A little less, so that cutting digits off would show.
            split[key] = (np.maximum(split[key] / np.float32(255) - np.float32(1e-3), 0)).astype(kind)
    made, _ = convert(record(tmp_path / "src", splits[:1]), rgb=True)
    assert all(np.array_equal(a.states, b.states) for a, b in zip(made, expected))
    splits[0]["observations"] = splits[0]["observations"] * kind(255)
    with pytest.raises(BadInput, match=r"bigfish_0\.gz: observations are float"):
        convert(record(tmp_path / "src", splits[:1]))


def test_wrong_content_is_refused(tmp_path):
    first = recorded()[0]
    wrong = {
        "actions": first["actions"] + 5,
        "rewards": first["rewards"][:-1],
        "dones": first["dones"].astype("S1"),
        "observations": first["observations"][:, :, :1],
        "next_observations": first["next_observations"][:5],
        "pos": 61,
        "full": None,
    }
    for key, value in wrong.items():
        with pytest.raises(BadInput, match=rf"bigfish_0\.gz: .*{key}"):
            convert(record(tmp_path / "src", [first | {key: value}]))
    envs = {key: value[:, :1] if isinstance(value, np.ndarray) else value for key, value in recorded()[1].items()}
    with pytest.raises(BadInput, match=r"bigfish_1\.gz: 1 environments, expected 2"):
        convert(record(tmp_path / "src", [first, envs]))


class Command:
    def __reduce__(self):
        return os.system, ("touch touched",)


def test_an_unsafe_pickle_is_no_gap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, pack in (("bigfish_1.gz", gzip.compress), ("bigfish/x_1_2_3_0.0.npy", bytes)):
        src = tmp_path / name.split(".")[-1]
        (src / name).parent.mkdir(parents=True)
        if name.endswith("gz"):
            shutil.copyfile(DATA / "buffers" / "bigfish_0.gz", src / "bigfish_0.gz")
        (src / name).write_bytes(pack(pickle.dumps({"dones": Command()})))
        with pytest.raises(BadInput, match=f"{Path(name).name}: unsafe pickle: it would call posix.system"):
            convert(src)
    assert not (tmp_path / "touched").exists()


def episode(src: Path, name: str, **changes) -> None:
    content = load(next((DATA / "episodes").rglob("*_0_12_*.npy"))).item() | changes
    (src / "bigfish").mkdir(parents=True, exist_ok=True)
    np.save(src / "bigfish" / name, np.array(content, object))


def test_single_files_are_taken_in_the_order_of_their_ids(tmp_path):
    episode(tmp_path, "20240101T000000_10_12_7_0.0.npy")
    episode(tmp_path, "20240102T000000_9_12_8_0.0.npy")
    episode(tmp_path, "20240102T000000_11_13_9_2.5.npy")
    episode(tmp_path, "20240102T000000_12_12_9_0.0.npy", dones=np.zeros(12, bool))
    (tmp_path / "bigfish" / "20240102T000000_13_12_9_0.0.npy").write_bytes(b"\x93NUMPY")
    made, count = convert(tmp_path)
    assert [t.seed for t in made] == [8, 7, 9] and count.dropped == {UNFINISHED: 12}
    said, broken = count.problems
    assert "says 13 steps and a return of 2.5, but it holds 12 steps" in said and "_13_12_9_0.0.npy" in broken


def test_single_files_of_other_content_are_refused(tmp_path):
    for n, changes in enumerate([{"dones": np.ones(12, bool)}, {"actions": np.arange(5)}, {"rewards": "none"}]):
        episode(tmp_path / str(n), "20240101T000000_0_12_7_0.0.npy", **changes)
        with pytest.raises(BadInput, match=r"20240101T000000_0_12_7_0\.0\.npy: "):
            convert(tmp_path / str(n))


def test_jobs_say_what_they_do_not_find(tmp_path):
    with pytest.raises(BadInput, match="holds bigfish as single episodes and as buffers"):
        jobs(DATA, Options())
    with pytest.raises(BadInput, match="no such game"):
        jobs(DATA / "buffers", Options(games=("pong",)))
    for options in (Options(), Options(games=("maze",))):
        with pytest.raises(BadInput, match="no Procgen recordings"):
            jobs(tmp_path if options == Options() else DATA / "buffers", options)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(DATA / "buffers" / "bigfish_0.gz", tmp_path / folder / "maze_0.gz")
    assert [job.name for job in jobs(tmp_path / "a", Options())] == ["procgen/maze"]
    with pytest.raises(BadInput, match=r"a second maze_0\.gz"):
        jobs(tmp_path, Options())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.npy").write_bytes(b"")
    with pytest.raises(BadInput, match="neither game nor episode"):
        jobs(tmp_path / "c", Options())
