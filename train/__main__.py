"""Entry of `torchrun --nproc-per-node N -m lram.train ROOT …`: the same settings as `lram train`.

Without torchrun it is one process; `lram train` does the same with a progress bar.
"""

from __future__ import annotations

import json
import sys

import tyro

from lram.datasets.specs import BadInput
from lram.train.trainer import TrainSettings, train


def main() -> None:
    """Trains with settings from the command line, printing a JSON line per log line."""
    settings = tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(TrainSettings), prog="lram.train")
    try:
        out = train(settings, lambda line: print(json.dumps(line), flush=True))
    except BadInput as error:
        sys.exit(f"error: {error}")
    print(out)


if __name__ == "__main__":
    main()
