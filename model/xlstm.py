"""xLSTM backbone: the `xlstm` package's blocks hold the parameters, the functions here run them.

    backbone = XLSTM(layers=8, width=512, slstm_at=[1])       # [7:1]; slstm_at=() is [1:0]
    y_BLD = backbone(x_BLD)                                   # training
    y_BKD, state = backbone.step(x_BKD, state)                # control and prefill, any K

Names, shapes and initialisation are the package's, so its checkpoints load; outputs and gradients are equal to
those of `xlstm.xLSTMBlockStack` to rounding. What differs is how: the package's `step` takes one token and its sLSTM
builds an autograd graph of a dozen nodes a token, here every function takes a chunk of any length and a state.
Stabilisers are treated as constants in the backward pass, since nothing that is read depends on them; what is given
up is second derivatives.

Shapes: B batch, L tokens, D width, I inner width of the mLSTM, N heads, H channels a head, C chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import xlstm
from torch import Tensor

from lram.model import kernels
from lram.model.state import State, causal_conv

HEADS = 4
Memory = tuple[Tensor, Tensor, Tensor]


class XLSTM(xlstm.xLSTMBlockStack):
    """Residual stack of mLSTM blocks, with sLSTM blocks at the places of choice.

    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv 2405.04517, and the `xlstm` package 2.0.
    """

    def __init__(self, layers: int, width: int, slstm_at: Sequence[int] = ()) -> None:
        """Builds `layers` blocks of `width` channels; those whose index is in `slstm_at` are sLSTM blocks."""
        if any(not 0 <= index < layers for index in slstm_at):
            raise ValueError(f"slstm_at {list(slstm_at)} names a block outside 0..{layers - 1}")
        mlstm = xlstm.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS, proj_factor=2.0)
        slstm = xlstm.sLSTMBlockConfig(
            slstm=xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=HEADS, conv1d_kernel_size=4),
            feedforward=xlstm.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
        )
        super().__init__(
            xlstm.xLSTMBlockStackConfig(
                mlstm_block=xlstm.mLSTMBlockConfig(mlstm=mlstm),
                slstm_block=slstm if slstm_at else None,
                # The package allocates a causal mask of context_length², which nothing here reads.
                context_length=1,
                num_blocks=layers,
                embedding_dim=width,
                slstm_at=list(slstm_at),
            )
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Returns the outputs (B, L, D) of whole sequences."""
        return self._run(x_BLD, None, keep=False)[0]

    def step(self, x_BKD: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Returns the outputs (B, K, D) of the next K tokens, and the state after them."""
        return self._run(x_BKD, state, keep=True)

    def _run(self, x_BLD: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
        after = []
        for index, block in enumerate(self.blocks):
            run = _slstm if isinstance(block, xlstm.sLSTMBlock) else _mlstm
            before = None if state is None else state[index]
            y_BLD, block_state = run(block.xlstm, block.xlstm_norm(x_BLD), before, keep)
            x_BLD = x_BLD + y_BLD
            if block.ffn is not None:
                x_BLD = x_BLD + block.ffn(block.ffn_norm(x_BLD))
            after.append(block_state)
        return self.post_blocks_norm(x_BLD), after if keep else None


def _head_norm(h_BLNH: Tensor, norm: Any) -> Tensor:
    """Normalises every head on its own and joins them: the package's MultiHeadLayerNorm, shape (B, L, N·H)."""
    normed = F.layer_norm(h_BLNH, h_BLNH.shape[-1:], eps=norm.eps).flatten(2)
    return normed * norm.weight_proxy


# mLSTM ------------------------------------------------------------------------------------------------------------


def _heads(x_BLI: Tensor, weight_KOJ: Tensor) -> Tensor:
    """Multiplies by a block-diagonal matrix of 4 x 4 blocks, as `LinearHeadwiseExpand` does: heads (B, N, L, H).

    Four blocks are padded with zeros to one of 16 x 16: twice as fast on CPU as products of 4 x 4.
    """
    blocks, out, inner = weight_KOJ.shape
    join = math.gcd(blocks // HEADS, 4)
    eye = torch.eye(join, dtype=weight_KOJ.dtype, device=weight_KOJ.device)
    joined = torch.einsum("naoj,ab->najbo", weight_KOJ.view(-1, join, out, inner), eye)
    joined = joined.reshape(blocks // join, join * inner, join * out)
    x_nMj = x_BLI.reshape(-1, blocks // join, join * inner).transpose(0, 1)
    y_NnBLo = torch.bmm(x_nMj, joined).view(HEADS, -1, *x_BLI.shape[:2], join * out)
    return y_NnBLo.permute(2, 0, 3, 1, 4).flatten(3)


def _mlstm(layer: xlstm.mLSTMLayer, x_BLD: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
    """One mLSTM layer on normed inputs, arXiv 2405.04517 section 2.3; `xlstm.blocks.mlstm.layer`."""
    u_BLI, z_BLI = layer.proj_up(x_BLD).chunk(2, dim=-1)
    conv, cell = layer.conv1d.conv, layer.mlstm_cell
    c_BLI, tail = causal_conv(u_BLI, conv.weight, conv.bias, state["conv"] if state else None)

    q_KOJ, k_KOJ, v_KOJ = layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight
    q, k, v = _heads(c_BLI, q_KOJ), _heads(c_BLI, k_KOJ), _heads(u_BLI, v_KOJ)
    # The gates read q, k and v, which are linear in c and u: the small product of the weights comes first.
    gates_GPKO = torch.cat([cell.igate.weight, cell.fgate.weight]).unflatten(-1, (3, *q_KOJ.shape[:2]))
    by_q, by_k, by_v = (
        torch.einsum("gko,koj->gkj", gate, weight).flatten(1)
        for gate, weight in zip(gates_GPKO.unbind(1), (q_KOJ, k_KOJ, v_KOJ))
    )
    bias = torch.cat([cell.igate.bias, cell.fgate.bias])
    gates_BLG = F.linear(c_BLI, by_q + by_k) + F.linear(u_BLI, by_v, bias)
    i_BNL, f_BNL = gates_BLG.transpose(1, 2).chunk(2, dim=1)

    h_BNLH, memory = mlstm_cell(q, k, v, i_BNL, f_BNL, state["memory"] if state else None, keep)
    h_BLI = _head_norm(h_BNLH.transpose(1, 2), cell.outnorm)
    y_BLD = layer.proj_down((h_BLI + layer.learnable_skip * c_BLI) * F.silu(z_BLI))
    return y_BLD, {"conv": tail, "memory": memory} if keep else None


def mlstm_cell(
    q_BNLH: Tensor,
    k_BNLH: Tensor,
    v_BNLH: Tensor,
    i_BNL: Tensor,
    f_BNL: Tensor,
    memory: Memory | None = None,
    keep: bool = True,
    chunk: int | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Memory | None]:
    """Runs the mLSTM over a sequence, chunk by chunk: parallel inside a chunk, the matrix memory carried between them.

    Inside a chunk with F the running sum of log sigmoid(f), token s weighs exp(i_s - F_s + F_t) at token t. All
    weights of row t are divided by exp(m_t), m_t = F_t + G_t, where G_t is the running maximum of i_s - F_s and of the
    memory's m: F_t cancels, what is left is exp(g_s - G_t) with g = i - F (the parallel form of arXiv 2405.04517, with
    the row maximum found in O(L)).

    Args:
        q_BNLH: Queries.
        k_BNLH: Keys.
        v_BNLH: Values.
        i_BNL: Input gates before exp.
        f_BNL: Forget gates before sigmoid.
        memory: C (B, N, H, H) and n (B, N, H), both divided by exp(m), and m (B, N, 1); None at the start.
        keep: Whether the memory after the last token is wanted.
        chunk: Tokens a chunk; by default what measures fastest for the head's width.
        eps: Added to the normaliser, as the package does.

    Returns:
        Outputs (B, N, L, H), and the memory after the last token (None unless `keep`).
    """
    if kernel := kernels.for_mlstm(q_BNLH):
        return kernels.mlstm(kernel, (q_BNLH, k_BNLH, v_BNLH), i_BNL, f_BNL, memory, keep, eps)
    length, width = q_BNLH.shape[-2:]
    scale = 1 / math.sqrt(width)
    # Equal chunks of at most max(64, H) tokens: beyond, the L x L part costs more than carrying the memory.
    chunk = chunk or math.ceil(length / math.ceil(length / max(64, width)))
    outputs, read = [], 0
    # One split each: slices would fill a gradient of the full length per chunk.
    parts = (part.split(chunk, dim=2) for part in (q_BNLH, k_BNLH, v_BNLH, i_BNL, F.logsigmoid(f_BNL)))
    for q, k, v, i, logf in zip(*parts):
        read += q.shape[2]
        sumf = logf.cumsum(-1)
        g = i - sumf
        # The stabiliser cancels in what is read, so no gradient needs to flow through it.
        top = g.detach().cummax(-1).values
        if memory is not None:
            top = torch.maximum(top, memory[2].detach())
        sums, norm = _Decayed.apply(q, k, v, g, top, scale)
        if memory is not None:
            c, n, m = memory
            q = q * (scale * (m - top).exp())[..., None]
            sums, norm = sums + q @ c, norm + (q @ n[..., None])[..., 0]
        # Where no input gate has opened yet, exp would be inf and its gradient nan: exp(80) gives the same 0.
        floor = (-sumf - top).clamp(max=80).exp()
        outputs.append(sums * (1 / (torch.maximum(norm.abs(), floor) + eps))[..., None])
        if keep or read < length:
            last = top[..., -1:]
            k = k * (g - last).exp()[..., None]
            after_c, after_n = k.transpose(-1, -2) @ v, k.sum(-2)
            if memory is not None:
                fade = (m - last).exp()
                after_c, after_n = after_c + c * fade[..., None], after_n + n * fade
            memory = after_c, after_n, sumf[..., -1:] + last
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2), memory if keep else None


class _Decayed(torch.autograd.Function):
    """Sums over s <= t of w_ts v_s, and of w_ts = (q_t · k_s) exp(g_s - top_t) scale.

    Saves two L x L matrices instead of autograd's six.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, top: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        decay = (g[..., None, :] - (top[..., :, None] - math.log(scale))).exp_().tril_()
        weights = (q @ k.transpose(-1, -2)).mul_(decay)
        ctx.save_for_backward(q, k, v, decay, weights)
        return weights @ v, weights.sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_sums, d_norm = grads
        q, k, v, decay, weights = ctx.saved_tensors
        d_v = weights.transpose(-1, -2) @ d_sums
        d_scores = (d_sums @ v.transpose(-1, -2)).add_(d_norm[..., None]).mul_(decay)
        # sum over t of d(weights)_ts weights_ts, without another L x L product.
        d_g = (v * d_v).sum(-1) + (weights.transpose(-1, -2) @ d_norm[..., None])[..., 0]
        return d_scores @ k, d_scores.transpose(-1, -2) @ q, d_v, d_g, None, None


# sLSTM ------------------------------------------------------------------------------------------------------------


def _slstm(layer: xlstm.sLSTMLayer, x_BLD: Tensor, state: State, keep: bool) -> tuple[Tensor, State]:
    """One sLSTM layer on normed inputs, arXiv 2405.04517 section 2.2; `xlstm.blocks.slstm.layer`."""
    batch, length, width = x_BLD.shape
    conv, cell = layer.conv1d.conv, layer.slstm_cell
    c_BLD, tail = causal_conv(x_BLD, conv.weight, conv.bias, state["conv"] if state else None)

    # The loop wants the batch innermost: each gate of a head is then one contiguous run of H·B numbers.
    def to_lnhb(part: Tensor) -> Tensor:
        return part.view(batch, length, HEADS, -1).permute(1, 2, 3, 0)

    # The package feeds the weights named `fgate` to the input gate and `igate` to the forget gate.
    from_conv = torch.cat([layer.fgate.weight, layer.igate.weight], dim=1)
    from_input = torch.cat([layer.zgate.weight, layer.ogate.weight], dim=1)
    x_LNGB = torch.cat([from_conv @ to_lnhb(c_BLD), from_input @ to_lnhb(x_BLD)], dim=2)
    bias = cell._bias.view(4, HEADS, -1).transpose(0, 1).reshape(HEADS, -1, 1)

    if state:
        y0, c0, logn0 = (state[key].view(batch, HEADS, -1).permute(1, 2, 0) for key in ("y", "c", "logn"))
        # An empty memory has weight 0, log weight -inf; zeros are what a reset leaves, so the flag tells them apart.
        logn0 = logn0.masked_fill(state["started"][:, 0] == 0, -math.inf)
    else:
        y0 = c0 = x_LNGB.new_zeros(HEADS, width // HEADS, batch)
        logn0 = torch.full_like(y0, -math.inf)
    with torch.autocast(x_BLD.device.type, enabled=False):
        dtype = cell._recurrent_kernel.dtype
        x_LNGB = x_LNGB.to(dtype) + bias
        inputs = (x_LNGB, cell._recurrent_kernel, y0.to(dtype), c0.to(dtype), logn0.to(dtype))
        kernel = kernels.for_slstm(x_LNGB)
        y_LNHB, c1, logn1 = kernels.slstm(kernel, *inputs) if kernel else _recur(*inputs)
    out = _head_norm(y_LNHB.permute(3, 0, 1, 2), layer.group_norm)
    if not keep:
        return out, None
    # A copy, since at batch 1 the last output would be a view that keeps all of them.
    y1, c1, logn1 = (part.permute(2, 0, 1).flatten(1) for part in (y_LNHB[-1].clone(), c1, logn1))
    return out, {"conv": tail, "y": y1, "c": c1, "logn": logn1, "started": torch.ones_like(y1[:, :1])}


class _SLSTM(torch.autograd.Function):
    """The sLSTM recurrence as one autograd node, with its backward pass by hand.

    With c the cell *divided by* the normaliser n, and log n carried in place of the package's (n, m):
        raw_t = x_t + R y_{t-1} = (i, f, z, o)
        log n_t = log(exp(i) + sigmoid(f) n_{t-1}),  p = exp(i) / n_t
        c_t = c_{t-1} + p (tanh(z) - c_{t-1}),  y_t = sigmoid(o) c_t
    These are the equations of arXiv 2405.04517 section 2.2 with c / n as the variable: p is a sigmoid, none overflows,
    no stabiliser is needed, and no condition on the batch decides how a first token is treated.

    Shapes: x_LNGB gates before the nonlinearities, G = 4H in the order i, f, z, o; R_NGH; y, c, log n (N, H, B).
    """

    @staticmethod
    def forward(ctx: Any, x_LNGB: Tensor, r_NGH: Tensor, y: Tensor, c: Tensor, logn: Tensor) -> Any:
        ctx.set_materialize_grads(True)
        raw_LNGB = x_LNGB.clone(memory_format=torch.contiguous_format)
        length, width = len(raw_LNGB), r_NGH.shape[-1]
        y_LNHB = raw_LNGB.new_empty(length, *y.shape)
        c_LNHB, p_LNHB = torch.empty_like(y_LNHB), torch.empty_like(y_LNHB)
        y0 = y
        for t in range(length):
            raw = torch.baddbmm(raw_LNGB[t], r_NGH, y, out=raw_LNGB[t])
            i, f, z, o = raw.split(width, dim=1)
            logf = F.logsigmoid(f)
            logp = F.logsigmoid(i - logf - logn)
            logn = i - logp
            p = torch.exp(logp, out=p_LNHB[t])
            c = torch.lerp(c, z.tanh_(), p, out=c_LNHB[t])
            y = torch.mul(o.sigmoid_(), c, out=y_LNHB[t])
        ctx.save_for_backward(raw_LNGB, r_NGH, y0, y_LNHB, c_LNHB, p_LNHB)
        return y_LNHB, c.clone(), logn

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        grad_LNHB, d_c, d_logn = grads
        raw_LNGB, r_NGH, y0, y_LNHB, c_LNHB, p_LNHB = ctx.saved_tensors
        length, width = len(raw_LNGB), r_NGH.shape[-1]
        _, f, z, o = raw_LNGB.split(width, dim=2)
        # Everything that does not depend on later gradients is done for all tokens at once.
        for_f, for_z, for_o = torch.sigmoid(-f), p_LNHB * (1 - z * z), y_LNHB * (1 - o)
        for_p, keep_LNHB = p_LNHB * (z - c_LNHB), 1 - p_LNHB
        d_raw_LNGB = torch.empty_like(raw_LNGB)
        r_NHG = r_NGH.transpose(1, 2).contiguous()
        d_y = torch.zeros_like(y0)
        for t in range(length - 1, -1, -1):
            d_i, d_f, d_z, d_o = d_raw_LNGB[t].split(width, dim=1)
            d_y = d_y + grad_LNHB[t]
            d_c = torch.addcmul(d_c, d_y, o[t])
            torch.mul(d_y, for_o[t], out=d_o)
            torch.mul(d_c, for_z[t], out=d_z)
            torch.addcmul(d_c * for_p[t], p_LNHB[t], d_logn, out=d_i)
            d_logn = d_logn - d_i
            torch.mul(d_logn, for_f[t], out=d_f)
            d_c = d_c * keep_LNHB[t]
            d_y = torch.bmm(r_NHG, d_raw_LNGB[t])
        before = torch.cat([y0[None], y_LNHB[:-1]])
        d_r = torch.einsum("lngb,lnhb->ngh", d_raw_LNGB, before)
        return d_raw_LNGB, d_r, d_y, d_c, d_logn


# Compiled, its loop over tokens would be unrolled, which takes many minutes.
_recur = torch.compiler.disable(_SLSTM.apply)
