"""The backbones against their alternatives: the package's xLSTM, a plain loop for Mamba, torch.compile for all.

    rows = list(against_package("16M", 50, 20.0, torch.device("cpu")))

All take turns, update by update, on random tokens of three to a step; the best turn of each counts. On a GPU products
are in bfloat16, as in training, and kernels are compared with PyTorch.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import xlstm
from torch import Tensor

from lram.datasets.bench_loader import Row
from lram.model import kernels
from lram.model.mamba import STATE_SIZE, selective_scan
from lram.model.policy import SIZES, Policy, PolicySettings
from lram.model.xlstm import XLSTM

BACKBONES: dict[str, tuple[Any, bool]] = {
    "xLSTM [1:0]": ("xlstm", False),
    "xLSTM [7:1]": ("xlstm", True),
    "Mamba": ("mamba", False),
    "DT": ("dt", False),
}
COMPILE_SECONDS = 300
"""What torch.compile may take before it is given up."""


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _turns(contestants: dict[str, Callable[[], float]], seconds: float, device: torch.device) -> dict[str, list[float]]:
    """Lets all run in turn for some seconds; returns the best time of each, and the last number it returned."""
    for run in contestants.values():
        run()
    results = {name: [math.inf, 0.0] for name in contestants}
    until = time.perf_counter() + seconds * len(contestants) / 2
    turns = 0
    while turns < 2 or time.perf_counter() < until:
        for name, run in contestants.items():
            wait(device)
            began = time.perf_counter()
            number = run()
            wait(device)
            results[name] = [min(results[name][0], time.perf_counter() - began), number]
        turns += 1
    return results


def _stepper(module: Callable[[Tensor], Tensor], parameters: Any, x_BLD: Tensor) -> Callable[[], float]:
    """Returns a function that does one update of a backbone and returns its loss."""
    optimizer = torch.optim.AdamW(list(parameters), 1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=x_BLD.is_cuda):
            loss = module(x_BLD).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def package_stack(model: XLSTM, length: int) -> torch.nn.Module:
    """Returns the `xlstm` package's own stack of blocks with the same weights, for sequences of `length` tokens."""
    ours = model.config
    config = xlstm.xLSTMBlockStackConfig(
        mlstm_block=ours.mlstm_block,
        slstm_block=ours.slstm_block,
        context_length=length,
        num_blocks=ours.num_blocks,
        embedding_dim=ours.embedding_dim,
        slstm_at=ours.slstm_at,
    )
    stack = xlstm.xLSTMBlockStack(config)
    stack.load_state_dict(model.state_dict())
    return stack


def against_package(size: str, context: int, seconds: float, device: torch.device) -> Iterator[Row]:
    """Our xLSTM and the package's own, from the same weights, on the same input."""
    batch, length = (128 if device.type == "cuda" else 8), 3 * context
    layers, width = SIZES[size].layers, SIZES[size].width
    for label, slstm_at in (("[1:0]", ()), ("[7:1]", SIZES[size].slstm_at)):
        torch.manual_seed(0)
        model = XLSTM(layers, width, slstm_at)
        theirs = package_stack(model, length).to(device)
        model, x_BLD = model.to(device), torch.randn(batch, length, width).to(device)
        section = f"xLSTM {label}, {layers} × {width}, {batch} × {length} tokens, forward, backward, AdamW"
        runs = {
            "the xlstm package": _stepper(theirs, theirs.parameters(), x_BLD),
            "ours": _stepper(model, model.parameters(), x_BLD),
        }
        if device.type == "cuda":
            plain = XLSTM(layers, width, slstm_at).to(device)
            runs["ours, PyTorch alone"] = _without_kernels(_stepper(plain, plain.parameters(), x_BLD))
        results = _turns(runs, seconds, device)
        base, loss = results["the xlstm package"]
        for name, (took, last) in results.items():
            ratio, ours = base / took, name == "ours"
            text = f"{took * 1e3:,.0f} ms, loss {last:.6f}"
            equal = math.isclose(last, loss, rel_tol=1e-3)
            yield Row(
                section, name, text, ratio, "≥ 1×, same loss" if ours else "", ratio >= 1 and equal if ours else None
            )


def _without_kernels(run: Callable[[], float]) -> Callable[[], float]:
    def step() -> float:
        kernels.ENABLED = False
        try:
            return run()
        finally:
            kernels.ENABLED = True

    return step


def loop(u: Tensor, dt: Tensor, a_IN: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The scan as arXiv 2312.00752 writes it, a token at a time: what Mamba is without a kernel or a trick."""
    h_BIN = u.new_zeros(u.shape[0], *a_IN.shape)
    outputs = []
    for t in range(u.shape[1]):
        h_BIN = torch.exp(dt[:, t, :, None] * a_IN) * h_BIN + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
        outputs.append((h_BIN @ c[:, t, :, None])[..., 0])
    return torch.stack(outputs, 1)


def against_loop(size: str, context: int, seconds: float, device: torch.device) -> Iterator[Row]:
    """Mamba's scan and the loop that defines it, forward and backward."""
    batch, length, inner = 8, 3 * context, 2 * SIZES[size].width
    torch.manual_seed(0)
    u, dt = torch.randn(batch, length, inner), torch.rand(batch, length, inner) / 10
    a_IN, b, c = -torch.rand(inner, STATE_SIZE) * 16, *torch.randn(2, batch, length, STATE_SIZE)
    inputs = [part.to(device).requires_grad_() for part in (u, dt, a_IN, b, c)]

    def run(scan: Callable[..., Any]) -> Callable[[], float]:
        def step() -> float:
            y = scan(*inputs)
            total = (y[0] if isinstance(y, tuple) else y).square().mean()
            torch.autograd.grad(total, inputs)
            return total.item()

        return step

    results = _turns({"a loop over tokens": run(loop), "our scan": run(selective_scan)}, seconds, device)
    section = f"Mamba's scan, {batch} × {length} tokens × {inner} × {STATE_SIZE}, forward and backward"
    base, expected = results["a loop over tokens"]
    for name, (took, last) in results.items():
        ours = name == "our scan"
        met = base / took > 2 and math.isclose(last, expected, rel_tol=1e-3) if ours else None
        yield Row(section, name, f"{took * 1e3:,.0f} ms", base / took, "≥ 2×" if ours else "", met)


# torch.compile ----------------------------------------------------------------------------------------------------


def compiled(label: str, size: str, steps: int, seconds: float, device: torch.device) -> Iterator[Row]:
    """Eager and compiled in turns, in a process of its own that is ended when compiling takes too long."""
    section = f"torch.compile of the backbone, {size}, forward, backward, AdamW"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arguments = (there, label, size, steps, seconds, str(device))
    process = context.Process(target=_compile, args=arguments, daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(COMPILE_SECONDS + 3 * seconds):
            yield Row(section, label, f"given up: compiling takes more than {COMPILE_SECONDS} s")
            return
        took, best = here.recv()
    except EOFError:
        yield Row(section, label, "torch.compile failed: is there a C++ compiler?")
        return
    finally:
        process.kill()
        process.join()
    yield Row(section, f"{label}, eager", f"{best['eager'][0] * 1e3:,.0f} ms, loss {best['eager'][1]:.6f}", 1.0)
    text = f"{best['compiled'][0] * 1e3:,.0f} ms, loss {best['compiled'][1]:.6f}, {took:.0f} s to compile"
    yield Row(section, f"{label}, compiled", text, best["eager"][0] / best["compiled"][0])


def _compile(there: Connection, label: str, size: str, steps: int, seconds: float, name: str) -> None:
    """Sends the seconds that compiling took, and the results of both."""
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # workers of its own would outlive this process when it is ended
    device = torch.device(name)
    batch = 128 if device.type == "cuda" else 8
    backbone, slstm = BACKBONES[label]

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        settings = PolicySettings(backbone, size, slstm, max_steps=steps, image=False)
        return Policy(settings).backbone.to(device)

    eager, compiled = make(), make()
    x_BLD = torch.randn(batch, 3 * steps, SIZES[size].width).to(device)
    runs = {
        "eager": _stepper(eager, eager.parameters(), x_BLD),
        "compiled": _stepper(torch.compile(compiled), compiled.parameters(), x_BLD),
    }
    began = time.perf_counter()
    runs["compiled"]()
    took = time.perf_counter() - began
    runs["eager"]()
    there.send((took, _turns(runs, seconds, device)))
