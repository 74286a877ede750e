"""Measures how fast policies train, and the backbones against their alternatives, all in one run.

    lram bench train                                # 16M on synthetic data; --quick for a smoke test
    lram bench train --root ROOT --sizes 16M 206M   # on a dataset of yours
    rows = list(bench_train(TrainBenchSettings(quick=True)))

Training is the trainer's own update on batches of the real loader; what is compared takes turns (`bench_backbones`).
A share of the hardware's speed (MFU) is the model's FLOPs over the time, and over the best that a large product of
matrices reaches in the same run, in the type that training multiplies in. The model's FLOPs are three times those of a
forward pass (the backward pass is twice it), two for every multiply-add: encoders as PyTorch counts them, the logits
that the loss reads, and for each token of the backbone

    2 · numbers in its matrices  +  per layer  DT 2·L·D (causal attention over L tokens), Mamba 9·16·2D (scan),
                                               mLSTM the lesser of 4·L·D (all at once) and 4·D² (with its memory)

They are those of the method: what an implementation computes twice or pads does not count as work done.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import xlstm
from torch.utils.flop_counter import FlopCounterMode

from lram.datasets.ahead import batches_ahead
from lram.datasets.bench_data import atari, vector_maker
from lram.datasets.bench_loader import Row, as_table
from lram.datasets.windows import Batch, Windows, WindowSettings
from lram.datasets.writer import TaskWriter
from lram.model import kernels
from lram.model.mamba import STATE_SIZE
from lram.model.policy import Policy, count_parameters
from lram.train.bench_backbones import BACKBONES, against_loop, against_package, compiled, wait
from lram.train.loss import do_update, logits_needed
from lram.train.ranks import Ranks, start_ranks
from lram.train.settings import DeviceName, SizeName, TrainSettings
from lram.train.trainer import build

__all__ = ["TrainBenchSettings", "as_table", "bench_train"]


@dataclass(frozen=True)
class TrainBenchSettings:
    """What to measure training on."""

    root: Path | None = None
    """Dataset to train on; by default a synthetic one of a vector and an image domain."""
    sizes: tuple[SizeName, ...] = ("16M",)
    """Sizes of the policies; what is compared is compared at the first."""
    per_domain: int | None = None
    """Windows of each domain in an update; by default 4 on a CPU, 128 on a GPU."""
    context: int = 50
    """Environment steps in a window."""
    seconds: float = 20
    """How long to measure each policy, and each comparison."""
    device: DeviceName = "auto"
    """Where to train; auto takes CUDA when there is one."""
    quick: bool = False
    """Tiny policies, a fraction of a second each, nothing compiled: shows that it runs, not how fast."""


def bench_train(settings: TrainBenchSettings, progress: Callable[[str], None] | None = None) -> Iterator[Row]:
    """Trains every backbone at every size, then compares.

    Args:
        settings: On what.
        progress: Told what is done now.

    Yields:
        The rows of the table.

    Raises:
        BadInput: The dataset cannot be used.
    """
    tell = progress or (lambda text: None)
    ranks = start_ranks(settings.device)
    sizes: Sequence[SizeName] = ("tiny",) if settings.quick else settings.sizes
    seconds = min(settings.seconds, 0.2) if settings.quick else settings.seconds
    per_domain = settings.per_domain or (1 if settings.quick else 128 if ranks.device.type == "cuda" else 4)
    yield from _machine(ranks.device)
    peaks = [peak_flops(ranks.device, 3 if settings.quick else 20)]
    with tempfile.TemporaryDirectory() if settings.root is None else nullcontext(settings.root) as name:
        root = Path(name)
        if settings.root is None:
            tell("making data")
            make_data(root, 4 if settings.quick else 40)
        windows = Windows.open(root, WindowSettings(settings.context))
        for size in sizes:
            for label, (backbone, slstm) in BACKBONES.items():
                tell(f"training {label} {size}")
                training = TrainSettings(root, backbone=backbone, size=size, slstm=slstm, per_domain=per_domain)
                yield from _training(training, windows, ranks, seconds, label, peaks)
    tell("comparing xLSTM")
    yield from against_package(sizes[0], settings.context, seconds, ranks.device)
    tell("comparing Mamba's scan")
    yield from against_loop(sizes[0], settings.context, seconds, ranks.device)
    for label in () if settings.quick else BACKBONES:
        tell(f"compiling {label}")
        yield from compiled(label, sizes[0], settings.context, seconds, ranks.device)


def make_data(root: Path, episodes: int) -> None:
    """Writes a dataset of one vector domain and one image domain."""
    walker = vector_maker("dmcontrol", "walker-walk", 1000, 24, 6)
    with TaskWriter(root, "dmcontrol", "walker-walk", {"bench": "train"}) as writer:
        for episode in range(episodes):
            writer.add(walker(episode))
        writer.finish()
    with TaskWriter(root, "atari", "breakout", {"bench": "train"}) as writer:
        for trajectory in atari("breakout", 25 * episodes):
            writer.add(trajectory)
        writer.finish()


# Machine ----------------------------------------------------------------------------------------------------------


def _machine(device: torch.device) -> Iterator[Row]:
    """Says what runs here."""
    if device.type == "cpu":
        yield Row("machine", "processor", f"{torch.get_num_threads()} threads, torch {torch.__version__}")
        return
    yield Row("machine", "GPU", f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    probe = torch.zeros(1, 4, 64, 1, device=device)
    found = {
        "mLSTM, mlstm_kernels": kernels.for_mlstm(probe.mT),
        "sLSTM, xlstm": kernels.for_slstm(probe),
        "scan, mamba_ssm": kernels.find(probe, "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn"),
        "convolution, causal_conv1d": kernels.find(probe, "causal_conv1d", "causal_conv1d_fn"),
    }
    for name, kernel in found.items():
        yield Row("machine", f"kernel for {name}", "used" if kernel else "not installed: PyTorch")


def peak_flops(device: torch.device, repeats: int = 3) -> float:
    """Returns FLOPs a second of a large product of matrices: float32 on a CPU, bfloat16 on a GPU; the best of some."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # a system that forbids it reports the peak since the start
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> int:
    """Returns the most bytes held since `_forget_peak`, on the GPU or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# Training ---------------------------------------------------------------------------------------------------------


def window_flops(policy: Policy, batch: Batch) -> float:
    """Returns the model's FLOPs for training on one window, as the module's docstring says."""
    device = policy.head.weight.device
    one = [
        torch.from_numpy(part[:1]).to(device) for part in (batch.states, batch.returns_to_go, batch.previous_rewards)
    ]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = policy.tokens(*one)
    _, length, width = tokens.shape
    head = batch.mask.shape[1] * 2 * width * logits_needed(batch)
    named = policy.backbone.named_parameters()
    matrices = sum(p.numel() for name, p in named if p.ndim >= 2 and not name.endswith(("wpe.weight", "A_log")))
    mixing = 0
    if policy.settings.backbone == "dt":
        mixing = len(policy.backbone.h) * 2 * length * width
    elif policy.settings.backbone == "mamba":
        mixing = len(policy.backbone.layers) * 9 * STATE_SIZE * 2 * width
    else:
        mixing = (
            sum(isinstance(block, xlstm.mLSTMBlock) for block in policy.backbone.blocks)
            * 4
            * width
            * min(length, width)
        )
    return 3 * (counter.get_total_flops() + head + length * (2 * matrices + mixing))


def _training(
    settings: TrainSettings, windows: Windows, ranks: Ranks, seconds: float, label: str, peaks: list[float]
) -> Iterator[Row]:
    """Runs the trainer's update on batches of the real loader for some seconds."""
    device = ranks.device
    _forget_peak(device)
    policy, optimizer = build(settings, windows, device)
    times, waited, count, tokens, flops = [], 0.0, 0, 0, 0.0
    ahead = batches_ahead(windows, range(100_000), "train", settings.per_domain, 0, workers=settings.readers)
    with closing(ahead) as reading:
        asked = time.perf_counter()
        for update, batches in reading:
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            losses = do_update(policy, batches, ranks)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip)
            optimizer.step()
            losses.sum().item()  # waits for the device
            ended = time.perf_counter()
            if update == 0:  # compiles kernels while the readers fill their slots
                count = sum(len(batch.mask) for batch in batches)
                tokens = sum(batch.mask.size for batch in batches) * policy.settings.tokens_per_step
                flops = sum(len(batch.mask) * window_flops(policy, batch) for batch in batches)
            else:
                times.append(ended - asked)
                waited += began - asked
                if sum(times) > seconds and len(times) >= 2:
                    break
            asked = time.perf_counter()
    memory = _peak(device)
    peaks.append(peak_flops(device))
    took, best = sum(times), min(times)
    section = f"training, {settings.size}, {settings.per_domain} windows of each of {', '.join(sorted(windows.tasks))}"
    label = f"{label}, {count_parameters(policy) / 1e6:.1f} M"
    rate = len(times) / took
    yield Row(section, label, f"{rate * count:,.1f} windows/s, {rate * tokens:,.0f} tokens/s")
    yield Row(section, "  best update", f"{count / best:,.1f} windows/s, {tokens / best:,.0f} tokens/s")
    share = (
        f"{flops / best / max(peaks):.0%} of {max(peaks) / 1e12:.3g} TFLOP/s, {flops / count / 1e9:,.3g} GFLOP a window"
    )
    yield Row(section, "  MFU of the best update", share)
    yield Row(section, "  peak memory", f"{memory / 2**30:.2f} GiB")
    yield Row(section, "  waiting for data", f"{waited / took:.2%}", None, "< 5 %", waited / took < 0.05)
