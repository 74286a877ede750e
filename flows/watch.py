"""Draws an episode that a policy plays, as a GIF or an mp4.

lram watch RUN dmcontrol/cartpole-swingup
watch_policy(WatchSettings(Path("RUN"), "atari/breakout"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from lram.train.watch import WatchSettings, watch


@flow(name="watch")
def watch_policy(settings: WatchSettings) -> tuple[Path, dict[str, Any]]:
    """Plays the episode and draws it.

    Returns:
        The file, and the episode's result.
    """
    return watch(settings)


def main(settings: WatchSettings) -> int:
    """Runs the flow, prints the result and the file."""
    path, result = watch_policy(settings)
    success = "" if result["success"] is None else f", {'' if result['success'] else 'no '}success"
    print(f"return {result['return']:.1f} of {result['target']:.1f} asked for, {result['length']} steps{success}")
    print(path)
    return 0
