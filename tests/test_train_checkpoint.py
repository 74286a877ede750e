from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lram.datasets.specs import BadInput
from lram.model.policy import Policy, PolicySettings
from lram.train.checkpoint import (
    TRAINED,
    WEIGHTS,
    State,
    best,
    checkpoints,
    find,
    load_optimizer,
    load_policy,
    load_weights,
    save,
)

TINY = {"backbone": "dt", "size": "tiny", "slstm": False, "max_steps": 4, "image": False}


def make_run(out: Path, updates: list[int], best_at: int = -1) -> Policy:
    torch.manual_seed(0)
    policy = Policy(PolicySettings(**TINY))
    optimizer = torch.optim.AdamW(policy.parameters())
    sum(p.square().sum() for p in policy.parameters()).backward()
    optimizer.step()
    for update in updates:
        save(out, State(update=update, policy=TINY, best=(1.5, best_at)), policy, optimizer)
    return policy


def test_newest_and_best_are_kept(tmp_path):
    policy = make_run(tmp_path, [10, 20, 30, 40], best_at=20)
    assert [path.name for path in checkpoints(tmp_path)] == ["update-000000020", "update-000000040"]
    assert find(tmp_path).name == "update-000000040"
    assert best(tmp_path).name == "update-000000020"
    assert find(tmp_path / "update-000000020") == best(tmp_path / "update-000000020") == best(tmp_path)
    loaded, state = load_policy(tmp_path)
    assert state.update == 40 and state.best == (1.5, 20)
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert not loaded.training


def test_the_optimizer_goes_on_where_it_was(tmp_path):
    policy = make_run(tmp_path, [10])
    optimizer = torch.optim.AdamW(policy.parameters())
    load_optimizer(optimizer, find(tmp_path))
    moments = optimizer.state[next(policy.parameters())]
    assert moments["step"] == 1 and moments["exp_avg"].abs().sum() > 0


def test_a_checkpoint_that_is_there_stays_as_it_is(tmp_path):
    make_run(tmp_path, [10])
    before = {path.name: path.read_bytes() for path in find(tmp_path).iterdir()}
    other = Policy(PolicySettings(**{**TINY, "backbone": "mamba"}))
    save(tmp_path, State(update=10), other, torch.optim.AdamW(other.parameters()))
    assert before == {path.name: path.read_bytes() for path in find(tmp_path).iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["update-000000010"]


def test_wrong_checkpoints_are_refused(tmp_path):
    make_run(tmp_path / "run", [10])
    folder = find(tmp_path / "run")
    other = Policy(PolicySettings(**{**TINY, "backbone": "mamba"}))
    with pytest.raises(BadInput, match=r"another policy \(backbone is dt, not mamba\)"):
        load_weights(other, folder)
    with pytest.raises(BadInput, match="no checkpoint"):
        find(tmp_path / "nothing")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="not readable weights"):
        load_policy(folder)
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(BadInput, match="not readable optimizer state"):
        load_optimizer(torch.optim.AdamW(other.parameters()), folder)
    torch.save({}, folder / "optimizer.pt")
    with pytest.raises(BadInput, match="not readable optimizer state"):
        load_optimizer(torch.optim.AdamW(other.parameters()), folder)
    state = json.loads((folder / "state.json").read_text())
    for wrong in ("{}", "[]", json.dumps(state)[:50], json.dumps({**state, "policy": {"later": 1}})):
        (folder / "state.json").write_text(wrong)
        with pytest.raises(BadInput, match="not a checkpoint's state"):
            load_policy(folder)


def test_a_pickle_in_place_of_optimizer_state_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    make_run(tmp_path / "run", [10])
    folder = find(tmp_path / "run")
    torch.save(Bomb(), folder / "optimizer.pt")
    with pytest.raises(BadInput, match="not readable optimizer state"):
        load_optimizer(torch.optim.AdamW(Policy(PolicySettings(**TINY)).parameters()), folder)
    assert not (tmp_path / "exploded").exists()


SAVER = """
import os, sys
from pathlib import Path
from lram.train.checkpoint import State, save
from lram.model.policy import Policy, PolicySettings
import torch
torch.set_num_threads(1)
settings = dict(backbone="dt", size="tiny", slstm=False, max_steps=4, image=False)
policy = Policy(PolicySettings(**settings))
optimizer = torch.optim.AdamW(policy.parameters())
update = 0
for line in sys.stdin:  # a process that saves, for each that was killed: starting torch is what costs
    pid = os.fork()
    if pid == 0:
        update = int(line)
        while True:
            update += 1
            save(Path(sys.argv[1]), State(update=update, policy=settings), policy, optimizer, policy)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def test_20_kills_while_saving_leave_a_loadable_checkpoint(tmp_path):
    rng = random.Random(0)
    last, cut = 0, 0
    run = [sys.executable, "-c", SAVER, str(tmp_path)]
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(20):
            process.stdin.write(f"{last}\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            while not [path for path in checkpoints(tmp_path) if path.name > f"update-{last:09d}"]:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            policy, state = load_policy(tmp_path)
            load_weights(policy, find(tmp_path), TRAINED)
            load_optimizer(torch.optim.AdamW(policy.parameters()), find(tmp_path))
            assert state.update >= last
            last = state.update
            cut += bool(list(tmp_path.glob(".update-*.tmp")))
        process.stdin.close()
    assert last >= 20
    assert cut > 5, "no kill fell into the writing of a checkpoint"
