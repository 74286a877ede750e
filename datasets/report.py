"""Writes the quality report of a dataset: one HTML page that opens offline, and the same content as JSON.

    folders = find_tasks(ROOT)
    checks = [check_task(folder) for folder in folders]
    statistics = [task_statistics(folder, check.duplicates) for folder, check in zip(folders, checks)]
    write_report(ROOT, checks, statistics, OUT)  # OUT/report.html, OUT/report.json

Everything is computed here or in `lram.datasets.statistics`; the page (report.html, filled by `lram.datasets.page`)
only draws the JSON that stands inside it, so the same dataset gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lram.datasets.check import TaskCheck
from lram.datasets.index import fingerprint
from lram.datasets.page import fill_page
from lram.datasets.specs import DOMAINS, BadInput, tasks
from lram.datasets.trajectory import write_whole

FORMAT = "lram-report"
VERSION = 1
PAGE, JSON = "report.html", "report.json"
GRID = np.linspace(0, 1, 41)
"""Where learning curves of different lengths are averaged: share of a task's episodes."""
MARKDOWN_FINDINGS = 20
"""Findings that the markdown lists by name; the page lists all."""


def write_report(root: Path, checks: list[TaskCheck], statistics: list[dict[str, Any]], out: Path) -> Path:
    """Writes OUT/report.html and OUT/report.json.

    Args:
        root: The dataset's directory; only its name is shown.
        checks: Result of `check_task` per task; tasks without one are shown as not checked.
        statistics: Result of `task_statistics` per task.
        out: Folder to write to, made when missing.

    Returns:
        Path of the page.
    """
    report = summarise(root, checks, statistics)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)
    write_whole(out / JSON, (text + "\n").encode())
    return fill_page(resources.files("lram.datasets").joinpath(PAGE), report, out / PAGE)


def summarise(root: Path, checks: list[TaskCheck], statistics: list[dict[str, Any]]) -> dict[str, Any]:
    """Makes the report's content: totals, failures, a row per domain, and the statistics as they were given."""
    failures = _failures(checks, statistics)
    domains = _domains(statistics, failures)
    totals: dict[str, Any] = {
        key: sum(domain[key] for domain in domains) for key in ("trajectories", "transitions", "bytes")
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": Path(root).resolve().name,
        "fingerprint": _fingerprint(root, statistics),
        "totals": {
            "tasks": sum(statistic["trajectories"] > 0 for statistic in statistics),
            **totals,
            "failures": len(failures),
            "planned": sum(task.split == "train" for task in tasks().values()),
            "covered": sum(domain["train"] for domain in domains if domain["planned"]),
            "checked_tasks": len(checks),
            "checked_trajectories": sum(check.trajectories for check in checks),
            "checked_transitions": sum(check.transitions for check in checks),
            "duplicates": sum(check.duplicates for check in checks),
        },
        "failures": failures,
        "domains": domains,
        "checks": [dataclasses.asdict(check) for check in checks],
        "statistics": statistics,
    }


def _fingerprint(root: Path, statistics: list[dict[str, Any]]) -> str | None:
    """Says which data the report is of; None where an index is missing or damaged."""
    try:
        return fingerprint([Path(root) / statistic["task"] for statistic in statistics])
    except BadInput:
        return None


def _failures(checks: list[TaskCheck], statistics: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Lists what the checks found, then what the statistics could not read in tasks without a finding."""
    found = [
        {"task": finding.task, "path": finding.path, "problem": finding.problem}
        for check in checks
        for finding in check.findings
    ]
    named = {failure["task"] for failure in found}
    for statistic in statistics:
        if statistic["error"] and statistic["task"] not in named:
            task = statistic["task"]
            found.append({"task": task, "path": task, "problem": f"no full statistics: {statistic['error']}"})
    return found


def _domains(statistics: list[dict[str, Any]], failures: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Makes a row for each domain that has tasks in the list of 432, or data."""
    planned: dict[str, int] = defaultdict(int)
    held_out: dict[str, int] = defaultdict(int)
    for task in tasks().values():
        (planned if task.split == "train" else held_out)[task.domain] += 1
    rows = []
    for name, spec in DOMAINS.items():
        members = [statistic for statistic in statistics if statistic["domain"] == name]
        filled = [statistic for statistic in members if statistic["trajectories"]]
        if not planned[name] and not members:
            continue
        # A variant ("TASK.medium") covers the task it varies, once.
        splits = list({statistic["task"].split(".")[0]: statistic["split"] for statistic in filled}.values())
        scores = _known((statistic.get("scores") or {}).get("normalised_mean") for statistic in filled)
        smooth = _known((statistic.get("actions") or {}).get("mse_mean") for statistic in filled)
        rows.append(
            {
                "domain": name,
                "state": spec.state,
                "action": spec.action,
                "tasks": len(filled),
                "planned": planned[name] or None,
                "train": splits.count("train") if planned[name] else 0,
                "held_out_planned": held_out[name] or None,
                "held_out": splits.count("holdout"),
                "trajectories": sum(statistic["trajectories"] for statistic in filled),
                "transitions": sum(statistic["transitions"] for statistic in filled),
                "bytes": sum(statistic["bytes"] for statistic in filled),
                "failures": sum(failure["task"].startswith(f"{name}/") for failure in failures),
                "normalised_mean": _mean(scores),
                "normalised_tasks": len(scores),
                "action_mse": _mean(smooth),
                "curve": _domain_curve(filled),
            }
        )
    return rows


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: list[float]) -> float | None:
    return float(f"{np.mean(values):.8g}") if values else None


def _domain_curve(statistics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Averages a domain's learning curves: of normalised scores where there are references, else of returns."""
    scales: dict[str, tuple[float, float]] = {}
    for statistic in statistics:
        scores = statistic.get("scores") or {}
        low, high = scores.get("low"), scores.get("high")
        if scores.get("reference") == "success" or low is None or high is None or low == high:
            continue
        scales[statistic["name"]] = low, high
    unit = "normalised score" if scales else "return"
    if not scales:
        scales = {statistic["name"]: (0.0, 1.0) for statistic in statistics}
    curves = []
    for statistic in statistics:
        curve = statistic["learning_curve"]
        if statistic["name"] not in scales or None in curve["mean"]:
            continue
        low, high = scales[statistic["name"]]
        episodes = np.array(curve["episode"])
        share = (episodes - episodes[0]) / max(episodes[-1] - episodes[0], 1)
        curves.append((np.interp(GRID, share, curve["mean"]) - low) / (high - low))
    if not curves:
        return None
    mean = [float(f"{value:.6g}") for value in np.mean(curves, axis=0)]
    return {
        "unit": unit,
        "scales": {name: [*scale] for name, scale in scales.items()},
        "share": [round(float(x), 4) for x in GRID],
        "mean": mean,
    }


def markdown(root: Path, checks: list[TaskCheck], statistics: list[dict[str, Any]]) -> str:
    """Returns a short report for a Prefect artifact: failures first, then totals and a row per domain."""
    report = summarise(root, checks, statistics)
    totals, failures = report["totals"], report["failures"]
    lines = [f"# Dataset {_text(report['name'])}", ""]
    if failures:
        lines += [f"**{len(failures):,} failures**", ""]
        lines += [
            f"- {_text(failure['path'])}: {_text(failure['problem'])}" for failure in failures[:MARKDOWN_FINDINGS]
        ]
        if len(failures) > MARKDOWN_FINDINGS:
            lines.append(f"- … and {len(failures) - MARKDOWN_FINDINGS:,} more, see {PAGE}")
    elif checks:
        lines.append(f"No failures: {totals['checked_trajectories']:,} trajectories of {len(checks):,} tasks checked.")
    else:
        lines.append("**Not checked.**")
    lines += [
        "",
        f"{totals['tasks']:,} tasks ({totals['covered']} of the {totals['planned']}), "
        f"{totals['trajectories']:,} trajectories, {totals['transitions']:,} transitions, "
        f"{totals['bytes'] / 1e6:,.1f} MB.",
        "",
        "| domain | tasks | trajectories | transitions | MB | normalised score | failures |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["domains"]:
        covered = f"{row['train']} of {row['planned']}" if row["planned"] else str(row["tasks"])
        score = "–"
        if row["normalised_mean"] is not None:
            score = f"{row['normalised_mean']:.3f} (n = {row['normalised_tasks']})"
        lines.append(
            f"| {row['domain']} | {covered} | {row['trajectories']:,} | {row['transitions']:,} "
            f"| {row['bytes'] / 1e6:,.1f} | {score} | {row['failures']:,} |"
        )
    return "\n".join(lines) + "\n"


def _text(value: str) -> str:
    """Escapes markdown and HTML, so that a hostile file name stays a name."""
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", " ".join(value.split()))
