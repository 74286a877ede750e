from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lram.datasets.specs import DOMAINS, NUM_LOGITS, BadInput, state_columns, tasks


def test_the_table_has_432_training_and_37_holdout_tasks():
    splits = Counter(task.split for task in tasks().values())
    assert splits == {"train": 432, "holdout": 37}
    assert {domain for domain, _ in tasks()} == set(DOMAINS) - {"darkroom"}
    without = {task.name for task in tasks().values() if task.score_low is None}
    assert without == {"carnival", "pooyan"}


def test_head_and_reward_scales_are_the_papers():
    assert NUM_LOGITS == 2066
    scales = {name: spec.reward_scale for name, spec in DOMAINS.items() if spec.reward_scale != 1}
    assert scales == {"metaworld": 200, "dmcontrol": 100, "atari": 20}


def test_union_layout_puts_keys_in_their_places():
    columns = state_columns("dmcontrol", {"position": [0, 3], "velocity": [3, 5]}, 5)
    assert columns.tolist() == [41, 42, 43, 14, 15]
    assert state_columns("metaworld", None, 39).tolist() == list(range(39))


@pytest.mark.parametrize(
    ("layout", "width", "said"),
    [
        (None, 5, "no state_layout"),
        ({"sonar": [0, 5]}, 5, "'sonar'"),
        ({"height": [0, 2]}, 2, "'height'"),
        ({"position": [0, 3]}, 5, "does not cover all 5"),
    ],
)
def test_states_without_a_place_are_refused(layout, width, said):
    with pytest.raises(BadInput, match=said):
        state_columns("dmcontrol", layout, width)
    with pytest.raises(BadInput, match="does not fit"):
        state_columns("composuite", None, 205)


def test_columns_are_distinct_for_all_keys_at_once():
    layout = {"orientations": [0, 14], "velocity": [14, 41], "touch": [41, 46], "height": [46, 47]}
    columns = state_columns("dmcontrol", layout, 47)
    assert len(np.unique(columns)) == 47
