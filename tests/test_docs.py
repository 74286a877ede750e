"""What README and docs/ say is run here: every command, and every example in Python.

The tables below have a row for each of them: with which flags it is made small and run, or which test runs it, or why
none does. A command without a row fails, and so does a row without its command.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import tyro

from lram.collectors.specialists import DarkRoomSettings, train_goal
from lram.converters.run import convert_job
from lram.datasets.check import check_task
from lram.datasets.index import read_index
from lram.flows.cli import COMMANDS
from lram.model.state import reset_state, select_state

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Here(NamedTuple):
    """A command that is run here."""

    flags: str = ""
    """Appended: what makes it small."""
    folder: str = "."
    """Folder of the workspace to run it in."""
    needs: str = ""
    """Module without which it is left out."""


class There(NamedTuple):
    """A command that another test runs."""

    test: str
    """FILE::FUNCTION, in this folder."""


class Nowhere(NamedTuple):
    """A command that no test runs."""

    why: str


Row = Here | There | Nowhere

SMALL = "--size tiny --updates 3 --per-domain 4 --gap 10 --readers 0"
INTERNET = Nowhere("needs the internet, and replaces installed packages")
DEPLOYED = There("test_flows_deployments.py::test_every_deployment_is_registered_with_what_operators_read")
SET = There("test_docs.py::test_prefect_takes_the_guides_settings")
ASKED = There("test_docs.py::test_prefect_answers_the_guides_other_commands")
POSTGRES = Nowhere("needs root, and a PostgreSQL server on this machine")
SERVED = There("test_docs.py::test_the_guides_dask_cluster_converts")

ROWS: dict[str, Row] = {
    # README.md
    "git clone REPOSITORY && cd lram": INTERNET,
    "make quickstart": There("test_flows_quickstart.py::test_it_prints_where_everything_is"),
    "make test": Nowhere("is what runs this test"),
    "lram collect darkroom runs/rooms": Here("--size 3 --horizon 6 --steps 1200 --workers 1"),
    "lram check runs/rooms": Here("--workers 1"),
    "lram report runs/rooms": Here("--workers 1"),
    "lram train runs/rooms --size 16M --backbone mamba --out runs/mamba": Here(SMALL),
    "lram evaluate runs/mamba --trials 40": Here("--trials 2 --seeds 1"),
    "lram watch runs/mamba darkroom/room10x10-goal-07-03": Here("--target 3"),
    "lram export-policy runs/mamba runs/policy": Here(),
    "lram check runs/rooms --quarantine runs/bad": Here("--workers 1"),
    "lram pack runs/rooms runs/rooms.zarr": Here("--workers 1"),
    "lram export runs/rooms runs/minari --to minari": Here("--workers 1", needs="minari"),
    "torchrun --nproc-per-node 8 -m lram.train runs/rooms --size 16M --backbone mamba --out runs/mamba": There(
        "test_train_ranks.py::test_torchrun_starts_ranks"
    ),
    "lram envs": Here(),
    "lram collect dmcontrol runs/dmcontrol --tasks cartpole-swingup walker-stand --steps 60000": Here(
        "--steps 1000 --learning-starts 1000 --train-freq 100 --batch-size 8 --workers 1", needs="dm_control"
    ),
    "lram collect metaworld runs/metaworld --policy scripted": Here(
        "--tasks reach-v2 --scripted.episodes 1 --workers 1", needs="metaworld"
    ),
    "lram collect procgen runs/procgen --tasks coinrun bigfish": Here(
        "--tasks bigfish --steps 256 --num-envs 4 --n-steps 64 --batch-size 256 --n-epochs 1 --device cpu",
        needs="envpool",
    ),
    "lram convert dqn-replay SRC runs/atari --dry-run": Here(folder="dqn_replay"),
    "lram convert composuite SRC runs/composuite --kinds expert medium": Here("--workers 1", "composuite"),
    "lram convert procgen SRC runs/procgen": Here("--workers 1", "procgen"),
    "lram convert mimicgen SRC runs/mimicgen --failed": Here("--workers 1", "mimicgen"),
    "lram convert lram SRC runs/lram": Here("--workers 1", "lram"),
    "lram convert dqn-replay tests/data/dqn_replay runs/atari": Here("--workers 1", "shown"),
    "lram publish runs/rooms OWNER/NAME --tag v1": Here("--workers 1"),
    "lram publish runs/rooms --to runs/published": Here("--workers 1"),
    "lram download OWNER/NAME darkroom --to data": Here(),
    "lram train data": Here(SMALL),
    "lram collect dmcontrol runs/robots --tasks cartpole-swingup walker-stand --steps 80000 --expert 200 "
    "--expert-noise 0.2": Here(
        "--tasks cartpole-swingup --expert 2 --steps 1000 --learning-starts 1000 --train-freq 100 --batch-size 8 "
        "--workers 1",
        needs="dm_control",
    ),
    "lram collect metaworld runs/robots --policy scripted --tasks reach-v2 drawer-close-v2 button-press-topdown-v2 "
    "window-open-v2 door-close-v2": Here("--tasks reach-v2 --scripted.episodes 2 --workers 1", needs="metaworld"),
    "lram train runs/robots --size tiny --updates 3000 --per-domain 64 --learning-rate 2e-3 "
    "--out runs/robots-xlstm": Here("--updates 3 --per-domain 4 --readers 0", needs="metaworld"),
    "lram evaluate runs/robots-xlstm --temperature 0.5": Here("--episodes 1 --workers 1", needs="metaworld"),
    # docs/inference.md
    "lram export-policy runs/train OUT": Here(),
    "python OUT/example.py dmcontrol/cartpole-swingup": There("test_train_export.py::test_the_example_plays_cartpole"),
    # docs/mimicgen.md
    'pip install "lram[robosuite]" -c constraints.txt': INTERNET,
    "for repository in NVlabs/mimicgen@72bd767 ARISE-Initiative/robomimic@d309eae Lifelong-ML/CompoSuite@1fa36f6; do "
    'git clone "https://github.com/${repository%@*}" "$(basename "${repository%@*}")"; '
    'git -C "$(basename "${repository%@*}")" checkout "${repository#*@}"; '
    'pip install --no-deps -e "$(basename "${repository%@*}")"; done': INTERNET,
    "pip install gdown imageio psutil six termcolor transformers": INTERNET,
    "pip install --no-deps diffusers torchvision": INTERNET,
    "pip install gym": INTERNET,
    "lram collect mimicgen stack.hdf5 runs/mimicgen --task Stack_D0 --robots IIWA UR5e Sawyer --demos 1000": There(
        "test_collectors_mimicgen.py::test_successes_are_kept_and_failures_counted"
    ),
    "lram check runs/mimicgen": Here("--workers 1", "mimicgen"),
    # docs/operating.md
    "prefect server start": DEPLOYED,
    "prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api": SET,
    "prefect server status --wait": ASKED,
    "prefect work-pool create default --type process": DEPLOYED,
    "prefect deploy --all": DEPLOYED,
    "prefect worker start --pool default": DEPLOYED,
    "sudo apt install postgresql": POSTGRES,
    'sudo -u postgres createuser "$(id -un)"': POSTGRES,
    'sudo -u postgres createdb --owner "$(id -un)" prefect': POSTGRES,
    "prefect config set PREFECT_SERVER_DATABASE_CONNECTION_URL="
    '"postgresql+asyncpg:///prefect?host=/var/run/postgresql"': SET,
    "prefect server start --host 0.0.0.0": POSTGRES,
    "prefect config set PREFECT_API_URL=http://SERVER:4200/api": SET,
    "prefect automation create --from-file flows/dead_runs.yaml": ASKED,
    "prefect config set PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30": SET,
    "prefect worker start --pool default --limit 1": DEPLOYED,
    "dask scheduler --port 8786": SERVED,
    "dask worker tcp://SERVER:8786 --nworkers 8 --nthreads 1": SERVED,
    "lram convert dqn-replay SRC ROOT --scheduler tcp://SERVER:8786": SERVED,
}

EXAMPLES: dict[str, Row] = {
    "README.md 1": Here(),
    "README.md 2": Here("updates=500: updates=3, trials=10: trials=2"),
    "data.md 1": Here(folder="runs/quickstart/dataset/darkroom/room5x5-h20-goal-00-01/000"),
    "extending.md 1": There("test_docs.py::test_a_task_is_added_as_the_guide_says"),
    "extending.md 2": There("test_docs.py::test_a_source_is_added_as_the_guide_says"),
    "extending.md 3": There("test_docs.py::test_a_source_is_added_as_the_guide_says"),
    "extending.md 4": There("test_docs.py::test_a_backbone_is_added_as_the_guide_says"),
    "inference.md 1": There("test_train_export.py::test_actions_are_those_of_the_evaluator"),
    "operating.md 1": Here(),
}


def fences(page: Path) -> list[tuple[str, str]]:
    """Returns language and text of every block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in fences(page) if name == language]


def examples(name: str) -> list[str]:
    return blocks(ROOT / "docs" / name, "python")


def documented() -> Iterator[str]:
    """Gives every command in a block of shell, and every one after a `$`, in order; a loop is one command."""
    for page in PAGES:
        for language, text in fences(page):
            lines = re.sub(r" *\\\n *", " ", text).splitlines()
            if language in ("bash", "sh"):
                text = "\n".join(re.sub(r"\s#.*", "", line).strip() for line in lines)
                for loop in re.findall(r"^for .*?^done", text, re.S | re.M):
                    text = text.replace(loop, loop.replace("\n", "; ").replace("do; ", "do "))
                yield from (line for line in text.splitlines() if line)
            elif not language:
                yield from (line.removeprefix("$ ") for line in lines if line.startswith("$ "))


def mentioned() -> Iterator[str]:
    """Gives every `lram …` in the text that is whole, that is without "…"."""
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
        for words in re.findall(r"`(lram [^`…]+)`", prose):
            yield " ".join(words.split())


def parse(line: str) -> None:
    """Parses a command as `lram` does; "lram collect" stands for all that begin so."""
    words = shlex.split(line)[1:]
    if len(words) == 1 and any(name.startswith(f"{words[0]} ") for name in COMMANDS):
        return
    name = next(name for name in COMMANDS if words[: len(name.split())] == name.split())
    module, settings, _ = COMMANDS[name]
    if rest := words[len(name.split()) :]:
        flow = importlib.import_module(f"lram.flows.{module}")
        tyro.cli(getattr(flow, settings), args=rest, config=(tyro.conf.PositionalRequiredArgs,))


def test_the_readme_lists_the_commands_as_lram_does():
    listed = [f"lram {name:<{max(map(len, COMMANDS))}}  {words}" for name, (_, _, words) in COMMANDS.items()]
    assert "\n".join(listed) in PAGES[0].read_text()


def test_every_command_has_a_row_and_every_row_a_command():
    assert list(dict.fromkeys(documented())) == list(ROWS)
    found = [f"{page.name} {n + 1}" for page in PAGES for n in range(len(blocks(page, "python")))]
    assert found == list(EXAMPLES)


@pytest.mark.parametrize("line", sorted(set(mentioned()) - {"lram COMMAND --help", "lram convert robot SRC ROOT"}))
def test_every_command_in_the_text_is_one_that_the_command_line_takes(line):
    parse(line)


OTHERS = sorted({row.test for row in (*ROWS.values(), *EXAMPLES.values()) if isinstance(row, There)})


@pytest.mark.parametrize("line", OTHERS)
def test_the_tests_that_run_the_rest_are_there(line):
    file, name = line.split("::")
    assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text()


# One process for all: each would import for five seconds. What a command prints goes to a file of its own.
DRIVER = """
import contextlib, io, json, os, sys, time, traceback
from lram.flows import cli

def main():
    home = os.getcwd()
    for kind, folder, what in json.load(sys.stdin):
        os.chdir(os.path.join(home, folder))
        out, err, code, began = io.StringIO(), io.StringIO(), 0, time.process_time()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main(what) if kind == "lram" else exec(compile(what, "example", "exec"), {})
            except SystemExit as end:
                code = end.code
            except BaseException:
                code = traceback.format_exc()
        said = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.process_time() - began}
        print(json.dumps(said), flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder in which what the pages name is found: SRC of every source, and a quickstart's dataset."""
    home = tmp_path_factory.mktemp("workspace")
    sources = {"dqn_replay": "dqn_replay", "composuite": "composuite", "procgen": "procgen/buffers"}
    for name, source in (sources | {"mimicgen": "mimicgen"}).items():
        (home / name).mkdir()
        (home / name / "SRC").symlink_to(DATA / source)
    (home / "shown" / "tests").mkdir(parents=True)
    (home / "shown" / "tests" / "data").symlink_to(DATA)
    (home / "lram" / "SRC").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), 400
    states = rng.standard_normal((rows + 1, 39))
    np.savez(
        home / "lram" / "SRC" / "reach-v2.npz",
        observations=states[:-1],
        next_observations=states[1:],
        actions=rng.uniform(-1, 1, (rows, 4)),
        rewards=rng.random(rows),
        dones=(np.arange(rows) % 200 == 199).astype(np.float32),
    )
    specialist = DarkRoomSettings(size=5, horizon=20, steps=10_000)
    for task in ("room5x5-h20-goal-00-01", "room5x5-h20-goal-00-02"):
        train_goal(specialist, task, home / "runs" / "quickstart" / "dataset")
    return home


@pytest.fixture
def driven(workspace, hub, server):
    """Runs rows in one process, in their order, and returns what became of each."""

    def driven(rows: list[tuple[str, str, Here, object]]) -> dict[str, dict]:
        known = [row for row in rows if not row[2].needs or importlib.util.find_spec(row[2].needs)]
        (workspace / "driver.py").write_text(DRIVER)
        environment = {**hub.environment, "PREFECT_API_URL": server, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "driver.py"],
            input=json.dumps([(kind, row.folder, what) for kind, _, row, what in known]),
            cwd=workspace,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = [json.loads(line) for line in done.stdout.splitlines()]
        return {name: result for (_, name, _, _), result in zip(known, said, strict=True)}

    return driven


def test_every_command_runs(driven, workspace):
    rows = []
    for line, row in ROWS.items():
        if isinstance(row, Here):
            rows.append(("lram", line, row, [*shlex.split(line)[1:], *row.flags.split()]))
    for name, row in EXAMPLES.items():
        if isinstance(row, Here):
            page, number = name.split()
            text = blocks(next(path for path in PAGES if path.name == page), "python")[int(number) - 1]
            for change in filter(None, row.flags.split(", ")):
                before, after = change.split(": ")
                assert before in text
                text = text.replace(before, after)
            rows.append(("python", name, row, text))
    made = driven(rows)
    for name, result in made.items():
        print(f"{result['seconds']:5.1f} s  {name}")
    for name, result in made.items():
        assert not result["code"], f"{name}\n{result['code']}\n{result['out']}\n{result['err']}"
    # What the README shows of one is what it prints.
    shown = "lram convert dqn-replay tests/data/dqn_replay runs/atari"
    (block,) = (text for text in blocks(PAGES[0], "") if shown in text)
    assert made[shown]["out"].splitlines() == block.splitlines()[2:]
    assert (workspace / "runs" / "rooms" / "report" / "report.html").exists()
    assert {path.name for path in (workspace / "data").iterdir() if path.is_dir()} == {".cache", "darkroom"}


def prefect(line: str, home: Path, **environment: str) -> None:
    command = [sys.executable, "-m", *shlex.split(line)]
    environment = {**os.environ, "PREFECT_HOME": str(home), **environment}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


def test_prefect_takes_the_guides_settings(tmp_path):
    for line in (line for line, row in ROWS.items() if row is SET):
        prefect(line, tmp_path)
        value = shlex.split(line)[-1].split("=", 1)[1]
        assert f'"{value}"' in (tmp_path / "profiles.toml").read_text()


def test_prefect_answers_the_guides_other_commands(server, tmp_path):
    for line in (line for line, row in ROWS.items() if row is ASKED):
        prefect(line, tmp_path, PREFECT_API_URL=server)


def test_the_guides_dask_cluster_converts(lram, workspace, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    scheduler, worker, convert = (
        line.replace("8786", port).replace("SERVER", "127.0.0.1").replace("--nworkers 8", "--nworkers 2").split()
        for line, row in ROWS.items()
        if row is SERVED
    )
    running = []
    try:
        for words in (scheduler, worker):
            command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
            running.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL))
        words = [str(DATA / "dqn_replay") if word == "SRC" else word for word in convert[1:]]
        done = lram(*[str(tmp_path / "ROOT") if word == "ROOT" else word for word in words])
        assert done.returncode == 0, done.stderr
        assert "28 trajectories, 5,193 transitions" in done.stdout
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()


def test_a_task_is_added_as_the_guide_says(tmp_path, monkeypatch):
    pytest.importorskip("dm_control", reason="the guide's example plays DMControl")
    monkeypatch.chdir(tmp_path)
    exec(compile(examples("extending.md")[0], "extending.md", "exec"), {})
    folder = tmp_path / "data" / "dmcontrol" / "pendulum-swingup"
    assert not check_task(folder).findings
    index = read_index(folder)
    assert index.numpy("length").tolist() == [1000, 1000] and index.meta["complete"]


def test_a_source_is_added_as_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("lram.converters.robot")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source, call = examples("extending.md")[1:3]
    exec(compile(source, "extending.md", "exec"), vars(module))
    for number, length in enumerate((4, 6)):
        path = tmp_path / "logs" / "push-v2" / f"{number}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([[step, step / 10, 0.5, 1.0] for step in range(length)])
    names = {**vars(module), "convert_job": convert_job}
    exec(compile(call, "extending.md", "exec"), names)
    assert (names["result"].episodes, names["result"].transitions) == (2, 10)
    folder = tmp_path / "data" / "metaworld" / "push-v2"
    assert not check_task(folder).findings
    assert read_index(folder).meta["account"]["read"] == 10


def test_a_backbone_is_added_as_the_guide_says(in_pieces):
    names: dict = {}
    exec(compile(examples("extending.md")[3], "extending.md", "exec"), names)
    torch.manual_seed(0)
    gru = names["GRU"](2, 16)
    x = torch.randn(3, 20, 16)
    whole = gru(x)
    pieces, state = in_pieces(gru, x, [3, 1, 7])
    torch.testing.assert_close(pieces, whole)
    again = gru.step(x[:, :5], reset_state(state, torch.tensor([True, False, True])))[0]
    torch.testing.assert_close(again[[0, 2]], whole[[0, 2], :5])
    assert not torch.allclose(again[1], whole[1, :5])
    assert select_state(state, torch.tensor([2, 0])).shape == (2, 2, 16)
