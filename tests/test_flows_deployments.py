"""`prefect.yaml` as written, on a real server with a real worker: a schedule fires, and one flow starts the next."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from lram.datasets.index import find_tasks, fingerprint
from lram.flows.events import VERSION_DIGITS

ROOT = Path(__file__).parents[1]
PREFECT = [sys.executable, "-m", "prefect"]


class Server:
    """A Prefect server, a process work pool, and one worker."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api"
        self.environment = {
            **os.environ,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "0",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
            "OMP_NUM_THREADS": "1",
        }
        self.processes = [self.start("server", "start", "--port", str(port), log=folder / "server.log")]
        self.wait(lambda: self.ask("health", method="GET") is True, 60)

    def start(self, *words: str, log: Path) -> subprocess.Popen:
        out = open(log, "w")  # noqa: SIM115 (as long as the process)
        return subprocess.Popen([*PREFECT, *words], env=self.environment, cwd=ROOT, stdout=out, stderr=out)

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [*PREFECT, *words], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"{self.url}/{path}", data, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            if error.code == 503:  # sqlite is busy
                time.sleep(0.5)
                return self.ask(path, body, method)
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from error
        except urllib.error.URLError:
            return None  # not up yet

    def wait(self, done: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert all(process.poll() is None for process in self.processes)
            assert time.monotonic() < deadline, self.states()
            time.sleep(0.3)

    def states(self) -> dict[str, set[str]]:
        """Returns the states of the runs of every flow."""
        flows = {flow["id"]: flow["name"] for flow in self.ask("flows/filter")}
        states: dict[str, set[str]] = {}
        for run in self.ask("flow_runs/filter"):
            states.setdefault(flows[run["flow_id"]], set()).add(run["state_type"])
        return states

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # a worker waits for its runs
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployments")
    server = Server(folder)
    try:
        server.run("work-pool", "create", "default", "--type", "process")
        # As written, but for the length of the training that a publish starts.
        written = yaml.safe_load((ROOT / "prefect.yaml").read_text())
        (train,) = (d for d in written["deployments"] if d["name"] == "on-publish")
        for parameters in (train["parameters"], train["triggers"][0]["parameters"]):
            parameters["settings"] |= {"updates": 3, "per_domain": 4, "gap": 10}
        file = folder / "prefect.yaml"
        file.write_text(yaml.safe_dump(written))
        server.run("--no-prompt", "deploy", "--all", "--prefect-file", str(file))
        worker = server.start("worker", "start", "--pool", "default", log=folder / "worker.log")
        server.processes.append(worker)
        yield server
    finally:
        server.stop()


def test_every_deployment_is_registered_with_what_operators_read(running):
    written = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    known = {(d["name"], d["entrypoint"]): d for d in running.ask("deployments/filter")}
    assert len(known) == len(written) >= 15
    for deployment in written:
        there = known[deployment["name"], deployment["entrypoint"]]
        assert there["description"] and there["tags"] and there["parameters"]
    assert {d["name"] for d in known.values() if d["schedules"]} == {"nightly", "weekly"}
    files = {d["entrypoint"].split(":")[0].removeprefix("flows/") for d in written}
    flows = {path.name for path in (ROOT / "flows").glob("*.py") if "\n@flow(" in path.read_text()}
    # Every flow can be deployed, but those that somebody looks at: measurements, and a policy's films.
    assert flows - files == {"bench.py", "watch.py"}


def test_a_schedule_fires_and_what_follows_follows(running, tmp_path):
    root = tmp_path / "rooms"
    (nightly,) = (
        d for d in running.ask("deployments/filter") if d["entrypoint"] == "flows/collect.py:collect_darkroom"
    )
    # Every half minute, until the first run of it: the server looks for due schedules at its own pace.
    soon = (datetime.now(UTC) + timedelta(seconds=5)).isoformat()
    specialist = {"size": 3, "horizon": 6, "steps": 300}
    settings = {"root": str(root), "goals": "training", "at_most": 2, "workers": 1, "specialist": specialist}
    schedule = {
        "schedule": {"interval": 30, "anchor_date": soon},
        "active": True,
        "parameters": {"settings": settings},
    }
    (made,) = running.ask(f"deployments/{nightly['id']}/schedules", [schedule])
    begun = {"PENDING", "RUNNING", "COMPLETED"}
    running.wait(lambda: running.states().get("collect-darkroom", set()) & begun, 120)
    running.ask(f"deployments/{nightly['id']}/schedules/{made['id']}", method="DELETE")
    running.wait(lambda: "COMPLETED" in running.states().get("train", ()), 400)
    runs = running.ask("flow_runs/filter")
    assert any(run["auto_scheduled"] and run["state_type"] == "COMPLETED" for run in runs)
    assert len(list((root / "darkroom").iterdir())) >= 2  # a night's share
    published = Path(f"{root}-published")
    assert len(list(published.glob("darkroom/*/shard-00000.tar"))) >= 2

    def trained() -> bool:
        version = fingerprint(find_tasks(published))[:VERSION_DIGITS]
        return (Path(f"{root}-policy") / version / "update-000000003").is_dir()

    # The server may have planned a second night just before its schedule went: that is published and trained on, too.
    running.wait(trained, 200)
