"""Mamba: the chunked scan against a loop, whole sequences against pieces, and initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lram.model import mamba
from lram.model.mamba import CHUNK_TOKENS, Mamba, selective_scan
from lram.model.state import map_state, reset_state

torch.set_num_threads(1)
WIDTH = 64


def loop(u, dt, a, b, c, h=None):
    """The recurrence of arXiv 2312.00752 as it is written, one token at a time, left to autograd."""
    h = u.new_zeros(u.shape[0], a.shape[1], a.shape[0]) if h is None else h
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, None] * a.t()) * h + b[:, t, :, None] * (dt * u)[:, t, None]
        outputs.append((c[:, t, :, None] * h).sum(1))
    return torch.stack(outputs, 1), h


def scan_inputs(seed, batch, length, inner, size, scale, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    u, dt = random(batch, length, inner), F.softplus(random(batch, length, inner)) * scale
    b, c = random(batch, length, size), random(batch, length, size)
    a, h = -torch.exp(random(inner, size)), random(batch, size, inner)
    return [part.requires_grad_() for part in (u, dt, a, b, c, h)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 3),
    length=st.integers(1, 3 * CHUNK_TOKENS + 1),
    scale=st.sampled_from([1e-4, 0.1, 1.0, 1e3, 1e6]),
    start=st.booleans(),
)
def test_scan_equals_loop(seed, batch, length, scale, start):
    inputs = scan_inputs(seed, batch, length, 5, 4, scale)
    grads = []
    for run in (selective_scan, loop):
        y, h = run(*(inputs if start else inputs[:-1]))
        ((y**2).sum() / scale + h.sum()).backward()
        grads.append((y.detach(), h.detach(), [part.grad for part in inputs]))
        for part in inputs:
            part.grad = None
    torch.testing.assert_close(grads[0][:2], grads[1][:2], rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(grads[0][2], grads[1][2]):
        if theirs is not None:
            assert theirs.isfinite().all()
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8 * theirs.abs().max().item())


def test_scan_of_a_batch_too_large_for_one_piece():
    # 40 rows of 128 x 16 and 16 tokens do not fit the 2**19 numbers that a piece may hold.
    inputs = scan_inputs(0, 40, 20, 128, 16, 0.1, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(selective_scan(*inputs), loop(*inputs), rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(
    layers=st.sampled_from([2, 4]),
    length=st.integers(1, 600),
    cuts=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
@example(layers=2, length=600, cuts=[3], seed=0)
def test_step_in_pieces_equals_forward(in_pieces, layers, length, cuts, seed):
    torch.manual_seed(seed)
    model = Mamba(layers, WIDTH)
    x = torch.randn(2, length, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, x, cuts)[0], model(x), rtol=1e-4, atol=1e-4)


def test_step_in_bfloat16(in_pieces):
    """The stated tolerance of bfloat16: outputs are of size 1, and differ by 0.003 in the root mean square."""
    torch.manual_seed(0)
    model = Mamba(4, WIDTH)
    x = torch.randn(2, 600, WIDTH)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            whole, pieces = model(x).float(), in_pieces(model, x, [3])[0].float()
    for each in (whole, pieces):
        assert (each - exact).square().mean().sqrt() < 0.003
        assert (each - exact).abs().max() < 0.03


def test_size_of_the_state_is_constant_in_length(in_pieces):
    """In numbers, and in the memory that they keep alive."""
    torch.manual_seed(0)
    model = Mamba(2, WIDTH)
    for length in (4, 40, 600):
        for cuts in ([length], [3]):
            with torch.no_grad():
                _, state = in_pieces(model, torch.randn(1, length, WIDTH), cuts)
            numbers, kept = [], []
            map_state(lambda tensor, to=numbers: to.append(tensor.numel()), state)
            map_state(lambda tensor, to=kept: to.append(tensor.untyped_storage().nbytes()), state)
            assert sum(numbers) == 2 * 2 * WIDTH * (mamba.STATE_SIZE + mamba.CONV_WIDTH - 1)
            assert max(kept) == 4 * 2 * WIDTH * mamba.STATE_SIZE


# The reference ----------------------------------------------------------------------------------------------------


def transformers_model(model):
    """The slow path of `transformers` with the same weights, which it names the same."""
    transformers = pytest.importorskip("transformers", reason="the reference of Mamba is transformers' slow path")
    config = transformers.MambaConfig(
        vocab_size=1, hidden_size=WIDTH, num_hidden_layers=len(model.layers), use_associative_scan=False
    )
    theirs = transformers.MambaModel(config).eval()
    missing, unknown = theirs.load_state_dict(model.state_dict(), strict=False)
    assert missing == ["embeddings.weight"] and not unknown
    return theirs


@pytest.mark.parametrize(("length", "cuts"), [(1, None), (90, None), (90, [3]), (41, [7, 1, 16])])
def test_equals_transformers(in_pieces, length, cuts):
    """Outputs and gradients, whole and through `step` with its state."""
    torch.manual_seed(length)
    model = Mamba(3, WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = transformers_model(model)
    x, weights = torch.randn(2, 2, length, WIDTH)
    results = []
    for run in (
        lambda x: model(x) if cuts is None else in_pieces(model, x, cuts)[0],
        lambda x: theirs(inputs_embeds=x, use_cache=False).last_hidden_state,
    ):
        inputs = x.clone().requires_grad_()
        y = run(inputs)
        (y * weights).sum().backward()
        results.append((y.detach(), inputs.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        scale = expected[name].grad.abs().max().clamp(min=1)
        torch.testing.assert_close(parameter.grad / scale, expected[name].grad / scale, rtol=1e-5, atol=1e-5, msg=name)


def test_state_equals_that_of_transformers():
    """After a prefill of 20 tokens, one token at a time."""
    torch.manual_seed(0)
    model = Mamba(3, WIDTH)
    theirs = transformers_model(model)
    x = torch.randn(2, 30, WIDTH)
    with torch.no_grad():
        y, state = model.step(x[:, :20])
        answer = theirs(inputs_embeds=x[:, :20], use_cache=True)
        torch.testing.assert_close(y, answer.last_hidden_state, rtol=1e-5, atol=1e-5)
        for token in range(20, 30):
            y, state = model.step(x[:, token : token + 1], state)
            answer = theirs(inputs_embeds=x[:, token : token + 1], cache_params=answer.cache_params, use_cache=True)
            torch.testing.assert_close(y, answer.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_reset_slot_is_fresh_while_others_go_on(in_pieces):
    torch.manual_seed(0)
    model = Mamba(2, WIDTH)
    x = torch.randn(3, 30, WIDTH)
    with torch.no_grad():
        _, state = model.step(x[:, :11])
        kept = map_state(torch.clone, state)
        y, _ = in_pieces(model, x[:, 11:], [3], reset_state(state, torch.tensor([False, True, False])))
        torch.testing.assert_close(y[1], model(x[1:2, 11:])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[[0, 2]], model(x)[[0, 2], 11:], rtol=1e-4, atol=1e-4)
    for before, after in zip(kept, state):
        assert all(torch.equal(before[key], after[key]) for key in before), "step changed the state it was given"


def test_names_and_initial_values():
    torch.manual_seed(0)
    model = Mamba(4, 512)
    mixer = model.layers[0].mixer
    names = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    assert {name for name, _ in mixer.named_parameters()} == names | {"A_log", "D", "out_proj.weight"}
    assert mixer.dt_proj.weight.shape == (1024, 32)
    dt = F.softplus(mixer.dt_proj.bias)
    assert dt.min() > 0.001 * 0.999 and dt.max() < 0.1 * 1.001
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(1024, 16))
    # Uniform in ±1/sqrt(fan in), divided by sqrt(layers).
    assert mixer.out_proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(1024) / 2, rel=0.01)
