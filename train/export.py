"""A policy in a folder of its own: states in, actions out, NumPy both, without the dataset or the run it came from.

    export_policy(ExportPolicySettings(Path("runs/train"), Path("OUT")))
    policy = load_policy("OUT")                                # or load_policy("OUT", weights="int8")
    policy.reset("dmcontrol/cartpole-swingup")
    action = policy.act(state, reward)                         # reward: what the last action brought, 0 at first

OUT holds `policy.safetensors` (the weights that act), `policy.json` (what the policy is built from; for every task it
was trained on the columns its states go to, the width of its actions, the reward scale, the best return in the data)
and `example.py`, which plays an episode. Actions are those of the evaluator: with the same seed and the same number
of the episode, the same draws. Reading the folder needs this package and runs no code from it. What it trades away:
one environment at a time, and recurrent state that ends with the episode (`reset`).
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lram.datasets.disk import whole_folder
from lram.datasets.index import find_tasks
from lram.datasets.reader import TaskReader, open_task
from lram.datasets.specs import DOMAINS, NUM_BINS, NUM_DIMS, NUM_DISCRETE, STATE_WIDTH, BadInput
from lram.model.policy import Policy, PolicySettings, bin_centre
from lram.model.state import State
from lram.train import checkpoint
from lram.train.fast import FastPolicy, Weights

FORMAT, VERSION = "lram-policy", 1
WEIGHTS, DESCRIPTION, EXAMPLE = "policy.safetensors", "policy.json", "example.py"


@dataclass(frozen=True)
class ExportPolicySettings:
    """What to export, and where to."""

    checkpoint: Path
    """A checkpoint's folder, or a run's folder: then its best checkpoint."""
    out: Path
    """Folder to make."""
    root: Path | None = None
    """Dataset the policy was trained on, which says what its tasks' states look like; by default where it was then."""


@dataclass(frozen=True)
class ExportedTask:
    """What acting in a task takes.

    Attributes:
        state_shape: Shape of a state as the simulator gives it.
        columns: Where each column of a vector state goes among the policy's 204; empty for images.
        num_actions: Width of a continuous action, or valid discrete actions.
        discrete: Whether actions are numbers of a discrete set.
        reward_scale: Rewards and returns-to-go are divided by it.
        target_return: Best return in the data.
    """

    state_shape: tuple[int, ...]
    columns: tuple[int, ...]
    num_actions: int
    discrete: bool
    reward_scale: float
    target_return: float


def export_policy(settings: ExportPolicySettings) -> Path:
    """Writes a policy's folder, whole or not at all.

    Returns:
        The folder.

    Raises:
        BadInput: There is no checkpoint, its dataset is not found, or the folder exists.
    """
    folder = checkpoint.best(settings.checkpoint)
    policy, state = checkpoint.load_policy(folder)
    if settings.out.exists():
        raise BadInput(f"{settings.out}: exists; choose another folder")
    tasks = {}
    for name, reader in _readers(settings.root or Path(state.train["root"]), state.dataset["tasks"]).items():
        tasks[name] = _describe(reader, state.target_returns[name])
    description = {
        "format": FORMAT,
        "version": VERSION,
        "source": {"checkpoint": folder.name, "update": state.update, "data_sha256": state.dataset["sha256"]},
        "policy": state.policy,
        "tasks": {name: asdict(task) for name, task in tasks.items()},
    }
    with whole_folder(settings.out) as partial:
        save_file(policy.state_dict(), partial / WEIGHTS)
        (partial / DESCRIPTION).write_text(json.dumps(description, indent=1))
        shutil.copyfile(Path(__file__).with_name(EXAMPLE), partial / EXAMPLE)
    return settings.out


def _readers(root: Path, names: list[str]) -> dict[str, TaskReader]:
    """Opens the tasks of these names.

    Raises:
        BadInput: They are not all there.
    """
    try:
        folders = {f"{folder.parent.name}/{folder.name}": folder for folder in find_tasks(root)}
    except BadInput as error:
        raise BadInput(f"{error}; say with --root where the dataset of the policy is") from error
    if missing := [name for name in names if name not in folders]:
        raise BadInput(f"{root}: has no task {missing[0]}, which the policy was trained on; say with --root what has")
    return {name: open_task(folders[name]) for name in names}


def _describe(reader: TaskReader, target_return: float) -> ExportedTask:
    """Reads a task's spaces from its index."""
    columns = [to + i for _, to, width in reader.state_runs for i in range(width)]
    spec = reader.domain
    discrete = spec.action == "discrete"
    return ExportedTask(
        tuple(reader.state_shape),
        tuple(columns),
        spec.num_actions if discrete else reader.num_dims,
        discrete,
        spec.reward_scale,
        target_return,
    )


def load_policy(
    folder: str | Path,
    weights: Weights = "float32",
    temperature: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> ExportedPolicy:
    """Reads an exported policy.

    Args:
        folder: What `export_policy` wrote.
        weights: What to keep its weights in; bfloat16 and int8 act faster on a CPU, and a little differently.
        temperature: Divides the logits; 0 takes the likeliest action.
        seed: Of the actions drawn.
        device: Where to put it.

    Raises:
        BadInput: The folder is not one of ours, or damaged.
    """
    path = Path(folder) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        if (description["format"], description["version"]) != (FORMAT, VERSION):
            raise ValueError(f"{description['format']} version {description['version']}")
        policy = Policy(PolicySettings(**description["policy"]))
        tasks = {name: _task(fields) for name, fields in description["tasks"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: expected an exported policy, version {VERSION} ({error})") from error
    try:
        policy.load_state_dict(load_file(Path(folder) / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BadInput(f"{Path(folder) / WEIGHTS}: not the weights of this policy ({error})") from error
    return ExportedPolicy(FastPolicy(policy, weights).to(device), tasks, temperature, seed)


def _task(fields: dict[str, Any]) -> ExportedTask:
    """Checks a task's description.

    Raises:
        ValueError: A number is out of range.
    """
    shape, columns = (tuple(map(int, fields.pop(key))) for key in ("state_shape", "columns"))
    task = ExportedTask(shape, columns, **fields)
    if len(shape) == 1 and (len(columns) != shape[0] or not all(0 <= column < STATE_WIDTH for column in columns)):
        raise ValueError(f"columns of a state of shape {shape}: expected one in 0..{STATE_WIDTH - 1} for each")
    if not 1 <= task.num_actions <= (NUM_DISCRETE if task.discrete else NUM_DIMS) or not task.reward_scale > 0:
        raise ValueError(f"{task.num_actions} actions, rewards over {task.reward_scale}: out of range")
    return task


class ExportedPolicy:
    """A policy that plays one episode at a time.

    Attributes:
        tasks: What it was trained on, by "<domain>/<task>".
    """

    def __init__(self, policy: FastPolicy, tasks: dict[str, ExportedTask], temperature: float, seed: int) -> None:
        """Is called by `load_policy`."""
        self.tasks = tasks
        self._policy, self._temperature, self._seed = policy, temperature, seed
        self._device = policy.encoders.token_norm.weight.device
        self._task: ExportedTask | None = None
        self._domain = ""
        self._state: State = None
        self._asked = 0.0
        self._action: Any = None

    def reset(self, task: str, target_return: float | None = None, episode: int = 0) -> None:
        """Starts an episode.

        Args:
            task: Its "<domain>/<task>".
            target_return: Return to ask for, unscaled; by default the best in the data.
            episode: Its number: another one draws other actions.

        Raises:
            BadInput: The policy was not trained on the task.
        """
        if task not in self.tasks:
            raise BadInput(f"task {task!r}: the policy was trained on {', '.join(sorted(self.tasks))}")
        self._task, self._state = self.tasks[task], None
        self._domain = task.split("/")[0]
        self._asked = self._task.target_return if target_return is None else target_return
        self._random = np.random.default_rng([self._seed, zlib.crc32(task.encode()), episode])
        # What precedes the first action, as `PreviousAction` takes it.
        self._action = np.int64(-1) if self._task.discrete else np.full(self._task.num_actions, np.nan, np.float32)

    def act(self, state: np.ndarray, reward: float = 0.0) -> np.ndarray:
        """Chooses the next action.

        Args:
            state: What the simulator shows now, in its own layout.
            reward: What the last action brought, unscaled; 0 at the first.

        Returns:
            Action (A,) float32 in [-1, 1], or () int64.

        Raises:
            BadInput: The state has another shape than the task's, or no episode was started.
        """
        if self._task is None:
            raise BadInput("act: no episode yet, call reset(task) first")
        task, state = self._task, np.asarray(state)
        if state.shape != task.state_shape:
            raise BadInput(f"act: a state of shape {state.shape}, expected {task.state_shape}")
        if task.columns:
            padded = np.zeros(STATE_WIDTH, np.float32)
            padded[list(task.columns)] = state
            state = padded
        self._asked -= reward
        asked, paid = (np.array(value / task.reward_scale, np.float32) for value in (self._asked, reward))
        inputs = (torch.as_tensor(part[None, None], device=self._device) for part in (state, asked, paid, self._action))
        states, returns, rewards, before = inputs
        logits, self._state = self._policy.step(states, returns, rewards, self._state, before)
        self._action = self._draw(logits[0, -1].float().cpu(), task)
        return self._action

    def _draw(self, logits_V: torch.Tensor, task: ExportedTask) -> np.ndarray:
        """Draws an action as the evaluator does: the argmax of logits and Gumbel noise is a draw."""
        if task.discrete:
            logits = logits_V[: task.num_actions]
        else:
            logits = logits_V[NUM_DISCRETE:].unflatten(-1, (NUM_DIMS, NUM_BINS))[: task.num_actions]
        if self._temperature > 0:
            # As many numbers as the domain's widest action takes, as the evaluator draws them.
            widest = DOMAINS[self._domain].num_actions
            uniform = self._random.random((widest, *logits.shape[1:]), dtype=np.float32)[: task.num_actions]
            logits = logits / self._temperature - torch.from_numpy(uniform).log().neg().log()
        choice = logits.argmax(-1)
        return (choice if task.discrete else bin_centre(choice)).numpy()
