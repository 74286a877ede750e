"""The evaluator: how good a policy is, on which tasks, and with what certainty.

    lram evaluate RUN --tasks 'dmcontrol/*' --episodes 20      # rollouts of training tasks
    lram evaluate RUN --protocol holdout                       # tasks it never saw, zero-shot
    lram evaluate RUN --trials 20                              # Dark-Room: in-context learning
    lram evaluate RUN --compare OTHER-RUN ANOTHER-RUN          # beside what was measured of others

Rollouts play many episodes at once (`lram.train.rollouts`); every result is a line of `episodes.jsonl` as it comes,
under a key of the weights and of how is played, so that a killed evaluation goes on where it was, one with more
tasks or episodes adds to it, and another checkpoint's results never mix in. At the end come `evaluation.json`
(everything), `episodes.parquet` and `evaluation.html`. Several processes or machines play shares of the episodes
into files of their own. What could not be played is listed, and tried again next time.
What it trades away: lines of older checkpoints stay in the file until somebody removes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.distributed as dist

from lram.collectors import environments
from lram.datasets.disk import sha256_of
from lram.datasets.specs import DOMAINS, BadInput, reference, tasks
from lram.datasets.trajectory import write_whole
from lram.model.policy import Policy
from lram.train import checkpoint, incontext
from lram.train.incontext import InContextSettings, Progress, playing, results_folder
from lram.train.page import write_page
from lram.train.ranks import Ranks, device_of
from lram.train.results import (
    CURVES,
    EPISODES,
    PAGE,
    RESULT,
    TABLE,
    Lines,
    Recording,
    label_of,
    other_results,
    read_results,
    write_table,
)
from lram.train.rollouts import RolloutSettings, check, play, share
from lram.train.scores import ALL, compare, normalised, summarise
from lram.train.settings import FREE, DeviceName, TrainSettings
from lram.train.simulators import Job, Make

__all__ = ["EvaluateSettings", "evaluate", "playing", "results_folder"]


HOW = ("protocol", "episodes", "target", "temperature", "seed")
"""Settings that the result repeats."""
IN_TRAINING = 5
"""Episodes of each task that are played in the middle of a training."""


@dataclass(frozen=True)
class EvaluateSettings(InContextSettings):
    """Settings of an evaluation."""

    protocol: Literal["auto", "training", "holdout", "all", "in-context"] = "auto"
    """Rollouts of training tasks, of hold-out tasks of the same domains (zero-shot), or of both; or in-context
    learning, which auto takes where the policy was trained on Dark-Room alone and no tasks are named."""
    tasks: tuple[str, ...] = ()
    """Rollouts: tasks, as patterns of <domain>/<task> such as 'dmcontrol/*'; all of the protocol by default."""
    episodes: int = 20
    """Rollouts: episodes of each task."""
    slots: int = 16
    """Rollouts: episodes of a domain played at once."""
    workers: int = 0
    """Rollouts: processes with simulators; 0 takes one per core."""
    timeout: float = 120.0
    """Rollouts: seconds that one call of a simulator may take before its episode is given up."""
    record: Path | None = None
    """Rollouts: dataset directory to record the episodes in as well."""
    compare: tuple[Path, ...] = ()
    """Other runs, or folders of their results, to show beside this one; those that differ in the seed are a group."""
    embedding: bool = False
    """Draw a map of 32 windows of each task, embedded by the policy; reads the dataset it was trained on."""
    device: DeviceName = "auto"
    """Where the policy is; auto takes CUDA when there is one."""
    scheduler: str | None = None
    """Rollouts: address of a Dask scheduler whose workers play shares of the episodes."""


def evaluate(settings: InContextSettings, progress: Progress | None = None, make: Make | None = None) -> dict[str, Any]:
    """Evaluates a policy by the protocol its settings or its training tasks ask for, and writes the results.

    Args:
        settings: The checkpoint and how to play.
        progress: Called after every trial or episode.
        make: Builds environments, those of `lram.collectors.environments` by default.

    Returns:
        The content of `in_context.json` or `evaluation.json`.

    Raises:
        BadInput: There is no usable checkpoint, or a setting does not fit it.
    """
    if not isinstance(settings, EvaluateSettings):
        return incontext.evaluate(settings, progress)
    if protocol(settings) == "in-context":
        result = incontext.evaluate(settings, progress)
        _page(settings, {}, result)
        return result
    jobs = remaining(settings)
    play_share(settings, jobs, progress=progress, make=make)
    return finish(settings)


def protocol(settings: EvaluateSettings) -> str:
    """Returns the protocol that `auto` stands for."""
    if settings.protocol != "auto":
        return settings.protocol
    trained = checkpoint.read_state(checkpoint.best(settings.checkpoint)).dataset["tasks"]
    rooms = all(name.startswith("darkroom/") for name in trained)
    return "in-context" if rooms and not settings.tasks else "training"


# What is played ---------------------------------------------------------------------------------------------------


def rollouts(settings: EvaluateSettings) -> RolloutSettings:
    """Returns how episodes are played.

    Raises:
        BadInput: A number means nothing.
    """
    if settings.episodes < 1:
        raise BadInput(f"--episodes {settings.episodes}: expected at least 1")
    how = settings.workers, settings.temperature, settings.seed, settings.timeout
    check(RolloutSettings(settings.slots, *how))
    # Of all episodes, not of those that are left: rows of the forward pass are the same when it is continued.
    return RolloutSettings(slots_for(all_jobs(settings), settings.slots), *how)


def slots_for(jobs: list[Job], most: int) -> int:
    """Returns how many episodes to play at once, `most` or fewer: beyond the domain that has most, slots would idle."""
    return min(most, max(Counter(job.domain for job in jobs).values()))


def chosen(trained: list[str], which: str, patterns: Iterable[str] = ()) -> list[str]:
    """Chooses the tasks to play.

    Args:
        trained: What the policy was trained on, as "<domain>/<task>".
        which: "training", "holdout" or "all".
        patterns: Shell patterns; a full name may also be of a task that is in neither set.

    Raises:
        BadInput: A pattern fits no task, or there is none.
    """
    domains = {name.split("/")[0] for name in trained}
    holdout = [
        f"{task.domain}/{task.name}" for task in tasks().values() if task.split == "holdout" and task.domain in domains
    ]
    if "darkroom" in domains:
        holdout += [f"darkroom/{name}" for name in incontext.goals_of(trained, "holdout")["holdout"]]
    holdout = [name for name in holdout if name not in trained]
    offered = {"training": sorted(trained), "holdout": sorted(holdout)}
    names = offered["training"] + offered["holdout"] if which == "all" else offered[which]
    found: list[str] = [] if patterns else names
    for pattern in patterns:
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        domain, _, task = pattern.partition("/")
        if not fitting and domain in DOMAINS and task and not set("*?[") & set(task):
            fitting = [pattern]
        if not fitting:
            example = names[0] if names else "none"
            raise BadInput(f"--tasks {pattern!r} fits no task of protocol {which}, whose tasks are like {example}")
        found += [name for name in fitting if name not in found]
    if not found:
        raise BadInput(f"there are no tasks to play for protocol {which} of a policy trained on {', '.join(domains)}")
    return found


def targets(state: checkpoint.State, names: list[str], how: str) -> dict[str, float]:
    """Returns the return to ask for in every task.

    Args:
        state: What the checkpoint knows.
        names: The tasks.
        how: "best" of the task's data, or where it has none as in "table", or where that has none the median of its
            domain's bests; "table": what `tasks.csv` says; or a number.

    Raises:
        BadInput: There is nothing to go by for a task, or `how` is none of these.
    """
    if how not in ("best", "table"):
        try:
            return dict.fromkeys(names, float(how))
        except ValueError:
            raise BadInput(f"--target {how}: expected best, table or a number") from None
    found = {}
    for name in names:
        domain = name.split("/")[0]
        row = reference(*name.split("/", 1))
        bests = [best for other, best in state.target_returns.items() if other.startswith(f"{domain}/")]
        if how == "best" and name in state.target_returns:
            found[name] = state.target_returns[name]
        elif row is not None and row.target_return is not None:
            found[name] = row.target_return
        elif how == "best" and bests:
            found[name] = float(np.median(bests))
        else:
            raise BadInput(f"{name}: neither its data nor the table has a return to ask for; give a number as --target")
    return found


def key_of(settings: EvaluateSettings, folder: Path) -> str:
    """Returns a hash of all that a result depends on besides its task and episode."""
    how = [sha256_of(folder / checkpoint.WEIGHTS), settings.target, settings.temperature, settings.seed]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]


def all_jobs(settings: EvaluateSettings) -> list[Job]:
    """Returns every episode of the evaluation."""
    trained = checkpoint.read_state(checkpoint.best(settings.checkpoint)).dataset["tasks"]
    names = chosen(trained, "training" if settings.protocol == "auto" else settings.protocol, settings.tasks)
    return jobs_of(names, settings.episodes)


def jobs_of(names: Iterable[str], episodes: int) -> list[Job]:
    """Returns the first episodes of tasks given as "<domain>/<task>"."""
    parts = (name.partition("/") for name in names)
    return [Job(domain, task, episode) for domain, _, task in parts for episode in range(episodes)]


def remaining(settings: EvaluateSettings) -> list[Job]:
    """Returns the episodes without a result on disk, or with `record` without a trajectory there."""
    rollouts(settings)
    jobs = all_jobs(settings)
    results = read_results(results_folder(settings), key_of(settings, checkpoint.best(settings.checkpoint)))
    done = {(result["task"], result["episode"]) for result in results if "failed" not in result}
    left = [job for job in jobs if (job.name, job.episode) not in done]
    if settings.record is None:
        return left
    recording, again = _recording(settings, settings.record, jobs), set(left)
    try:
        return [job for job in jobs if job in again or job.episode not in recording.writers[job.name]]
    finally:
        recording.close()


# Playing ----------------------------------------------------------------------------------------------------------


def play_share(
    settings: EvaluateSettings,
    jobs: list[Job],
    name: str = EPISODES,
    progress: Progress | None = None,
    make: Make | None = None,
) -> int:
    """Plays episodes and appends their results to a file of the results' folder: all of them, or a process's share.

    Args:
        settings: The checkpoint and how to play.
        jobs: The episodes.
        name: The file; no two processes may share one.
        progress: Called after every episode.
        make: Builds environments.

    Returns:
        Episodes that could not be played.
    """
    if not jobs:
        return 0
    folder = checkpoint.best(settings.checkpoint)
    policy, state = checkpoint.load_policy(folder, device_of(settings.device))
    asked = targets(state, list(dict.fromkeys(job.name for job in jobs)), settings.target)
    lines = Lines(results_folder(settings) / name, key_of(settings, folder))
    recording = _recording(settings, settings.record, jobs) if settings.record else None
    source = f"lram evaluate, {label_of(state.policy)}, update {state.update}"
    failed = done = 0
    try:
        for result in play(
            policy,
            jobs,
            asked,
            rollouts(settings),
            make or environments.make,
            recording.add if recording else None,
            source,
        ):
            lines.write(result)
            failed, done = failed + ("failed" in result), done + 1
            if progress:
                progress(result["task"], done, len(jobs))
    finally:
        lines.close()
        if recording:
            recording.close()
    return failed


def _recording(settings: EvaluateSettings, root: Path, jobs: list[Job]) -> Recording:
    """Opens the dataset that episodes are recorded in."""
    folder = checkpoint.best(settings.checkpoint)
    state = checkpoint.read_state(folder)
    provenance = {
        "policy": {"update": state.update, **state.policy},
        "evaluation": key_of(settings, folder),
        **{name: getattr(settings, name) for name in HOW if name not in ("protocol", "episodes")},
    }
    return Recording(root, dict.fromkeys(job.name for job in jobs), settings.episodes, provenance)


def play_in_training(
    policy: Policy,
    names: list[str],
    asked: dict[str, float],
    settings: TrainSettings,
    ranks: Ranks,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Plays a few episodes of each task in the middle of a training run, the same ones at every call.

    Args:
        policy: The policy that acts; it is put into evaluation mode and back.
        names: Tasks, as "<domain>/<task>".
        asked: Return to ask for in each.
        settings: Their `seed` is the episodes'.
        ranks: The processes that train together; each plays a share.
        say: Told on rank 0 how many episodes could not be played, and why the first.

    Returns:
        For the log, by domain: `return/<domain>`, and where it is known `score/<domain>` (normalised mean) and
        `success/<domain>`.
    """
    training = policy.training
    policy.eval()
    jobs = jobs_of(names, IN_TRAINING)
    how = RolloutSettings(slots_for(jobs, RolloutSettings.slots), seed=settings.seed)
    played = list(play(policy, share(jobs, (ranks.rank, ranks.of)), asked, how))
    policy.train(training)
    shares = [played] * ranks.of
    if ranks.of > 1:
        dist.all_gather_object(shares, played)
    results = sorted(itertools.chain(*shares), key=lambda result: (result["task"], result["episode"]))
    ended = [result for result in results if "failed" not in result]
    lost = [result for result in results if "failed" in result]
    if lost and ranks.rank == 0:
        say(f"{len(lost)} of {len(results)} episodes could not be played: {lost[0]['task']}: {lost[0]['failed']}")
    line: dict[str, float] = {}
    for domain in dict.fromkeys(result["task"].split("/")[0] for result in ended):
        mine = [result for result in ended if result["task"].startswith(f"{domain}/")]
        found = {
            "return": [result["return"] for result in mine],
            "score": [value for value in map(normalised, mine) if value is not None],
            "success": [result["success"] for result in mine if result["success"] is not None],
        }
        line |= {f"{name}/{domain}": float(np.mean(values)) for name, values in found.items() if values}
    return line


# What is said of them ---------------------------------------------------------------------------------------------


def finish(settings: EvaluateSettings) -> dict[str, Any]:
    """Summarises the results on disk; writes the JSON, the Parquet file and the page.

    Returns:
        The content of `evaluation.json`.

    Raises:
        BadInput: A run to compare with has no results.
    """
    folder = checkpoint.best(settings.checkpoint)
    state = checkpoint.read_state(folder)
    wanted = {(job.name, job.episode) for job in all_jobs(settings)}
    found = read_results(results_folder(settings), key_of(settings, folder))
    results = [result for result in found if (result["task"], result["episode"]) in wanted]
    summary = summarise(results, settings.seed)
    latest = {(result["task"], result["episode"]): result for result in results}
    result = {
        "format": "lram-evaluation",
        "version": 1,
        "checkpoint": folder.name,
        "label": label_of(state.policy),
        "update": state.update,
        "policy": state.policy,
        "train": {name: value for name, value in state.train.items() if name not in FREE},
        "settings": {name: getattr(settings, name) for name in HOW},
        **summary,
        "episodes": [latest[at] for at in sorted(latest)],
    }
    out = results_folder(settings)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / RESULT, json.dumps(result).encode())
    write_table(result["episodes"], out / TABLE)
    _page(settings, result, None)
    return result


def grouped(results: list[tuple[str, dict[str, Any]]]) -> dict[str, list[list[dict[str, Any]]]]:
    """Groups evaluations, given with their runs' names, whose policies differ in the training seed alone."""
    groups: dict[str, tuple[str, list[list[dict[str, Any]]]]] = {}
    for name, result in results:
        same = {key: value for key, value in result["train"].items() if key not in ("seed", "init")}
        identity = json.dumps([result["policy"], same, result["update"]], sort_keys=True)
        label = result["label"]
        if identity not in groups and label in [other for other, _ in groups.values()]:
            label = f"{label} ({name})"
        groups.setdefault(identity, (label, []))[1].append(result["episodes"])
    return dict(groups.values())


def _page(settings: EvaluateSettings, result: dict[str, Any], in_context: dict[str, Any] | None) -> None:
    """Writes the page, with what there is of the other protocol and of the runs to compare with."""
    out = results_folder(settings)
    mine = Path(settings.checkpoint).resolve().name
    played = [(mine, result)] if result else []
    curves = [(mine, in_context or other_results(out, CURVES))]
    for path in settings.compare:
        name, other, curve = path.resolve().name, other_results(path, RESULT), other_results(path, CURVES)
        if other is None and curve is None:
            raise BadInput(f"{path}: no {RESULT} or {CURVES} there; evaluate it first")
        played += [(name, other)] if other else []
        curves += [(name, curve)]
    content = {
        "name": mine,
        "result": result or None,
        "comparison": compare(grouped(played), settings.seed) if len(played) > 1 else [],
        "in_context": [{"name": name, **curve} for name, curve in curves if curve is not None],
        "embedding": None,
        "all": ALL,
    }
    if settings.embedding:
        from lram.train.embedding import embedding

        content["embedding"] = embedding(settings.checkpoint, device_of(settings.device), settings.seed)
    write_page(content, out / PAGE)
