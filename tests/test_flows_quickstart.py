"""The quickstart as a user runs it, on the smallest room: to its end, and killed on the way there."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lram.datasets.index import find_tasks
from lram.datasets.writer import finished

SMALL = ["--size", "3", "--horizon", "6", "--steps", "1200", "--gap", "20", "--updates", "150", "--trials", "5"]


def start(out: Path, home: Path) -> subprocess.Popen:
    environment = {**os.environ, "PREFECT_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "lram.flows.cli", "quickstart", "--out", str(out), *SMALL]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def servers(home: Path) -> list[str]:
    """Prefect servers that commands with this PREFECT_HOME have started."""
    found = subprocess.run(["pgrep", "-f", "lram.flows.server"], capture_output=True, text=True, check=False)
    mine = []
    for pid in found.stdout.split():
        with suppress(OSError):  # it has ended
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            mine += [pid] if f"PREFECT_HOME={home}".encode() in environment else []
    return mine


def state(out: Path) -> dict[str, bytes]:
    """Everything whose content does not depend on the clock."""
    kinds = ("*.hdf5", "*.parquet", "report.*", "dataset.json", "*.safetensors", "in_context.json")
    paths = [path for kind in kinds for path in out.rglob(kind)]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str, float]:
    """An uninterrupted run: its folder, what it printed, and how many seconds it took."""
    root, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    printed = end(start(root / "out", root / "home"))
    return root / "out", printed, time.monotonic() - began


def test_it_prints_where_everything_is(whole):
    printed = whole[1]
    made = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert set(made) == {"dataset", "report", "checkpoint", "curves", "plot"}
    assert all(Path(path).exists() for path in made.values())
    result = json.loads(Path(made["curves"]).read_text())
    assert {name: len(curve["tasks"]) for name, curve in result["curves"].items()} == {"training": 7, "holdout": 2}
    assert all(len(curve["policy"]["mean"]) == 5 for curve in result["curves"].values())


def test_a_second_run_redoes_nothing(whole, tmp_path):
    out, printed, _ = whole
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".hdf5", ".html", ".png")}
    assert end(start(out, tmp_path)) == printed
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_ten_kills_lose_and_double_nothing(whole, tmp_path):
    rng = random.Random(1)
    out, home = tmp_path / "out", tmp_path / "home"
    reached, seen = set(), 0
    for _ in range(10):
        process = start(out, home)
        # Past the imports, anywhere in collecting, checking, training and evaluating, however fast the machine is.
        time.sleep(rng.uniform(0.15, 0.7) * whole[2])
        seen += len(servers(home))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        complete = (
            [folder for folder in find_tasks(out / "dataset") if finished(out / "dataset", "darkroom", folder.name)]
            if (out / "dataset" / "darkroom").is_dir()
            else []
        )
        reached.add((len(complete), len(list(out.glob("policy-*/update-*"))), (out / "report").exists()))
    assert len(reached) > 1, "every kill hit the same place"
    assert seen, "no command had a server of its own"
    end(start(out, home))
    assert state(out) == state(whole[0])
    deadline = time.monotonic() + 30
    while servers(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not servers(home), "a killed command left its Prefect server behind"
