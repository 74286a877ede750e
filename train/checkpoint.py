"""Checkpoints: a folder each, written whole, the newest and the best kept.

    save(OUT, state, policy, optimizer)             # OUT/update-000001000/
    policy, state = load_policy(OUT)                # the newest; or one checkpoint's own folder

A checkpoint holds `policy.safetensors` (the weights that are validated and act), `optimizer.pt` (tensors and
numbers only, loaded with `weights_only=True`) and `state.json` (update, settings, validation perplexity, what the
policy was trained on). Where those weights are an average, `trained.safetensors` holds the ones it is taken of.
The folder is filled under a temporary name and renamed, so a kill leaves either all of it or nothing. Keeping
two of them costs the disk of two models with their optimizer moments.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lram.datasets.disk import whole_folder
from lram.datasets.specs import BadInput
from lram.model.policy import Policy, PolicySettings

WEIGHTS, TRAINED, OPTIMIZER, STATE = "policy.safetensors", "trained.safetensors", "optimizer.pt", "state.json"


@dataclass
class State:
    """What a checkpoint says beside its tensors.

    Attributes:
        update: Optimizer updates done.
        perplexity: Validation perplexity by domain at this update; empty when it was not measured.
        best: Lowest mean validation perplexity so far, and the update it was seen at.
        policy: `PolicySettings` as a dict.
        train: `TrainSettings` as a dict.
        dataset: Fingerprint of the data: tasks, transitions, hash of the content, what was left out.
        target_returns: Best return in the data, by "<domain>/<task>".
    """

    update: int = 0
    perplexity: dict[str, float] = field(default_factory=dict)
    best: tuple[float, int] = (float("inf"), -1)
    policy: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    target_returns: dict[str, float] = field(default_factory=dict)


def save(
    out: Path, state: State, policy: Policy, optimizer: torch.optim.Optimizer, trained: Policy | None = None
) -> Path:
    """Writes a checkpoint and removes those that are neither the newest nor the best.

    Args:
        out: The run's folder; a checkpoint of the same update there stays as it is.
        state: Where the run is.
        policy: The policy that acts, not wrapped.
        optimizer: The optimizer.
        trained: What the optimizer trains, where it is not `policy`.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskFull: There is no room for it.
    """
    folder = out / f"update-{state.update:09d}"
    if folder.exists():
        return folder
    with whole_folder(folder) as temporary:
        save_file(policy.state_dict(), temporary / WEIGHTS)
        if trained is not None:
            save_file(trained.state_dict(), temporary / TRAINED)
        with open(temporary / OPTIMIZER, "wb") as file:  # with a path, torch does not say that a disk is full
            torch.save(optimizer.state_dict(), file)
        (temporary / STATE).write_text(json.dumps(dataclasses.asdict(state), indent=1))
    for other in checkpoints(out):
        if other not in (folder, out / f"update-{state.best[1]:09d}"):
            shutil.rmtree(other)
    for stale in out.glob(".update-*.tmp"):
        shutil.rmtree(stale)
    return folder


def checkpoints(out: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    return sorted(out.glob("update-*"))


def find(path: Path) -> Path:
    """Returns a checkpoint's folder, given it or its run's folder (then the newest).

    Raises:
        BadInput: There is none.
    """
    path = Path(path)
    if (path / STATE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        raise BadInput(f"{path}: no checkpoint, expected a folder update-… or a run that holds some")
    return found[-1]


def best(path: Path) -> Path:
    """Returns a checkpoint's folder, given it or its run's folder (then the one of lowest validation perplexity).

    Raises:
        BadInput: There is none.
    """
    newest = find(path)
    if newest == Path(path):
        return newest
    best_path = newest.parent / f"update-{read_state(newest).best[1]:09d}"
    return best_path if best_path.is_dir() else newest


def read_state(path: Path) -> State:
    """Reads `state.json` of a checkpoint.

    Raises:
        BadInput: It is missing or not one of ours.
    """
    try:
        fields = json.loads((path / STATE).read_text())
        PolicySettings(**fields["policy"])  # of another version it may have fields that are not known here
        return State(**{**fields, "best": tuple(fields["best"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path / STATE}: not a checkpoint's state ({error})") from error


def load_policy(path: Path, device: str | torch.device = "cpu") -> tuple[Policy, State]:
    """Loads a policy for acting.

    Args:
        path: A checkpoint's or a run's folder.
        device: Where to put the policy.

    Returns:
        The policy in evaluation mode, and the checkpoint's state.

    Raises:
        BadInput: There is no checkpoint, or its weights are not those of its settings.
    """
    folder = find(path)
    state = read_state(folder)
    policy = Policy(PolicySettings(**state.policy))
    load_weights(policy, folder)
    return policy.to(device).eval(), state


def load_weights(policy: Policy, folder: Path, name: str = WEIGHTS) -> None:
    """Loads a checkpoint's weights into a policy: those that act, or `TRAINED`.

    Raises:
        BadInput: They are unreadable, or of another size or backbone.
    """
    try:
        weights = load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{folder / name}: not readable weights ({error})") from error
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        saved = {**dataclasses.asdict(PolicySettings()), **read_state(folder).policy}
        wanted = dataclasses.asdict(policy.settings)
        keys = [key for key in wanted if saved.get(key) != wanted[key]]
        differs = "; ".join(f"{key} is {saved.get(key)}, not {wanted[key]}" for key in keys) or "other weights"
        raise BadInput(f"{folder}: a checkpoint of another policy ({differs})") from error


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Loads a checkpoint's optimizer moments.

    Raises:
        BadInput: They are unreadable.
    """
    try:
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu"))
    except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError, KeyError, TypeError) as error:
        said = "unsafe content" if isinstance(error, UnpicklingError) else error
        raise BadInput(f"{folder / OPTIMIZER}: not readable optimizer state ({said})") from error
