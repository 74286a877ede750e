"""Episodes drawn: pictures, captions, files."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from lram.datasets.specs import BadInput
from lram.model.policy import Policy, PolicySettings
from lram.train import checkpoint
from lram.train.watch import PANEL, SIDE, WatchSettings, draw, watch

ROOM = "darkroom/room3x3-h6-goal-02-01"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("watch")
    policy = Policy(PolicySettings(size="tiny"))
    state = checkpoint.State(1, {}, (1.0, 1), dataclasses.asdict(policy.settings), {}, {"tasks": [ROOM]}, {ROOM: 4.0})
    checkpoint.save(out, state, policy, torch.optim.AdamW(policy.parameters()))
    return out


def test_a_room_is_drawn_step_by_step(run, tmp_path):
    path, result = watch(WatchSettings(run, ROOM, every=1))
    assert path == run / "evaluation" / "watch" / "darkroom-room3x3-h6-goal-02-01-0.gif"
    assert result["length"] == 6 and result["target"] == 4.0
    with Image.open(path) as film:
        assert film.n_frames == 6 and film.size == (SIDE, SIDE + PANEL)
        film.seek(0)
        first = np.array(film.convert("RGB"))
    # The agent starts in the upper left corner, the goal is in the lowest row.
    assert first[SIDE // 6, SIDE // 6].argmax() == 2 and first[SIDE - SIDE // 6, SIDE // 2].argmax() == 1
    path, _ = watch(WatchSettings(run, ROOM, tmp_path / "room.mp4", every=2))
    film = cv2.VideoCapture(str(path))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) == 3


@pytest.mark.parametrize("domain", ["atari", "metaworld"])
def test_the_caption_follows_actions_and_rewards(make, domain):
    if domain == "metaworld":
        pytest.importorskip("metaworld", reason="metaworld is an optional simulator")
        with pytest.raises(RuntimeError, match="step 0 does not come out as it was"):
            list(draw(make(domain, length=3, task="reach-v2"), 5.0, "", WatchSettings(Path(), "")))
        return
    trajectory = make(domain, length=4, actions=np.array([0, 7, 7, 17]), rewards=np.array([0, 0, 1, 0], np.float32))
    trajectory.states[:] = trajectory.states[0]
    pictures = list(draw(trajectory, 5.0, "title", WatchSettings(Path(), "", every=1)))
    assert len(pictures) == 4 and pictures[0].shape == (SIDE + PANEL, SIDE, 3)
    panels = [picture[SIDE + 36 :] for picture in pictures]  # the actions
    assert np.array_equal(panels[1], panels[2]) and not np.array_equal(panels[0], panels[1])
    lines = [picture[SIDE + 16 : SIDE + 34, 60:] for picture in pictures]  # the return-to-go
    assert np.array_equal(lines[1], lines[2]) and not np.array_equal(lines[2], lines[3])


def test_dmcontrol_is_simulated_again_and_rendered(run, tmp_path):
    pytest.importorskip("dm_control", reason="dm_control is an optional simulator")
    settings = WatchSettings(run, "dmcontrol/cartpole-swingup", tmp_path / "pole.gif", target="10", every=250)
    try:
        path, _ = watch(settings)
    except BadInput as error:
        assert "MUJOCO_GL" in str(error)
        pytest.skip("nothing here renders")
    with Image.open(path) as film:
        assert film.n_frames == 4 and np.array(film.convert("RGB"))[:SIDE].std() > 10


def test_what_cannot_be_drawn_is_one_sentence(run, tmp_path, make):
    for changed, words in (
        ({"task": "nowhere"}, "expected <domain>/<task>"),
        ({"every": 0}, "--every"),
        ({"out": tmp_path / "film.avi"}, ".gif or .mp4"),
        ({"task": "darkroom/none"}, "not a Dark-Room task"),
    ):
        with pytest.raises(BadInput, match=words):
            watch(dataclasses.replace(WatchSettings(run, ROOM), **changed))
    with pytest.raises(BadInput, match="composuite cannot be drawn"):
        list(draw(make("composuite"), 1.0, "", WatchSettings(Path(), "")))
