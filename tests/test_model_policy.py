"""The policy around the backbones: tokens, sizes, loss, choice of actions, weight decay."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lram.datasets.specs import DOMAINS, NUM_BINS, NUM_DISCRETE, NUM_LOGITS, STATE_WIDTH
from lram.model.policy import (
    SIZES,
    Policy,
    PolicySettings,
    action_loss,
    bin_centre,
    bin_of,
    choose_action,
    count_parameters,
    decayed,
    reset_state,
)

torch.set_num_threads(1)
BACKBONES = [("xlstm", False), ("xlstm", True), ("mamba", False), ("dt", False)]
PAPER = {
    "xlstm": [16.1, 47.9, 108.3, 206.5, 409.3],
    "mamba": [16.7, 49.9, 112.9, 215.3, 426.9],
    "dt": [16.6, 48.4, 108.6, 206.5, 408.3],
}


def build(backbone, slstm=False, **options):
    torch.manual_seed(0)
    return Policy(PolicySettings(backbone, "tiny", slstm, **options))


def stream(batch, steps, image=False):
    states = torch.randn(batch, steps, STATE_WIDTH)
    if image:
        states = torch.randint(0, 256, (batch, steps, 1, 64, 64), dtype=torch.uint8)
    return states, torch.randn(batch, steps), torch.randn(batch, steps)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_step_equals_forward(backbone, slstm, image):
    policy = build(backbone, slstm, max_steps=12)
    inputs = stream(3, 12, image)
    state, start = None, 0
    with torch.no_grad():
        whole = policy(*inputs)
        assert whole.shape == (3, 12, NUM_LOGITS)
        for size in (1, 1, 4, 2, 4):
            logits, state = policy.step(*(part[:, start : start + size] for part in inputs), state)
            torch.testing.assert_close(logits, whole[:, start : start + size], rtol=1e-4, atol=1e-4)
            start += size


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_reset_slot_is_fresh(backbone, slstm):
    policy = build(backbone, slstm)
    inputs = stream(3, 10)
    done = torch.tensor([True, False, False])
    with torch.no_grad():
        _, state = policy.step(*(part[:, :6] for part in inputs))
        logits, _ = policy.step(*(part[:, 6:] for part in inputs), reset_state(state, done))
        torch.testing.assert_close(logits[0], policy(*(part[:1, 6:] for part in inputs))[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[1:], policy(*inputs)[1:, 6:], rtol=1e-4, atol=1e-4)


def test_order_of_tokens():
    policy = build("dt")
    states, returns, rewards = stream(1, 4)
    before = policy.tokens(states, returns, rewards)
    for inputs, token in (
        ((states, returns, rewards + 1), 0),
        ((states + 1, returns, rewards), 1),
        ((states, returns + 1, rewards), 2),
    ):
        changed = (policy.tokens(*inputs) != before).any(-1)[0]
        assert changed.nonzero()[:, 0].tolist() == list(range(token, 12, 3))


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_what_the_action_sees(backbone):
    """The action at t sees r_{t-1}, s_t and R_t, all of the past, and nothing after."""
    policy = build(backbone)
    inputs = stream(1, 6)
    with torch.no_grad():
        before = policy(*inputs)
        for part in range(3):
            changed = [each.clone() for each in inputs]
            changed[part][:, 3] += 1
            difference = (policy(*changed) - before).abs().amax((0, 2))
            assert difference[:3].max() < 1e-5
            assert difference[3:].min() > 1e-5


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_padding_on_the_right_changes_nothing(backbone, slstm):
    policy = build(backbone, slstm)
    inputs = stream(2, 8)
    padded = [F.pad(part, (0, 0, 0, 3) if part.ndim == 3 else (0, 3), value=7.0) for part in inputs]
    with torch.no_grad():
        torch.testing.assert_close(policy(*padded)[:, :8], policy(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_gradients_reach_every_parameter(backbone, slstm):
    policy = build(backbone, slstm, max_steps=5)
    vectors, images = policy(*stream(2, 5)), policy(*stream(2, 5, image=True))
    (vectors.square().sum() + images.square().sum()).backward()
    without = [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_bf16_autocast_is_close(backbone, slstm):
    policy = build(backbone, slstm)
    inputs = stream(2, 20)
    with torch.no_grad():
        exact = policy(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(*inputs)
        _, state = policy.step(*(part[:, :7] for part in inputs))
        rest, _ = policy.step(*(part[:, 7:] for part in inputs), state)
    logits.float().square().sum().backward()
    assert (logits.float() - exact).abs().max() < 0.05
    assert (rest.float() - exact[:, 7:]).abs().max() < 0.05
    assert all(p.grad.isfinite().all() for name, p in policy.named_parameters() if "image" not in name)


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match=r"xlstm, mamba, dt"):
        Policy(PolicySettings(backbone="lstm", size="tiny"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"16M, 48M"):
        Policy(PolicySettings(size="17M"))
    with pytest.raises(ValueError, match="image"):
        build("mamba", image=False)(*stream(1, 1, image=True))


@pytest.mark.parametrize("backbone", list(PAPER))
def test_parameter_counts_of_the_paper(backbone):
    """The counts of arXiv 2410.22391, once what its code holds and never reads is added.

    That is, in rows of D numbers: 1,000 time embeddings (`max_ep_len`, with `use_time_embds: False`), 275 action
    embeddings, 126 dead logits, 8 + 204 for unused heads; for DT 1,600 positions instead of 150.
    """
    for size, millions in zip(list(SIZES)[1:], PAPER[backbone]):
        with torch.device("meta"):
            policy = Policy(PolicySettings(backbone, size))  # type: ignore[arg-type]
        unread = (1000 + 275 + 126 + 8 + 204 + (1450 if backbone == "dt" else 0)) * SIZES[size].width
        assert (count_parameters(policy) + unread) / 1e6 == pytest.approx(millions, rel=0.003)
        if size == "16M":
            # By themselves: 5 to 10 % fewer at 16M, less the larger the model.
            assert 0.9 < count_parameters(policy) / 1e6 / millions < 0.96


# Loss -------------------------------------------------------------------------------------------------------------


def test_discrete_loss_is_cross_entropy_over_valid_actions():
    torch.manual_seed(0)
    domain = DOMAINS["procgen"]
    logits, actions = torch.randn(2, 5, NUM_LOGITS), torch.randint(0, 15, (2, 5))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    total, count = action_loss(logits, actions, mask, domain)
    expected = -sum(logits[b, t, :15].log_softmax(-1)[actions[b, t]] for b in range(2) for t in range(5) if mask[b, t])
    torch.testing.assert_close(total, expected)
    assert count == 7


def test_continuous_loss_is_cross_entropy_over_valid_dimensions():
    torch.manual_seed(0)
    logits, actions = torch.randn(2, 3, NUM_LOGITS), torch.rand(2, 3, 4) * 2 - 1
    mask = torch.tensor([[True, True, True], [True, False, False]])
    dims = torch.tensor([[True, True, False, False], [True, True, True, True]])
    expected = 0.0
    for b in range(2):
        for t in range(3):
            for a in range(4):
                if mask[b, t] and dims[b, a]:
                    row = logits[b, t, NUM_DISCRETE + a * NUM_BINS : NUM_DISCRETE + (a + 1) * NUM_BINS]
                    expected -= row.log_softmax(-1)[bin_of(actions[b, t, a])]
    total, count = action_loss(logits, actions, mask, DOMAINS["metaworld"], dims)
    torch.testing.assert_close(total, expected)
    assert count == 3 * 2 + 1 * 4
    assert action_loss(logits, actions, mask, DOMAINS["metaworld"])[1] == 16


@pytest.mark.parametrize("name", ["procgen", "metaworld"])
def test_loss_ignores_padding_and_invalid_logits(name):
    torch.manual_seed(0)
    domain = DOMAINS[name]
    logits = torch.randn(2, 4, NUM_LOGITS, requires_grad=True)
    discrete = domain.action == "discrete"
    actions = torch.randint(0, 15, (2, 4)) if discrete else torch.rand(2, 4, 4) * 2 - 1
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    total, _ = action_loss(logits, actions, mask, domain)
    total.backward()
    used = logits.grad.abs() > 0
    valid = slice(0, 15) if discrete else slice(NUM_DISCRETE, NUM_DISCRETE + 4 * NUM_BINS)
    assert used[..., valid][mask].all()
    assert used.sum() == used[..., valid][mask].sum(), "a gradient outside valid logits of real steps"
    with torch.no_grad():
        garbage, broken = actions.clone(), logits.clone()
        garbage[1, 1:] = 10**6 if discrete else math.nan
        broken[1, 1:] = math.nan
        torch.testing.assert_close(action_loss(broken, garbage, mask, domain)[0], total)


@given(st.floats(-1, 1, width=32))
def test_bins_round_trip(value):
    action = torch.tensor(value)
    index = bin_of(action)
    assert 0 <= index < NUM_BINS
    assert abs(bin_centre(index) - action) <= 1 / NUM_BINS + 1e-6


def test_bins_at_the_ends():
    assert bin_of(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(NUM_BINS)
    assert torch.equal(bin_of(bin_centre(every)), every)
    assert bin_centre(every).sum().abs() < 1e-5


# Choice -----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), greedy=st.booleans(), temperature=st.sampled_from([0.1, 1.0, 100.0]))
def test_only_valid_actions_are_chosen(seed, greedy, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, NUM_LOGITS, generator=generator)
    logits[:, 5:NUM_DISCRETE] += 50
    action = choose_action(logits, DOMAINS["darkroom"], 5, generator, temperature, greedy)
    assert action.dtype == torch.int64 and action.shape == (64,)
    assert action.min() >= 0 and action.max() < 5
    action = choose_action(logits, DOMAINS["metaworld"], 4, generator, temperature, greedy)
    assert action.dtype == torch.float32 and action.shape == (64, 4)
    torch.testing.assert_close(bin_centre(bin_of(action)), action)


def test_choice_follows_the_distribution():
    logits = torch.full((20_000, NUM_LOGITS), -100.0)
    logits[:, :2] = torch.tensor([0.0, 1.0])
    spec = DOMAINS["darkroom"]
    for temperature in (0.5, 1.0, 2.0):
        actions = choose_action(logits, spec, 5, torch.Generator().manual_seed(0), temperature)
        share = (actions == 1).float().mean().item()
        assert share == pytest.approx(1 / (1 + math.exp(-1 / temperature)), abs=0.02)
    again = choose_action(logits, spec, 5, torch.Generator().manual_seed(0), 2.0)
    assert torch.equal(actions, again)
    assert not torch.equal(actions, choose_action(logits, spec, 5, torch.Generator().manual_seed(1), 2.0))
    assert (choose_action(logits, spec, 5, greedy=True) == 1).all()


def test_greedy_continuous_action_reads_the_right_logits():
    logits = torch.zeros(1, NUM_LOGITS)
    wanted = [0, 255, 128]
    for dimension, index in enumerate(wanted):
        logits[0, NUM_DISCRETE + dimension * NUM_BINS + index] = 5.0
    action = choose_action(logits, DOMAINS["composuite"], 3, greedy=True)
    torch.testing.assert_close(action[0], bin_centre(torch.tensor(wanted)))


# Weight decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_weight_decay_is_for_matrices(backbone, slstm):
    policy = build(backbone, slstm)
    yes = {name for name, p in policy.named_parameters() if decayed(name, p)}
    no = {name for name, _ in policy.named_parameters()} - yes
    assert "head.weight" in yes and "encode_image.project.weight" in yes
    assert all(not name.endswith(("bias", "norm.weight", "A_log", ".D")) and "wpe" not in name for name in yes)
    inner = {
        "xlstm": "blocks.0.xlstm.proj_up.weight",
        "mamba": "layers.0.mixer.in_proj.weight",
        "dt": "h.0.mlp.c_fc.weight",
    }
    assert f"backbone.{inner[backbone]}" in yes
    assert all(dict(policy.named_parameters())[name].ndim == 1 or "wpe" in name or "A_log" in name for name in no)
