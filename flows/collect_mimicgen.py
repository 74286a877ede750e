"""Collects MimicGen data: a few demonstrations of a task become many, on several arms.

    lram collect mimicgen stack.hdf5 runs/mimicgen --task Stack_D0 --robots IIWA UR5e Sawyer --demos 1000
    collect_mimicgen(CollectMimicgenSettings(Path("stack.hdf5"), Path("runs/mimicgen")))

A Prefect task is one arm; the attempts of all arms run over the same processes. What is on disk is kept, and the
files are the same for any number of processes and however often the run was killed.
MimicGen is for research use only, and so is what it generates: `docs/mimicgen.md` says how to install it.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from lram.collectors.mimicgen import Recipe, generate, prepared, source_task
from lram.datasets.index import write_description
from lram.flows.events import announce
from lram.flows.processes import process_pool
from lram.flows.progress import Step, bar


@dataclass(frozen=True)
class CollectMimicgenSettings:
    """Which demonstrations to multiply, for what, where to."""

    source: Path
    """robomimic file with demonstrations of the task; it is prepared for MimicGen if it is not."""
    root: Path
    """Dataset directory to write to."""
    task: str = ""
    """MimicGen's environment to generate for, Stack_D1 for example; empty takes the demonstrations' own."""
    robots: tuple[str, ...] = ("IIWA", "UR5e", "Sawyer")
    """Arms to generate for: IIWA, Jaco, Kinova3, Panda, Sawyer, UR5e; each becomes a task of the dataset."""
    gripper: str = ""
    """Gripper of all of them: PandaGripper, RethinkGripper, Robotiq85Gripper or Robotiq140Gripper; empty takes what
    each arm has in the published data."""
    demos: int = 1000
    """Successful trajectories to have on disk for each arm; a later run may ask for more."""
    seed: int = 0
    """Seed from which every attempt's own is derived."""
    workers: int = 0
    """Attempts under way at once, each on one core; 0 takes all cores."""


@task(task_run_name="{recipe.name}", cache_policy=NO_CACHE)
def generate_arm(
    recipe: Recipe, settings: CollectMimicgenSettings, pool: ProcessPoolExecutor, step: Step
) -> dict[str, Any]:
    """Generates the trajectories of one arm."""
    done = 0

    def report(episodes: int, attempts: int) -> None:
        nonlocal done
        step(episodes - done, f"{recipe.name}: {episodes} of {attempts} attempts")
        done = episodes

    # As many ahead as there are processes: one arm alone then keeps all of them busy.
    ahead = settings.workers or os.cpu_count() or 1
    result = generate(recipe, settings.demos, settings.root, pool, ahead, report)
    step(max(0, settings.demos - done), "")
    return result


@flow(name="collect-mimicgen", task_runner=ThreadPoolTaskRunner[Any](max_workers=64))  # type: ignore[arg-type]
def collect_mimicgen(settings: CollectMimicgenSettings) -> list[dict[str, Any]]:
    """Generates trajectories for every arm.

    Returns:
        What `generate` says of each arm, in the order of `settings.robots`.
    """
    env = settings.task or source_task(settings.source)
    total = settings.demos * len(settings.robots)
    with (
        prepared(settings.source, env) as source,
        process_pool(settings.workers) as pool,
        bar("collect", total, "successes") as step,
    ):
        recipes = [Recipe(source, env, robot, settings.gripper, settings.seed) for robot in settings.robots]
        futures = [generate_arm.submit(recipe, settings, pool, step) for recipe in recipes]
        for future in as_completed(futures):
            future.result()
        results = [future.result() for future in futures]
    write_description(settings.root)
    announce("collect", settings.root)
    return results


def main(settings: CollectMimicgenSettings) -> int:
    """Runs the flow and says what it made."""
    for result in collect_mimicgen(settings):
        name, made = result["task"], result["made"]
        rate = result["episodes"] / max(1, result["attempts"])
        line = f"{name}: {result['episodes']:,} trajectories of {result['attempts']:,} attempts ({rate:.0%})"
        if made:
            line += f", {made:,} now, {result['seconds'] / made:.1f} core seconds each"
        print(line)
    print(settings.root)
    return 0
