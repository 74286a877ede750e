"""The real `lram convert` over real samples: what it writes, says, skips and survives."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from lram.datasets.index import find_tasks, read_index
from lram.datasets.specs import BadInput
from lram.flows.convert import PartlyConverted, convert, plan
from lram.train import checkpoint

DATA = Path(__file__).parent / "data"
COMPOSUITE = DATA / "composuite"


def content(root: Path) -> dict[str, bytes]:
    """Returns every file below a folder, locks left out."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_converts_counts_and_is_complete_the_second_time(lram, tmp_path):
    root = tmp_path / "data"
    done = lram("convert", "composuite", COMPOSUITE, root)
    assert done.returncode == 0, done.stderr
    assert re.search(r"left out: 230 rows: .*unfinished", done.stdout)
    assert "3 tasks (0 were complete already): 8 trajectories, 4,000 transitions" in done.stdout
    assert done.stdout.splitlines()[-1] == str(root)
    before = content(root)
    again = lram("convert", "composuite", COMPOSUITE, root)
    assert "3 tasks (3 were complete already): 8 trajectories, 4,000 transitions" in again.stdout
    assert "left out: 230 rows" in again.stdout
    assert content(root) == before
    planned = lram("convert", "composuite", COMPOSUITE, root, "--episodes", 1, "--dry-run")
    assert planned.stdout.count("options.episodes") == 3, planned.stdout
    changed = lram("convert", "composuite", COMPOSUITE, root, "--episodes", 1)
    assert changed.stdout.count("made anew: ") == 3, changed.stdout
    assert "3 tasks (0 were complete already): 3 trajectories" in changed.stdout
    assert lram("convert", "composuite", COMPOSUITE, root).returncode == 0
    assert content(root) == before
    checked = lram("check", root)
    assert checked.returncode == 0, checked.stdout

    described = json.loads((root / "dataset.json").read_text())["tasks"]
    task = described["composuite/Panda_Plate_ObjectWall_Push"]
    assert task["account"]["written"] + sum(task["account"]["dropped"].values()) == task["account"]["read"] == 1230
    (file,) = task["provenance"]["files"]
    assert file["path"] == "expert/Panda_Plate_ObjectWall_Push/data.hdf5" and len(file["sha256"]) == 64
    assert task["provenance"]["options"]["episodes"] == 2000 and "tasks" not in task["provenance"]["options"]
    # A variant is measured by the scores of the task that it varies.
    medium = described["composuite/IIWA_Box_None_PickPlace.medium"]
    assert medium["reference"] == described["composuite/IIWA_Box_None_PickPlace"]["reference"] is not None


def test_dry_run_lists_and_writes_nothing(lram, tmp_path):
    root = tmp_path / "data"
    done = lram("convert", "composuite", COMPOSUITE, root, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "3 tasks" in done.stdout and "to make" in done.stdout
    assert not root.exists()


def test_what_is_wrong_with_one_task_costs_no_other(lram, tmp_path):
    src, root = tmp_path / "src", tmp_path / "data"
    shutil.copytree(COMPOSUITE, src)
    broken = src / "expert" / "IIWA_Box_None_PickPlace" / "data.hdf5"
    broken.write_bytes(broken.read_bytes()[:5000])
    done = lram("convert", "composuite", src, root)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("problem: ")]
    assert str(broken) in problem
    assert "2 tasks (0 were complete already): 4 trajectories" in done.stdout
    assert {path.name for path in find_tasks(root)} == {
        "IIWA_Box_None_PickPlace.medium",
        "Panda_Plate_ObjectWall_Push",
    }


def test_a_run_in_which_a_task_failed_has_failed(server, tmp_path):
    src, root = tmp_path / "src", tmp_path / "data"
    shutil.copytree(COMPOSUITE, src)
    broken = src / "expert" / "IIWA_Box_None_PickPlace" / "data.hdf5"
    broken.write_bytes(b"")
    with temporary_settings({PREFECT_API_URL: server}):
        state = convert("composuite", src, root, workers=1, return_state=True)
    assert state.is_failed()
    assert "1 of 3 tasks could not be converted" in state.message and str(broken) in state.message
    with pytest.raises(PartlyConverted) as caught:
        state.result()
    assert len(caught.value.made) == 2


def test_bad_requests_are_sentences(tmp_path):
    with pytest.raises(BadInput, match="unknown source 'gold'"):
        plan("gold", tmp_path)
    with pytest.raises(BadInput, match="nowhere: no such file or folder"):
        plan("composuite", tmp_path / "nowhere")
    with pytest.raises(BadInput, match="options of composuite: episodes: "):
        plan("composuite", COMPOSUITE, {"episodes": "many"})


def test_killed_at_random_the_next_run_gives_the_same_bytes(server, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "PREFECT_API_URL": server, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lram.flows.cli", "convert", "dqn-replay", str(DATA / "dqn_replay")]
    subprocess.run([*command, str(whole)], env=environment, check=True, capture_output=True, timeout=120)
    rng, kills = random.Random(0), 0
    for _ in range(3):
        process = subprocess.Popen([*command, str(killed)], env=environment, stderr=subprocess.DEVNULL)
        # From the first file on, so that the kill meets a conversion and no import.
        present = len(list(killed.rglob("*.hdf5")))
        while process.poll() is None and len(list(killed.rglob("*.hdf5"))) <= present:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills
    subprocess.run([*command, str(killed)], env=environment, check=True, capture_output=True, timeout=120)
    assert content(killed) == content(whole)


def test_a_dask_cluster_gives_the_same_bytes(lram, tmp_path):
    from distributed import LocalCluster

    here, there = tmp_path / "here", tmp_path / "there"
    assert lram("convert", "composuite", COMPOSUITE, here, "--workers", 1).returncode == 0
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        done = lram("convert", "composuite", COMPOSUITE, there, "--scheduler", address)
    assert done.returncode == 0, done.stderr
    assert content(here) == content(there)
    nobody = lram("convert", "composuite", COMPOSUITE, tmp_path / "x", "--scheduler", "tcp://127.0.0.1:9")
    assert nobody.returncode == 1 and "no Dask scheduler answers there" in nobody.stderr


def test_five_domains_train_in_one_run(lram, rooms, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(rooms, root)
    for source, folder in (
        ("composuite", "composuite"),
        ("dqn-replay", "dqn_replay"),
        ("mimicgen", "mimicgen"),
        ("procgen", "procgen/buffers"),
    ):
        done = lram("convert", source, DATA / folder, root)
        assert done.returncode == 0, done.stdout + done.stderr
    checked = lram("check", root)
    assert checked.returncode == 0, checked.stdout
    run = tmp_path / "run"
    trained = lram("train", root, "--out", run, "--size", "tiny", "--updates", 4, "--per-domain", 4, "--gap", 10)
    assert trained.returncode == 0, trained.stderr
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    domains = {"atari", "composuite", "darkroom", "mimicgen", "procgen"}
    assert domains == {key.removeprefix("loss/") for key in lines[-1] if key.startswith("loss/")}
    state = checkpoint.read_state(checkpoint.find(run))
    assert {name.split("/")[0] for name in state.dataset["tasks"]} == domains
    # What was converted keeps its account through an index made anew.
    before = read_index(root / "composuite" / "Panda_Plate_ObjectWall_Push").meta["account"]
    assert lram("index", root).returncode == 0
    assert read_index(root / "composuite" / "Panda_Plate_ObjectWall_Push").meta["account"] == before
