"""The policy: encoders, one of three backbones, the action head; the loss it is trained by, and the choice of actions.

    policy = Policy(PolicySettings(backbone="xlstm", size="16M"))
    logits_BTV = policy(states, returns_to_go_BT, prev_rewards_BT)                           # training
    logits_BKV, state = policy.step(states, returns_to_go_BK, prev_rewards_BK, state)        # control
    actions = choose_action(logits_BKV[:, -1], DOMAINS["atari"], 18, generator)

An environment step t is three tokens, in this order: reward r_{t-1} (0 at the start of an episode), state s_t,
return-to-go R_t. The action is read at the last, so that a control step is one call of three tokens, and training and
control see the same stream. Rewards and returns-to-go come in already divided by the domain's scale. Actions are not
tokens: that shortens the sequence by a quarter, and what was done shows only in what followed. The paper's ablations
are settings: `with_actions` puts a_{t-1} first, `without_return` and `without_reward` leave their tokens out.

Shapes: B batch, T environment steps, K new environment steps, S tokens a step, D width, V logits = 2066, A action
dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lram.datasets.specs import NUM_BINS, NUM_DIMS, NUM_DISCRETE, NUM_LOGITS, STATE_WIDTH, DomainSpec
from lram.model.dt import DT
from lram.model.mamba import Mamba
from lram.model.state import State
from lram.model.xlstm import XLSTM


@dataclass(frozen=True)
class Size:
    """One row of the table of sizes.

    Attributes:
        layers: Blocks of xLSTM and Mamba.
        width: Channels, all backbones.
        dt_layers: Blocks of DT; half as many, since each holds an attention and an MLP.
        dt_heads: Attention heads of DT.
        slstm_at: Indices of the sLSTM blocks in xLSTM [7:1].
    """

    layers: int
    width: int
    dt_layers: int
    dt_heads: int
    slstm_at: tuple[int, ...]

    def halved(self) -> Size:
        """Returns half the layers, √2 times as wide: within 7 % of the parameters (arXiv 2410.22391, section 4.4)."""
        width = round(self.width * math.sqrt(2) / 64) * 64
        slstm_at = tuple(sorted({place // 2 for place in self.slstm_at}))
        return Size(self.layers // 2, width, self.dt_layers // 2, self.dt_heads * width // self.width, slstm_at)


SIZES: dict[str, Size] = {
    "tiny": Size(2, 64, 2, 4, (1,)),
    "16M": Size(8, 512, 4, 8, (1,)),
    "48M": Size(12, 768, 6, 12, (1, 3)),
    "110M": Size(16, 1024, 8, 16, (1, 3)),
    "206M": Size(20, 1280, 10, 20, (1, 3, 5)),
    "408M": Size(28, 1536, 14, 24, (1, 3, 5)),
}
"""The sizes of arXiv 2410.22391 as design.md lists them, and `tiny` for tests and the quickstart."""


@dataclass(frozen=True)
class PolicySettings:
    """What a policy is built from; its fields are what a checkpoint needs to say."""

    backbone: Literal["xlstm", "mamba", "dt"] = "xlstm"
    """Sequence model: xlstm, mamba or dt."""
    size: str = "16M"
    """Key of SIZES: tiny, 16M, 48M, 110M, 206M or 408M."""
    slstm: bool = False
    """xLSTM only: sLSTM blocks at the places of xLSTM [7:1] instead of mLSTM blocks alone, [1:0]."""
    max_steps: int = 50
    """DT only: environment steps in its context window."""
    image: bool = True
    """Whether there is an encoder for images beside the one for vectors."""
    half: bool = False
    """Half the layers, wider, with about as many parameters: the shape of the paper's latency test."""
    with_actions: bool = False
    """The action before each step is its first token."""
    without_return: bool = False
    """No return-to-go token: behaviour cloning."""
    without_reward: bool = False
    """No reward token."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one environment step, the state's included."""
        return 3 + self.with_actions - self.without_return - self.without_reward


class Policy(nn.Module):
    """Tokens ([a_{t-1},] r_{t-1}, s_t, R_t) in, logits of the action at t out."""

    def __init__(self, settings: PolicySettings) -> None:
        """Builds the policy.

        Raises:
            ValueError: The backbone or the size is unknown.
        """
        super().__init__()
        self.settings = settings
        if settings.size not in SIZES:
            raise ValueError(f"unknown size {settings.size!r}: choose from {', '.join(SIZES)}")
        size = SIZES[settings.size].halved() if settings.half else SIZES[settings.size]
        self.backbone: Any
        if settings.backbone == "xlstm":
            self.backbone = XLSTM(size.layers, size.width, size.slstm_at if settings.slstm else ())
        elif settings.backbone == "mamba":
            self.backbone = Mamba(size.layers, size.width)
        elif settings.backbone == "dt":
            max_tokens = settings.tokens_per_step * settings.max_steps
            self.backbone = DT(size.dt_layers, size.width, size.dt_heads, max_tokens)
        else:
            raise ValueError(f"unknown backbone {settings.backbone!r}: choose from xlstm, mamba, dt")
        self.encode_vector = nn.Linear(STATE_WIDTH, size.width)
        self.encode_image = Impala(size.width) if settings.image else None
        self.encode_return = None if settings.without_return else nn.Linear(1, size.width)
        self.encode_reward = None if settings.without_reward else nn.Linear(1, size.width)
        self.encode_action = PreviousAction(size.width) if settings.with_actions else None
        self.token_norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, NUM_LOGITS)

    def tokens(
        self, states: Tensor, returns_to_go_BT: Tensor, prev_rewards_BT: Tensor, prev_actions: Tensor | None = None
    ) -> Tensor:
        """Returns the tokens of T environment steps, (B, S·T, D).

        Args:
            states: Vectors (B, T, 204) float32, or images (B, T, 1, 64, 64) uint8.
            returns_to_go_BT: Returns-to-go, scaled; unread by a policy without them.
            prev_rewards_BT: Reward received before each state, scaled; 0 at the start of an episode.
            prev_actions: Action taken before each state, as `PreviousAction` takes it; only a policy with actions
                reads it.
        """
        if states.ndim == 3:
            state_BTD = self.encode_vector(states)
        elif self.encode_image is None:
            raise ValueError("this policy has no image encoder: build it with PolicySettings(image=True)")
        else:
            state_BTD = self.encode_image(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        step = [state_BTD]
        if self.encode_reward is not None:
            step.insert(0, self.encode_reward(prev_rewards_BT[..., None]))
        if self.encode_return is not None:
            step.append(self.encode_return(returns_to_go_BT[..., None]))
        if self.encode_action is not None:
            if prev_actions is None:
                raise ValueError("this policy was built with_actions: pass prev_actions")
            step.insert(0, self.encode_action(prev_actions))
        return self.token_norm(torch.stack(step, dim=2).flatten(1, 2))

    def forward(
        self,
        states: Tensor,
        returns_to_go_BT: Tensor,
        prev_rewards_BT: Tensor,
        prev_actions: Tensor | None = None,
        first: int = NUM_LOGITS,
    ) -> Tensor:
        """Returns the first logits (B, T, V) of whole windows, by default all; other arguments as `tokens`."""
        y_BLD = self.backbone(self.tokens(states, returns_to_go_BT, prev_rewards_BT, prev_actions))
        return self._logits(y_BLD, first)

    def step(
        self,
        states: Tensor,
        returns_to_go_BK: Tensor,
        prev_rewards_BK: Tensor,
        state: State = None,
        prev_actions: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Returns the logits (B, K, V) of the next K environment steps, and the state after them."""
        tokens = self.tokens(states, returns_to_go_BK, prev_rewards_BK, prev_actions)
        y_BLD, state = self.backbone.step(tokens, state)
        return self._logits(y_BLD), state

    def _logits(self, y_BLD: Tensor, first: int = NUM_LOGITS) -> Tensor:
        count = self.settings.tokens_per_step
        return F.linear(y_BLD[:, count - 1 :: count], self.head.weight[:first], self.head.bias[:first])


class PreviousAction(nn.Module):
    """Encodes the action before a step, where there is one.

    Discrete actions are (B, T) int64, -1 for none; continuous ones (B, T, A) float32, A up to 8, all NaN for none.
    """

    def __init__(self, width: int) -> None:
        """Builds one vector an action, one for "none", and a projection of the continuous dimensions."""
        super().__init__()
        self.discrete = nn.Embedding(NUM_DISCRETE + 1, width)
        self.continuous = nn.Linear(NUM_DIMS, width)

    def forward(self, actions: Tensor) -> Tensor:
        """Returns one vector a step, (B, T, D)."""
        if not actions.is_floating_point():
            return self.discrete(actions.where(actions >= 0, NUM_DISCRETE))
        none_BT = actions.isnan().all(-1)
        known_BTD = self.continuous(F.pad(actions.nan_to_num(), (0, NUM_DIMS - actions.shape[-1])))
        return torch.where(none_BT[..., None], self.discrete.weight[NUM_DISCRETE], known_BTD)


class Impala(nn.Module):
    """The IMPALA residual network without its recurrence, for (M, 1, 64, 64) uint8 images.

    Source: Espeholt et al., "IMPALA", arXiv 1802.01561, figure 3 (large architecture).
    """

    def __init__(self, width: int, channels: tuple[int, ...] = (16, 32, 32)) -> None:
        """Builds a stage per entry of `channels`, each of which halves the image, and a projection to `width`."""
        super().__init__()
        stages: list[nn.Module] = []
        before = 1
        for after in channels:
            pool = nn.MaxPool2d(3, stride=2, padding=1)
            stages += [nn.Conv2d(before, after, 3, padding=1), pool, _Residual(after), _Residual(after)]
            before = after
        self.stages = nn.Sequential(*stages)
        self.project = nn.Linear(before * 8 * 8, width)

    def forward(self, image: Tensor) -> Tensor:
        """Returns one vector an image, (M, D)."""
        features = self.stages(image.to(self.project.weight.dtype) / 255)
        return self.project(F.relu(features).flatten(1))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))


# Actions ----------------------------------------------------------------------------------------------------------


def bin_of(action: Tensor) -> Tensor:
    """Returns the bin (int64) of every continuous action; the bins are uniform on [-1, 1], and outside is clipped."""
    return ((action + 1) * (NUM_BINS / 2)).floor().long().clamp(0, NUM_BINS - 1)


def bin_centre(index: Tensor) -> Tensor:
    """Returns the centre (float32) of every bin."""
    return (index.to(torch.float32) + 0.5) * (2 / NUM_BINS) - 1


def _bins(logits: Tensor) -> Tensor:
    """Returns the continuous part of the logits, (..., 8, 256), or of the first dimensions."""
    return logits[..., NUM_DISCRETE:].unflatten(-1, (-1, NUM_BINS))


def action_loss(
    logits_BTV: Tensor,
    actions: Tensor,
    mask_BT: Tensor,
    domain: DomainSpec,
    dims_BA: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the actions, over the logits that are valid for the domain only.

    Args:
        logits_BTV: Logits; the first that the domain needs are enough.
        actions: Discrete (B, T) int64, or continuous (B, T, A) float32 in [-1, 1].
        mask_BT: True where the step is real, False in the padding.
        domain: Says which kind of action, and how many are valid.
        dims_BA: Continuous only: True where a sample's task has that dimension. All are valid without it.

    Returns:
        The sum over all action tokens, and their number; a discrete action is one token, a continuous one is a
        token a valid dimension. Their quotient is the loss, and adds up over micro-batches exactly.
    """
    if domain.action == "discrete":
        logits = logits_BTV[..., : domain.num_actions]
        target, mask = actions, mask_BT
    else:
        dims = actions.shape[-1]
        logits = _bins(logits_BTV)[..., :dims, :]
        target, mask = bin_of(actions), mask_BT[..., None].expand(actions.shape)
        if dims_BA is not None:
            mask = mask & dims_BA[:, None, :]
    # Only what counts is gathered: padding may hold anything, and costs nothing.
    return F.cross_entropy(logits[mask].float(), target[mask], reduction="sum"), mask.sum()


def choose_action(
    logits_BV: Tensor,
    domain: DomainSpec,
    num_actions: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Draws an action of every slot from the policy.

    Args:
        logits_BV: Logits of one environment step.
        domain: Says which kind of action.
        num_actions: Valid discrete actions, or dimensions, of the task at hand.
        generator: Source of randomness, on the logits' device; unused when greedy.
        temperature: Divides the logits: below 1 is closer to greedy.
        greedy: Takes the likeliest action instead.
        top_k: Draws among the k likeliest only; 0 for all.
        top_p: Draws among the fewest likeliest that hold this much probability (nucleus sampling, arXiv 1904.09751);
            1 for all. It counts what `temperature` and `top_k` leave. Each continuous dimension is drawn by itself.

    Returns:
        Discrete actions (B,) int64, or continuous ones (B, A) float32, centres of bins.
    """
    logits = logits_BV[:, :num_actions] if domain.action == "discrete" else _bins(logits_BV)[:, :num_actions]
    if greedy:
        choice = logits.argmax(-1)
    else:
        probabilities = _nucleus((logits.float() / temperature).softmax(-1), top_k, top_p)
        flat = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        choice = flat.view(logits.shape[:-1])
    return choice if domain.action == "discrete" else bin_centre(choice)


def _nucleus(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets to 0 what is not among the `top_k` likeliest, or beyond the likeliest that hold `top_p` of the rest."""
    if top_k <= 0 and top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k > 0:
        ordered[..., top_k:] = 0
    # One stays while those before it hold less than top_p: the likeliest always does.
    before = ordered.cumsum(-1) - ordered
    ordered[..., 1:].masked_fill_((before >= top_p * ordered.sum(-1, keepdim=True))[..., 1:], 0)
    return torch.zeros_like(probabilities).scatter_(-1, order, ordered)


# Parameters -------------------------------------------------------------------------------------------------------


def count_parameters(module: nn.Module) -> int:
    """Returns how many numbers are trained."""
    return sum(math.prod(parameter.shape) for parameter in module.parameters() if parameter.requires_grad)


def decayed(name: str, parameter: Tensor) -> bool:
    """Says whether weight decay applies: to matrices, not to norms, biases, decay rates or positions."""
    plain = any(part in name for part in ("norm", "bias", "A_log", "wpe"))
    return parameter.ndim >= 2 and not plain
