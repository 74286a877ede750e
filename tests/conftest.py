"""Small real datasets, and a real Prefect server, that several tests share."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from lram.collectors.specialists import DarkRoomSettings, tasks_of, train_goal
from lram.datasets.trajectory import Trajectory
from lram.datasets.writer import TaskWriter

torch.set_num_threads(1)
# Speed is measured in `lram bench`, never asserted in a test.
settings.register_profile("lram", deadline=None)
settings.load_profile("lram")

Make = Callable[..., Trajectory]


@pytest.fixture(scope="session")
def make() -> Make:
    """Makes trajectories of any domain with random content, seeded by the episode."""

    def make(domain: str = "darkroom", episode: int = 0, length: int = 20, task: str = "task", **fields) -> Trajectory:
        rng = np.random.default_rng([episode, length])
        layout = None
        if domain in ("atari", "procgen"):
            # Smooth frames: noise would not compress.
            ramp = rng.integers(0, 4, (length, 1, 1, 1)) * np.arange(64, dtype=np.uint8)
            states = np.broadcast_to(ramp, (length, 1, 64, 64)).astype(np.uint8)
            actions = rng.integers(0, 15, length)
        elif domain == "darkroom":
            states = rng.integers(0, 5, (length, 2)).astype(np.float32)
            actions = rng.integers(0, 5, length)
        else:
            width = {"composuite": 93, "dmcontrol": 5, "metaworld": 39}[domain]
            states = rng.standard_normal((length, width), np.float32)
            actions = rng.uniform(-1, 1, (length, 4)).astype(np.float32)
            if domain == "dmcontrol":
                layout = {"position": [0, 3], "velocity": [3, 5]}
        given = {
            "states": states,
            "actions": actions,
            "rewards": rng.integers(0, 2, length).astype(np.float32),
            "seed": episode,
            "terminated": False,
            "truncated": True,
            "source": "test",
            "final_state": states[-1],
            "state_layout": layout,
        }
        return Trajectory(domain=domain, task=task, episode=episode, **(given | fields))

    return make


@pytest.fixture
def write(make: Make) -> Callable[..., Path]:
    """Writes a task of `count` trajectories and returns its folder."""

    def write(root: Path, domain: str = "darkroom", task: str = "task", count: int = 12, **fields) -> Path:
        with TaskWriter(root, domain, task, {"maker": "test"}) as writer:
            for episode in range(count):
                writer.add(make(domain, episode, task=task, **fields))
            writer.finish()
        return root / domain / task

    return write


@pytest.fixture(scope="session")
def in_pieces() -> Callable[..., tuple[torch.Tensor, Any]]:
    """Runs a backbone's `step` over pieces of a sequence, whose lengths are `cuts` in turn."""

    def run(model, x, cuts, state=None):
        outputs, start = [], 0
        while start < x.shape[1]:
            size = cuts[len(outputs) % len(cuts)]
            y, state = model.step(x[:, start : start + size], state)
            outputs.append(y)
            start += size
        return torch.cat(outputs, 1), state

    return run


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Dark-Room dataset: specialists of the seven training goals of 3x3, 200 episodes each."""
    root = tmp_path_factory.mktemp("rooms")
    settings = DarkRoomSettings(size=3, horizon=6, steps=1200, learning_rate=1e-2)
    for task in tasks_of(settings, "training"):
        train_goal(settings, task, root)
    return root


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[str]:
    """A Prefect server of its own, as a user who runs one has."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "0"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "Prefect's server does not answer"
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait()


@pytest.fixture
def lram(server):
    """Runs `lram …` and returns the finished process."""

    def run(*words: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        environment = {**(environment or os.environ), "PREFECT_API_URL": server, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "lram.flows.cli", *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """Runs a page in Chromium, then `script`, and returns the document and what the console said."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=3000"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1600"]

    def open_page(path: Path, script: str = "") -> tuple[str, list[str]]:
        probe = path.with_name("probe.html")
        probe.write_text(path.read_text().replace("</body>", f"<script>{{ {script} }}</script></body>"))
        command = [chromium, *flags, "--dump-dom", f"file://{probe}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_page


class Hub:
    """A Hub on this machine, in a process of its own (tests/hub_server.py)."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        home = str(folder / "home")
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_TOKEN": "hf_test",
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

    def _ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/-/{path}", data), timeout=10) as answer:
            return json.load(answer)

    def log(self, pattern: str = "") -> list[dict[str, Any]]:
        """Returns the requests whose "METHOD path" matches, oldest first."""
        return [e for e in self._ask("log") if re.search(pattern, f"{e['method']} {e['path']}")]

    def clear(self) -> None:
        """Forgets the log and the faults."""
        self._ask("clear", {})
        self._ask("faults", [])

    def fail(self, match: str, status: int, times: int = 1, **more: Any) -> None:
        """Makes the next requests that match fail; `retry_after` in seconds, `cut` breaks the answer in half."""
        self._ask("faults", [{"match": match, "status": status, "times": times, **more}])


@pytest.fixture
def hub(tmp_path_factory) -> Iterator[Hub]:
    """A Hub of its own, empty."""
    folder = tmp_path_factory.mktemp("hub")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parent / "hub_server.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder / "store"), str(port)], stderr=subprocess.DEVNULL
    )
    hub = Hub(f"http://127.0.0.1:{port}", folder)
    for _ in range(100):
        try:
            hub.log()
            break
        except OSError:
            assert process.poll() is None
            time.sleep(0.05)
    yield hub
    process.kill()
    process.wait()
