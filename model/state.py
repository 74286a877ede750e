"""Recurrent state: what every backbone keeps between calls of `step`, and the two things done to it from outside.

    logits, state = policy.step(states, returns, rewards, state)      # state=None at the start
    state = reset_state(state, done_B)                                # finished slots start afresh

A state is any nesting of tuples, lists and dicts of tensors with the batch, one episode slot a row, on dimension 0;
all zeros is the initial state. That one rule lets a slot be cleared without knowing whose state it is; it costs the
backbones a formulation in which nothing but zero marks the start. Nothing here changes a tensor in place.

Shapes: B batch (episode slots), L tokens, D channels, W taps of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = Any
"""Nested tuples, lists and dicts of tensors; `None` is the state before the first token."""


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """Returns a state of the same nesting with `function` applied to every tensor."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: map_state(function, value) for key, value in state.items()}
    return type(state)(map_state(function, value) for value in state)


def reset_state(state: State, done_B: Tensor) -> State:
    """Returns `state` with the rows of finished slots set to the initial state; the others are untouched.

    Args:
        state: State of a backbone, or None.
        done_B: True where a slot starts a new episode, bool, shape (B,).
    """

    def reset(tensor: Tensor) -> Tensor:
        # A row that holds inf or nan must be cleared too, so rows are chosen, not multiplied.
        return tensor.masked_fill(done_B.view(-1, *[1] * (tensor.ndim - 1)).to(tensor.device), 0)

    return map_state(reset, state)


def select_state(state: State, index: Tensor) -> State:
    """Returns the rows `index` (int64, or a bool mask) of `state`: slots dropped, repeated or reordered."""
    return map_state(lambda tensor: tensor[index.to(tensor.device)], state)


def causal_conv(
    x_BLD: Tensor, weight_D1W: Tensor, bias_D: Tensor | None, tail_BTD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution that continues from the last W - 1 inputs.

    W shifted products instead of `F.conv1d`: on CPU they need no transposes and measure 1.5 times as fast.

    Args:
        x_BLD: Inputs.
        weight_D1W: Taps in the layout of `nn.Conv1d(D, D, W, groups=D)`, oldest first.
        bias_D: Bias.
        tail_BTD: The W - 1 inputs before x, None for zeros.

    Returns:
        Outputs (B, L, D), and the last W - 1 inputs.
    """
    length, taps = x_BLD.shape[1], weight_D1W.shape[-1]
    if tail_BTD is None:
        tail_BTD = x_BLD.new_zeros(x_BLD.shape[0], taps - 1, x_BLD.shape[2])
    padded = torch.cat([tail_BTD.to(x_BLD.dtype), x_BLD], dim=1)
    return _Conv.apply(padded, weight_D1W[:, 0].t(), bias_D), padded[:, length:]


class _Conv(torch.autograd.Function):
    """The convolution of a padded input (B, W - 1 + L, D) by taps (W, D) as one autograd node, taps added in place."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight_WD: Tensor, bias_D: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight_WD)
        taps = len(weight_WD)
        length = padded.shape[1] - taps + 1
        weight_WD = weight_WD.to(padded.dtype)
        y_BLD = torch.addcmul(bias_D.to(padded.dtype), padded[:, :length], weight_WD[0])
        for tap in range(1, taps):
            y_BLD.addcmul_(padded[:, tap : tap + length], weight_WD[tap])
        return y_BLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        padded, weight_WD = ctx.saved_tensors
        length = grad.shape[1]
        d_padded, d_weight = torch.zeros_like(padded), torch.empty_like(weight_WD)
        for tap, weight_D in enumerate(weight_WD.to(padded.dtype)):
            window = slice(tap, tap + length)
            d_padded[:, window].addcmul_(grad, weight_D)
            d_weight[tap] = (grad * padded[:, window]).sum((0, 1))
        return d_padded, d_weight, grad.sum((0, 1)).to(weight_WD.dtype)
