"""GPU kernels of other packages behind the signatures of our own functions, which run where these cannot.

They are taken by themselves on CUDA tensors: `mlstm_kernels` (Triton) and `xlstm`'s sLSTM (compiled at first use) come
with the package, `mamba_ssm` and `causal_conv1d` with the extra `gpu`. `ENABLED = False` turns all off. Given up: the
last digits. Triton multiplies in TF32 or bfloat16 and leaves out the mLSTM normaliser's gradient, which the norm that
follows cancels; gradients do not flow into the last state of Mamba's scan.

Shapes: B batch, L tokens, N heads, H channels a head, G = 4H gates, I inner width, W taps.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ENABLED = True


def find(x: Tensor, module: str, name: str) -> Any:
    """Returns a function of another package for a CUDA tensor, None where there is none or kernels are off."""
    return _imported(module, name) if ENABLED and x.is_cuda else None


@functools.cache
def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def for_mlstm(q_BNLH: Tensor) -> Any:
    """Returns the Triton mLSTM; it reads past the end of heads that are not blocks of 64 channels, or 16 or 32."""
    width = q_BNLH.shape[-1]
    fits = (width % 64 == 0 or width in (16, 32)) and q_BNLH.dtype != torch.float64
    return find(q_BNLH, "mlstm_kernels.torch.chunkwise", "mlstm_chunkwise__xl_chunk") if fits else None


def mlstm(
    kernel: Callable[..., Any],
    qkv_BNLH: tuple[Tensor, Tensor, Tensor],
    i_BNL: Tensor,
    f_BNL: Tensor,
    memory: tuple[Tensor, Tensor, Tensor] | None,
    keep: bool,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """Runs a chunkwise kernel of `mlstm_kernels` on any length; arguments and results are those of `mlstm_cell`."""
    length = i_BNL.shape[-1]
    # Whole chunks of a power of two, 16 at least; what fills up leaves the memory as it is: forget gate 1, input 0.
    chunk = min(64, max(16, 2 ** (length - 1).bit_length()))
    fill = -length % chunk
    q, k, v = (F.pad(part, (0, 0, 0, fill)) for part in qkv_BNLH)
    i, f = F.pad(i_BNL.float(), (0, fill), value=-25.0), F.pad(f_BNL.float(), (0, fill), value=25.0)
    before = dict(zip(("c_initial", "n_initial", "m_initial"), memory or ()))
    # Autocast would round the gates too.
    with torch.autocast(q.device.type, enabled=False):
        result = kernel(q, k, v, i, f, **before, return_last_states=keep, eps=eps, chunk_size=chunk)
    h_BNLH, memory = result if keep else (result, None)
    return h_BNLH[:, :, :length], memory


@functools.cache
def _slstm_module(width: int, heads: int) -> Any:
    from xlstm.blocks.slstm.cell import sLSTMCellConfig, sLSTMCellFuncGenerator

    settings = {"dtype": "float32", "enable_automatic_mixed_precision": False}
    try:
        return sLSTMCellFuncGenerator(True, sLSTMCellConfig(hidden_size=width, num_heads=heads, **settings))
    except Exception as error:  # whatever a missing compiler does
        warnings.warn(f"xlstm's CUDA kernel for sLSTM does not build, PyTorch runs instead: {error}", stacklevel=2)
        return None


def for_slstm(x_LNGB: Tensor) -> Any:
    """Returns xlstm's CUDA sLSTM for heads as wide as these, None where it does not build."""
    _, heads, gates, _ = x_LNGB.shape
    return _slstm_module(heads * gates // 4, heads) if ENABLED and x_LNGB.is_cuda else None


def slstm(kernel: Any, x_LNGB: Tensor, r_NGH: Tensor, y: Tensor, c: Tensor, logn: Tensor) -> tuple[Tensor, ...]:
    """Runs the package's sLSTM; arguments and results are those of `_SLSTM`."""
    length, heads, gates, batch = x_LNGB.shape
    # The package carries c, n and m with c / n what we call c, and log n + m what we call log n; n = 0 is the start.
    started = logn > -torch.inf
    before = torch.stack([y, c, started.to(y.dtype), logn.where(started, 0)]).permute(0, 3, 1, 2).flatten(2)
    x_LBG = x_LNGB.permute(0, 3, 1, 2).flatten(2)
    bias = x_LBG.new_zeros(x_LBG.shape[-1])
    r_NHG = r_NGH.transpose(1, 2)
    states = kernel.apply(torch.is_grad_enabled(), *(p.contiguous() for p in (x_LBG, before, r_NHG, bias)))
    y_, c_, n_, m_ = states.view(4, length + 1, batch, heads, gates // 4).permute(0, 1, 3, 4, 2)
    return y_[1:], c_[-1] / n_[-1], n_[-1].log() + m_[-1]


def scan(
    kernel: Callable[..., Any], u: Tensor, dt: Tensor, a_IN: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs `mamba_ssm`'s scan from an empty state; arguments and results are those of `selective_scan`."""
    u, dt, b, c = (part.to(u.dtype).transpose(1, 2) for part in (u, dt, b, c))
    y, h_BIN = kernel(u, dt, a_IN, b, c, return_last_state=True)
    return y.transpose(1, 2), h_BIN.transpose(1, 2)
