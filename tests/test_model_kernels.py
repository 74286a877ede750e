"""Kernels: on a CPU what surrounds them, with the packages' own slow paths in their place; on a GPU themselves."""

import math

import pytest
import torch
from mlstm_kernels.torch.chunkwise import mlstm_chunkwise__native_autograd
from xlstm.blocks.slstm.src.vanilla import slstm_forward, slstm_pointwise_function_registry

from lram.model import kernels
from lram.model.mamba import Mamba, selective_scan
from lram.model.policy import Policy, PolicySettings
from lram.model.xlstm import _SLSTM, XLSTM, mlstm_cell

torch.set_num_threads(1)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def gradients(outputs, inputs):
    """Gradients of a weighted sum of the outputs, each weight different."""
    total = sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in outputs)
    return torch.autograd.grad(total, inputs)


@pytest.mark.parametrize("length", [1, 3, 16, 17, 64, 65, 150])
def test_mlstm_around_the_kernel(length):
    """Filling up to whole chunks changes no output, no memory and no gradient, from an empty memory or a full one."""
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, 4, length, 16, requires_grad=True) for _ in range(3))
    i, f = (torch.randn(2, 4, length, requires_grad=True) for _ in range(2))
    _, memory = mlstm_cell(*torch.randn(3, 2, 4, 9, 16), *torch.randn(2, 2, 4, 9))
    for before in (None, memory):
        ours, ours_after = mlstm_cell(q, k, v, i, f, before)
        theirs, after = kernels.mlstm(mlstm_chunkwise__native_autograd, (q, k, v), i, f, before, True, 1e-6)
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        # The stabiliser m is free; what it stands for is not.
        for mine, other in zip(ours_after[:2], after[:2]):
            scale, other_scale = (m.exp().view(2, 4, *[1] * (mine.ndim - 2)) for m in (ours_after[2], after[2]))
            torch.testing.assert_close(other * other_scale, mine * scale, rtol=1e-4, atol=1e-5)
        for mine, other in zip(gradients([ours], (q, k, v, i, f)), gradients([theirs], (q, k, v, i, f))):
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-4)
        alone, nothing = kernels.mlstm(mlstm_chunkwise__native_autograd, (q, k, v), i, f, before, False, 1e-6)
        assert nothing is None and torch.equal(alone, theirs)


class VanillaSLSTM:
    """The package's recurrence in PyTorch behind the arguments of its CUDA kernel: x (L, B, NGH), R (N, H, GH)."""

    @staticmethod
    def apply(training, x, states, r_NHG, bias):
        heads, width, _ = r_NHG.shape
        x = x.unflatten(-1, (heads, 4, width)).transpose(2, 3).flatten(2)
        point = slstm_pointwise_function_registry["slstm"]
        bias = bias.view(heads, 4, width).transpose(0, 1).flatten()
        return slstm_forward(x, states, r_NHG.transpose(1, 2), bias, point)[0]


def test_slstm_around_the_kernel():
    torch.manual_seed(0)
    x, r = torch.randn(9, 4, 12, 2, requires_grad=True), torch.randn(4, 12, 3, requires_grad=True)
    zero = torch.zeros(4, 3, 2)
    start = (zero, zero, torch.full_like(zero, -math.inf))
    ours = _SLSTM.apply(x, r, *start)
    theirs = kernels.slstm(VanillaSLSTM, x, r, *start)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(theirs, (x, r)), gradients(ours, (x, r)), rtol=1e-4, atol=1e-4)
    half = _SLSTM.apply(x[:4], r, *start)
    rest = kernels.slstm(VanillaSLSTM, x[4:], r, half[0][-1], *half[1:])
    torch.testing.assert_close(rest[0], ours[0][4:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest[1:], ours[1:], rtol=1e-5, atol=1e-5)


def test_scan_around_the_kernel():
    """`transformers` has `selective_scan_fn` in plain PyTorch, under the same arguments."""
    slow = pytest.importorskip(
        "transformers.models.mamba.modeling_mamba", reason="needs transformers"
    ).mamba_selective_scan
    torch.manual_seed(0)
    u, dt = torch.randn(2, 20, 8), torch.rand(2, 20, 8)
    b, c, a = torch.randn(2, 20, 16), torch.randn(2, 20, 16), -torch.rand(8, 16)
    inputs = [part.requires_grad_() for part in (u, dt, a, b, c)]
    y, state = kernels.scan(slow, *inputs)
    expected, state_expected = selective_scan(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, state_expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients([y], inputs), gradients([expected], inputs), rtol=1e-4, atol=1e-4)


def test_no_kernel_on_a_cpu():
    assert kernels.for_mlstm(torch.zeros(1, 4, 3, 64)) is None
    assert kernels.for_slstm(torch.zeros(3, 4, 64, 1)) is None
    assert kernels.find(torch.zeros(1), "math", "sqrt") is None


# On a GPU ---------------------------------------------------------------------------------------------------------

MODELS = {
    "mlstm": lambda: XLSTM(2, 512),
    "slstm": lambda: XLSTM(2, 128, (0,)),
    "mamba": lambda: Mamba(2, 128),
}


@pytest.fixture
def kernels_off():
    """Turns the kernels off for a while."""

    def run(function):
        kernels.ENABLED = False
        try:
            return function()
        finally:
            kernels.ENABLED = True

    return run


def needed(name):
    if name == "mamba":
        pytest.importorskip("mamba_ssm", reason="the extra gpu is not installed")
        pytest.importorskip("causal_conv1d", reason="the extra gpu is not installed")
    if name == "slstm" and kernels.for_slstm(torch.zeros(1, 4, 128, 1, device="cuda")) is None:
        pytest.skip("xlstm's CUDA kernel does not build here")


@ON_GPU
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("length", [3, 64, 150])
@pytest.mark.parametrize("name", MODELS)
def test_kernel_equals_pytorch(kernels_off, name, length, dtype, tolerance):
    """Outputs of size 1 and relative gradients, in the root mean square, against PyTorch in float32."""
    needed(name)
    torch.manual_seed(0)
    model = MODELS[name]().cuda()
    width = 512 if name == "mlstm" else 128
    x, weights = torch.randn(2, 4, length, width, device="cuda")

    def run(cast):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            y = model(x)
        (y.float() * weights).sum().backward()
        return y.detach().float(), {key: p.grad.clone() for key, p in model.named_parameters()}

    expected, expected_grads = kernels_off(lambda: run(False))
    y, grads = run(dtype == torch.bfloat16)
    assert (y - expected).square().mean().sqrt() < tolerance
    for key, grad in grads.items():
        size = expected_grads[key].square().mean().sqrt()
        # In a window of one chunk some gates hardly matter: their tiny gradients are compared with the largest.
        floor = 1e-3 * max(each.square().mean().sqrt() for each in expected_grads.values())
        assert (grad - expected_grads[key]).square().mean().sqrt() < 2 * tolerance * max(size, floor), key


@ON_GPU
@pytest.mark.parametrize("name", MODELS)
def test_kernel_step_equals_forward(in_pieces, name):
    needed(name)
    torch.manual_seed(0)
    model = MODELS[name]().cuda()
    x = torch.randn(4, 150, 512 if name == "mlstm" else 128, device="cuda")
    with torch.no_grad():
        for cuts in ([3], [64, 1, 20]):
            assert (in_pieces(model, x, cuts)[0] - model(x)).square().mean().sqrt() < 0.01


@ON_GPU
@pytest.mark.parametrize(("backbone", "slstm"), [("xlstm", False), ("xlstm", True), ("mamba", False), ("dt", False)])
def test_policy_on_the_gpu_equals_the_cpu(backbone, slstm):
    torch.manual_seed(0)
    policy = Policy(PolicySettings(backbone, "tiny", slstm))
    inputs = torch.randn(2, 50, 204), torch.randn(2, 50), torch.randn(2, 50)
    with torch.no_grad():
        expected = policy(*inputs)
        logits = policy.cuda()(*(part.cuda() for part in inputs)).cpu()
    assert (logits - expected).square().mean().sqrt() < 0.01
