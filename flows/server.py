"""A Prefect server for one command, where none is configured; it ends with the command, even one that is killed.

    ensure_prefect_server()
    some_flow()

With PREFECT_API_URL set (or a Prefect profile that names a server) nothing is started, and the flows show up
there. Prefect's own temporary server would outlive a SIGKILL of the command; this one watches a pipe instead.
It keeps its runs in Prefect's usual database on this machine and has no pages: `prefect server start` has.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack

START_SECONDS = 120
"""Longest wait for the server: the first start on a machine makes its database."""

# Entered for the rest of the process: Prefect sends its last logs and events while it exits.
_settings = ExitStack()


def ensure_prefect_server() -> None:
    """Provides a Prefect API to this process: the configured one, or one of our own until the process ends.

    Raises:
        RuntimeError: Our own server did not come up.
    """
    from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

    if get_current_settings().api.url:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "lram.flows.server", str(port)],
        stdin=subprocess.PIPE,
        env={**os.environ, "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
    )
    _wait(process, f"http://127.0.0.1:{port}/api/health")
    _settings.enter_context(temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}))


def _wait(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise RuntimeError("the temporary Prefect server did not start; start one with `prefect server start`")


def _end_with_parent() -> None:
    # The pipe closes when the parent ends, however it ends.
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serves Prefect's API on the port given until standard input closes."""
    import uvicorn

    threading.Thread(target=_end_with_parent, daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="error",
        lifespan="on",
    )


if __name__ == "__main__":
    main()
