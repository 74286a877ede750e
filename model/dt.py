"""Decision Transformer backbone: a GPT-2 stack with a key-value cache that stays exact when its window slides.

    backbone = DT(layers=4, width=512, heads=8, max_tokens=150)
    y_BLD = backbone(x_BLD)                             # training, L <= max_tokens
    y_BKD, state = backbone.step(x_BKD, state)          # control and prefill, any K

Positions are learned and absolute, so a cached key is right only as long as its token keeps its place. While the
tokens of a slot fit, `step` reads the cache; once they do not, the slot's window is its newest `max_tokens` tokens
including the K new ones, and it is encoded afresh: the result is that of `forward` on that window, at that price.
With K tokens an environment step and `max_tokens` a multiple of K, whole steps leave the window.

Shapes: B batch, L tokens, D width, N heads, H channels a head, W cached tokens, K new tokens, M max_tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lram.model.state import State


class DT(nn.Module):
    """GPT-2 without token embeddings and dropout.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", and `transformers`' GPT2Model, whose
    parameter names these are; Chen et al., "Decision Transformer", arXiv 2106.01345.
    """

    def __init__(self, layers: int, width: int, heads: int, max_tokens: int) -> None:
        """Builds `layers` blocks of `width` channels for windows of up to `max_tokens` tokens."""
        super().__init__()
        self.heads, self.max_tokens = heads, max_tokens
        self.wpe = nn.Embedding(max_tokens, width)
        self.h: Any = nn.ModuleList(_Block(width) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Returns the outputs (B, L, D) of whole sequences of at most `max_tokens` tokens."""
        length = x_BLD.shape[1]
        if length > self.max_tokens:
            raise ValueError(f"{length} tokens do not fit a context of {self.max_tokens}: raise max_steps")
        x_BLD = x_BLD + self.wpe.weight[:length]
        for block in self.h:
            q, k, v = self._heads(block.attn.c_attn(block.ln_1(x_BLD)))
            x_BLD = block.rest(x_BLD, F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.ln_f(x_BLD)

    def step(self, x_BKD: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Returns the outputs (B, K, D) of the next K tokens, and the state after them.

        The state is {"length": (B,), "tokens": (B, W, D), "kv": [(B, 2, N, W', H)]}, a slot's tokens flush right.
        """
        batch, count, width = x_BKD.shape
        if count > self.max_tokens:
            head, state = self.step(x_BKD[:, : self.max_tokens], state)
            tail, state = self.step(x_BKD[:, self.max_tokens :], state)
            return torch.cat([head, tail], dim=1), state
        if state is None:
            empty = x_BKD.new_zeros(batch, 2, self.heads, 0, width // self.heads)
            length = torch.zeros(batch, dtype=torch.int64, device=x_BKD.device)
            state = {"length": length, "tokens": x_BKD[:, :0], "kv": [empty for _ in self.h]}
        tokens = torch.cat([state["tokens"], x_BKD], dim=1)[:, -self.max_tokens :]
        full_B = state["length"] + count > self.max_tokens
        after = {
            "length": (state["length"] + count).clamp(max=self.max_tokens),
            "tokens": tokens,
            # A slot whose window slides never reads its cache again before it is reset.
            "kv": state["kv"],
        }
        if full_B.all():
            return self.forward(tokens)[:, -count:], after
        y_BKD, after["kv"] = self._append(x_BKD, state)
        if full_B.any():
            rows = full_B.nonzero()[:, 0]
            y_BKD = y_BKD.index_copy(0, rows, self.forward(tokens[rows])[:, -count:].to(y_BKD.dtype))
        return y_BKD, after

    def _append(self, x_BKD: Tensor, state: State) -> tuple[Tensor, list[Tensor]]:
        """Runs K new tokens against the cache: outputs (B, K, D), and the longer cache of every layer."""
        count = x_BKD.shape[1]
        new_K = torch.arange(count, device=x_BKD.device)
        # Slots whose window slides are overwritten by the caller; the clamp keeps their positions legal until then.
        position_BK = (state["length"][:, None] + new_K).clamp(max=self.max_tokens - 1)
        x_BKD = x_BKD + self.wpe(position_BK)
        # Columns count from the first new token: a slot's own are those from -length up to the querying token.
        cached = state["kv"][0].shape[3]
        column_W = torch.arange(-cached, count, device=x_BKD.device)
        own_BKW = (column_W <= new_K[:, None]) & (column_W >= -state["length"][:, None, None])
        caches = []
        for block, before in zip(self.h, state["kv"]):
            q, k, v = self._heads(block.attn.c_attn(block.ln_1(x_BKD)))
            cache = torch.cat([before, torch.stack([k, v], dim=1).to(before.dtype)], dim=3)
            k, v = cache.to(q.dtype).unbind(1)
            x_BKD = block.rest(x_BKD, F.scaled_dot_product_attention(q, k, v, attn_mask=own_BKW[:, None]))
            caches.append(cache[:, :, :, -self.max_tokens :])
        return self.ln_f(x_BKD), caches

    def _heads(self, qkv: Tensor) -> list[Tensor]:
        """Splits (B, L, 3D) into queries, keys and values, each (B, N, L, H)."""
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn: Any = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.ln_2 = nn.LayerNorm(width)
        self.mlp: Any = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def rest(self, x_BLD: Tensor, attended_BNLH: Tensor) -> Tensor:
        """Adds what the heads read, then the MLP."""
        x_BLD = x_BLD + self.attn.c_proj(attended_BNLH.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp.c_fc(self.ln_2(x_BLD)), approximate="tanh")
        return x_BLD + self.mlp.c_proj(hidden)
