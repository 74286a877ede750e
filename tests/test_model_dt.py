"""Decision Transformer: the cache against plain encoding, inside the window and once it slides."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lram.model.dt import DT
from lram.model.state import map_state, reset_state, select_state

torch.set_num_threads(1)
WIDTH = 64


def build(layers=2, max_tokens=30, seed=0):
    """A model whose positions matter: at their initial 0.02 they would hide an error in their place."""
    torch.manual_seed(seed)
    model = DT(layers, WIDTH, 4, max_tokens)
    with torch.no_grad():
        model.wpe.weight.normal_()
        for block in model.h:
            block.attn.c_attn.weight.normal_(std=0.2)
    return model


@settings(max_examples=20, deadline=None)
@given(
    layers=st.sampled_from([2, 4]),
    length=st.integers(1, 120),
    max_tokens=st.integers(8, 120),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_step_equals_encoding_the_window(layers, length, max_tokens, cuts, seed):
    model = build(layers, max_tokens, seed)
    x = torch.randn(2, length, WIDTH)
    state, start, index = None, 0, 0
    with torch.no_grad():
        while start < length:
            size = min(cuts[index % len(cuts)], max_tokens)
            y, state = model.step(x[:, start : start + size], state)
            start, index = min(start + size, length), index + 1
            window = x[:, max(0, start - max_tokens) : start]
            torch.testing.assert_close(y, model(window)[:, -y.shape[1] :], rtol=1e-4, atol=1e-4)


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 600), cuts=st.lists(st.integers(1, 150), min_size=1, max_size=6), seed=st.integers(0, 99))
@example(length=600, cuts=[3], seed=0)
def test_step_in_pieces_equals_forward(in_pieces, length, cuts, seed):
    model = build(max_tokens=600, seed=seed)
    x = torch.randn(2, length, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, x, cuts)[0], model(x), rtol=1e-4, atol=1e-4)


def test_step_in_bfloat16(in_pieces):
    """The stated tolerance of bfloat16: outputs are of size 1, and differ by 0.01 in the root mean square."""
    model = build(4, max_tokens=600)
    x = torch.randn(2, 600, WIDTH)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            whole, pieces = model(x).float(), in_pieces(model, x, [3])[0].float()
    for each in (whole, pieces):
        assert (each - exact).square().mean().sqrt() < 0.01
        assert (each - exact).abs().max() < 0.1


def test_equals_encoding_every_window_afresh_with_gradients():
    """Control steps of three tokens, half of them after the window has begun to slide, to 1e-5."""
    model = build(max_tokens=30)
    x, weights = torch.randn(2, 2, 60, WIDTH)
    results = []
    for cached in (True, False):
        model.zero_grad()
        inputs, state, outputs = x.clone().requires_grad_(), None, []
        for end in range(3, 61, 3):
            if cached:
                y, state = model.step(inputs[:, end - 3 : end], state)
            else:
                y = model(inputs[:, max(0, end - 30) : end])[:, -3:]
            outputs.append(y)
        y = torch.cat(outputs, 1)
        (y * weights).sum().backward()
        results.append(
            (y.detach(), inputs.grad, [p.grad / p.grad.abs().max().clamp(min=1) for p in model.parameters()])
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_equals_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the reference of DT is transformers' GPT-2")
    model = build(3, 40)
    config = transformers.GPT2Config(
        vocab_size=1, n_positions=40, n_embd=WIDTH, n_layer=3, n_head=4, attn_implementation="eager"
    )
    theirs = transformers.GPT2Model(config).eval()
    # GPT-2 keeps its matrices transposed.
    weights = {
        name: value.t() if name.startswith("h.") and value.ndim == 2 else value
        for name, value in model.state_dict().items()
    }
    missing, unknown = theirs.load_state_dict(weights, strict=False)
    assert missing == ["wte.weight"] and not unknown
    x, weights = torch.randn(2, 2, 40, WIDTH)
    results = []
    for run in (model, lambda x: theirs(inputs_embeds=x).last_hidden_state):
        inputs = x.clone().requires_grad_()
        y = run(inputs)
        (y * weights).sum().backward()
        results.append((y.detach(), inputs.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    expected = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        grad = expected[name].grad
        grad = grad.t() if name.startswith("h.") and grad.ndim == 2 else grad
        scale = grad.abs().max().clamp(min=1)
        torch.testing.assert_close(parameter.grad / scale, grad / scale, rtol=1e-5, atol=1e-5, msg=name)


def test_pieces_longer_than_the_window():
    model = build(max_tokens=10)
    x = torch.randn(2, 24, WIDTH)
    with torch.no_grad():
        y, _ = model.step(x)
        torch.testing.assert_close(y[:, 10:20], model(x[:, 10:20]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[:, 20:], model(x[:, 14:])[:, -4:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="10"):
        model(x)


def test_slots_of_different_age():
    """Slots are reset at different times, so that some slide, some are full and some are new in the same call."""
    model = build(max_tokens=12)
    torch.manual_seed(1)
    x = torch.randn(4, 60, WIDTH)
    born = [0, 0, 0, 0]
    state, mixed = None, False
    with torch.no_grad():
        for start in range(0, 60, 3):
            if state is not None:
                done = torch.rand(4) < torch.tensor([0.0, 0.15, 0.3, 0.5])
                state = reset_state(state, done)
                born = [start if over else when for over, when in zip(done.tolist(), born)]
            y, state = model.step(x[:, start : start + 3], state)
            sliding = [start + 3 - when > 12 for when in born]
            mixed |= any(sliding) and not all(sliding)
            for slot, when in enumerate(born):
                window = x[slot : slot + 1, max(when, start + 3 - 12) : start + 3]
                torch.testing.assert_close(y[slot], model(window)[0, -3:], rtol=1e-4, atol=1e-4)
    assert mixed, "no call had both sliding and young slots"


def test_state_is_selected_and_not_changed():
    model = build(max_tokens=12)
    x = torch.randn(3, 9, WIDTH)
    with torch.no_grad():
        _, state = model.step(x[:, :6])
        before = map_state(torch.clone, state)
        y, _ = model.step(x[[2, 0], 6:], select_state(state, torch.tensor([2, 0])))
        torch.testing.assert_close(y, model(x)[[2, 0], 6:], rtol=1e-4, atol=1e-4)
    tensors = []
    map_state(tensors.append, state)
    map_state(tensors.append, before)
    half = len(tensors) // 2
    assert all(torch.equal(a, b) for a, b in zip(tensors[:half], tensors[half:]))


def test_gradient_through_the_cache_equals_forward():
    model = build()
    x = torch.randn(2, 12, WIDTH)
    weights = torch.randn_like(x)

    def stepped(x):
        state, outputs = None, []
        for piece in x.split([5, 1, 6], dim=1):
            y, state = model.step(piece, state)
            outputs.append(y)
        return torch.cat(outputs, 1)

    grads = []
    for run in (model, stepped):
        model.zero_grad()
        (run(x) * weights).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_is_causal():
    model = build()
    x = torch.randn(1, 20, WIDTH)
    changed = x.clone()
    changed[:, 12:] += torch.randn(8, WIDTH)
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 12], after[:, 12], atol=1e-3)


def test_initial_values():
    torch.manual_seed(0)
    model = DT(8, 512, 8, 150)
    assert model.h[0].attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert model.wpe.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.h[0].mlp.c_fc.bias.abs().max() == 0
