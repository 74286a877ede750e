"""xLSTM: equal to the `xlstm` package, whole or in pieces, with slots that start at different times."""

import copy

import pytest
import torch
import xlstm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple

from lram.model.state import map_state, reset_state, select_state
from lram.model.xlstm import _SLSTM, XLSTM, mlstm_cell

torch.set_num_threads(1)
WIDTH = 64
STACKS = [(2, ()), (2, (1,)), (8, (1,)), (3, (0, 1, 2))]


def build(layers, slstm_at, seed=0):
    """A stack whose gates, norms and recurrent weights are not at their (often zero) initial values."""
    torch.manual_seed(seed)
    model = XLSTM(layers, WIDTH, slstm_at)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "kernel" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "gate.weight" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def reference(model, length):
    """The package's stack with the same weights; it masks nothing beyond its context_length."""
    config = copy.deepcopy(model.config)
    config.context_length = length
    config.__post_init__()
    stack = xlstm.xLSTMBlockStack(config)
    stack.load_state_dict(model.state_dict())
    return stack


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("length", [1, 90, 150])
def test_equals_package(stack, length):
    model = build(*stack)
    theirs = reference(model, length)
    x = torch.randn(3, length, WIDTH)
    weights = torch.randn(3, length, WIDTH)
    results = []
    for each in (model, theirs):
        inputs = x.clone().requires_grad_()
        y = each(inputs)
        (y * weights).sum().backward()
        # A recurrent kernel meets only zeros in a single token: the package leaves its gradient zero too.
        results.append((y, inputs.grad, {name: p.grad for name, p in each.named_parameters()}))
    (y, d_x, grads), (y_ref, d_x_ref, grads_ref) = results
    torch.testing.assert_close(y, y_ref, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_x, d_x_ref, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        scale = grads_ref[name].abs().max().clamp(min=1)
        torch.testing.assert_close(grad / scale, grads_ref[name] / scale, rtol=1e-5, atol=1e-5, msg=name)


def test_initialises_as_package():
    torch.manual_seed(5)
    model = XLSTM(3, WIDTH, (1,))
    config = copy.deepcopy(model.config)
    torch.manual_seed(5)
    theirs = xlstm.xLSTMBlockStack(config).state_dict()
    ours = model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


PLACES = st.sets(st.integers(0, 3)).map(tuple)
CUTS = st.lists(st.integers(1, 150), min_size=1, max_size=6)


@settings(max_examples=10, deadline=None)
@given(slstm_at=PLACES, length=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_place_for_slstm_equals_package(slstm_at, length, seed):
    model = build(4, slstm_at, seed)
    x = torch.randn(2, length, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(model, length)(x), rtol=1e-5, atol=1e-5)
    assert tuple(i for i, block in enumerate(model.blocks) if isinstance(block, xlstm.sLSTMBlock)) == slstm_at


@settings(max_examples=12, deadline=None)
@given(slstm_at=PLACES, length=st.integers(1, 600), cuts=CUTS, seed=st.integers(0, 99))
@example(slstm_at=(), length=600, cuts=[3], seed=0)
@example(slstm_at=(1,), length=600, cuts=[3], seed=0)
@example(slstm_at=(0, 3), length=600, cuts=[1, 149], seed=0)
def test_step_in_pieces_equals_forward(in_pieces, slstm_at, length, cuts, seed):
    model = build(4, slstm_at, seed)
    x = torch.randn(2, length, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(in_pieces(model, x, cuts)[0], model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slstm_at", [(), (1,), (0, 1, 2, 3)])
def test_step_in_bfloat16(in_pieces, slstm_at):
    """The stated tolerance of bfloat16: outputs are of size 1, and differ by 0.01 in the root mean square."""
    model = build(4, slstm_at)
    x = torch.randn(2, 600, WIDTH)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            whole, pieces = model(x).float(), in_pieces(model, x, [3])[0].float()
    for each in (whole, pieces):
        assert (each - exact).square().mean().sqrt() < 0.01
        assert (each - exact).abs().max() < 0.1


@pytest.mark.parametrize("slstm_at", [(), (1,)])
def test_size_of_the_state_is_constant_in_length(in_pieces, slstm_at):
    """In numbers, and in the memory that they keep alive."""
    model = build(2, slstm_at)
    sizes = []
    for length in (4, 40, 600):
        for cuts in ([length], [3]):
            with torch.no_grad():
                _, state = in_pieces(model, torch.randn(1, length, WIDTH), cuts)
            size = [0, 0]

            def add(tensor, size=size):
                size[0] += tensor.numel()
                size[1] = max(size[1], tensor.untyped_storage().nbytes())

            map_state(add, state)
            sizes.append(size)
    assert all(numbers == sizes[0][0] and kept == sizes[0][1] for numbers, kept in sizes), sizes


def test_gradient_through_pieces_equals_forward(in_pieces):
    model = build(2, (1,))
    x = torch.randn(2, 20, WIDTH)
    weights = torch.randn_like(x)
    grads = []
    for run in (model, lambda x: in_pieces(model, x, [7, 1, 5])[0]):
        model.zero_grad()
        (run(x) * weights).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-4, msg=name)


def test_reset_slot_is_fresh_while_others_go_on(in_pieces):
    model = build(2, (1,))
    x = torch.randn(3, 30, WIDTH)
    done = torch.tensor([False, True, False])
    with torch.no_grad():
        _, state = model.step(x[:, :11])
        before = map_state(torch.clone, state)
        y, _ = in_pieces(model, x[:, 11:], [3], reset_state(state, done))
        torch.testing.assert_close(y[1], model(x[1:2, 11:])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[[0, 2]], model(x)[[0, 2], 11:], rtol=1e-4, atol=1e-4)
        swapped, _ = model.step(x[[2, 0], 11:], select_state(state, torch.tensor([2, 0])))
        torch.testing.assert_close(swapped, model(x)[[2, 0], 11:], rtol=1e-4, atol=1e-4)
    same = []
    map_state(lambda tensor: same.append(tensor), state)
    map_state(lambda tensor: same.append(tensor), before)
    half = len(same) // 2
    assert all(torch.equal(a, b) for a, b in zip(same[:half], same[half:])), "step changed the state it was given"


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_mlstm_cell_with_strong_gates(spread, chunk):
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 4, 40, 8, dtype=torch.float64)
    i, f = spread * torch.randn(2, 2, 4, 40, dtype=torch.float64)
    h, _ = mlstm_cell(q, k, v, i, f, None, True, chunk)
    h_ref = parallel_stabilized_simple(q, k, v, i[..., None], f[..., None])
    torch.testing.assert_close(h, h_ref, rtol=1e-9, atol=1e-9)


def test_mlstm_with_closed_input_gates_has_finite_gradients():
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 1, 1, 8, 4).requires_grad_().unbind()
    i = torch.full((1, 1, 8), -200.0).index_fill_(2, torch.tensor([5]), 0.0).requires_grad_()
    f = torch.zeros(1, 1, 8, requires_grad=True)
    h, _ = mlstm_cell(q, k, v, i, f)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(h.sum(), (q, k, v, i, f)))
    assert h[:, :, :5].abs().max() < 1e-6
    assert h[:, :, 5].abs().max() > 1e-3


def test_slstm_gradients():
    torch.manual_seed(0)
    heads, width, batch = 2, 3, 2

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    inputs = (random(4, heads, 4 * width, batch), random(heads, 4 * width, width), *random(3, heads, width, batch))
    assert torch.autograd.gradcheck(_SLSTM.apply, inputs)


def test_slstm_with_extreme_gates_is_finite():
    x = torch.tensor([-1e4, 1e4, 0.0, 80.0]).repeat(5)[:, None, None, None].expand(20, 1, 4, 2).clone()
    zero = torch.zeros(1, 1, 2)
    y, c, _ = _SLSTM.apply(x.requires_grad_(), torch.randn(1, 4, 1), zero, zero, torch.full_like(zero, -torch.inf))
    y.sum().backward()
    assert y.isfinite().all() and c.isfinite().all() and x.grad.isfinite().all()
    assert c.abs().max() > 0.5, "the cell saw nothing"


def test_unknown_place_for_slstm():
    with pytest.raises(ValueError, match=r"0\.\.1"):
        XLSTM(2, WIDTH, (2,))
