"""The policy: encoders, three backbones, the action head, and the recurrent state."""
