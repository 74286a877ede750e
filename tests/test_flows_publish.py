"""Publishing and downloading with the real commands and the real Hub clients, against a Hub on this machine."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from lram.datasets.index import read_index
from lram.datasets.writer import TaskWriter

REPO = "me/trajectories"
SMALL = ("--shard-bytes", 110_000)


@pytest.fixture(scope="module")
def five(tmp_path_factory, make) -> Path:
    """A dataset of five tasks in three domains."""
    root = tmp_path_factory.mktemp("five")
    names = ("dmcontrol/cartpole-swingup", "dmcontrol/walker-stand", "metaworld/reach-v2")
    for name in (*names, "darkroom/room5x5-goal-00-01", "darkroom/room5x5-goal-02-03"):
        domain, task = name.split("/")
        with TaskWriter(root, domain, task, {"collector": "test"}) as writer:
            for episode in range(12):
                writer.add(make(domain, episode, task=task))
            writer.finish()
    return root


@pytest.fixture
def data(five, tmp_path) -> Path:
    """The five tasks, in a directory of their own."""
    return Path(shutil.copytree(five, tmp_path / "data"))


@pytest.fixture
def publish(lram, hub, data):
    """Publishes `data` to the Hub."""

    def publish(*words: object) -> subprocess.CompletedProcess:
        return lram("publish", data, REPO, *SMALL, *words, environment=hub.environment)

    return publish


def uploads(hub) -> list[str]:
    """Returns the hashes of the files that the Hub received, in order."""
    return [entry["path"].removeprefix("/-lfs/") for entry in hub.log("^PUT /-lfs/")]


def test_without_a_token_it_says_how_to_log_in(lram, hub, data):
    nobody = {key: value for key, value in hub.environment.items() if key != "HF_TOKEN"}
    done = lram("publish", data, REPO, environment=nobody)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: the Hub refuses: ") and line.endswith("log in with `hf auth login`, or set HF_TOKEN")


def test_what_changed_is_sent_and_nothing_else(publish, hub, data, make):
    planned = publish("--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "in 5 folders, 2 commits" in planned.stdout and not hub.log("POST")
    first = publish("--tag", "v1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == f"{hub.url}/datasets/{REPO}"
    sent = uploads(hub)
    assert len(sent) == len(set(sent)) > 10
    (created,) = hub.log("/api/repos/create")
    settings = (hub.folder / "store" / "repos" / REPO / "settings.json").read_text()
    assert settings == '{"private": true}' and created

    hub.clear()
    assert publish("--tag", "v1").returncode == 0
    assert not uploads(hub) and not hub.log("/commit/")

    with TaskWriter(data, "metaworld", "reach-v2", {"collector": "test"}) as writer:
        for episode in range(12, 22):
            writer.add(make("metaworld", episode, task="reach-v2", length=2))
        writer.finish()
    hub.clear()
    plan = publish("--dry-run").stdout
    assert "metaworld/reach-v2: 1 shards to send" in plan and plan.count(": 0 shards to send") == 4
    assert publish("--tag", "v2").returncode == 0
    # The last shard, the task's index, and the card's plot.
    assert len(uploads(hub)) == 3
    moved = publish("--tag", "v1")
    assert moved.returncode == 1 and "the tag v1 names another version already" in moved.stderr


def test_a_bad_dataset_is_refused(publish, hub, data):
    path = next((data / "metaworld").rglob("*.hdf5"))
    path.write_bytes(path.read_bytes()[:3000])
    done = publish()
    assert done.returncode == 1 and "findings, first" in done.stderr and "Traceback" not in done.stderr
    assert not hub.log("POST|PUT")


def test_what_is_published_already_is_not_checked_again(publish, hub, data, make):
    assert publish().returncode == 0
    path = next((data / "metaworld").rglob("*.hdf5"))
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    hub.clear()
    again = publish()
    assert again.returncode == 0 and not uploads(hub), again.stderr
    with TaskWriter(data, "metaworld", "reach-v2", {"collector": "test"}) as writer:
        writer.add(make("metaworld", 12, task="reach-v2"))
        writer.finish()
    refused = publish()
    assert refused.returncode == 1 and f"{path.name}: not a whole trajectory file" in refused.stderr
    assert not hub.log("POST .*/commit/|PUT")
    path.write_bytes(whole)
    assert publish().returncode == 0 and uploads(hub)


def test_a_directory_gets_the_same_layout_and_the_same_bytes(lram, hub, publish, data, tmp_path):
    out = tmp_path / "out"
    for target in (out, tmp_path / "twin"):
        done = lram("publish", data, "--to", target, *SMALL)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(target)

    def content(root: Path) -> dict[str, bytes]:
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    here, twin = content(out), content(tmp_path / "twin")
    assert here.keys() == twin.keys()
    assert {name for name in here if here[name] != twin[name]} == {"README.md"}  # names its directory
    assert publish().returncode == 0
    done = lram("download", REPO, "--to", tmp_path / "got", environment=hub.environment)
    assert done.returncode == 0, done.stderr
    got = {name: data for name, data in content(tmp_path / "got").items() if not name.startswith(".")}
    assert got.keys() == here.keys()
    assert {name for name in here if here[name] != got[name]} == {"README.md"}
    card = got["README.md"].decode()
    assert "5 tasks, 60 trajectories, 1,200 transitions" in card and "- config_name: dmcontrol" in card
    # A shard that is gone is made again, from files that are checked again.
    (out / "metaworld" / "reach-v2" / "shard-00000.tar").unlink()
    planned = lram("publish", data, "--to", out, *SMALL, "--dry-run")
    assert planned.stdout.count(": 0 shards to send") == 4, planned.stdout
    assert lram("publish", data, "--to", out, *SMALL).returncode == 0
    assert content(out) == here
    neither = lram("publish", data)
    assert neither.returncode == 1 and "say where to publish" in neither.stderr


@pytest.fixture(scope="module")
def old_client(tmp_path_factory) -> Path:
    """`huggingface-cli` of huggingface_hub 0.36, in a virtual environment of its own."""
    folder = tmp_path_factory.mktemp("old") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(folder / "bin" / "pip"), "install", "-q", "huggingface_hub==0.36.0"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"huggingface_hub 0.36 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "huggingface-cli"


@pytest.fixture(scope="module")
def new_client(tmp_path_factory) -> Path:
    """`hf` of the huggingface_hub that this project pins, in a virtual environment of its own."""
    import huggingface_hub

    folder = tmp_path_factory.mktemp("new") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = f"huggingface_hub=={huggingface_hub.__version__}"
    done = subprocess.run(
        [str(folder / "bin" / "pip"), "install", "-q", wanted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"{wanted} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin" / "hf"


READ = """
import sys, h5py
with h5py.File(sys.argv[1]) as file:
    print(dict(file.attrs)["task"], file["states"].shape, float(file["rewards"][:].sum()))
"""


def test_both_clients_fetch_exactly_one_task_that_trains_untouched(
    publish, hub, lram, data, tmp_path, old_client, new_client
):
    assert publish().returncode == 0
    task = "dmcontrol/cartpole-swingup"
    for name, client in (("new", new_client), ("old", old_client)):
        to = tmp_path / name
        command = [str(client), "download", REPO, "--repo-type", "dataset", "--include", f"{task}/*"]
        environment = {**hub.environment, "HF_HOME": str(tmp_path / f"home-{name}")}
        subprocess.run(
            [*command, "--local-dir", str(to)], env=environment, check=True, capture_output=True, timeout=120
        )
        got = {p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file() and ".cache" not in p.parts}
        shards = {f"{task}/{name}" for name in read_index(to / task).meta["shards"]}
        assert got == {f"{task}/index.parquet", *shards}
        files = tmp_path / f"files-{name}"
        files.mkdir()
        for shard in sorted(shards):
            subprocess.run(["tar", "xf", str(to / shard), "-C", str(files)], check=True)
        for path in files.rglob("*.hdf5"):
            assert path.read_bytes() == (data / task / path.relative_to(files)).read_bytes()
        one = files / "000" / "000000003.hdf5"
        said = subprocess.run([sys.executable, "-c", READ, str(one)], capture_output=True, text=True, check=True)
        assert said.stdout.startswith("cartpole-swingup (20, 5)")
        trained = lram(
            "train", to, "--out", tmp_path / f"run-{name}", "--size", "tiny", "--updates", 3, "--per-domain", 4
        )
        assert trained.returncode == 0, trained.stderr
    checked = lram("check", tmp_path / "new")
    assert checked.returncode == 0, checked.stdout
    unpacked = lram("unpack", tmp_path / "new", tmp_path / "plain")
    assert unpacked.returncode == 0 and "12 trajectories unpacked" in unpacked.stdout
    with tarfile.open(tmp_path / "new" / task / "shard-00000.tar") as tar:
        assert all(member.name.endswith(".hdf5") for member in tar)


def test_a_download_is_verified_and_resumes(publish, hub, lram, tmp_path):
    assert publish().returncode == 0
    to = tmp_path / "got"
    unknown = lram("download", REPO, "metaworld/reach", "--to", to, environment=hub.environment)
    assert unknown.returncode == 1 and "it has metaworld/reach-v2" in unknown.stderr
    done = lram("download", REPO, "metaworld", "--to", to, environment=hub.environment)
    assert done.returncode == 0 and {p.name for p in to.iterdir() if p.is_dir()} == {".cache", "metaworld"}
    shard = to / "metaworld" / "reach-v2" / "shard-00001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 4
    before = shard.stat()
    shard.write_bytes(data)
    # As a disk would flip it: the client looks at files again whose time has changed.
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    hub.clear()
    flipped = lram("download", REPO, "metaworld", "--to", to, environment=hub.environment)
    assert flipped.returncode == 1 and "shard-00001.tar: damaged or cut" in flipped.stderr
    healed = lram("download", REPO, "metaworld", "--to", to, environment=hub.environment)
    assert healed.returncode == 0, healed.stderr
    fetched = [entry["path"] for entry in hub.log("^GET .*/resolve/.*tar")]
    assert len(fetched) == 1 and fetched[0].endswith("shard-00001.tar")
    nobody = lram("download", "me/nothing", "--to", to, environment=hub.environment)
    assert nobody.returncode == 1 and "the Hub refuses" in nobody.stderr and "Traceback" not in nobody.stderr


def test_later_is_obeyed_on_both_ways(publish, hub, lram, tmp_path):
    hub.fail("POST .*/preupload/", 429, retry_after=2)
    assert publish().returncode == 0
    refused, again = hub.log("POST .*/preupload/")[:2]
    assert refused["status"] == 429 and again["time"] - refused["time"] >= 2
    hub.fail("GET .*/tree/", 503, times=2, retry_after=1)
    done = lram("download", REPO, "metaworld", "--to", tmp_path / "got", environment=hub.environment)
    assert done.returncode == 0, done.stderr
    hub.fail("GET .*/resolve/.*shard-00000.tar", 200, cut=True)
    done = lram("download", REPO, "darkroom", "--to", tmp_path / "got", environment=hub.environment)
    assert done.returncode == 0, done.stderr


def test_killed_at_random_nothing_is_sent_twice_and_everything_arrives(server, hub, data, tmp_path):
    """Kills uploads, then downloads; `hub` keeps the log of all of them."""
    environment = {**hub.environment, "PREFECT_API_URL": server, "OMP_NUM_THREADS": "1"}
    lram = [sys.executable, "-m", "lram.flows.cli"]
    up = [*lram, "publish", str(data), REPO, *map(str, SMALL)]
    down = [*lram, "download", REPO, "--to", str(tmp_path / "got")]
    rng = random.Random(0)
    for command, progress in ((up, "^PUT /-lfs/"), (down, "^GET .*/resolve/.*tar")):
        for _ in range(int(os.environ.get("LRAM_KILLS", "2"))):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seen = len(hub.log(progress))
            while process.poll() is None and len(hub.log(progress)) <= seen + rng.randrange(3):
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    store = hub.folder / "store" / "blobs"
    received = [oid for oid in uploads(hub) if (store / oid).exists()]
    # A file under way when its sender died was not received; whatever was received came once.
    complete = [entry for entry in hub.log("^PUT /-lfs/") if entry.get("done")]
    assert len({entry["path"] for entry in complete}) == len(complete) == len(set(received))
    assert not (data / ".publish").exists()
    for folder in (tmp_path / "got").glob("*/*"):
        if folder.parent.name != ".cache":
            for name, expected in read_index(folder).meta["shards"].items():
                assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
