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
import torch.nn.functional as F
from torch import Tensor

from lram.model import kernels

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
    """Depthwise causal convolution that continues from the last W - 1 inputs, and SiLU.

    Args:
        x_BLD: Inputs.
        weight_D1W: Taps in the layout of `nn.Conv1d(D, D, W, groups=D)`, oldest first.
        bias_D: Bias.
        tail_BTD: The W - 1 inputs before x, None for zeros.

    Returns:
        Outputs (B, L, D), and the last W - 1 inputs.
    """
    batch, _, width = x_BLD.shape
    kept = weight_D1W.shape[-1] - 1
    tail_BTD = x_BLD.new_zeros(batch, kept, width) if tail_BTD is None else tail_BTD.to(x_BLD.dtype)
    # Not a view of the padded inputs below, which would keep all of them with the state.
    after_BTD = torch.cat([tail_BTD, x_BLD[:, -kept:]], dim=1)[:, -kept:]
    if kernel := kernels.find(x_BLD, "causal_conv1d", "causal_conv1d_fn"):
        x_BDL, tail_BDT = x_BLD.transpose(1, 2), tail_BTD.transpose(1, 2)
        y_BDL = kernel(x_BDL, weight_D1W[:, 0], bias_D, initial_states=tail_BDT, activation="silu")
    else:
        padded_BDL = torch.cat([tail_BTD, x_BLD], dim=1).transpose(1, 2)
        y_BDL = F.silu(F.conv1d(padded_BDL, weight_D1W, bias_D, groups=width))
    return y_BDL.transpose(1, 2), after_BTD
