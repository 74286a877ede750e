"""What an evaluation leaves on disk: a line per episode as it comes, a table, and trajectories where asked.

    lines = Lines(folder / "episodes.jsonl", key)
    lines.write(result)
    results = read_results(folder, key)

Every line is under a key of what it depends on, so one file serves many evaluations and none reads another's lines.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lram.datasets.specs import BadInput
from lram.datasets.trajectory import Trajectory, write_whole
from lram.datasets.writer import TaskWriter
from lram.train.scores import normalised, score

EPISODES, RESULT, TABLE, PAGE = "episodes.jsonl", "evaluation.json", "episodes.parquet", "evaluation.html"
CURVES, WATCH = "in_context.json", "evaluation/watch"


def label_of(policy: dict[str, Any]) -> str:
    """Names a policy by its settings: `xlstm 16M`, `xlstm [7:1] 16M`."""
    kind = " [7:1]" if policy.get("slstm") else ""
    return f"{policy['backbone']}{kind} {policy['size']}"


def read_results(folder: Path, key: str) -> list[dict[str, Any]]:
    """Reads the results of one evaluation from all files of a folder; a line that a kill has cut is left out."""
    results = []
    for path in sorted(folder.glob("episodes*.jsonl")):
        for line in path.read_text().splitlines():
            if line.startswith(f'{{"key": "{key}"') and line.endswith("}"):
                results.append({name: value for name, value in json.loads(line).items() if name != "key"})
    return results


class Lines:
    """Appends results to a file, each whole."""

    def __init__(self, path: Path, key: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file, self._key = path.open("ab"), key
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")  # ends what a kill has cut, which no reader takes

    def write(self, result: dict[str, Any]) -> None:
        """Writes one line."""
        self._file.write(json.dumps({"key": self._key, **result}).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


class Recording:
    """The writers of the tasks that are recorded.

    Attributes:
        writers: By "<domain>/<task>".
    """

    def __init__(self, root: Path, names: Iterable[str], episodes: int, provenance: dict[str, Any]) -> None:
        """Opens the tasks of a dataset.

        Args:
            root: Its directory.
            names: The tasks.
            episodes: What each of them has when it is complete.
            provenance: Who plays, and how.

        Raises:
            BadInput: A task there was made otherwise, or is being written.
        """
        self._episodes = episodes
        self.writers: dict[str, TaskWriter] = {}
        try:
            for name in names:
                domain, _, task = name.partition("/")
                self.writers[name] = TaskWriter(root, domain, task, provenance)
        except BaseException:
            self.close()
            raise

    def add(self, trajectory: Trajectory) -> None:
        """Writes an episode."""
        self.writers[f"{trajectory.domain}/{trajectory.task}"].add(trajectory)

    def close(self) -> None:
        """Marks the tasks that have all their episodes as complete, and ends."""
        for writer in self.writers.values():
            if all(episode in writer for episode in range(self._episodes)):
                writer.finish()
            writer.close()


def write_table(episodes: list[dict[str, Any]], path: Path) -> None:
    """Writes the episodes that ended as Parquet, one row each."""
    ended = [episode for episode in episodes if "failed" not in episode]
    rows = [
        {
            "domain": episode["task"].split("/")[0],
            **{name: value for name, value in episode.items() if name != "score"},
            "score": score(episode),
            "normalised": normalised(episode),
        }
        for episode in ended
    ]
    kinds = {"domain": pa.string(), "task": pa.string(), "episode": pa.int64(), "target": pa.float64()}
    kinds |= {"return": pa.float64(), "length": pa.int64(), "terminated": pa.bool_(), "truncated": pa.bool_()}
    kinds |= {"success": pa.bool_(), "score": pa.float64(), "normalised": pa.float64()}
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(list(kinds.items()))), buffer, compression="zstd")
    write_whole(path, buffer.getvalue())


def other_results(path: Path, name: str = RESULT) -> dict[str, Any] | None:
    """Reads the results in a run's folder, or in the folder they are in; None where there are none."""
    for folder in (path, path / "evaluation"):
        try:
            found: dict[str, Any] = json.loads((folder / name).read_text())
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise BadInput(f"{folder / name}: not results of an evaluation ({error})") from error
        return found
    return None
