from __future__ import annotations

import pytest
import torch

from lram.datasets.specs import NUM_BINS, NUM_DIMS, NUM_DISCRETE
from lram.model.policy import Policy, PolicySettings
from lram.model.state import map_state, reset_state
from lram.train.fast import FastPolicy, tensors_of

BACKBONES = [("xlstm", False), ("xlstm", True), ("mamba", False), ("dt", False)]


def make(backbone: str, slstm: bool = False, **more) -> Policy:
    """A tiny policy whose parameters are all away from where initialisation puts them, which hides mistakes."""
    torch.manual_seed(0)
    policy = Policy(PolicySettings(backbone, "tiny", slstm=slstm, max_steps=60, image=False, **more)).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return policy


def inputs(steps: int, batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    returns, rewards = torch.randn(2, batch, steps, generator=generator)
    return torch.randn(batch, steps, 204, generator=generator), returns, rewards


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_as_the_policy_does_in_pieces_of_any_size(backbone, slstm, batch):
    policy = make(backbone, slstm)
    fast, parts = FastPolicy(policy), inputs(40, batch)
    with torch.no_grad():
        expected, _ = policy.step(*parts)
    outputs, state, at = [], None, 0
    for size in (1, 1, 2, 5, 1, 10, 20):
        logits, state = fast.step(*(part[:, at : at + size] for part in parts), state)
        outputs.append(logits)
        at += size
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [-20.0, -2.0, 3.0])
def test_xlstms_memory_is_scaled_anew_when_it_has_to_be(bias, monkeypatch):
    policy = make("xlstm")
    for block in policy.backbone.blocks:
        torch.nn.init.constant_(block.xlstm.mlstm_cell.fgate.bias, bias)
    scaled = []
    monkeypatch.setattr(torch, "maximum", lambda *pair, real=torch.maximum: scaled.append(1) or real(*pair))
    fast, parts = FastPolicy(policy), inputs(60, 2)
    state, outputs = None, []
    for at in range(60):
        logits, state = fast.step(*(part[:, at : at + 1] for part in parts), state)
        outputs.append(logits)
    # Twice a step for the two blocks' norms; once more where the memory is scaled: at each step, at some, at none.
    anew = len(scaled) - 2 * 60
    assert {-20.0: anew > 100, -2.0: 10 < anew < 60, 3.0: anew == 0}[bias], anew
    with torch.no_grad():
        expected, _ = policy.step(*parts)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_states_pass_from_the_policy_to_the_fast_one_and_back(backbone, slstm):
    policy = make(backbone, slstm)
    fast, parts = FastPolicy(policy), inputs(30, 3)
    with torch.no_grad():
        expected, _ = policy.step(*parts)
        _, state = policy.step(*(part[:, :10] for part in parts))
        middle, state = fast.step(*(part[:, 10:20] for part in parts), state)
        last, _ = policy.step(*(part[:, 20:] for part in parts), state)
    torch.testing.assert_close(torch.cat([middle, last], 1), expected[:, 10:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_a_reset_slot_starts_afresh_and_leaves_the_others(backbone, slstm):
    fast = FastPolicy(make(backbone, slstm))
    before, after = inputs(6, 2), inputs(6, 2, seed=1)
    _, state = fast.step(*before)
    logits, _ = fast.step(*after, reset_state(state, torch.tensor([True, False])))
    alone, _ = fast.step(*after)
    both, _ = fast.step(*(torch.cat(pair, 1) for pair in zip(before, after)))
    torch.testing.assert_close(logits[0], alone[0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1], both[1, 6:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES[:3])
def test_a_recurrent_state_is_changed_in_place(backbone, slstm):
    fast, parts = FastPolicy(make(backbone, slstm)), inputs(2, 1)
    _, state = fast.step(*parts)
    kept = map_state(torch.clone, state)
    _, after = fast.step(*parts, state)
    assert all(a is b for a, b in zip(tensors_of(after), tensors_of(state), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(tensors_of(kept), tensors_of(state), strict=True))


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    bins = logits[:, -1, NUM_DISCRETE:].unflatten(-1, (NUM_DIMS, NUM_BINS)).argmax(-1)
    return torch.cat([logits[:, -1, :5].argmax(-1)[:, None], bins], 1)


@pytest.mark.parametrize(("backbone", "slstm"), BACKBONES)
def test_greedy_actions_over_200_steps(backbone, slstm, monkeypatch):
    monkeypatch.setattr("lram.train.fast.SMALL", 2**11)  # a tiny policy has no large matrices
    policy = make(backbone, slstm)
    shares = {"float32": 1.0, "bfloat16": 0.97, "int8": 0.9}
    ways = {weights: FastPolicy(policy, weights).step for weights in shares}
    equal, states, state = {weights: 0.0 for weights in shares}, dict.fromkeys(shares), None
    for seed in range(200):
        parts = inputs(1, 1, seed)
        with torch.no_grad():
            expected, state = policy.step(*parts, state)
        for weights, step in ways.items():
            logits, states[weights] = step(*parts, states[weights])
            equal[weights] += (likeliest(logits) == likeliest(expected)).float().mean().item() / 200
    assert all(equal[weights] >= share - 1e-9 for weights, share in shares.items()), equal


def test_lighter_weights_are_lighter_and_the_small_ones_stay(monkeypatch):
    monkeypatch.setattr("lram.train.fast.SMALL", 2**11)
    policy = make("mamba")
    assert FastPolicy(policy, "bfloat16").head.weight.dtype == torch.bfloat16
    assert FastPolicy(policy, "int8").head.weight().dtype == torch.qint8
    assert isinstance(FastPolicy(policy, "int8").backbone.blocks[0].dt_proj, torch.nn.Linear)


def test_previous_actions_are_read():
    policy = make("xlstm", with_actions=True)
    fast, parts = FastPolicy(policy), inputs(5, 2)
    before = torch.tensor([[-1, 0, 1, 2, 3], [-1, 4, 4, 4, 4]])
    with torch.no_grad():
        expected, _ = policy.step(*parts, prev_actions=before)
    logits, _ = fast.step(*parts, prev_actions=before)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_the_policy_it_was_made_of_is_left_alone():
    policy = make("xlstm", slstm=True)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    FastPolicy(policy, "int8").step(*inputs(3, 1))
    assert policy.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert all(parameter.requires_grad for parameter in policy.parameters())
