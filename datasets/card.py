"""Writes a dataset's card, the README.md that the Hub shows: what is in it, how good, whose, and how to get it.

    (OUT / "README.md").write_text(card(summaries(Path("ROOT")), "me/trajectories", findings=0))

Everything on it comes from the indices: numbers of tasks, trajectories and transitions, returns beside the
reference scores of `tasks.csv`, and who made each task. The YAML at its top points the Hub's viewer at the
indices, so that it shows one row per trajectory.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lram.datasets.index import find_tasks, read_index
from lram.datasets.specs import DOMAINS, reference

IMAGE = "returns.png"
"""Name of the card's plot, beside it."""

LICENCES = {
    "atari": "DQN-Replay (Agarwal et al. 2020): the terms of the DQN Replay Dataset",
    "composuite": "Composuite's offline data (Hussing et al. 2023): the terms of its publication",
    "darkroom": "made by this project: MIT",
    "dmcontrol": "made by this project with the DeepMind Control Suite: MIT",
    "metaworld": "Meta-World (Yu et al. 2020); recordings of LRAM's authors: the terms of their publication",
    "mimicgen": "MimicGen (Mandlekar et al. 2023): **for research use, not commercial**",
    "procgen": "Procgen (Cobbe et al. 2020); recordings of RA-DT's authors: the terms of their publication",
}
"""Whose data a domain holds; a provenance that names a converter or collector says which of it was used."""


@dataclass(frozen=True)
class Summary:
    """What a card says of one task.

    Attributes:
        domain: Its domain.
        task: Its name.
        trajectories: Number of trajectories.
        transitions: Number of their transitions.
        size: Bytes of their files.
        returns: Lowest, mean and highest return.
        normalised: Mean return between the reference scores, None where there are none.
        success: Share of trajectories that solved their task, None where it is not known.
        maker: Converter or collector, and its version of the source.
        left_out: Rows of the source that are in no trajectory.
    """

    domain: str
    task: str
    trajectories: int
    transitions: int
    size: int
    returns: tuple[float, float, float]
    normalised: float | None
    success: float | None
    maker: str
    left_out: int


def summaries(root: Path) -> list[Summary]:
    """Reads the summary of every task that holds a trajectory, in order of tasks."""
    rows = []
    for folder in find_tasks(root):
        index = read_index(folder, columns=["length", "return", "size", "success"])
        if not index.table.num_rows:
            continue
        returns, known = index.numpy("return"), index.table["success"].drop_null()
        scores = reference(folder.parent.name, folder.name)
        normalised = None
        if scores is not None and scores.score_low is not None and scores.score_high is not None:
            normalised = float((returns.mean() - scores.score_low) / (scores.score_high - scores.score_low))
        provenance = index.meta["provenance"]
        rows.append(
            Summary(
                domain=folder.parent.name,
                task=folder.name,
                trajectories=index.table.num_rows,
                transitions=int(index.numpy("length").sum()),
                size=int(index.numpy("size").sum()),
                returns=(float(returns.min()), float(returns.mean()), float(returns.max())),
                normalised=normalised,
                success=float(known.to_numpy(zero_copy_only=False).mean()) if len(known) else None,
                maker=str(provenance.get("converter") or provenance.get("collector") or "not said"),
                left_out=sum(index.meta.get("account", {}).get("dropped", {}).values()),
            )
        )
    return rows


def card(tasks: list[Summary], repo: str, findings: int, tag: str | None = None) -> str:
    """Makes the dataset card.

    Args:
        tasks: What `summaries` gives.
        repo: The repository, "owner/name", or a directory's name: it stands in the commands.
        findings: Number of findings of `lram check`.
        tag: The version that the card belongs to.
    """
    domains = [name for name in DOMAINS if any(task.domain == name for task in tasks)]
    total = sum(task.transitions for task in tasks)
    first = f"{tasks[0].domain}/{tasks[0].task}"
    parts = [
        _yaml(domains, total),
        f"# {repo.split('/')[-1]}\n",
        f"{len(tasks)} tasks, {sum(task.trajectories for task in tasks):,} trajectories, {total:,} transitions"
        f"{f', version {tag}' if tag else ''}: offline-RL trajectories for Large Recurrent Action Models "
        "([arXiv 2410.22391](https://arxiv.org/abs/2410.22391)). One HDF5 file per episode, readable with plain "
        "`h5py`, in uncompressed tar shards; `index.parquet` says for each one its shard, its first byte in it, "
        "its return, length, seed and SHA-256.\n",
        "## What is in it\n",
        _table(_domain_rows(domains, tasks)),
        f"`lram check` opened every file: {findings} findings. Returns are raw; *normalised* is the mean return "
        "between the reference scores of `tasks.csv`, over the tasks that have them.\n",
        f"![Mean normalised return of every task, by domain]({IMAGE})\n",
        "## Get it\n",
        _commands(repo, first, domains[0], tag),
        "## Licences\n",
        "\n".join(f"* {name}: {LICENCES[name]}." for name in domains) + "\n",
        "## Tasks\n",
        _table(_task_rows(tasks)),
        "*Left out* counts rows of a source that are in no trajectory (padding, unfinished episodes, stale tails); "
        "`dataset.json` gives the reasons, hashes of the source files, and the settings of each maker.\n",
    ]
    return "\n".join(parts)


def _yaml(domains: list[str], transitions: int) -> str:
    sizes = ((10**6, "n<1M"), (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
    size = next((name for limit, name in sizes if transitions < limit), "n>1B")
    lines = ["---", "license: other", "task_categories:", "- reinforcement-learning", "- robotics"]
    lines += ["tags:", "- offline-rl", "- trajectories", "- lram", "size_categories:", f"- {size}", "configs:"]
    lines += ["- config_name: all", "  default: true", '  data_files: "*/*/index.parquet"']
    for name in domains:
        lines += [f"- config_name: {name}", f'  data_files: "{name}/*/index.parquet"']
    return "\n".join([*lines, "---", ""])


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.2f} ({len(known)})" if known else "–"


def _domain_rows(domains: list[str], tasks: list[Summary]) -> list[list[str]]:
    rows = [["domain", "tasks", "trajectories", "transitions", "GB", "normalised (tasks)", "success (tasks)"]]
    for name in domains:
        some = [task for task in tasks if task.domain == name]
        rows.append(
            [
                name,
                str(len(some)),
                f"{sum(task.trajectories for task in some):,}",
                f"{sum(task.transitions for task in some):,}",
                f"{sum(task.size for task in some) / 1e9:.2f}",
                _mean(task.normalised for task in some),
                _mean(task.success for task in some),
            ]
        )
    return rows


def _task_rows(tasks: list[Summary]) -> list[list[str]]:
    rows = [["task", "trajectories", "transitions", "return: lowest", "mean", "highest", "left out", "made by"]]
    for task in tasks:
        numbers = [f"{value:,.1f}" for value in task.returns]
        counts = [f"{task.trajectories:,}", f"{task.transitions:,}"]
        rows.append([f"{task.domain}/{task.task}", *counts, *numbers, f"{task.left_out:,}", task.maker])
    return rows


def _commands(repo: str, task: str, domain: str, tag: str | None) -> str:
    version = f" --revision {tag}" if tag else ""
    fetch = f"hf download {repo} --repo-type dataset{version} --local-dir data"
    return f"""```bash
{fetch} --include "{task}/*"   # one task
{fetch} --include "{domain}/*"   # a domain
{fetch}   # all of it
lram download {repo} {task} --to data{version}   # the same, every shard's SHA-256 compared
lram train data   # the shards are trained from as they lie
tar xf data/{task}/shard-00000.tar   # or plain HDF5 files
```

Older clients say `huggingface-cli download` in place of `hf download`.

```python
import h5py

with h5py.File("000/000000000.hdf5") as file:
    print(dict(file.attrs), file["states"].shape, file["actions"][:5], file["rewards"][:].sum())
```
"""


def plot(tasks: list[Summary]) -> bytes:
    """Draws the mean normalised return of every task, by domain; a raw mean return where there are no scores.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    domains = [name for name in DOMAINS if any(task.domain == name for task in tasks)]
    figure = Figure(figsize=(8, 0.6 + 0.5 * len(domains)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(domains):
        some = [task for task in tasks if task.domain == name]
        values = [task.normalised for task in some if task.normalised is not None]
        if not values:  # no reference scores: between the worst and the best trajectory instead
            values = [_inside(task.returns) for task in some]
        axes.plot(values, [row] * len(values), "|", color="#0b6e99", markersize=14, alpha=0.7)
        axes.plot([float(np.mean(values))], [row], "o", color="#d9730d", markersize=5)
    axes.set_yticks(range(len(domains)), domains)
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.axvline(0, color="#bbbbbb", linewidth=0.8)
    axes.axvline(1, color="#bbbbbb", linewidth=0.8)
    axes.set_xlabel("mean return of a task (bars) and of its domain (dots), normalised")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    # No version in the file: the same data gives the same bytes.
    figure.savefig(buffer, dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _inside(returns: tuple[float, float, float]) -> float:
    low, mean, high = returns
    return (mean - low) / (high - low) if high > low else 1.0
