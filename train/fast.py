"""A policy prepared for acting: what `Policy.step` computes, in half the time on a CPU.

    fast = FastPolicy(policy)                                       # or FastPolicy(policy, "int8")
    logits_BKV, state = fast.step(states, returns_to_go_BK, prev_rewards_BK, state)

What depends on weights alone is computed once (block-diagonal matrices joined, the products behind the gates), weights
lie in memory as a product of few rows wants them, and the state is written **in place**: fresh memory for it costs more
than the arithmetic. So a state that was handed in is the state after the step, and is no longer the one before.
States are those of `Policy.step`: a long prefix is read by that, in chunks, and acting goes on here.

Weights may also be bfloat16 (half the memory to read at each step) or int8 (a quarter, one scale an output channel,
inputs quantised as they come; CPU only); then logits differ in the second or third digit. DT keeps its own step, with
lighter weights only. Given up: gradients, and the memory of a second copy of the weights.

Shapes: B batch, L tokens, D width, I inner width, N heads, H channels a head, K steps or blocks, J channels a block.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
import xlstm
from torch import Tensor, nn

from lram.model.mamba import CONV_WIDTH, STATE_SIZE
from lram.model.policy import Policy
from lram.model.state import State
from lram.model.xlstm import HEADS

Weights = Literal["float32", "bfloat16", "int8"]
SMALL = 2**17
"""Matrices of fewer numbers keep float32: they cost little, and Mamba's step sizes hang on them."""
HEADROOM = 15.0
"""Largest logarithm of an input's weight before xLSTM's memory is scaled anew: e^15 is far from float32's e^88."""
BLOCK = 16
"""Width of the joined blocks of q, k and v: products of 16 x 16 are twice as fast as of 4 x 4."""


class FastPolicy(nn.Module):
    """Acts as the policy it was made of.

    Attributes:
        settings: The policy's.
    """

    def __init__(self, policy: Policy, weights: Weights = "float32") -> None:
        """Copies and prepares the weights of a policy."""
        super().__init__()
        self.settings = policy.settings
        policy = copy.deepcopy(policy).eval().requires_grad_(False)
        self.head: nn.Module = policy.head
        self.backbone: Any = policy.backbone
        if self.settings.backbone == "xlstm":
            blocks = (SLSTM(b) if isinstance(b, xlstm.sLSTMBlock) else MLSTM(b) for b in self.backbone.blocks)
            self.backbone = Stack(blocks, self.backbone.post_blocks_norm)
        elif self.settings.backbone == "mamba":
            self.backbone = Stack(map(MambaLayer, self.backbone.layers), self.backbone.norm_f)
        lighten(self, weights)
        del policy.backbone, policy.head
        self.encoders = policy

    @torch.inference_mode()
    def step(
        self,
        states: Tensor,
        returns_to_go_BK: Tensor,
        prev_rewards_BK: Tensor,
        state: State = None,
        prev_actions: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Returns the logits (B, K, V) of the next few environment steps, and the state, changed in place."""
        tokens = self.encoders.tokens(states, returns_to_go_BK, prev_rewards_BK, prev_actions)
        y_BLD, state = self.backbone.step(tokens, state)
        count = self.settings.tokens_per_step
        return self.head(y_BLD[:, count - 1 :: count]), state


class Graphed:
    """One step of a recurrent `FastPolicy` as a CUDA graph: one launch in place of hundreds. Untested: no GPU at hand.

    Attributes:
        state: The state of all slots; `reset_state`'s result is to be copied into it, since the graph holds its place.
    """

    def __init__(self, fast: FastPolicy, states: Tensor, scalar_B1: Tensor) -> None:
        """Captures a step of inputs like these, CUDA tensors; the state starts at zero."""
        self.inputs = states.clone(), scalar_B1.clone(), scalar_B1.clone()
        self.state = fast.backbone.start(len(states))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                fast.step(*self.inputs, self.state)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits, _ = fast.step(*self.inputs, self.state)
        for tensor in tensors_of(self.state):
            tensor.zero_()

    def step(self, states: Tensor, returns_B1: Tensor, rewards_B1: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Returns the logits, overwritten by the next step, and the state; one handed in is copied into it."""
        for place, value in zip(self.inputs, (states, returns_B1, rewards_B1)):
            place.copy_(value)
        if state is not None and state is not self.state:
            for own, given in zip(tensors_of(self.state), tensors_of(state), strict=True):
                own.copy_(given)
        self.graph.replay()
        return self.logits, self.state


def tensors_of(state: State) -> list[Tensor]:
    """Returns the tensors of a state, in order."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state
    return [tensor for part in parts for tensor in tensors_of(part)]


class Stack(nn.Module):
    """Blocks one after the other, each with its residual inside, and a last norm."""

    def __init__(self, blocks: Any, norm: nn.Module) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = norm

    def start(self, batch: int) -> State:
        """Returns the state before the first token: all zeros."""
        return [block.start(batch) for block in self.blocks]

    def step(self, x_BLD: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Returns the outputs (B, L, D) of the next few tokens, and the state, changed in place."""
        state = self.start(len(x_BLD)) if state is None else state
        for block, own in zip(self.blocks, state):
            x_BLD = block(x_BLD, own)
        return self.norm(x_BLD), state


class _Conv(nn.Module):
    """`causal_conv` with its taps laid out for few tokens."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.taps = _fixed(conv.weight[:, 0].t())
        self.bias = _fixed(conv.bias)

    def forward(self, x_BLI: Tensor, tail_BTI: Tensor) -> Tensor:
        length, taps = x_BLI.shape[1], len(self.taps)
        padded = torch.cat([tail_BTI, x_BLI], dim=1)
        tail_BTI.copy_(padded[:, length:])
        y_BLI = torch.addcmul(self.bias, padded[:, :length], self.taps[0])
        for tap in range(1, taps):
            y_BLI.addcmul_(padded[:, tap : tap + length], self.taps[tap])
        return F.silu(y_BLI)


def _fixed(tensor: Any) -> nn.Parameter:
    """Returns a contiguous copy that is no part of any graph, and moves with its module."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)


# xLSTM ------------------------------------------------------------------------------------------------------------


class MLSTM(nn.Module):
    """One mLSTM block; the equations are those of `lram.model.xlstm.mlstm_cell` for a single chunk."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        layer, cell = block.xlstm, block.xlstm.mlstm_cell
        self.norm, self.up, self.down = block.xlstm_norm, layer.proj_up, layer.proj_down
        self.conv = _Conv(layer.conv1d.conv)
        self.inner = layer.proj_down.in_features
        q_KOJ, k_KOJ, v_KOJ = layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight
        scale = (self.inner // HEADS) ** -0.5
        self.qk = _fixed(torch.cat([_joined(q_KOJ) * scale, _joined(k_KOJ)], dim=-1))
        self.v = _fixed(_joined(v_KOJ))
        # The gates read q, k and v, which are linear in the convolution's output and its input.
        gates_GPKO = torch.cat([cell.igate.weight, cell.fgate.weight]).unflatten(-1, (3, *q_KOJ.shape[:2]))
        by_q, by_k, by_v = (
            torch.einsum("gko,koj->gkj", gate, weight).flatten(1)
            for gate, weight in zip(gates_GPKO.unbind(1), (q_KOJ, k_KOJ, v_KOJ))
        )
        self.gates_of_conv, self.gates_of_input = _fixed((by_q + by_k).t()), _fixed(by_v.t())
        self.gates_bias = _fixed(torch.cat([cell.igate.bias, cell.fgate.bias]))
        self.gain, self.eps = _fixed(cell.outnorm.weight_proxy), cell.outnorm.eps
        self.skip = _fixed(layer.learnable_skip)

    def start(self, batch: int) -> State:
        """Returns the state before the first token."""
        width = self.inner // HEADS
        zeros = self.skip.new_zeros
        memory = zeros(batch, HEADS, width, width), zeros(batch, HEADS, width), zeros(batch, HEADS, 1)
        return {"conv": zeros(batch, CONV_WIDTH - 1, self.inner), "memory": memory}

    def _heads(self, x_BLI: Tensor, joined_KJO: Tensor, parts: int) -> Tensor:
        """Multiplies by block-diagonal matrices: (parts, B, N, L, H)."""
        batch, length, _ = x_BLI.shape
        blocks = len(joined_KJO)
        y = torch.bmm(x_BLI.reshape(batch * length, blocks, -1).transpose(0, 1), joined_KJO)
        y = y.view(HEADS, blocks // HEADS, batch, length, parts, -1).permute(4, 2, 0, 3, 1, 5)
        return y.reshape(parts, batch, HEADS, length, -1)

    def forward(self, x_BLD: Tensor, state: State) -> Tensor:
        """Returns the outputs (B, L, D), the residual added, and changes the state in place."""
        u_BLI, z_BLI = self.up(self.norm(x_BLD)).chunk(2, dim=-1)
        c_BLI = self.conv(u_BLI, state["conv"])
        q, k = self._heads(c_BLI, self.qk, 2).unbind(0)
        v = self._heads(u_BLI, self.v, 1)[0]
        gates_BLG = c_BLI @ self.gates_of_conv + u_BLI @ self.gates_of_input + self.gates_bias
        i, f = gates_BLG.transpose(1, 2).chunk(2, dim=1)

        c, n, m = state["memory"]
        sumf = F.logsigmoid(f).cumsum(-1)
        g = i - sumf
        # Any stabiliser is right, and that of the last step spares scaling the memory: two of five passes over it.
        # A GPU would have to be waited for, and a compiled graph would break.
        look = not (m.is_cuda or torch.compiler.is_compiling())
        keep = look and bool((g.amax(-1, keepdim=True) - m).amax() <= HEADROOM)
        top = m.expand_as(g) if keep else torch.maximum(g.cummax(-1).values, m)
        decay_BNLL = (g[..., None, :] - top[..., None]).exp_().tril_()
        weights_BNLL = (q @ k.transpose(-1, -2)).mul_(decay_BNLL)
        if not keep:
            q = q * (m - top).exp_()[..., None]
        sums = (weights_BNLL @ v).add_(q @ c)
        norm = weights_BNLL.sum(-1).add_((q @ n[..., None])[..., 0])
        # Where no input gate has opened yet, exp would be inf: exp(80) gives the same 0.
        floor = (-sumf - top).clamp_(max=80).exp_()
        h = sums / (torch.maximum(norm.abs_(), floor).add_(1e-6))[..., None]

        last = top[..., -1:]
        k = k * decay_BNLL[..., -1, :, None]
        if not keep:
            fade = (m - last).exp_()
            c.mul_(fade[..., None])
            n.mul_(fade)
        c.flatten(0, 1).baddbmm_(k.transpose(-1, -2).flatten(0, 1), v.flatten(0, 1))
        n.add_(k.sum(-2))
        m.copy_(sumf[..., -1:] + last)

        h_BLI = F.layer_norm(h, h.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2) * self.gain
        return x_BLD + self.down(h_BLI.addcmul_(self.skip, c_BLI).mul_(F.silu(z_BLI)))


def _joined(weight_KOJ: Tensor) -> Tensor:
    """Returns blocks as wide as BLOCK with the small ones along their diagonals, (K', J', O')."""
    blocks, out, inner = weight_KOJ.shape
    join = min(BLOCK // inner, blocks // HEADS)
    eye = torch.eye(join, dtype=weight_KOJ.dtype, device=weight_KOJ.device)
    joined = torch.einsum("kaoj,ab->kajbo", weight_KOJ.detach().view(-1, join, out, inner), eye)
    return joined.reshape(blocks // join, join * inner, join * out)


class SLSTM(nn.Module):
    """One sLSTM block; the equations are those of `lram.model.xlstm._SLSTM`."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        layer, cell = block.xlstm, block.xlstm.slstm_cell
        self.norm, self.ffn_norm, self.ffn = block.xlstm_norm, block.ffn_norm, block.ffn
        self.conv = _Conv(layer.conv1d.conv)
        # The package feeds the weights named `fgate` to the input gate and `igate` to the forget gate.
        self.of_conv = _fixed(torch.cat([layer.fgate.weight, layer.igate.weight], dim=1))
        self.of_input = _fixed(torch.cat([layer.zgate.weight, layer.ogate.weight], dim=1))
        self.bias = _fixed(cell._bias.view(4, HEADS, -1).transpose(0, 1).reshape(HEADS, -1, 1))
        self.recurrent = _fixed(cell._recurrent_kernel)
        self.gain, self.eps = _fixed(layer.group_norm.weight_proxy), layer.group_norm.eps

    def start(self, batch: int) -> State:
        """Returns the state before the first token."""
        width = len(self.gain)
        zeros = self.gain.new_zeros
        parts = {key: zeros(batch, width) for key in ("y", "c", "logn")}
        return {"conv": zeros(batch, CONV_WIDTH - 1, width), **parts, "started": zeros(batch, 1)}

    def forward(self, x_BLD: Tensor, state: State) -> Tensor:
        """Returns the outputs (B, L, D), the residual added, and changes the state in place."""
        batch, length, _ = x_BLD.shape
        normed = self.norm(x_BLD)

        def to_lnhb(part: Tensor) -> Tensor:
            return part.view(batch, length, HEADS, -1).permute(1, 2, 3, 0)

        c_BLD = self.conv(normed, state["conv"])
        raw = torch.cat([self.of_conv @ to_lnhb(c_BLD), self.of_input @ to_lnhb(normed)], dim=2) + self.bias
        y, c, logn = (state[key].view(batch, HEADS, -1).permute(1, 2, 0) for key in ("y", "c", "logn"))
        logn = logn.masked_fill(state["started"][:, 0] == 0, -torch.inf)
        outputs = []
        for token in raw:
            i, f, z, o = torch.baddbmm(token, self.recurrent, y).chunk(4, dim=1)
            logp = F.logsigmoid(i - F.logsigmoid(f) - logn)
            logn = i - logp
            c = torch.lerp(c, z.tanh(), logp.exp())
            y = o.sigmoid() * c
            outputs.append(y)
        for key, part in zip(("y", "c", "logn"), (y, c, logn)):
            state[key].copy_(part.permute(2, 0, 1).flatten(1))
        state["started"].fill_(1)
        y_BLNH = torch.stack(outputs).permute(3, 0, 1, 2)
        x_BLD = x_BLD + F.layer_norm(y_BLNH, y_BLNH.shape[-1:], eps=self.eps).flatten(2) * self.gain
        return x_BLD + self.ffn(self.ffn_norm(x_BLD))


# Mamba ------------------------------------------------------------------------------------------------------------


class MambaLayer(nn.Module):
    """One Mamba layer; the equations are those of `lram.model.mamba.selective_scan`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, mixer = layer.norm, layer.mixer
        self.in_proj, self.out_proj = mixer.in_proj, mixer.out_proj
        self.x_proj, self.dt_proj = mixer.x_proj, mixer.dt_proj
        self.conv = _Conv(mixer.conv1d)
        self.a_NI = _fixed(-torch.exp(mixer.A_log).t())
        self.skip = _fixed(mixer.D)
        self.sizes = [mixer.dt_proj.in_features, STATE_SIZE, STATE_SIZE]

    def start(self, batch: int) -> State:
        """Returns the state before the first token."""
        zeros, inner = self.skip.new_zeros, len(self.skip)
        return {"conv": zeros(batch, CONV_WIDTH - 1, inner), "ssm": zeros(batch, STATE_SIZE, inner)}

    def forward(self, x_BLD: Tensor, state: State) -> Tensor:
        """Returns the outputs (B, L, D), the residual added, and changes the state in place."""
        u_BLI, z_BLI = self.in_proj(self.norm(x_BLD)).chunk(2, dim=-1)
        u_BLI = self.conv(u_BLI, state["conv"])
        dt_BLR, b_BLN, c_BLN = self.x_proj(u_BLI).split(self.sizes, dim=-1)
        dt_BLI = F.softplus(self.dt_proj(dt_BLR))
        decay_BLNI = (dt_BLI[:, :, None] * self.a_NI).exp_()
        # Every state in turn overwrites what was added to it.
        h_BLNI = b_BLN[..., None] * (dt_BLI * u_BLI)[:, :, None]
        h_BNI = state["ssm"]
        for token in range(h_BLNI.shape[1]):
            h_BNI = h_BLNI[:, token].addcmul_(decay_BLNI[:, token], h_BNI)
        state["ssm"].copy_(h_BNI)
        y_BLI = (c_BLN[:, :, None] @ h_BLNI)[:, :, 0].addcmul_(u_BLI, self.skip)
        return x_BLD + self.out_proj(y_BLI.mul_(F.silu(z_BLI)))


# Weights ----------------------------------------------------------------------------------------------------------


class _Float(nn.Module):
    """A linear layer whose matrix lies input first: a quarter faster for a few rows on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.matrix = _fixed(linear.weight.t())
        self.bias = None if linear.bias is None else _fixed(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.matrix
        return y if self.bias is None else y.add_(self.bias)


class _BFloat16(nn.Module):
    """A linear layer in bfloat16, between float32 inputs and outputs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = _fixed(linear.weight.bfloat16())
        self.bias = None if linear.bias is None else _fixed(linear.bias.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias).float()


def _int8(linear: nn.Linear) -> nn.Module:
    """Returns PyTorch's dynamically quantised layer, one scale an output channel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has a successor, in a package of its own
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        return quantize_dynamic(nn.Sequential(linear), {nn.Linear: per_channel_dynamic_qconfig})[0]


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {"float32": _Float, "bfloat16": _BFloat16, "int8": _int8}


def lighten(module: nn.Module, weights: Weights) -> None:
    """Replaces the large linear layers inside a module by others of the same results."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and child.weight.numel() >= SMALL:
            setattr(module, name, KINDS[weights](child))
        else:
            lighten(child, weights)
