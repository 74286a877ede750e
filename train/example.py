"""Plays an episode with an exported policy: python example.py [<domain>/<task>] [TARGET_RETURN]."""

import sys
from pathlib import Path

from lram.collectors.environments import make
from lram.train.export import load_policy


def main() -> None:
    """Acts until the episode ends, and prints its return."""
    policy = load_policy(Path(__file__).parent)
    task = sys.argv[1] if len(sys.argv) > 1 else sorted(policy.tasks)[0]
    target = float(sys.argv[2]) if len(sys.argv) > 2 else None
    domain, name = task.split("/", 1)
    env = make(domain, name, num_envs=1, seed=0)  # or your robot: anything with states, rewards and an end
    states, _ = env.reset()
    policy.reset(task, target)
    total, reward, done = 0.0, 0.0, False
    while not done:
        action = policy.act(states[0], reward)
        states, rewards, terminated, truncated, _ = env.step(action[None])
        reward = float(rewards[0])
        total += reward
        done = bool(terminated[0] or truncated[0])
    print(f"{task}: return {total:.1f}")


if __name__ == "__main__":
    main()
