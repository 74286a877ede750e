"""No published file is at hand: these are built as LRAM's code writes them, by `save_episode` and `make_tarfile`."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from lram.collectors.darkroom import Room, make, parse_task, rooms, task_name
from lram.converters import lram_hub
from lram.converters.lram_hub import DMCONTROL, UNFINISHED, Options, jobs, trajectories
from lram.converters.source import Count
from lram.datasets.specs import BadInput, state_columns, tasks
from lram.datasets.trajectory import encode


def convert(src: Path, **options):
    (job,) = jobs(src, Options(**options))
    count = Count()
    made = list(trajectories(job, Options(**options), count))
    count.check()
    assert count.episodes == len(made)
    for trajectory in made:
        encode(trajectory)
    return made, count


def rng(seed=0):
    return np.random.default_rng(seed)


def episode(seed: int, length: int, width: int, actions: int, dones="scalar", states=None) -> dict:
    """What LRAM's `save_episode` is given."""
    r = rng(seed)
    rewards = np.zeros(length, np.float32) if width == 23 else r.random(length, np.float32)
    rewards[-1] = 1
    return {
        "states": r.standard_normal((length, width), np.float32) if states is None else states,
        "actions": r.uniform(-1, 1, (length, actions)).astype(np.float32),
        "rewards": rewards,
        "returns_to_go": np.cumsum(rewards[::-1])[::-1],
        "dones": True if dones == "scalar" else np.arange(length) == length - 1,
    }


def save(folder: Path, name: str, content: dict, form: str = "hdf5", compress: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "npz":
        np.savez(folder / name, **content)
        return
    with h5py.File(folder / f"{name}.hdf5", "w") as file:
        for key, value in content.items():
            packed = {"compression": "gzip", "compression_opts": 1} if compress and not np.isscalar(value) else {}
            file.create_dataset(key, data=value, **packed)


def pack(folder: Path, archive: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return archive


def union(native: np.ndarray, task: str) -> np.ndarray:
    layout, at = {}, 0
    for key, width in DMCONTROL[task].items():
        layout[key], at = [at, at + width], at + width
    full = np.zeros((len(native), 204), np.float32)
    full[:, state_columns("dmcontrol", layout, at)] = native
    return full


@pytest.mark.parametrize("task", sorted(DMCONTROL))
def test_layouts_are_dm_controls(task):
    suite = pytest.importorskip("dm_control.suite", reason="needs dm_control")
    observation = suite.load(*task.split("-")).reset().observation
    assert list(DMCONTROL[task].items()) == [(key, np.size(value)) for key, value in observation.items()]


def test_there_is_a_layout_for_every_dmcontrol_task():
    assert set(DMCONTROL) == {name for domain, name in tasks() if domain == "dmcontrol"}


@pytest.mark.parametrize("form", ["hdf5", "npz"])
@pytest.mark.parametrize("packed", [True, False])
def test_dmcontrol_comes_back_from_the_union(tmp_path, form, packed):
    folder = tmp_path / "walker_stand"
    natives = {n: rng(n).standard_normal((1000, 24), np.float32) for n in range(12)}
    for n, native in natives.items():
        content = episode(n, 1000, 204, 6, states=union(native, "walker-stand"))
        save(folder, str(n), content | {"dones": n % 2 == 0}, form, compress=True)
    (folder / "episode_lengths.json").write_text(json.dumps({"0": 1000}))
    src = pack(folder, tmp_path / "hub" / "walker_stand.tar.gz").parent if packed else folder
    made, count = convert(src)
    # An archive holds 0, 1, 10, 11, 2: the numbers tell the order of recording.
    order = [0, 1, 10, 11, *range(2, 10)] if packed else list(range(12))
    assert [t.episode for t in made] == order and not count.problems and count.read == 12_000
    for t in made:
        assert (t.domain, t.task, t.truncated, t.terminated) == ("dmcontrol", "walker-stand", True, False)
        assert np.array_equal(t.states, natives[t.episode]) and t.final_state is None and t.success is None
        assert t.state_layout == {"orientations": [0, 14], "height": [14, 15], "velocity": [15, 24]}


def test_dmcontrol_of_another_task_is_refused(tmp_path):
    for states, said in ((union(np.ones((9, 24), np.float32), "walker-stand"), "does not have"), (None, "columns")):
        width = 24 if states is None else 204
        save(tmp_path / "hopper_stand", "0", episode(0, 9, width, 4, states=states) | {"dones": np.arange(9) == 8})
        with pytest.raises(BadInput, match=f"0.hdf5: .*{said}"):
            convert(tmp_path / "hopper_stand")


@pytest.mark.parametrize(
    ("folder", "task", "gripper"),
    [
        ("stack_d0", "Stack_D0", 2),
        ("nut_assembly_d0", "NutAssembly_D0", 2),
        ("stack_D0_robot_IIWA_gripper_Robotiq85Gripper", "Stack_D0-IIWA", 6),
        ("three_piece_assembly_D2_robot_Sawyer_gripper_RethinkGripper", "ThreePieceAssembly_D2-Sawyer", 2),
    ],
)
def test_mimicgen_is_sparse_and_succeeds(tmp_path, folder, task, gripper):
    contents = [episode(n, 30 + n, 23, 7, dones="steps") for n in range(3)]
    contents[1]["rewards"][-5:] = 1  # of the sets that are not sparse
    contents[2]["rewards"][:] = 0
    for n, content in enumerate(contents):
        save(tmp_path / folder, str(n), content)
    made, count = convert(pack(tmp_path / folder, tmp_path / "hub" / f"{folder}.tar.gz").parent)
    assert [(t.task, t.length, t.total, t.rewards[-1]) for t in made] == [(task, 30, 1, 1), (task, 31, 1, 1)]
    assert all(t.terminated and t.success and not t.truncated for t in made)
    stops = [3, 7, 7 + gripper, 23]
    assert [stop for _, stop in made[0].state_layout.values()] == stops
    assert count.changed == {"reward made sparse": 4}
    assert count.dropped == {"failed demonstrations": 32} and np.array_equal(made[0].states, contents[0]["states"])


def rows_of(lengths, width=39, actions=4, resets=False, seed=0) -> dict:
    r, total = rng(seed), sum(lengths)
    observations = r.standard_normal((total + 1, width))
    following = observations[1:].copy()
    ends = np.cumsum(lengths) - 1
    if not resets:
        following[ends] = r.standard_normal((len(lengths), width))
    return {
        "observations": observations[:-1],
        "next_observations": following,
        "actions": r.uniform(-1, 1, (total, actions)),
        "rewards": r.random(total),
        "dones": np.isin(np.arange(total), ends).astype(np.float32),
    }


@pytest.mark.parametrize("shaped", ["flat", "one environment"])
@pytest.mark.parametrize("resets", [False, True])
def test_metaworld_rows_become_episodes(tmp_path, monkeypatch, shaped, resets):
    rows = rows_of([200, 200, 200], resets=resets)
    rows["dones"][-1] = 0
    monkeypatch.setattr(lram_hub, "BLOCK", 150)  # episodes run over blocks
    stored = {key: value[:, None] if shaped != "flat" else value for key, value in rows.items()}
    np.savez_compressed(tmp_path / "reach-v2.npz", **stored)
    made, count = convert(tmp_path)
    assert [(t.task, t.length, t.episode) for t in made] == [("reach-v2", 200, 0), ("reach-v2", 200, 1)]
    assert count.read == 600 and count.dropped == {UNFINISHED: 200}
    for n, t in enumerate(made):
        span = slice(200 * n, 200 * n + 200)
        assert t.truncated and not t.terminated and t.states.dtype == np.float32
        assert np.array_equal(t.states, rows["observations"][span].astype(np.float32))
        assert np.array_equal(t.actions, rows["actions"][span].astype(np.float32))
        if resets:
            assert t.final_state is None
        else:
            assert np.array_equal(t.final_state, rows["next_observations"][span][-1].astype(np.float32))


def test_metaworld_comes_once(tmp_path):
    np.savez(tmp_path / "reach-v2.npz", **rows_of([200]))
    for n in range(2):
        save(tmp_path / "parts" / "reach-v2", str(n), episode(n, 200, 39, 4) | {"dones": False})
    save(tmp_path / "parts" / "reach-v2", "2", episode(2, 150, 39, 4) | {"dones": False})
    with pytest.raises(BadInput, match="holds metaworld/reach-v2 twice"):
        jobs(tmp_path, Options())
    made, count = convert(tmp_path / "parts")
    assert [t.length for t in made] == [200, 200] and count.dropped == {UNFINISHED: 150}
    with pytest.raises(BadInput, match="does not hold it"):
        jobs(tmp_path / "parts", Options(tasks=("push-v2",)))
    assert [j.task for j in jobs(tmp_path / "parts", Options(tasks=("reach-v2",)))] == ["reach-v2"]


def played(room: Room, episodes: int, seed: int) -> dict:
    """Rows of a room as PPOWithBuffer records them: `next_observations` at an end are the next episode's first."""
    env, r = make(task_name(room)), rng(seed)
    states, _ = env.reset()
    rows = {key: [] for key in ("observations", "next_observations", "actions", "rewards", "dones")}
    for _ in range(episodes * room.horizon):
        # Mostly towards the last corner, so that goals are found.
        action = np.array([r.choice([1, 2, 0, 3, 4], p=[0.3, 0.3, 0.15, 0.15, 0.1])])
        following, rewards, _, truncated, _ = env.step(action)
        for key, value in zip(rows, (states, following, action[:, None], rewards, truncated)):
            rows[key].append(np.array(value, copy=True))
        states = following.copy()
    kinds = {"observations": np.uint8, "next_observations": np.uint8, "actions": np.int64}
    return {key: np.stack(values).astype(kinds.get(key, np.float32)) for key, values in rows.items()}


class CustomReplayBuffer:
    """Stands for src.algos.ppo_with_buffer.CustomReplayBuffer: what matters is its attributes."""

    def __init__(self, rows):
        self.buffer_size, self.pos, self.full, self.n_envs = len(rows["dones"]), 0, True, 1
        self.__dict__ |= rows | {"timeouts": rows["dones"], "seeds": np.zeros_like(rows["dones"])}
        self.np_random = np.random.default_rng(0)


def bracket(*cells) -> str:
    return "_".join(f"[{a},{b}]" for a, b in cells)


@pytest.mark.parametrize("form", ["npz", "pkl"])
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("keydoor", [None, "door first", "key first"])
def test_dark_rooms_are_told_by_their_rewards(tmp_path, form, swapped, keydoor):
    folder = tmp_path / "dark" / "5x5"
    folder.mkdir(parents=True)
    chosen = [room for room in rooms(5, keydoor=keydoor is not None)[0] if room.goal != (0, 0) != room.key][:3]
    for n, room in enumerate(chosen):
        cells = [room.goal] if keydoor is None else [room.goal, room.key][:: 1 if keydoor == "door first" else -1]
        stem = bracket((0, 0), *[(b, a) if swapped else (a, b) for a, b in cells])
        rows = played(room, 40, n)
        if form == "npz":
            np.savez(folder / f"{stem}.npz", **rows)
        else:
            (folder / f"{stem}.pkl").write_bytes(pickle.dumps(CustomReplayBuffer(rows)))
    found = jobs(folder.parent, Options())
    assert sorted(job.task for job in found) == sorted(task_name(room) for room in chosen)
    for job in found:
        count, room = Count(), parse_task(job.task)
        made = list(trajectories(job, Options(), count))
        count.check()
        assert len(made) == 40 and count.read == 1000 and {t.length for t in made} == {25}
        rows = played(room, 40, chosen.index(room))
        for n, t in enumerate(made):
            encode(t)
            assert t.truncated and not t.terminated and t.final_state is None and t.episode == n
            assert np.array_equal(t.states, rows["observations"][25 * n : 25 * n + 25, 0])
            assert np.array_equal(t.actions, rows["actions"][25 * n : 25 * n + 25, 0, 0])
            assert t.success == (t.total > (room.key is not None))


def test_a_room_that_never_pays_is_named_like_its_neighbours(tmp_path):
    (tmp_path / "5x5").mkdir()
    silent, telling = played(Room(5, 5, (0, 4)), 4, 0), played(Room(5, 5, (3, 1)), 40, 0)
    np.savez(tmp_path / "5x5" / "[0,0]_[3,1].npz", **telling)
    np.savez(tmp_path / "5x5" / "[0,0]_[0,4].npz", **(silent | {"rewards": 0 * silent["rewards"]}))
    assert [job.task for job in jobs(tmp_path, Options())] == ["room5x5-goal-00-04", "room5x5-goal-03-01"]


def test_wide_rooms_and_other_starts(tmp_path):
    (tmp_path / "40x20").mkdir()
    for name in ("[0,0]_[39,19]", "[3,2]_[39,19]"):  # (x, y), as MiniHack has them
        np.savez(tmp_path / "40x20" / f"{name}.npz", **played(Room(20, 40, (19, 39), horizon=5), 2, 0))
    names = [job.task for job in jobs(tmp_path, Options())]
    assert names == ["room20x40-goal-19-39", "room20x40-goal-19-39.start-02-03"]
    assert parse_task(names[0]) == Room(20, 40, (19, 39))


def test_dark_rooms_that_are_not_what_they_say(tmp_path):
    rows = played(Room(5, 5, (3, 1)), 40, 0)
    for name, said in (("5x5/[0,0]_[2,2]", "does not tell"), ("5x5/[0,0]_[3,1]", None), ("x/[0,0]_[3,1]", "no folder")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.savez(tmp_path / f"{name}.npz", **rows)
        if said:
            with pytest.raises(BadInput, match=said):
                jobs(tmp_path / f"{name}.npz", Options())
    (job,) = jobs(tmp_path / "5x5" / "[0,0]_[3,1].npz", Options())
    assert job.task == "room5x5-goal-03-01"
    for key, value in (("observations", rows["observations"] + 9), ("rewards", np.ones_like(rows["rewards"]))):
        np.savez(job.files[0], **(rows | {key: value}))
        with pytest.raises(BadInput, match=r"\[0,0\]_\[3,1\]\.npz"):
            list(trajectories(job, Options(), Count()))


def test_a_pickled_room_that_would_run_a_command_does_not(tmp_path):
    (tmp_path / "5x5").mkdir()
    path = tmp_path / "5x5" / "[0,0]_[3,1].pkl"
    rows = played(Room(5, 5, (3, 1)), 1, 0)
    path.write_bytes(pickle.dumps(CustomReplayBuffer(rows | {"rewards": Command(tmp_path / "touched")})))
    with pytest.raises(BadInput, match=r"\[0,0\]_\[3,1\]\.pkl: unsafe pickle"):
        jobs(tmp_path, Options())
    assert not (tmp_path / "touched").exists()


class Command:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def archive(path: Path, members) -> None:
    """Writes headers as they are, whatever they say of what follows."""
    with gzip.open(path, "wb") as file:
        for member, data in members:
            file.write(member.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512))
        file.write(b"\0" * 1024)


def member(path: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(path)
    for key, value in ({"size": len(data)} | fields).items():
        setattr(info, key, value)
    return info, data


def hdf5(tmp_path: Path, **content) -> bytes:
    save(tmp_path / "made", "0", episode(0, 200, 39, 4) | content)
    return (tmp_path / "made" / "0.hdf5").read_bytes()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "reach-v2/../../0.hdf5"}, "outside"),
        ({"name": "/tmp/0.hdf5"}, "outside"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link"),
        ({"type": tarfile.LNKTYPE, "linkname": "reach-v2/0.hdf5"}, "link"),
        ({"type": tarfile.CHRTYPE}, "device"),
        ({"type": tarfile.FIFOTYPE}, "device"),
        ({"size": 1 << 40}, "bytes"),
        ({"type": tarfile.GNUTYPE_LONGNAME, "size": 1 << 27}, "bytes"),
        ({"type": tarfile.XHDTYPE, "size": 1 << 27}, "bytes"),
    ],
)
def test_unsafe_archives_are_refused(tmp_path, fields, said):
    good = hdf5(tmp_path)
    bad = member("reach-v2/1.hdf5", b"", **fields)
    (tmp_path / "hub").mkdir()
    archive(tmp_path / "hub" / "reach-v2.tar.gz", [member("reach-v2/0.hdf5", good), bad])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=rf"reach-v2\.tar\.gz: .*{said}"):
        convert(tmp_path / "hub")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_size_from_an_extension_header_is_looked_at_too(tmp_path):
    info, data = member("reach-v2/0.hdf5", hdf5(tmp_path))
    info.pax_headers = {"size": str(1 << 45)}
    (tmp_path / "hub").mkdir()
    with tarfile.open(tmp_path / "hub" / "reach-v2.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(data))
    with pytest.raises(BadInput, match=r"reach-v2\.tar\.gz: .*bytes"):
        convert(tmp_path / "hub")


def test_a_truncated_archive_keeps_what_came_before(tmp_path):
    for n in range(20):
        save(tmp_path / "reach-v2", f"{n:02d}", episode(n, 200, 39, 4))
    (tmp_path / "reach-v2" / "05.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 50)
    (tmp_path / "reach-v2" / "notes.txt").write_text("x")
    path = pack(tmp_path / "reach-v2", tmp_path / "hub" / "reach-v2.tar.gz")
    made, count = convert(path)
    assert [t.episode for t in made] == [n for n in range(20) if n != 5]
    assert "05.hdf5: not a whole HDF5 file" in count.problems[0] and "1 files are no trajectories" in count.problems[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    made, count = convert(path)
    assert 5 <= len(made) < 15 and f"the {len(made)} trajectories before that were kept" in count.problems[-1]


def test_unsafe_or_absurd_hdf5_members_are_refused(tmp_path):
    folder = tmp_path / "reach-v2"
    outside = tmp_path / "outside.hdf5"
    with h5py.File(outside, "w") as file:
        file["states"] = np.ones((200, 39), np.float32)
    content = episode(0, 200, 39, 4)
    content.pop("states")

    def external(file):
        file["states"] = h5py.ExternalLink(str(outside), "states")

    def virtual(file):
        layout = h5py.VirtualLayout((200, 39), np.float32)
        layout[:] = h5py.VirtualSource(str(outside), "states", (200, 39))
        file.create_virtual_dataset("states", layout)

    def wide(file):
        file.create_dataset("states", (200, 100_000), np.float32, chunks=(1, 1000), compression="gzip")

    def long(file):
        file.create_dataset("states", (1 << 40, 39), np.float32, chunks=(64, 39))

    for fill, said in ((external, "link"), (virtual, "virtual"), (wide, "states"), (long, "states")):
        save(folder, "0", content)
        with h5py.File(folder / "0.hdf5", "a") as file:
            fill(file)
        for src in (folder, pack(folder, tmp_path / "hub" / "reach-v2.tar.gz")):
            with pytest.raises(BadInput, match=rf"0\.hdf5: .*{said}") as caught:
                convert(src)
            assert "BytesIO" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("states", np.zeros((200, 100_000), np.uint8)),
        ("states", np.zeros((199, 39), np.float32)),
        ("rewards", np.zeros((200, 2), np.float32)),
        ("dones", np.zeros(3, bool)),
        ("dones", np.ones(200, bool)),
        ("actions", np.array(["x"] * 200)),
    ],
)
def test_trajectories_of_other_content_are_refused(tmp_path, key, value):
    for form in ("hdf5", "npz"):
        content = episode(0, 200, 39, 4) | {key: value.astype("S1") if value.dtype.kind == "U" else value}
        save(tmp_path / form / "reach-v2", "0", content, form)
        with pytest.raises(BadInput, match=rf"0\.{form}"):
            convert(tmp_path / form)


def test_rows_of_other_content_are_refused(tmp_path):
    rows = rows_of([200])
    path = tmp_path / "reach-v2.npz"
    bad = [
        {"observations": np.zeros((200, 100_000), np.uint8), "next_observations": np.zeros((200, 100_000), np.uint8)},
        {"dones": rows["dones"][:-1]},
        {"rewards": np.zeros((200, 2))},
        {"actions": np.array([None] * 200)},
    ]
    for change in bad:
        np.savez(path, **(rows | change))
        with pytest.raises(BadInput, match=r"reach-v2\.npz"):
            convert(tmp_path)
    np.savez(path, **{key: value for key, value in rows.items() if key != "dones"})
    with pytest.raises(BadInput, match="has no dones"):
        convert(tmp_path)


def test_names_that_tell_no_task_are_refused(tmp_path):
    with pytest.raises(BadInput, match="none of LRAM's published files"):
        jobs(tmp_path, Options())
    for name in ("mazerunner.tar.gz", "unknown-v2.npz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(BadInput, match="tells no task"):
            jobs(tmp_path / name, Options())
