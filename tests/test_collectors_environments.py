"""Every domain's environments keep one contract, and say what is missing."""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from lram.collectors.environments import ENVIRONMENTS, make, status
from lram.datasets.specs import DOMAINS, BadInput
from lram.flows.envs import EnvsSettings, main

PACKAGES = {"atari": "ale_py", "dmcontrol": "dm_control", "metaworld": "metaworld", "procgen": "envpool"}


def test_every_domain_has_environments():
    assert ENVIRONMENTS.keys() == DOMAINS.keys()


@pytest.mark.parametrize("domain", ["atari", "darkroom", "dmcontrol", "metaworld", "procgen"])
def test_the_contract(domain):
    if not status(domain).works:
        pytest.skip(status(domain).words)
    spec, task = DOMAINS[domain], ENVIRONMENTS[domain].example
    env = make(domain, task, num_envs=2, seed=1)
    assert env.num_envs == 2 and env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    states, _ = env.reset()
    if spec.state == "image":
        assert states.shape == (2, 1, 64, 64) and states.dtype == np.uint8
    else:
        assert states.ndim == 2 and states.dtype == np.float32
    assert env.observation_space.contains(states)
    if spec.action == "discrete":
        assert env.single_action_space == gym.spaces.Discrete(spec.num_actions)
    else:
        box = env.single_action_space
        assert box.shape[0] <= spec.num_actions and (box.low == -1).all() and (box.high == 1).all()
    np.testing.assert_array_equal(
        make(domain, task, num_envs=2, seed=1).action_space.sample(), env.action_space.sample()
    )
    states, rewards, terminated, truncated, infos = env.step(env.action_space.sample())
    assert env.observation_space.contains(states) and rewards.dtype == np.float32
    assert terminated.dtype == truncated.dtype == bool and rewards.shape == terminated.shape == (2,)
    assert isinstance(infos, dict)
    if domain != "darkroom":
        np.testing.assert_array_equal(make(domain, task, 2, 1, first_episode=5).episodes, [5, 5])
        assert (env.state_layout is None) == (domain != "dmcontrol")
    env.close()


@pytest.mark.parametrize("domain", PACKAGES)
def test_a_missing_simulator_is_one_sentence_that_names_the_extra(domain, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[domain], None)
    with pytest.raises(BadInput, match=rf"pip install \"lram\[{domain}\]\"") as error:
        make(domain, ENVIRONMENTS[domain].example)
    assert status(domain).works is False and status(domain).words == str(error.value)
    assert "\n" not in str(error.value)
    if domain == "procgen":
        assert "libqt5gui5" in str(error.value)


def test_a_broken_simulator_does_not_end_the_table(monkeypatch):
    import lram.collectors.atari

    def broken(*arguments):
        raise OSError("no such library")

    monkeypatch.setattr(lram.collectors.atari, "make", broken)
    assert status("atari").words == "installed, but does not run: OSError: no such library"


def test_unknown_domains_are_refused():
    for call in (lambda: make("chess", "e4"), lambda: status("chess")):
        with pytest.raises(BadInput, match="unknown domain 'chess', expected one of atari"):
            call()


def test_lram_envs_shows_every_domain(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    assert main(EnvsSettings()) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == {"domain", *ENVIRONMENTS}
    assert "41 + 5" in lines["atari"] and "  no  " in lines["atari"] and "lram[atari]" in lines["atari"]
    assert "any size" in lines["darkroom"] and "  yes  " in lines["darkroom"]


def test_lram_envs_lists_a_domains_tasks(capsys):
    assert main(EnvsSettings(domain="dmcontrol")) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 16 and "walker-stand" in names
    with pytest.raises(BadInput, match="no tasks are listed for domain 'darkroom'"):
        main(EnvsSettings(domain="darkroom"))
