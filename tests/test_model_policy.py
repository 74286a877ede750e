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
)
from lram.model.state import reset_state

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


# Tokens of the ablations -------------------------------------------------------------------------------------------

ABLATIONS = {
    "with_actions": {"with_actions": True},
    "without_return": {"without_return": True},
    "without_reward": {"without_return": True, "without_reward": True},
    "all": {"with_actions": True, "without_return": True, "without_reward": True},
}


def previous_actions(batch, steps, discrete):
    """Actions before each step, none before the first."""
    if discrete:
        return F.pad(torch.randint(0, NUM_DISCRETE, (batch, steps - 1)), (1, 0), value=-1)
    return F.pad(torch.rand(batch, steps - 1, 4) * 2 - 1, (0, 0, 1, 0), value=math.nan)


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_ablations_step_equals_forward(backbone, slstm, options, discrete):
    policy = build(backbone, slstm, max_steps=7, image=False, **options)
    inputs, actions = stream(2, 7), previous_actions(2, 7, discrete)
    state, start = None, 0
    with torch.no_grad():
        whole = policy(*inputs, prev_actions=actions)
        assert whole.shape == (2, 7, NUM_LOGITS)
        for size in (1, 1, 3, 2):
            part = slice(start, start + size)
            logits, state = policy.step(*(each[:, part] for each in inputs), state, prev_actions=actions[:, part])
            torch.testing.assert_close(logits, whole[:, part], rtol=1e-4, atol=1e-4)
            start += size


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations_order_of_tokens(options, discrete):
    """A step is (a, r, s, R), what is left out missing, and the action is read at the last token."""
    policy = build("dt", **options)
    states, returns, rewards = stream(1, 4)
    actions = previous_actions(1, 4, discrete)
    before = policy.tokens(states, returns, rewards, actions)
    other = (actions + 1) % NUM_DISCRETE if discrete else -actions.nan_to_num(0.5)
    changes = {"state": (states + 1, returns, rewards, actions)}
    if not options.get("without_reward"):
        changes = {"reward": (states, returns, rewards + 1, actions)} | changes
    if not options.get("without_return"):
        changes["return"] = (states, returns + 1, rewards, actions)
    if options.get("with_actions"):
        changes = {"action": (states, returns, rewards, other)} | changes
    count = policy.settings.tokens_per_step
    assert before.shape[1] == 4 * count == 4 * len(changes)
    for token, inputs in enumerate(changes.values()):
        changed = (policy.tokens(*inputs) != before).any(-1)[0]
        assert changed.nonzero()[:, 0].tolist() == list(range(token, 4 * count, count))
    with torch.no_grad():
        tokens = policy.backbone(before)
        torch.testing.assert_close(
            policy(states, returns, rewards, actions), policy.head(tokens[:, count - 1 :: count])
        )


def test_what_is_left_out_is_not_built_and_not_read():
    policy = build("mamba", without_return=True, without_reward=True)
    assert not any("return" in name or "reward" in name for name, _ in policy.named_parameters())
    states, returns, rewards = stream(1, 3)
    with torch.no_grad():
        assert torch.equal(policy(states, returns, rewards), policy(states, returns + 1, rewards * math.nan))


def test_encoding_of_previous_actions():
    policy = build("mamba", with_actions=True)
    encode = policy.encode_action
    with torch.no_grad():
        none = encode.discrete.weight[NUM_DISCRETE]
        vectors = encode(torch.tensor([[-1, 0, 17]]))[0]
        assert torch.equal(vectors, encode.discrete.weight[[NUM_DISCRETE, 0, 17]])
        # Widths differ between tasks: what a task lacks is 0 or NaN, and the same.
        actions = torch.tensor([[[math.nan] * 3, [0.5, -0.5, 0.0], [0.5, -0.5, math.nan]]])
        vectors = encode(actions)[0]
        assert torch.equal(vectors[0], none)
        assert torch.equal(vectors[1], vectors[2])
        torch.testing.assert_close(vectors[1], encode.continuous(F.pad(actions[0, 1], (0, 5))))
    with pytest.raises(ValueError, match="prev_actions"):
        policy(*stream(1, 2))


@pytest.mark.parametrize("discrete", [True, False])
def test_gradients_reach_the_encoding_of_actions(discrete):
    policy = build("xlstm", with_actions=True, image=False)
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(*stream(2, 5), prev_actions=previous_actions(2, 5, discrete))
    logits.float().square().sum().backward()
    encode = policy.encode_action
    used = [encode.discrete.weight] if discrete else [encode.continuous.weight, encode.discrete.weight]
    assert all(parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0 for parameter in used)


def test_window_of_dt_is_in_steps():
    for options, tokens in (({}, 3), ({"with_actions": True}, 4), (ABLATIONS["without_reward"], 1)):
        assert build("dt", max_steps=5, **options).backbone.max_tokens == 5 * tokens


def test_defaults_are_those_before_the_ablations():
    """Settings of an older checkpoint build the same weights as the defaults do."""
    old = {"backbone": "xlstm", "size": "tiny", "slstm": True, "max_steps": 50, "image": True}
    torch.manual_seed(0)
    weights = Policy(PolicySettings(**old)).state_dict()
    new = build("xlstm", True).state_dict()
    assert list(weights) == list(new) and all(torch.equal(weights[name], new[name]) for name in new)
    assert PolicySettings(**old).tokens_per_step == 3
    assert not any("action" in name for name in new)


def test_first_logits_alone():
    policy, inputs = build("mamba"), stream(1, 3)
    with torch.no_grad():
        torch.testing.assert_close(policy(*inputs, first=5), policy(*inputs)[..., :5])


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
        # By themselves: 5 to 10 % fewer at 16M, less the larger the model.
        share = count_parameters(policy) / 1e6 / millions
        assert (0.90 if size == "16M" else 0.95) < share < (0.96 if size == "16M" else 1.0)


@pytest.mark.parametrize("backbone", list(PAPER))
def test_half_has_half_the_layers_and_as_many_parameters(backbone):
    for size in list(SIZES)[1:]:
        with torch.device("meta"):
            full, half = (Policy(PolicySettings(backbone, size, half=half)) for half in (False, True))
        assert count_parameters(half) == pytest.approx(count_parameters(full), rel=0.055)
        blocks = {"xlstm": "blocks", "mamba": "layers", "dt": "h"}[backbone]
        assert 2 * len(getattr(half.backbone, blocks)) == len(getattr(full.backbone, blocks))
        if backbone == "dt":
            assert half.encode_vector.out_features == 64 * half.backbone.heads


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_half_runs(backbone, slstm):
    policy = build(backbone, slstm, half=True)
    assert policy(*stream(1, 3)).shape == (1, 3, NUM_LOGITS)
    for size in list(SIZES)[1:]:
        with torch.device("meta"):
            Policy(PolicySettings(backbone, size, slstm, half=True))


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


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    name=st.sampled_from(["procgen", "metaworld"]),
    temperature=st.sampled_from([0.3, 1.0, 3.0]),
    top_k=st.integers(0, 300),
    top_p=st.floats(0, 1),
)
def test_truncated_choices_are_among_the_likeliest(seed, name, temperature, top_k, top_p):
    """Against a plain reading of the definitions, and never an invalid action, whose logits are the largest."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, NUM_LOGITS, generator=generator) * 3
    domain, count = DOMAINS[name], 3
    discrete = domain.action == "discrete"
    valid = logits[:, :count] if discrete else logits[:, NUM_DISCRETE:].unflatten(-1, (-1, NUM_BINS))[:, :count]
    kept = valid.clone()
    logits[:, count:NUM_DISCRETE] += 100
    logits[:, NUM_DISCRETE + count * NUM_BINS :] += 100
    chosen = choose_action(logits, domain, count, generator, temperature, top_k=top_k, top_p=top_p)
    chosen = chosen if discrete else bin_of(chosen)
    for row, index in zip(kept.flatten(0, -2), chosen.flatten(), strict=True):
        order = row.argsort(descending=True).tolist()[: top_k or None]
        probabilities = (row[order] / temperature).softmax(-1)
        held, nucleus = 0.0, []
        for place, probability in zip(order, probabilities.tolist()):
            if nucleus and held >= top_p + 1e-6:
                break
            nucleus.append(place)
            held += probability
        assert index.item() in nucleus


def test_truncation_keeps_all_it_should():
    """All of the nucleus is drawn, in its proportions: four actions of 0.5, 0.25, 0.15, 0.1."""
    logits = torch.full((20_000, NUM_LOGITS), 5.0)
    shares = [0.5, 0.25, 0.15, 0.1]
    logits[:, :4] = torch.tensor(shares).log()
    for options, kept in (
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 9}, 4),
        ({"top_p": 0.0}, 1),
        ({"top_p": 0.4}, 1),
        ({"top_p": 0.6}, 2),
        ({"top_p": 0.8}, 3),
        ({"top_p": 0.95}, 4),
        ({"top_k": 2, "top_p": 0.7}, 2),
        ({"top_k": 2, "top_p": 0.6}, 1),
    ):
        actions = choose_action(logits, DOMAINS["darkroom"], 4, torch.Generator().manual_seed(0), **options)
        drawn = torch.bincount(actions, minlength=4)[:4] / len(actions)
        expected = torch.tensor(shares[:kept]) / sum(shares[:kept])
        torch.testing.assert_close(drawn[:kept], expected, rtol=0, atol=0.02)
        assert drawn[kept:].sum() == 0
    plain = choose_action(logits, DOMAINS["darkroom"], 4, torch.Generator().manual_seed(0))
    assert torch.equal(plain, choose_action(logits, DOMAINS["darkroom"], 4, torch.Generator().manual_seed(0), top_k=4))


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
