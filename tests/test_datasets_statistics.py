"""Statistics of small datasets, against values computed by hand."""

import base64
import json
import zlib

import numpy as np
import pytest

from lram.datasets import statistics
from lram.datasets.specs import tasks
from lram.datasets.statistics import describe, histogram, learning_curve, png, sample_rows, task_statistics
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter


def write(root, trajectories, codec=None, complete=True, provenance=None):
    first = trajectories[0]
    with TaskWriter(root, first.domain, first.task, provenance or {"seed": 3}, codec) as writer:
        for trajectory in trajectories:
            writer.add(trajectory)
        if complete:
            writer.finish()
    return root / first.domain / first.task


def darkroom(episode, states, actions, rewards, **changes):
    arrays = np.array(states, np.float32), np.array(actions, np.int64), np.array(rewards, np.float32)
    ending = {"terminated": False, "truncated": True} | changes
    return Trajectory("darkroom", "room5x5-goal-01-01", episode, 0, *arrays, source="test", **ending)


def dmcontrol(episode, states, actions, rewards, task="walker-walk", layout=None):
    arrays = np.array(states, np.float32), np.array(actions, np.float32), np.array(rewards, np.float32)
    layout = layout or {"orientations": [0, 1], "velocity": [1, 4]}
    return Trajectory("dmcontrol", task, episode, 0, *arrays, False, True, "test", state_layout=layout)


def procgen(episode, length, channels=1, reward=0.0):
    # A bright square that moves one pixel a step over a gradient.
    frames = np.zeros((length, channels, 64, 64), np.uint8)
    frames += np.arange(64, dtype=np.uint8)
    for step in range(length):
        frames[step, :, 20:30, step % 50 : step % 50 + 8] = 200
    actions, rewards = np.arange(length) % 15, np.full(length, reward, np.float32)
    return Trajectory("procgen", "bigfish", episode, -1, frames, actions, rewards, True, False, "test")


@pytest.fixture
def vectors(tmp_path):
    return write(
        tmp_path,
        [
            darkroom(0, [[0, 1], [0, 2]], [0, 1], [0, 0], success=False),
            darkroom(1, [[0, 3], [0, 3], [0, 4]], [1, 1, 4], [0, 1, 1], success=True),
            darkroom(2, [[0, 1]], [2], [1], terminated=True, truncated=False, success=True),
            darkroom(3, [[0, 0], [0, 1]], [2, 2], [0, 0], truncated=False),
        ],
    )


def test_counts_and_endings_come_from_the_index(vectors):
    result = task_statistics(vectors, duplicates=2)
    assert result["task"] == "darkroom/room5x5-goal-01-01"
    assert (result["trajectories"], result["transitions"], result["duplicates"]) == (4, 8, 2)
    assert (result["terminated"], result["truncated"], result["unfinished"]) == (1, 2, 1)
    assert result["success_known"] == 3
    assert result["success_rate"] == pytest.approx(2 / 3)
    assert result["bytes"] == sum(path.stat().st_size for path in vectors.glob("000/*.hdf5"))
    assert (result["codec"], result["complete"], result["error"]) == ("none", True, None)
    assert result["provenance"] == {"seed": 3}
    assert result["scores"] is None and result["split"] is None


def test_returns_lengths_and_curve(vectors):
    result = task_statistics(vectors)
    returns, lengths = result["returns"], result["lengths"]
    assert (returns["mean"], returns["min"], returns["q50"], returns["max"]) == (0.75, 0, 0.5, 2)
    assert returns["std"] == pytest.approx(np.sqrt((0.75**2 * 2 + 1.25**2 + 0.25**2) / 4))
    assert returns["histogram"] == {"start": -0.5, "width": 1, "counts": [2, 1, 1]}
    assert (lengths["mean"], lengths["min"], lengths["max"]) == (2, 1, 3)
    assert lengths["histogram"]["counts"] == [1, 2, 1]
    curve = result["learning_curve"]
    assert curve["episode"] == [0, 1, 2, 3] and curve["mean"] == [0, 2, 1, 0] and curve["count"] == [1] * 4


def test_discrete_actions_rewards_and_dead_columns(vectors):
    result = task_statistics(vectors)
    assert result["actions"] == {"kind": "discrete", "counts": [1, 3, 3, 0, 1], "outside": 0}
    assert result["rewards"] == {"nonzero_share": 3 / 8, "min": 0, "max": 1}
    assert result["states"] == {"columns": 2, "dead": [0], "constant": [], "constant_in_trajectory": []}
    assert result["sampled"] == {"trajectories": 4, "transitions": 8}
    assert result["film"] is None


def test_continuous_actions_and_reference_scores(tmp_path):
    states = [[5, 0, 1, 0], [5, 0, 2, 0]]
    folder = write(
        tmp_path,
        [
            dmcontrol(0, states, [[0.0, 1.0], [0.5, -1.0]], [400, 100]),
            dmcontrol(1, np.add(states, [0, 0, 0, 7]), [[-0.995, 0.0], [-0.995, 0.02]], [300, 0]),
            dmcontrol(2, states[:1], [[0.99, 0.9]], [0]),  # no pair of consecutive actions
        ],
    )
    result = task_statistics(folder)
    actions = result["actions"]
    counts = np.array(actions["counts"])
    assert counts.shape == (2, 21) and counts.sum() == 10
    # Bin of a: floor((a + 1) / 2 * 21), 1 itself in the last.
    assert {i: counts[0, i] for i in np.flatnonzero(counts[0])} == {0: 2, 10: 1, 15: 1, 20: 1}
    assert {i: counts[1, i] for i in np.flatnonzero(counts[1])} == {0: 1, 10: 2, 19: 1, 20: 1}
    assert actions["saturated_share"] == [0.4, 0.4]  # 0.99 itself, as float32 just below it, is not saturated
    mse = (0.5**2 + 2**2) / 2, 0.02**2 / 2
    assert actions["mse_mean"] == pytest.approx(np.mean(mse), rel=1e-6)
    assert actions["mse_std"] == pytest.approx(np.std(mse), rel=1e-6)
    assert result["states"] == {"columns": 4, "dead": [1], "constant": [0], "constant_in_trajectory": [3]}
    assert result["state"]["layout"] == {"orientations": [0, 1], "velocity": [1, 4]}
    known = tasks()["dmcontrol", "walker-walk"]
    expected = (800 / 3 - known.score_low) / (known.score_high - known.score_low)
    assert result["scores"]["normalised_mean"] == pytest.approx(expected)
    assert (result["scores"]["high"], result["split"]) == (known.score_high, known.split)


def test_mimicgen_is_scored_by_success_not_by_return(tmp_path):
    def demo(episode, success):
        arrays = np.zeros((4, 3), np.float32), np.zeros((4, 7), np.float32), np.ones(4, np.float32)
        return Trajectory("mimicgen", "Coffee_D0", episode, 0, *arrays, True, False, "test", success=success)

    assert ("mimicgen", "Coffee_D0") in tasks()
    known = task_statistics(write(tmp_path / "a", [demo(i, i > 0) for i in range(4)]))
    assert known["returns"]["mean"] == 4 and known["scores"]["normalised_mean"] == 0.75
    assert task_statistics(write(tmp_path / "b", [demo(0, None)]))["scores"]["normalised_mean"] is None


def decode_png(data):
    """Width, height, colour type and pixels of a PNG whose rows are unfiltered."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start])
    assert zlib.crc32(data[start : start + 4 + size]) == int.from_bytes(data[start + 4 + size :][:4])
    rows = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + size]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return width, height, data[25], rows[:, 1:]


@pytest.mark.parametrize("codec", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("channels, colour", [(1, 0), (3, 2)])
def test_film_strip_shows_the_frames_of_the_best_trajectory(tmp_path, codec, channels, colour):
    trajectories = [procgen(0, 70, channels, 0.1), procgen(1, 101, channels, 0.2), procgen(2, 9, channels)]
    result = task_statistics(write(tmp_path, trajectories, codec))
    film = result["film"]
    assert (film["episode"], film["steps"]) == (1, [0, 20, 40, 60, 80, 100])
    width, height, kind, pixels = decode_png(base64.b64decode(film["png"]))
    assert (width, height, kind) == (6 * 64 + 5, 64, colour)
    strip = pixels.reshape(64, width, channels)
    for i, step in enumerate(film["steps"]):
        shown = strip[:, i * 65 : i * 65 + 64]
        assert np.array_equal(shown, trajectories[1].states[step].transpose(1, 2, 0))
    assert (strip[:, 64] == 128).all()
    assert result["states"] is None and result["actions"]["counts"][0] == 5 + 7 + 1


def test_png_is_read_by_another_library():
    image_module = pytest.importorskip("PIL.Image")
    import io

    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
        read = np.asarray(image_module.open(io.BytesIO(png(pixels))))
        assert np.array_equal(read.reshape(pixels.shape), pixels)


def test_a_sample_of_a_large_task_is_spread_and_said(tmp_path, monkeypatch):
    assert len(sample_rows(199)) == 199 and len(sample_rows(100_000)) == 200
    assert sample_rows(100_000)[[0, -1]].tolist() == [0, 99_999]
    assert sample_rows(1).tolist() == [0]
    monkeypatch.setattr(statistics, "SAMPLE", 3)
    folder = write(tmp_path, [darkroom(i, [[i, 0]], [i % 5], [i]) for i in range(9)])
    result = task_statistics(folder)
    assert result["trajectories"] == 9 and result["returns"]["max"] == 8
    assert result["sampled"] == {"trajectories": 3, "transitions": 3}
    assert result["actions"]["counts"] == [1, 0, 0, 1, 1]  # episodes 0, 4 and 8


def test_learning_curve_bins_by_episode_number():
    episodes = np.array([10, 11, 12, 13, 109])
    curve = learning_curve(episodes, np.array([1.0, 3.0, 5.0, 7.0, 9.0]))
    # 100 numbers in 50 ranges of two; ranges without an episode are absent.
    assert curve == {
        "episode": [10.5, 12.5, 109],
        "mean": [2, 6, 9],
        "q25": [1.5, 5.5, 9],
        "q75": [2.5, 6.5, 9],
        "count": [2, 2, 1],
    }
    assert len(learning_curve(np.arange(12_345), np.zeros(12_345))["mean"]) == 50


def test_histograms_count_everything_once():
    whole = histogram(np.arange(100.0))
    assert (whole["start"], whole["width"]) == (-0.5, 4) and whole["counts"].tolist() == [4] * 25
    parts = histogram(np.array([0.25, 0.5, 30.25]))
    assert len(parts["counts"]) == 30 and parts["counts"][0] == 2 and parts["counts"][-1] == 1
    assert histogram(np.array([0.5, 0.5]))["counts"].tolist() == [2]
    assert describe(np.array([np.nan, np.inf])) == {}
    assert describe(np.array([np.nan, 2.0]))["mean"] == 2


def test_what_cannot_be_read_is_said_and_costs_no_more(vectors):
    (vectors / "000" / "000000001.hdf5").unlink()
    result = task_statistics(vectors)
    assert result["error"].startswith("1 of 4 sampled trajectories are unreadable; the first: darkroom/")
    assert result["trajectories"] == 4 and result["sampled"]["trajectories"] == 3
    assert result["actions"]["counts"] == [1, 1, 3, 0, 0]
    (vectors / "index.parquet").unlink()
    result = task_statistics(vectors)
    assert "no index" in result["error"] and str(vectors) not in result["error"]
    assert (result["trajectories"], result["transitions"], result["bytes"]) == (0, 0, 0)


def test_a_file_with_other_content_than_indexed_still_gives_json(tmp_path):
    folder = write(tmp_path, [dmcontrol(i, np.ones((50, 4)), np.zeros((50, 2)), np.ones(50)) for i in range(2)])
    path = folder / "000" / "000000000.hdf5"
    path.write_bytes(b"\xff" * path.stat().st_size)  # every float reads as NaN
    result = task_statistics(folder)
    assert result["rewards"]["min"] is None or np.isfinite(result["rewards"]["min"])
    assert result["actions"]["outside"] == 100 and np.sum(result["actions"]["counts"]) == 100
    json.dumps(result, allow_nan=False)


def test_an_empty_task_and_an_incomplete_one(tmp_path):
    with TaskWriter(tmp_path, "darkroom", "room5x5-goal-00-01", {}):
        pass
    empty = task_statistics(tmp_path / "darkroom" / "room5x5-goal-00-01")
    assert (empty["trajectories"], empty["error"]) == (0, None)
    partial = task_statistics(write(tmp_path, [darkroom(0, [[1, 2]], [0], [0])], complete=False))
    assert partial["complete"] is False and partial["trajectories"] == 1


def test_statistics_survive_json(vectors):
    result = task_statistics(vectors)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
