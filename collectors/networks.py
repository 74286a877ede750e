"""What specialists compute with: the IMPALA network, and the same arithmetic in fewer and faster operations.

    agent = SAC("MlpPolicy", env, policy_kwargs={"optimizer_kwargs": {"fused": True}}, device="cpu")
    speed_up(agent)                   # then agent.train() is stable-baselines3's own, and takes 0.6 of the time

`speed_up` leaves the algorithm to stable-baselines3 and changes what is underneath: wide layers are multiplied by
oneDNN, which torch otherwise leaves to MKL, and MKL does not use AVX-512 on AMD processors (twice the time on an EPYC
9005, none lost on Intel ones); the actor's loss no longer computes gradients of the critic that are thrown away; and
networks without batch normalisation are no longer told twice a step whether they are training.
What it trades away: sums are rounded in another order, so that numbers agree to float32's precision and not to the
bit; and it names an operation of torch that is not documented, and does without it where it is missing.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

MIN_ROWS, MIN_WIDTH = 32, 64
"""Smallest batch and layer that oneDNN multiplies faster than MKL (measured)."""


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns x @ weight.T + bias, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        return (
            _product(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            _product(grad.t(), x.t()) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


class WideLinear(nn.Linear):
    """A linear layer that oneDNN multiplies, forward and backward, when the batch is large enough."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x @ weight.T + bias for x of shape (B, in)."""
        return _WideProduct.apply(x, self.weight, self.bias) if len(x) >= MIN_ROWS else super().forward(x)


def speed_up(agent: BaseAlgorithm) -> None:
    """Makes an agent on the CPU learn faster and otherwise as before; see the module's first words."""
    on_cpu = agent.device.type == "cpu"
    if on_cpu and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in agent.policy.modules():
            if type(module) is nn.Linear and min(module.weight.shape) >= MIN_WIDTH:
                module.__class__ = WideLinear
    critic = getattr(agent.policy, "critic", None)
    if critic is not None:
        critic.register_forward_pre_hook(_only_learn_from_data)
    kinds = (nn.modules.batchnorm._BatchNorm, nn.Dropout)
    # sb3-contrib's batch renormalisation is a class of its own.
    two_faced = any(isinstance(module, kinds) or "Batch" in type(module).__name__ for module in agent.policy.modules())
    if not two_faced:
        agent.policy.set_training_mode = lambda mode: None  # type: ignore[method-assign]


def _only_learn_from_data(critic: nn.Module, args: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Holds the critic fixed while the actor is judged: then, and only then, actions have a gradient."""
    critic.requires_grad_(not args[1].requires_grad)


class Impala(BaseFeaturesExtractor):
    """The network of IMPALA (Espeholt et al. 2018, figure 3, right) with 16, 32, 32 channels, on 64×64 images.

    Pixels come in [0, 1], as stable-baselines3's image policies hand them over.
    """

    def __init__(self, observation_space: gym.Space, features_dim: int = 256) -> None:
        """Builds the network.

        Args:
            observation_space: (C, 64, 64).
            features_dim: Width of the last layer.
        """
        super().__init__(observation_space, features_dim)
        assert observation_space.shape is not None
        channels, side = observation_space.shape[0], observation_space.shape[-1]
        layers: list[nn.Module] = []
        for width in (16, 32, 32):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, 2, 1), _Block(width), _Block(width)]
            channels, side = width, (side + 1) // 2
        layers += [nn.ReLU(), nn.Flatten(), nn.Linear(channels * side * side, features_dim), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Returns features (B, features_dim) of images (B, C, 64, 64)."""
        return self.layers(observations)


class _Block(nn.Module):
    """A residual block: two convolutions, each after a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(torch.relu(x))))
