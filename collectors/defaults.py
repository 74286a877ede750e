"""The specialists' default settings: one YAML file per algorithm and domain, in `settings/`.

    defaults("sac", "dmcontrol")                          # {"steps": 1000000, "learning_rate": 0.0003, …}
    filled(OffPolicySettings(steps=60_000), "sac", "dmcontrol")

A file holds every number that decides how an agent learns. Settings that have to serve several files leave a field
None where the file's value is meant; what is not None takes its place.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from importlib import resources
from typing import Any

import yaml

from lram.datasets.specs import BadInput


def defaults(algorithm: str, domain: str) -> dict[str, Any]:
    """Reads settings/<algorithm>_<domain>.yaml.

    Raises:
        BadInput: There is none.
    """
    folder = resources.files("lram.collectors").joinpath("settings")
    names = sorted(path.name for path in folder.iterdir())
    name = f"{algorithm}_{domain}.yaml"
    if name not in names:
        raise BadInput(f"{algorithm} has no settings for {domain}, expected one of {', '.join(names)}")
    return yaml.safe_load(folder.joinpath(name).read_text())


def filled(settings: Any, algorithm: str, domain: str) -> dict[str, Any]:
    """Returns the settings of a file, with the fields of a dataclass that are not None in their places.

    Args:
        settings: A dataclass with a field, None by default, for every name that its files hold.
        algorithm: Of the file.
        domain: Of the file.

    Raises:
        BadInput: There is no such file, or a field is given that the algorithm does not have.
    """
    chosen = defaults(algorithm, domain)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.default is not None or value is None:
            continue
        if field.name not in chosen:
            raise BadInput(f"{algorithm} has no setting {field.name}, expected one of {', '.join(chosen)}")
        chosen[field.name] = list(value) if isinstance(value, tuple) else value
    return chosen


def source(maker: str, *packages: str) -> str:
    """Says who makes trajectories: a sentence, and the versions of the packages that decide their content."""
    names = ("lram", *packages, "torch", "numpy")
    return f"{maker}: " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
