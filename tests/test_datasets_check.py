from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pytest

from lram.datasets.check import SHARDS, Finding, TaskCheck, check_root, check_task, judge, look, members, odd_ends
from lram.datasets.index import find_tasks, read_index, rebuild, write_description, write_index
from lram.datasets.quarantine import quarantine
from lram.datasets.shards import shard_task
from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, encode, read
from lram.datasets.writer import TaskWriter

TASK = "darkroom/task"
FILE = f"{TASK}/000/000000003.hdf5"
IMAGE = "atari/pong/000/000000001.hdf5"
WALK = "dmcontrol/walk/000/000000002.hdf5"
INDEX = f"{TASK}/index.parquet"
SHARD = "metaworld/packed/shard-00000.tar"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, make: Callable[..., Trajectory]) -> Path:
    """A dataset in which nothing is wrong: contiguous and compressed vectors, images, tar shards."""
    root = tmp_path_factory.mktemp("whole")
    kinds = (
        ("darkroom", "task", 24, 20),
        ("dmcontrol", "walk", 4, 30),
        ("composuite", "push", 3, 300),
        ("atari", "pong", 3, 70),
    )
    for domain, task, count, length in kinds:
        with TaskWriter(root, domain, task, {"maker": "test"}) as writer:
            for episode in range(count):
                writer.add(make(domain, episode, length, task=task))
            writer.finish()
    with TaskWriter(root / "files", "metaworld", "packed", {"maker": "test"}) as writer:
        for episode in range(6):
            writer.add(make("metaworld", episode, task="packed"))
        writer.finish()
    shard_task(root / "files" / "metaworld" / "packed", root, 30_000)
    shutil.rmtree(root / "files")
    write_description(root)
    return root


def check(root: Path) -> list[TaskCheck]:
    return [*map(check_task, find_tasks(root)), TaskCheck("dataset", findings=check_root(root))]


def findings(root: Path) -> list[Finding]:
    return [finding for result in check(root) for finding in result.findings]


Damage = Callable[[Path], None]
Row = tuple[str, str, str, Damage]


def edit(path: str, change: Callable[[h5py.File], object]) -> Damage:
    def damage(root: Path) -> None:
        with h5py.File(root / path, "r+") as file:
            change(file)

    return damage


def cut(path: str, keep: float) -> Damage:
    return lambda root: os.truncate(root / path, int((root / path).stat().st_size * keep))


def flip(path: str, place: Callable[[bytes], int]) -> Damage:
    def damage(root: Path) -> None:
        data = bytearray((root / path).read_bytes())
        data[place(bytes(data))] ^= 0x10
        (root / path).write_bytes(data)

    return damage


def swap(name: str, value: object) -> Callable[[h5py.File], object]:
    """Replaces a dataset, or takes it out when the value is None."""

    def change(file: h5py.File) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


def put(name: str, at: object, value: float) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        file[name][at] = value

    return change


def attribute(name: str, value: object) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value

    return change


def rows(change: Callable[[list[dict]], object], task: str = TASK) -> Damage:
    """Writes the index again with other rows."""

    def damage(root: Path) -> None:
        index = read_index(root / task)
        content = index.table.to_pylist()
        change(content)
        write_index(root / task, pa.Table.from_pylist(content, schema=index.table.schema))

    return damage


def column(name: str, row: int, value: object, task: str = TASK) -> Damage:
    return rows(lambda content: content[row].update({name: value}), task)


def meta(**fields: object) -> Damage:
    def damage(root: Path) -> None:
        index = read_index(root / TASK)
        described = {**index.meta, **fields}
        described = {key: value for key, value in described.items() if value is not None}
        write_index(root / TASK, index.table.replace_schema_metadata({"lram": json.dumps(described)}))

    return damage


def move(source: str, target: str, copy: bool = False) -> Damage:
    def damage(root: Path) -> None:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copy if copy else shutil.move)(root / source, root / target)

    return damage


def text(path: str, content: str) -> Damage:
    def damage(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)

    return damage


def remake(path: str, **fields: object) -> Damage:
    """Stores another trajectory under a file's name and makes the index agree with it."""

    def damage(root: Path) -> None:
        trajectory = read(root / path)
        changed = {name: value(trajectory) if callable(value) else value for name, value in fields.items()}
        (root / path).write_bytes(encode(replace(trajectory, **changed)).data)
        rebuild((root / path).parent.parent)
        write_description(root)

    return damage


def external(file: h5py.File) -> None:
    del file["rewards"]
    file["rewards"] = h5py.ExternalLink("000000001.hdf5", "rewards")


def raw_external(file: h5py.File) -> None:
    del file["rewards"]
    file.create_dataset("rewards", (20,), np.float32, external=[("/etc/passwd", 0, 80)])


def virtual(file: h5py.File) -> None:
    del file["rewards"]
    layout = h5py.VirtualLayout((20,), np.float32)
    layout[:] = h5py.VirtualSource("000000001.hdf5", "rewards", (20,))
    file.create_virtual_dataset("rewards", layout)


def loop(file: h5py.File) -> None:
    del file["rewards"]
    file["rewards"] = h5py.SoftLink("/rewards")


def group(file: h5py.File) -> None:
    del file["rewards"]
    file.create_group("rewards")


def huge(file: h5py.File) -> None:
    del file["rewards"]
    file.create_dataset("rewards", (10**15,), np.float32)


def hollow(file: h5py.File) -> None:
    del file["states"]
    file.create_dataset("states", (20, 10**7), np.float32)


def chunks_missing(file: h5py.File) -> None:
    del file["states"]
    file.create_dataset("states", (70, 1, 64, 64), np.uint8, chunks=(64, 1, 64, 64), compression="gzip")


def other_chunks(file: h5py.File) -> None:
    states = file["states"][...]
    del file["states"]
    file.create_dataset("states", data=states, chunks=(10, 1, 64, 64), compression="gzip")


def header_of_dimensions(file: h5py.File) -> None:
    file.attrs["source"] = np.zeros(8000)


def middle_of(name: str) -> Callable[[bytes], int]:
    """A byte in the middle of a dataset's data, found by what they are."""

    def place(data: bytes) -> int:
        with h5py.File(h5py.h5f.open_file_image(data)) as file:
            return file[name].id.get_offset() + file[name].id.get_storage_size() // 2

    return place


def a_reward(data: bytes) -> int:
    """The highest byte of the mantissa of a reward of 1: in one of 0, the bit would make next to no difference."""
    with h5py.File(h5py.h5f.open_file_image(data)) as file:
        return file["rewards"].id.get_offset() + 4 * int(np.argmax(file["rewards"][...])) + 2


def text_at(data: bytes, start: int = 0) -> int:
    """A byte of the attribute `source`."""
    return data.find(b"test", data.find(b"lram-trajectory", start))


def chunk(data: bytes) -> int:
    with h5py.File(h5py.h5f.open_file_image(data)) as file:
        info = file["states"].id.get_chunk_info(0)
    return info.byte_offset + info.size // 2


# What was done, the one path that must be named, what must be said of it, how.
DAMAGES: list[Row] = [
    ("cut to nothing", FILE, "not a whole", cut(FILE, 0)),
    ("cut in the signature", FILE, "not a whole", cut(FILE, 0.001)),
    ("cut in half", FILE, "not a whole", cut(FILE, 0.5)),
    ("cut by a byte", FILE, "not a whole", lambda root: os.truncate(root / FILE, (root / FILE).stat().st_size - 1)),
    ("image file cut", IMAGE, "not a whole", cut(IMAGE, 0.7)),
    ("a text under a trajectory's name", FILE, "not a whole", text(FILE, "episode 3\n")),
    ("flipped bit in the superblock", FILE, "not a whole", flip(FILE, lambda data: 20)),
    ("flipped bit in the root's header", FILE, "not a whole", flip(FILE, lambda data: data.find(b"episode"))),
    ("flipped bit in a text", FILE, "sha256 differs", flip(FILE, text_at)),
    ("flipped bit in a heap's size", FILE, "heap", flip(FILE, lambda data: data.find(b"GCOL") + 24)),
    ("flipped bit in states", FILE, "sha256 differs", flip(FILE, middle_of("states"))),
    ("flipped bit in rewards", FILE, "returns_to_go does not follow", flip(FILE, a_reward)),
    ("flipped bit in an image chunk", IMAGE, "", flip(IMAGE, chunk)),
    ("flipped bit in actions", WALK, "", flip(WALK, middle_of("actions"))),
    ("states of float64", FILE, "expected float32", edit(FILE, swap("states", np.zeros((20, 2))))),
    ("rewards of int16", FILE, "a type that no array", edit(FILE, swap("rewards", np.zeros(20, np.int16)))),
    ("big-endian rewards", FILE, "a type that no array", edit(FILE, swap("rewards", np.zeros(20, ">f4")))),
    ("dones of uint8", FILE, "dones does not follow", edit(FILE, swap("dones", np.zeros(20, np.uint8)))),
    ("a scalar for rewards", FILE, "no dimension", edit(FILE, swap("rewards", np.float32(1)))),
    ("NaN in states", FILE, "states hold values", edit(FILE, put("states", (4, 1), np.nan))),
    ("NaN in rewards", FILE, "rewards hold values", edit(FILE, put("rewards", 4, np.nan))),
    ("infinity in states", WALK, "states hold values", edit(WALK, put("states", (0, 0), np.inf))),
    ("infinity in rewards", FILE, "rewards hold values", edit(FILE, put("rewards", 4, -np.inf))),
    ("NaN in the final state", FILE, "final_state holds", edit(FILE, put("final_state", 0, np.nan))),
    ("shorter actions", FILE, "expected equal", edit(FILE, swap("actions", np.zeros(19, np.int64)))),
    ("longer states", FILE, "expected equal", edit(FILE, swap("states", np.zeros((21, 2), np.float32)))),
    ("returns of another episode", FILE, "returns_to_go", edit(FILE, put("returns_to_go", slice(0, 3), 40.0))),
    ("action out of range", FILE, "outside 0..4", edit(FILE, put("actions", 7, 5))),
    ("negative action", FILE, "outside 0..4", edit(FILE, put("actions", 7, -1))),
    ("continuous action out of range", WALK, "outside [-1, 1]", edit(WALK, put("actions", (0, 0), 1.5))),
    ("NaN action", WALK, "outside [-1, 1]", edit(WALK, put("actions", (0, 0), np.nan))),
    ("Atari action 18", IMAGE, "outside 0..17", edit(IMAGE, put("actions", 0, 18))),
    ("done in the middle", FILE, "dones does not follow", edit(FILE, put("dones", 4, 1))),
    ("no done at the end", FILE, "dones does not follow", edit(FILE, put("dones", 19, 0))),
    ("no dataset dones", FILE, "dones is missing", edit(FILE, swap("dones", None))),
    ("a dataset too many", FILE, "holds 'extra'", edit(FILE, lambda file: file.create_dataset("extra", data=[1.0]))),
    ("an external link", FILE, "rewards is a link", edit(FILE, external)),
    ("external storage", FILE, "points to other files", edit(FILE, raw_external)),
    ("a virtual dataset", FILE, "points to other files", edit(FILE, virtual)),
    ("a soft link to itself", FILE, "rewards is a link", edit(FILE, loop)),
    ("a group for a dataset", FILE, "no readable array", edit(FILE, group)),
    ("zero transitions", FILE, "no transitions", edit(FILE, swap("rewards", np.zeros(0, np.float32)))),
    ("a petabyte declared", FILE, "more than 4 GiB", edit(FILE, huge)),
    ("unwritten states", FILE, "does not hold that much", edit(FILE, hollow)),
    ("image chunks missing", IMAGE, "some are missing", edit(IMAGE, chunks_missing)),
    ("image chunks of 10", IMAGE, "expected (64, 1, 64, 64)", edit(IMAGE, other_chunks)),
    ("another format", FILE, "expected 'lram-trajectory'", edit(FILE, attribute("format", "other"))),
    ("version 2", FILE, "expected 'lram-trajectory'", edit(FILE, attribute("version", 2))),
    ("no attribute seed", FILE, "attribute seed is missing", edit(FILE, attribute("seed", None))),
    ("a text for a number", FILE, "attribute length is", edit(FILE, attribute("length", "20"))),
    ("8,000 numbers for a text", FILE, "attribute source is", edit(FILE, header_of_dimensions)),
    ("another length", FILE, "length and return", edit(FILE, attribute("length", 21))),
    ("another return", FILE, "length and return", edit(FILE, attribute("return", 0.5))),
    ("another episode", FILE, "its attributes say", edit(FILE, attribute("episode", 4))),
    ("another task", FILE, "its attributes say darkroom/other", edit(FILE, attribute("task", "other"))),
    ("unknown domain", FILE, "unknown domain 'chess'", edit(FILE, attribute("domain", "chess"))),
    ("a layout that is no JSON", WALK, "no JSON", edit(WALK, attribute("state_layout", "{position"))),
    ("a layout too wide", WALK, "state_layout", edit(WALK, attribute("state_layout", '{"position": [0, 9]}'))),
    ("a layout of texts", WALK, "state_layout", edit(WALK, attribute("state_layout", '["position"]'))),
    ("a file of another task", FILE, "its attributes say dmcontrol", move(WALK, FILE, True)),
    ("wider states", WALK, "expected [5]", remake(WALK, states=np.ones((30, 7), np.float32), final_state=None)),
    ("a third action", WALK, "action_shape [3]", remake(WALK, actions=np.ones((30, 3), np.float32))),
    ("color among gray", IMAGE, "expected [1, 64, 64]", remake(
        IMAGE, states=lambda t: np.repeat(t.states, 3, 1), final_state=None)),
    ("a blank film", IMAGE, "all pixels", remake(
        IMAGE, states=lambda t: np.full_like(t.states, 7), final_state=None)),
    ("pixels scaled to [0, 1]", IMAGE, "scaled", remake(
        IMAGE, states=lambda t: (t.states > 60).astype(np.uint8), final_state=None)),
    ("truncated before the limit", FILE, "time limit is 20", remake(
        FILE, states=lambda t: t.states[:9], actions=lambda t: t.actions[:9], rewards=lambda t: t.rewards[:9])),
    ("unfinished at the limit", FILE, "unfinished after 20", remake(FILE, truncated=False)),
    ("the same content twice", WALK, "same content as", lambda root: twin(root)),
    ("two files of an episode", f"{TASK}/001/000000003.hdf5", "its attributes say", move(
        FILE, f"{TASK}/001/000000003.hdf5", True)),
    ("a directory for a file", FILE, "no regular file", lambda root: directory(root)),
    ("a dangling link for a file", FILE, "no regular file", lambda root: dangling(root)),
    ("a gap in the numbers", TASK, "1 missing, the first is 3", lambda root: gap(root)),
    ("a file lost", FILE, "no such file", lambda root: (root / FILE).unlink()),
    ("no index", INDEX, "no index", lambda root: (root / INDEX).unlink()),
    ("an index of zero bytes", INDEX, "not a readable index", cut(INDEX, 0)),
    ("an index cut in half", INDEX, "not a readable index", cut(INDEX, 0.5)),
    ("an index with a flipped footer", INDEX, "", flip(INDEX, lambda data: len(data) - 7)),
    ("the index of another task", INDEX, "", move("dmcontrol/walk/index.parquet", INDEX, True)),
    ("'..' in the index", INDEX, "'../../secret.hdf5'", column("path", 3, "../../secret.hdf5")),
    ("an absolute path in the index", INDEX, "'/etc/passwd'", column("path", 3, "/etc/passwd")),
    ("a path twice in the index", INDEX, "twice", column("path", 3, "000/000000002.hdf5")),
    ("an episode twice in the index", INDEX, "ascending", column("episode", 3, 2)),
    ("another split", INDEX, "column split", rows(lambda content: [row.update(split="train") for row in content])),
    ("a row too few", FILE, "not in the index", lambda root: row_too_few(root)),
    ("a row too many", f"{TASK}/000/000000024.hdf5", "no such file", lambda root: row_too_many(root)),
    ("a stale row", FILE, "other values for return", column("return", 3, 99.0)),
    ("a wrong offset", FILE, "other values for rewards_offset", column("rewards_offset", 3, 8)),
    ("a wrong hash", FILE, "sha256 differs", column("sha256", 3, bytes(32))),
    ("an index of other shapes", INDEX, "run `lram index`", meta(state_shape=[3])),
    ("an index without provenance", INDEX, "metadata lack provenance", meta(provenance=None)),
    ("an index with odd metadata", INDEX, "quarantined", meta(quarantined="all")),
    ("a temporary left", f"{TASK}/000/.000000024.hdf5.tmp", "left behind", text(
        f"{TASK}/000/.000000024.hdf5.tmp", "half")),
    ("a part of the index left", f"{TASK}/index-part-000000000.parquet", "left behind", move(
        INDEX, f"{TASK}/index-part-000000000.parquet", True)),
    ("a foreign file", f"{TASK}/000/notes.txt", "does not belong", text(f"{TASK}/000/notes.txt", "todo")),
    ("a foreign folder", f"{TASK}/old", "does not belong", move(FILE, f"{TASK}/old/000000003.hdf5", True)),
    ("a file among tasks", "darkroom/a.hdf5", "does not belong", move(FILE, "darkroom/a.hdf5", True)),
    ("a domain that is none", "chess", "none of the domains", move(FILE, "chess/mate/000/000000003.hdf5", True)),
    ("a task without trajectories", "darkroom/empty", "holds no trajectory", lambda root: empty(root)),
    ("a description of other counts", "dataset.json", "says 24 trajectories", lambda root: miscount(root)),
    ("a description of other tasks", "dataset.json", "'atari/tennis'", lambda root: rename(root)),
    ("a description that is none", "dataset.json", "not a readable description", text("dataset.json", "[]")),
    ("a tar cut in half", SHARD, "cut or damaged", cut(SHARD, 0.5)),
    ("a tar cut at its end", SHARD, "cut or damaged", lambda root: os.truncate(
        root / SHARD, len((root / SHARD).read_bytes().rstrip(b"\0")))),
    ("a tar with a flipped header", SHARD, "cut or damaged", flip(SHARD, lambda data: data.find(b"000/000000001"))),
    ("a tar lost", SHARD, "no such file", lambda root: (root / SHARD).unlink()),
    ("a member with a flipped bit", f"{SHARD}/000/000000001.hdf5", "sha256 differs", flip(
        SHARD, lambda data: text_at(data, data.find(b"000/000000001")))),
    ("a member at another place", f"{SHARD}/000/000000001.hdf5", "member_offset", column(
        "member_offset", 1, 512, "metaworld/packed")),
]  # fmt: skip
# What quarantine cannot mend: it moves trajectory files only, and rebuilds what their index says.
STAYS = {"a domain that is none", "a file lost", "a task without trajectories", "a gap in the numbers", *(
    name for name, path, _, _ in DAMAGES if path.startswith(SHARD))}  # fmt: skip


def twin(root: Path) -> None:
    first = read(root / WALK.replace("2.hdf5", "1.hdf5"))
    (root / WALK).write_bytes(encode(replace(first, episode=2)).data)
    rebuild(root / "dmcontrol/walk")


def directory(root: Path) -> None:
    (root / FILE).unlink()
    (root / FILE).mkdir()


def dangling(root: Path) -> None:
    (root / FILE).unlink()
    (root / FILE).symlink_to("nowhere.hdf5")


def gap(root: Path) -> None:
    (root / FILE).unlink()
    rebuild(root / TASK)
    write_description(root)


def row_too_few(root: Path) -> None:
    (root / "dataset.json").unlink()
    rows(lambda content: content.pop(3))(root)


def row_too_many(root: Path) -> None:
    (root / "dataset.json").unlink()
    more = {"episode": 24, "path": "000/000000024.hdf5", "split": "train"}
    rows(lambda content: content.append({**content[3], **more}))(root)


def empty(root: Path) -> None:
    TaskWriter(root, "darkroom", "empty", {}).close()
    write_description(root)


def miscount(root: Path) -> None:
    described = (root / "dataset.json").read_text()
    (root / "dataset.json").write_text(described.replace('"transitions": 480', '"transitions": 481'))


def rename(root: Path) -> None:
    described = (root / "dataset.json").read_text().replace("atari/pong", "atari/tennis")
    (root / "dataset.json").write_text(described)


def test_a_whole_dataset_has_no_findings(whole):
    results = check(whole)
    assert [finding for result in results for finding in result.findings] == []
    assert [result.trajectories for result in results] == [3, 3, 24, 4, 6, 0]
    assert sum(result.transitions for result in results) == 3 * 70 + 3 * 300 + 24 * 20 + 4 * 30 + 6 * 20
    assert len(list((whole / "metaworld" / "packed").glob(SHARDS))) > 1


@pytest.mark.parametrize(("name", "path", "said", "damage"), DAMAGES, ids=[row[0] for row in DAMAGES])
def test_damage_is_found_named_and_costs_no_other(whole, tmp_path, name, path, said, damage):
    root, out = tmp_path / "data", tmp_path / "bad"
    shutil.copytree(whole, root)
    damage(root)
    results = check(root)
    found = [finding for result in results for finding in result.findings]
    named = {finding.path for finding in found if finding.path != "dataset.json"} or {"dataset.json"}
    assert named == {path}, found
    assert any(said in finding.problem for finding in found), found
    assert str(tmp_path) not in "".join(map(str, found))
    before = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.hdf5") if file.is_file()}
    moved = quarantine(root, results, out)
    assert moved == sum(finding.movable for finding in found) <= 1
    for label, data in before.items():
        gone = moved and (label == path or label.startswith(f"{path}/"))
        assert ((out if gone else root) / label).read_bytes() == data, label
    if name not in STAYS:
        assert findings(root) == []


def test_the_number_of_damages(capsys):
    names = [row[0] for row in DAMAGES]
    assert len(names) == len(set(names)) >= 40
    with capsys.disabled():
        print(f"\n{len(names)} damaged datasets, each must be found and named")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    (tmp_path / "data" / FILE).chmod(0)
    assert [(f.path, f.problem) for f in findings(tmp_path / "data")] == [(FILE, "cannot be read (Permission denied)")]


def test_several_damages_are_all_found_and_moved(whole, tmp_path):
    root, out = tmp_path / "data", tmp_path / "bad"
    shutil.copytree(whole, root)
    bad = [f"{TASK}/000/{episode:09d}.hdf5" for episode in (0, 5, 23)]
    for path in (*bad, IMAGE):
        cut(path, 0.5)(root)
    assert {finding.path for finding in findings(root)} == {*bad, IMAGE}
    assert quarantine(root, check(root), out) == 4
    assert findings(root) == []
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.hdf5")) == sorted([*bad, IMAGE])
    assert read_index(root / TASK).meta["quarantined"] == [0, 5, 23]
    assert json.loads((root / "dataset.json").read_text())["tasks"][TASK]["trajectories"] == 21
    # Rebuilding or writing on does not forget what was taken out, and a lost file is still missed.
    rebuild(root / TASK)
    TaskWriter(root, "darkroom", "task", {"maker": "test"}).close()
    assert findings(root) == []
    (root / FILE).unlink()
    rebuild(root / TASK)
    assert check_task(root / TASK).findings[0].problem.endswith("1 missing, the first is 3")


def test_quarantine_overwrites_nothing_and_stays_outside(whole, tmp_path):
    root, out = tmp_path / "data", tmp_path / "bad"
    shutil.copytree(whole, root)
    cut(FILE, 0.5)(root)
    text(FILE, "already here")(out)
    with pytest.raises(BadInput, match="exists already"):
        quarantine(root, check(root), out)
    assert (out / FILE).read_text() == "already here"
    with pytest.raises(BadInput, match="lies in the dataset itself"):
        quarantine(root, check(root), root / "bad")
    assert (root / FILE).exists()


def test_an_index_of_other_data_moves_no_file(whole, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(whole, root)
    rows(lambda content: [row.update({"sha256": bytes(32), "return": 5.0}) for row in content])(root)
    results = check(root)
    assert len(findings(root)) == 24
    assert quarantine(root, results, tmp_path / "bad") == 0
    assert findings(root) == []


def test_ranges_find_what_the_whole_finds(whole, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(whole, root)
    cut(FILE, 0.5)(root)
    twin(root)
    for folder in find_tasks(root):
        found, broken = members(folder)
        seen = [item for start in range(0, len(found), 5) for item in look(folder, found[start : start + 5])]
        assert judge(folder, seen, broken) == check_task(folder)


@pytest.mark.parametrize(
    ("limits", "odd"),
    [
        ([20] * 19 + [7], 0),
        ([20] * 20 + [7], 1),
        ([20] * 20 + [7, 8], 0),
        ([20] * 300 + [7, 8, 30], 3),
        ([20] * 300 + [7, 8, 30, 31], 0),
        (list(range(1, 200)), 0),
        ([], 0),
    ],
)
def test_a_time_limit_is_known_before_it_accuses(limits, odd):
    ended = {"terminated": False, "truncated": True}
    rows = [{"length": length, **ended} for length in limits]
    rows += [{"length": length, "terminated": True, "truncated": False} for length in (3, 25)]
    assert sum(problem is not None for problem in odd_ends(rows)) == odd


def test_equal_content_in_a_small_grid_is_counted_only(make, tmp_path):
    with TaskWriter(tmp_path, "darkroom", "task", {}) as writer:
        for episode in range(3):
            writer.add(replace(make(), episode=episode))
    result = check_task(tmp_path / "darkroom" / "task")
    assert (result.duplicates, result.findings) == (2, [])
