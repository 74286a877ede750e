"""Mamba backbone (version 1) in plain PyTorch, with the parameters of `mamba_ssm`.

    backbone = Mamba(layers=8, width=512)
    y_BLD = backbone(x_BLD)                             # training
    y_BKD, state = backbone.step(x_BKD, state)          # control and prefill, any K

Names and initialisation are those of `mamba_ssm` (`layers.0.mixer.in_proj.weight`, ..., `norm_f.weight`). The
selective scan does everything for a chunk of tokens at once except the recurrence itself, which is one fused
multiply-add a token; the backward pass is by hand and recomputes a chunk from the state it started in. So one state
in 16 is kept, and no exponent is ever positive: strong decay gives 0, never inf. What it trades away is computing
every chunk twice, and second derivatives.

Shapes: B batch, L tokens, D width, I inner width = 2D, N state size, R rank of the step size, C tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lram.model import kernels
from lram.model.state import State, causal_conv

STATE_SIZE = 16
CONV_WIDTH = 4
EXPAND = 2
CHUNK_TOKENS = 16
"""Tokens of which all states are held at once; one state of every so many is kept for the backward pass."""


class Mamba(nn.Module):
    """Residual stack of Mamba blocks, x + Mixer(RMSNorm(x)), and a last RMSNorm.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, and
    `mamba_ssm/models/mixer_seq_simple.py`.
    """

    def __init__(self, layers: int, width: int) -> None:
        """Builds `layers` blocks of `width` channels."""
        super().__init__()
        self.layers: Any = nn.ModuleList(
            nn.ModuleDict({"norm": nn.RMSNorm(width, eps=1e-5), "mixer": Mixer(width, layers)}) for _ in range(layers)
        )
        self.norm_f = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Returns the outputs (B, L, D) of whole sequences."""
        return self.step(x_BLD)[0]

    def step(self, x_BKD: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Returns the outputs (B, K, D) of the next K tokens, and the state after them."""
        after = []
        for index, layer in enumerate(self.layers):
            y_BKD, layer_state = layer.mixer(layer.norm(x_BKD), None if state is None else state[index])
            x_BKD = x_BKD + y_BKD
            after.append(layer_state)
        return self.norm_f(x_BKD), after


class Mixer(nn.Module):
    """One Mamba layer with the parameters of `mamba_ssm.Mamba`; arXiv 2312.00752, section 3.4 and figure 3."""

    def __init__(self, width: int, layers: int) -> None:
        """Initialises as `mamba_ssm.Mamba` and `_init_weights` with one residual a layer do."""
        super().__init__()
        inner, rank = EXPAND * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, CONV_WIDTH, groups=inner, padding=CONV_WIDTH - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * STATE_SIZE, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, STATE_SIZE + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            # Step sizes log-uniform in [0.001, 0.1]; the bias is their inverse softplus.
            low, high = math.log(0.001), math.log(0.1)
            dt = torch.exp(torch.empty(inner).uniform_(low, high)).clamp(min=1e-4)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            self.out_proj.weight.div_(math.sqrt(layers))

    def forward(self, x_BLD: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Returns the outputs (B, L, D), and the state {"conv": (B, 3, I), "ssm": (B, N, I)} after them."""
        u_BLI, z_BLI = self.in_proj(x_BLD).chunk(2, dim=-1)
        u_BLI, tail = causal_conv(u_BLI, self.conv1d.weight, self.conv1d.bias, state["conv"] if state else None)
        sizes = [self.dt_proj.in_features, STATE_SIZE, STATE_SIZE]
        dt_BLR, b_BLN, c_BLN = self.x_proj(u_BLI).split(sizes, dim=-1)
        dt_BLI = F.softplus(self.dt_proj(dt_BLR))
        y_BLI, h_BNI = selective_scan(
            u_BLI, dt_BLI, -torch.exp(self.A_log), b_BLN, c_BLN, state["ssm"] if state else None
        )
        y_BLI = torch.addcmul(y_BLI, u_BLI, self.D) * F.silu(z_BLI)
        return self.out_proj(y_BLI), {"conv": tail, "ssm": h_BNI}


@torch.compiler.disable  # its loop over tokens would be unrolled, and compile for many minutes
def selective_scan(
    u_BLI: Tensor, dt_BLI: Tensor, a_IN: Tensor, b_BLN: Tensor, c_BLN: Tensor, h_BNI: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Runs h_t = exp(dt_t a) h_{t-1} + dt_t b_t u_t and reads y_t = c_t · h_t; arXiv 2312.00752, equation (2).

    Args:
        u_BLI: Inputs.
        dt_BLI: Step sizes, positive.
        a_IN: Decay rates, negative.
        b_BLN: Input weights.
        c_BLN: Output weights.
        h_BNI: State before the first token, None for zeros.

    Returns:
        Outputs (B, L, I) and the state after the last token, in the type of `a_IN`.
    """
    if h_BNI is None:
        if kernel := kernels.find(u_BLI, "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"):
            return kernels.scan(kernel, u_BLI, dt_BLI, a_IN, b_BLN, c_BLN)
        h_BNI = a_IN.new_zeros(u_BLI.shape[0], a_IN.shape[1], a_IN.shape[0])
    # Rows of the batch that fill about 2 MB a tensor: the cache holds them. A GPU wants few large calls.
    numbers = 2**26 if u_BLI.is_cuda else 2**19
    rows = max(1, numbers // (min(u_BLI.shape[1], CHUNK_TOKENS) * a_IN.numel()))
    a_NI = a_IN.t().contiguous()
    outputs, states = [], []
    with torch.autocast(u_BLI.device.type, enabled=False):
        inputs = (part.to(a_IN.dtype).split(rows) for part in (u_BLI, dt_BLI, b_BLN, c_BLN, h_BNI))
        for u, dt, b, c, h in zip(*inputs):
            # Tokens first, so that one token of these rows is one contiguous run of memory.
            u, dt, b, c = (part.transpose(0, 1).contiguous() for part in (u, dt, b, c))
            y, h = _Scan.apply(dt, dt * u, a_NI, b, c, h)
            outputs.append(y.transpose(0, 1))
            states.append(h)
    return torch.cat(outputs), torch.cat(states)


def _chunk(dt: Tensor, du: Tensor, a_NI: Tensor, b: Tensor, h_BNI: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the decays and the states (C, B, N, I) of a chunk that starts in `h_BNI`, written into `space`."""
    decay, states = space[:2, : len(dt)].unbind(0)
    torch.mul(dt[:, :, None], a_NI, out=decay).exp_()
    torch.mul(b[..., None], du[:, :, None], out=states)
    for token in range(len(states)):
        h_BNI = states[token].addcmul_(decay[token], h_BNI)
    return decay, states


class _Scan(torch.autograd.Function):
    """The scan over chunks, saving the inputs and one state a chunk."""

    @staticmethod
    def forward(
        ctx: Any, dt: Tensor, du: Tensor, a_NI: Tensor, b: Tensor, c: Tensor, h_BNI: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = min(len(dt), CHUNK_TOKENS)
        space = dt.new_empty(2, size, *h_BNI.shape)
        y_LBI, starts = torch.empty_like(dt), []
        for start in range(0, len(dt), size):
            part = slice(start, start + size)
            starts.append(h_BNI)
            _, states = _chunk(dt[part], du[part], a_NI, b[part], h_BNI, space)
            y_LBI[part] = (c[part][:, :, None] @ states)[:, :, 0]
            h_BNI = states[-1].clone()
        ctx.size = size
        ctx.save_for_backward(dt, du, a_NI, b, c, *starts)
        return y_LBI, h_BNI

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        grad_LBI, d_h = grads
        dt, du, a_NI, b, c, *starts = ctx.saved_tensors
        d_dt, d_du, d_b, d_c = (torch.empty_like(part) for part in (dt, du, b, c))
        d_a = torch.zeros_like(a_NI)
        space = dt.new_empty(3, ctx.size, *d_h.shape)
        for index in range(len(starts) - 1, -1, -1):
            part = slice(index * ctx.size, (index + 1) * ctx.size)
            decay, states = _chunk(dt[part], du[part], a_NI, b[part], starts[index], space)
            grad = grad_LBI[part]
            d_c[part] = (states @ grad[..., None])[..., 0]
            # Gradient of every state: what its own output asks, and what the next state passes back.
            d_states = torch.mul(c[part][..., None], grad[:, :, None], out=space[2, : len(grad)])
            d_states[-1].add_(d_h)
            for token in range(len(states) - 1, 0, -1):
                d_states[token - 1].addcmul_(decay[token], d_states[token])
            d_h = decay[0] * d_states[0]
            d_du[part] = (b[part][:, :, None] @ d_states)[:, :, 0]
            d_b[part] = (d_states @ du[part][..., None])[..., 0]
            # d(dt a) = d_states · h_{t-1} · decay, gathered in place of the decays.
            decay.mul_(d_states)
            decay[1:].mul_(states[:-1])
            decay[0].mul_(starts[index])
            torch.sum(torch.mul(decay, a_NI, out=states), dim=2, out=d_dt[part])
            d_a += decay.mul_(dt[part][:, :, None]).sum((0, 1))
        return d_dt, d_du, d_a, d_b, d_c, d_h
