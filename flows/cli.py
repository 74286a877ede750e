"""The `lram` command: each subcommand is one flow with its settings.

    lram quickstart
    lram train --help

A command's module is imported when it is called, so that `lram --help` answers at once. What is wrong with the
input is one sentence on standard error and exit status 1.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

# Name of the command, its module in lram.flows, its settings' class, what it is for.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quickstart": ("quickstart", "QuickstartSettings", "from nothing to an agent that learns in context, in minutes"),
    "envs": ("envs", "EnvsSettings", "show which environments can be built here, and what to install for the rest"),
    "collect darkroom": ("collect", "CollectSettings", "train Dark-Room specialists and record their training"),
    "collect dmcontrol": (
        "collect_dmcontrol",
        "CollectDmcontrolSettings",
        "train DMControl specialists, recorded",
    ),
    "collect metaworld": (
        "collect_metaworld",
        "CollectMetaworldSettings",
        "train Meta-World specialists, or play scripts",
    ),
    "collect mimicgen": ("collect_mimicgen", "CollectMimicgenSettings", "generate MimicGen trajectories"),
    "collect procgen": ("collect_procgen", "CollectProcgenSettings", "train Procgen specialists, recorded"),
    "convert composuite": ("convert", "ComposuiteSettings", "convert Composuite's offline data"),
    "convert dqn-replay": ("convert", "DqnReplaySettings", "convert the DQN-Replay dataset (Atari)"),
    "convert lram": ("convert", "LramSettings", "convert the sets that LRAM's authors published"),
    "convert mimicgen": ("convert", "MimicgenSettings", "convert MimicGen and robomimic files"),
    "convert minari": ("convert", "MinariSettings", "convert a Minari dataset"),
    "convert procgen": ("convert", "ProcgenSettings", "convert Procgen recordings of RA-DT"),
    "index": ("index", "IndexSettings", "rebuild a dataset's indices from its files"),
    "check": ("check", "CheckSettings", "check a dataset; exit status 1 when anything is wrong"),
    "report": ("report", "ReportSettings", "write a dataset's quality report as HTML and JSON"),
    "pack": ("pack", "PackSettings", "pack a dataset into one sharded Zarr store"),
    "unpack": ("pack", "UnpackSettings", "unpack a Zarr store or tar shards to plain files"),
    "export": ("export", "ExportSettings", "give a dataset to Minari or to the LRAM code"),
    "publish": ("publish", "PublishSettings", "publish a dataset on the Hub, or as the same files in a directory"),
    "download": ("download", "DownloadSettings", "download a published dataset, or some tasks of it"),
    "train": ("train", "TrainSettings", "train a policy on a dataset"),
    "evaluate": ("evaluate", "EvaluateSettings", "play tasks with a policy: scores, intervals, a page of plots"),
    "watch": ("watch", "WatchSettings", "film an episode that a policy plays"),
    "export-policy": ("export_policy", "ExportPolicySettings", "put a policy in a folder of its own, with an example"),
    "bench collect": ("bench", "CollectBenchSettings", "measure what recording costs"),
    "bench convert": ("bench", "ConvertBenchSettings", "measure the converters"),
    "bench evaluate": ("bench", "EvaluateBenchSettings", "measure what playing many episodes at once is worth"),
    "bench inference": ("bench", "InferenceBenchSettings", "measure how long an action takes"),
    "bench loader": ("bench", "LoaderBenchSettings", "measure the readers of training windows"),
    "bench train": ("bench", "TrainBenchSettings", "measure training, per backbone and size"),
}


def usage() -> str:
    """Returns the text of `lram --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {words}" for name, (_, _, words) in COMMANDS.items()]
    return "usage: lram COMMAND …\n\n" + "\n".join(lines) + "\n\n`lram COMMAND --help` says what it takes."


def main(arguments: list[str] | None = None) -> None:
    """Runs the command named by the arguments, sys.argv by default."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if words else 2)
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        sys.exit(f"error: unknown command {' '.join(words[:2])!r}\n\n{usage()}")
    sys.exit(run(name, words[len(name.split()) :]))


def run(name: str, words: list[str]) -> int:
    """Runs one command with its arguments; returns its exit status."""
    # A flow's own log repeats what the command prints; a failure is said once, below.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "0")
    import tyro

    from lram.datasets.specs import BadInput
    from lram.flows.server import ensure_prefect_server

    module, settings_name, _ = COMMANDS[name]
    flow = importlib.import_module(f"lram.flows.{module}")
    settings: Any = tyro.cli(
        getattr(flow, settings_name), prog=f"lram {name}", args=words, config=(tyro.conf.PositionalRequiredArgs,)
    )
    try:
        ensure_prefect_server()
        return flow.main(settings)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is on disk", file=sys.stderr)
        return 130


if __name__ == "__main__":
    main()
