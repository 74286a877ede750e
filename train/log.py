"""What a run says of itself: OUT/log.jsonl, TensorBoard, Weights & Biases when asked, and the time it takes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lram.datasets.specs import BadInput
from lram.datasets.windows import Batch
from lram.train.settings import TrainSettings, plain

Report = Callable[[dict[str, Any]], None]
"""Takes a line of the log."""
Item = TypeVar("Item")


class Log:
    """Writes every line to OUT/log.jsonl and TensorBoard, and hands it to the caller."""

    def __init__(self, settings: TrainSettings, update: int, report: Report) -> None:
        """Opens the logs at an update; lines after it, which will be written again, are dropped.

        Raises:
            BadInput: OUT cannot be written to, or holds another log.
        """
        from torch.utils.tensorboard import SummaryWriter

        out = settings.out
        path = out / "log.jsonl"
        try:
            out.mkdir(parents=True, exist_ok=True)
            old = path.read_text().splitlines() if path.exists() else []
            kept = [line for line in old if line.endswith("}") and json.loads(line)["update"] <= update]
            path.write_text("".join(f"{line}\n" for line in kept))
            self._file = path.open("a")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: cannot be continued as a log of JSON lines ({error})") from error
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=update + 1)
        self._wandb = _wandb(settings) if settings.wandb else None
        self._report = report

    def write(self, line: dict[str, Any]) -> None:
        """Writes one line; `update` is its place."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        values = {key: value for key, value in line.items() if key not in ("update", "updates")}
        for key, value in values.items():
            self._board.add_scalar(key, value, line["update"])
        if self._wandb:
            self._wandb.log(values, step=line["update"])
        self._report(line)

    def close(self) -> None:
        """Ends the logs."""
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def _wandb(settings: TrainSettings) -> Any:
    """Begins a run on Weights & Biases, or continues the one that this folder began.

    Raises:
        BadInput: It does not let us, as when nobody has logged in.
    """
    import wandb

    path = settings.out / "wandb-run.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    where = {"project": settings.wandb, "id": path.read_text(), "dir": str(settings.out)}
    try:
        return wandb.init(**where, resume="allow", config=plain(settings))
    except wandb.Error as error:
        raise BadInput(f"--wandb {settings.wandb}: {str(error).splitlines()[0]}") from error


def keep(batches: list[Batch], out: Path, rank: int) -> Path:
    """Saves the batches of an update that went wrong."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"bad-batch-rank{rank}.npz"
    arrays = {f"{batch.domain.name}/{k}": v for batch in batches for k, v in vars(batch).items() if k != "domain"}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


class Clock:
    """Seconds since the start, and how many of them went by waiting for windows."""

    def __init__(self) -> None:
        self.began, self.waited = time.monotonic(), 0.0

    def waiting(self, reading: Iterator[Item]) -> Iterator[Item]:
        """Passes items on, counting the time until each is there."""
        asked = time.monotonic()
        for item in reading:
            self.waited += time.monotonic() - asked
            yield item
            asked = time.monotonic()

    def line(self, windows: int) -> dict[str, float]:
        """Returns what the log says of `windows` windows trained on so far."""
        seconds = time.monotonic() - self.began
        return {
            "seconds": seconds,
            "windows_per_second": windows / seconds,
            "waiting_for_data": self.waited / seconds,
        }
