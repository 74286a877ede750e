from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lram.collectors.specialists import DarkRoomSettings, tasks_of, train_goal
from lram.datasets.index import find_tasks
from lram.datasets.shards import shard_task
from lram.datasets.specs import BadInput
from lram.datasets.windows import Windows, WindowSettings
from lram.model.policy import Policy, PolicySettings, action_loss
from lram.train import checkpoint
from lram.train.evaluate import EvaluateSettings, evaluate
from lram.train.loss import do_update, logits_needed, negative_log_likelihood, previous
from lram.train.ranks import start_ranks
from lram.train.trainer import TrainSettings, build, learning_rate, open_windows, train

QUICK = {"size": "tiny", "per_domain": 16, "gap": 10, "learning_rate": 3e-3, "log_every": 1}


def settings_for(root: Path, out: Path, **fields) -> TrainSettings:
    return TrainSettings(root=root, out=out, **(QUICK | {"updates": 12, "save_every": 5, "validate_every": 6} | fields))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backbone", ["xlstm", "mamba", "dt"])
def test_every_backbone_lowers_validation_perplexity(rooms, tmp_path, backbone):
    lines = []
    train(settings_for(rooms, tmp_path, backbone=backbone, updates=60, validate_every=10), lines.append)
    measured = [line["perplexity/darkroom"] for line in lines if "perplexity/darkroom" in line]
    assert len(measured) == 6
    assert measured[-1] < 0.9 * measured[0] < 5


def test_an_interrupted_run_continues_the_same_curve(rooms, tmp_path):
    train(settings_for(rooms, tmp_path / "whole"))

    def interrupt(line):
        if line["update"] == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings_for(rooms, tmp_path / "cut"), interrupt)
    # Every fifth update is saved, and the sixth, whose validation was the best so far.
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "cut")] == ["update-000000006"]
    train(settings_for(rooms, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights = [(checkpoint.find(tmp_path / run) / checkpoint.WEIGHTS).read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_scores_in_the_simulators_are_in_the_log_and_change_no_curve(rooms, tmp_path):
    plain = settings_for(rooms, tmp_path / "plain", updates=4)
    train(plain)
    lines, names = [], sorted(f"darkroom/{folder.name}" for folder in find_tasks(rooms))
    played = replace(plain, out=tmp_path / "played", evaluate_every=3, evaluate_tasks=(names[0],))
    train(played, lines.append)
    assert losses(played.out) == losses(plain.out)
    assert [line["update"] for line in lines if "return/darkroom" in line] == [3, 4]
    result = evaluate(EvaluateSettings(played.out, protocol="training", tasks=(names[0],), episodes=5, workers=1))
    assert lines[-1]["return/darkroom"] == np.mean([episode["return"] for episode in result["episodes"]])
    with pytest.raises(BadInput, match=r"'darkroom/no\?' fits no task of protocol training"):
        train(replace(played, out=tmp_path / "wrong", evaluate_tasks=("darkroom/no?",)))
    assert not (tmp_path / "wrong").exists()


def test_all_kinds_of_domains_train_together(write, tmp_path):
    for domain, task in (("darkroom", "a"), ("dmcontrol", "b"), ("procgen", "c"), ("metaworld", "d")):
        write(tmp_path / "data", domain, task, count=60 if domain == "darkroom" else 15)
    lines = []
    out = train(settings_for(tmp_path / "data", tmp_path / "run", updates=3, gap=5, context=10), lines.append)
    names = [key for key in lines[-1] if key.startswith("loss/")]
    assert names == ["loss/darkroom", "loss/dmcontrol", "loss/metaworld", "loss/procgen"]
    assert np.isclose(lines[-1]["loss"], np.mean([lines[-1][name] for name in names]))
    # Untrained, every domain is as wrong as guessing among its valid choices.
    guesses = {"darkroom": 5, "dmcontrol": 256, "metaworld": 256, "procgen": 15}
    for domain, choices in guesses.items():
        assert abs(lines[0][f"loss/{domain}"] - np.log(choices)) < 0.7
    state = checkpoint.read_state(checkpoint.find(out))
    assert set(state.perplexity) == set(guesses)
    assert set(state.target_returns) == {"darkroom/a", "dmcontrol/b", "metaworld/d", "procgen/c"}


def test_other_settings_or_data_do_not_continue_a_run(rooms, write, tmp_path):
    settings = settings_for(rooms, tmp_path / "run", updates=2)
    train(settings)
    with pytest.raises(BadInput, match="was trained with size = tiny, not 16M; choose another --out"):
        train(replace(settings, size="16M"))
    write(tmp_path / "other", count=25)
    with pytest.raises(BadInput, match="was trained on other data"):
        train(replace(settings, root=tmp_path / "other"))


def test_a_loss_that_is_not_finite_stops_with_the_batch(rooms, tmp_path):
    settings = settings_for(rooms, tmp_path, learning_rate=1e30, clip=1e30)
    with pytest.raises(BadInput, match=r"loss or gradient is not finite at update \d+ \(darkroom nan, gradient nan\)"):
        train(settings)
    saved = np.load(tmp_path / "bad-batch-rank0.npz")
    assert saved["darkroom/states"].shape == (16, 12, 204)


def test_data_that_cannot_be_used_is_refused(rooms, tmp_path):
    with pytest.raises(BadInput, match="no such dataset directory"):
        train(settings_for(tmp_path / "missing", tmp_path / "run"))
    with pytest.raises(BadInput, match="no windows of 2 episodes 200 apart, the longest history has 200 episodes"):
        train(settings_for(rooms, tmp_path / "run", gap=200))
    assert not (tmp_path / "run").exists()


def test_the_rate_warms_up_and_falls_along_a_cosine():
    settings = TrainSettings(root=Path("x"), updates=100_000)
    assert learning_rate(settings, 0) == pytest.approx(1e-4 / 4000)
    assert learning_rate(settings, 3999) == pytest.approx(1e-4)
    assert learning_rate(settings, 52_000) == pytest.approx((1e-4 + 1e-6) / 2)
    assert learning_rate(settings, 99_999) == pytest.approx(1e-6, rel=1e-3)
    short = replace(settings, updates=100)
    rates = [learning_rate(short, update) for update in range(100)]
    assert max(rates) == rates[10] == pytest.approx(1e-4)


def weights(out: Path, name: str = checkpoint.WEIGHTS) -> bytes:
    return (checkpoint.find(out) / name).read_bytes()


def test_the_same_seed_gives_the_same_weights(rooms, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(ord(name))  # whatever was drawn before does not matter
        train(settings_for(rooms, tmp_path / name, updates=4, seed=seed, readers=ord(name) % 2))
    first, second, other = (losses(tmp_path / name) for name in "abc")
    assert first == second != other
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_an_exploding_loss_stops_with_the_batch(rooms, tmp_path):
    with pytest.raises(BadInput, match=r"loss has exploded at update \d+ \(darkroom \d+"):
        train(settings_for(rooms, tmp_path, learning_rate=3.0))
    assert np.load(tmp_path / "bad-batch-rank0.npz")["darkroom/actions"].shape == (16, 12)
    assert all(loss < 56 for loss in losses(tmp_path))


def test_a_run_continues_from_files_to_shards(rooms, tmp_path):
    for folder in find_tasks(rooms):
        shard_task(folder, tmp_path / "shards", 100_000)
    train(settings_for(rooms, tmp_path / "whole", updates=6, save_every=3))

    def interrupt(line):
        if line["update"] == 4:
            raise KeyboardInterrupt

    cut = settings_for(rooms, tmp_path / "cut", updates=6, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt)
    train(replace(cut, root=tmp_path / "shards"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_validation_is_logged_whenever_it_is_measured(rooms, tmp_path):
    lines = []
    train(settings_for(rooms, tmp_path, updates=5, validate_every=2, log_every=3), lines.append)
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["perplexity/darkroom" in line for line in lines] == [False, True, False, True, True]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines


def test_the_mixture_weighs_the_loss(write, tmp_path):
    for domain in ("metaworld", "dmcontrol", "procgen"):
        write(tmp_path / "data", domain, count=5)
    lines, fields = [], {"per_domain": 4, "context": 5, "updates": 1}
    out = train(
        settings_for(tmp_path / "data", tmp_path / "run", mix=("procgen=0.5", "dmcontrol=4"), **fields), lines.append
    )
    line = lines[-1]
    shares = {"procgen": 1, "dmcontrol": 9, "metaworld": 2}  # 12 windows in parts of 1.09, 8.73 and 2.18
    assert np.isclose(line["loss"], sum(line[f"loss/{name}"] * share for name, share in shares.items()) / 12)
    windows = Windows.open(tmp_path / "data", WindowSettings(context=5))
    assert {b.domain.name: len(b.mask) for b in windows.batches(0, "train", shares, 0)} == shares
    assert checkpoint.read_state(checkpoint.find(out)).train["mix"] == ["procgen=0.5", "dmcontrol=4"]
    without = train(settings_for(tmp_path / "data", tmp_path / "two", mix=("procgen=0",), **fields), lines.append)
    assert "loss/procgen" not in lines[-1]
    assert not checkpoint.read_state(checkpoint.find(without)).policy["image"]


def test_gradients_are_of_the_mean_weighted_by_windows(write, tmp_path):
    for domain in ("metaworld", "darkroom", "procgen"):
        write(tmp_path, domain, count=6)
    settings = settings_for(
        tmp_path, tmp_path / "run", context=5, gap=1, mix=("procgen=0.25", "metaworld=2"), backbone="dt"
    )
    windows, shares, _ = open_windows(settings)
    assert shares == {"darkroom": 15, "metaworld": 29, "procgen": 4}
    (policy, _), (other, _) = (build(settings, windows, torch.device("cpu")) for _ in range(2))
    ranks, batches = start_ranks("cpu"), list(windows.batches(0, "train", shares, 0))
    losses = do_update(policy, batches, ranks)
    expected = []
    for batch in batches:
        total, count = negative_log_likelihood(other, batch, ranks)
        expected.append(total / count)
    torch.testing.assert_close(losses, torch.stack(expected).double())
    sum(loss * shares[batch.domain.name] / 48 for loss, batch in zip(expected, batches)).backward()
    for one, two in zip(policy.parameters(), other.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_a_run_from_before_a_setting_existed_goes_on(rooms, tmp_path):
    settings = settings_for(rooms, tmp_path, updates=4, save_every=2)
    train(settings)
    newest = checkpoint.find(tmp_path)
    state = json.loads((newest / "state.json").read_text())
    for name in ("tasks", "mix", "ema", "init"):
        del state["train"][name]
    del state["policy"]["half"]
    (newest / "state.json").write_text(json.dumps(state))
    train(settings)
    with pytest.raises(BadInput, match=r"was trained with ema = 0.0, not 0.5; choose another --out"):
        train(replace(settings, ema=0.5))


def test_holdout_goals_are_left_out_unless_asked_for(rooms, tmp_path):
    shutil.copytree(rooms, tmp_path / "data")
    collect = DarkRoomSettings(size=3, horizon=6, steps=1200, learning_rate=1e-2)
    for task in tasks_of(collect, "holdout"):
        train_goal(collect, task, tmp_path / "data")
    said = []
    fields = {"updates": 2, "top": 0.05}
    out = train(settings_for(tmp_path / "data", tmp_path / "train", **fields), say=said.append)
    assert said == ["trains on 7 tasks; left out: 2 hold-out tasks"]
    dataset = checkpoint.read_state(checkpoint.find(out)).dataset
    assert [name.split("/")[1] for name in dataset["tasks"]] == sorted(tasks_of(collect, "training"))
    assert dataset["left_out"] == {"hold-out tasks": 2}
    train(settings_for(rooms, tmp_path / "alone", **fields), say=said.append)
    assert losses(tmp_path / "alone") == losses(tmp_path / "train") and len(said) == 1
    tuned = settings_for(tmp_path / "data", tmp_path / "tuned", holdout=True, init=out, **fields)
    train(tuned, say=said.append)
    assert said[1:] == ["trains on 2 tasks; left out: 7 tasks that are not hold-out tasks"]
    tasks = checkpoint.read_state(checkpoint.find(tmp_path / "tuned")).dataset["tasks"]
    assert [name.split("/")[1] for name in tasks] == sorted(tasks_of(collect, "holdout"))


def test_fine_tuning_starts_from_the_weights_of_a_checkpoint(rooms, write, tmp_path):
    shutil.copytree(rooms, tmp_path / "data")
    write(tmp_path / "data", "procgen", "bigfish", count=4)
    first = settings_for(tmp_path / "data", tmp_path / "first", context=4, per_domain=4, updates=3)
    train(first)
    # The data to tune on holds vectors alone: the image encoder comes along as it is.
    still = {"learning_rate": 0.0, "final_learning_rate": 0.0}
    tuned = replace(
        first, root=rooms, out=tmp_path / "tuned", init=first.out, top=0.05, updates=6, save_every=3, **still
    )
    train(tuned)
    assert weights(tuned.out) == weights(first.out)
    moved = replace(tuned, out=tmp_path / "moved", learning_rate=1e-2)
    train(moved)
    one, two = (checkpoint.load_policy(out)[0].state_dict() for out in (first.out, moved.out))
    changed = {name.split(".")[0] for name in one if not torch.equal(one[name], two[name])}
    assert changed == {"backbone", "encode_vector", "encode_return", "encode_reward", "token_norm", "head"}
    with pytest.raises(BadInput, match=r"a checkpoint of another policy \(backbone is xlstm, not mamba\)"):
        train(replace(tuned, out=tmp_path / "other", backbone="mamba"))
    with pytest.raises(BadInput, match="no checkpoint"):
        train(replace(tuned, out=tmp_path / "other", init=tmp_path / "nothing"))
    with pytest.raises(BadInput, match="a policy that has no image encoder, which the data calls for"):
        vectors = train(replace(first, root=rooms, out=tmp_path / "vectors"))
        train(replace(first, out=tmp_path / "other", init=vectors))
    with pytest.raises(BadInput, match="a policy for windows of 12 steps, not the data's 18"):
        short = train(replace(first, root=rooms, out=tmp_path / "short", backbone="dt"))
        train(replace(first, root=rooms, out=tmp_path / "other", backbone="dt", init=short, episodes=3))
    assert not (tmp_path / "other").exists()
    # A run that was tuned goes on without the checkpoint it started from.
    shutil.rmtree(first.out)
    train(tuned)


def test_an_average_of_the_weights_is_validated_and_saved_and_resumed(rooms, tmp_path):
    plain = settings_for(rooms, tmp_path / "plain", updates=0)
    averaged = replace(plain, ema=0.75)
    expected = None
    for updates in range(1, 5):  # the weights after every update; the rate is the same in all of these
        fields = {"updates": updates, "warmup": 0, "final_learning_rate": plain.learning_rate, "save_every": 2}
        train(replace(plain, out=tmp_path / f"plain-{updates}", **fields))
        now = checkpoint.load_policy(tmp_path / f"plain-{updates}")[0].state_dict()
        if expected is None:
            train(replace(plain, out=tmp_path / "zero", learning_rate=0.0, weight_decay=0.0, updates=1))
            expected = checkpoint.load_policy(tmp_path / "zero")[0].state_dict()
        expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now}
    train(replace(averaged, out=tmp_path / "ema", **fields))
    assert losses(tmp_path / "ema") == losses(tmp_path / "plain-4")
    assert weights(tmp_path / "ema", checkpoint.TRAINED) == weights(tmp_path / "plain-4")
    policy, state = checkpoint.load_policy(tmp_path / "ema")
    for name, weight in policy.state_dict().items():
        assert torch.allclose(weight, expected[name], atol=1e-6), name
    assert state.perplexity != checkpoint.read_state(checkpoint.find(tmp_path / "plain-4")).perplexity

    def interrupt(line):
        if line["update"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(averaged, out=tmp_path / "cut", **fields), interrupt)
    train(replace(averaged, out=tmp_path / "cut", **fields))
    for name in (checkpoint.WEIGHTS, checkpoint.TRAINED):
        assert weights(tmp_path / "cut", name) == weights(tmp_path / "ema", name)


def test_ablations_change_what_the_policy_sees(rooms, write, tmp_path):
    write(tmp_path / "data", "metaworld", count=6)
    shutil.copytree(rooms / "darkroom", tmp_path / "data" / "darkroom")
    settings = settings_for(tmp_path / "data", tmp_path / "run", context=5, updates=2, backbone="dt")
    first = {}
    for name in ("half", "with_actions", "without_return", "without_reward"):
        train(replace(settings, out=tmp_path / name, **{name: True}))
        policy, state = checkpoint.load_policy(tmp_path / name)
        assert state.policy[name] and getattr(policy.settings, name)
        first[name] = losses(tmp_path / name)[0]
    assert len(set(first.values())) == 4
    with pytest.raises(BadInput, match="was trained with half = True, not False"):
        train(replace(settings, out=tmp_path / "half"))


def test_the_action_before_a_step_is_the_one_of_the_step_before():
    assert previous(torch.tensor([[3, 1, 4], [1, 5, 0]])).tolist() == [[-1, 3, 1], [-1, 1, 5]]
    before = previous(torch.tensor([[[0.5, -1.0], [0.25, 0.0]]]))
    assert before[0, 0].isnan().all() and before[0, 1].tolist() == [0.5, -1.0]


def test_the_loss_reads_the_first_logits_alone(write, tmp_path):
    for domain in ("metaworld", "procgen"):
        write(tmp_path, domain, count=3)
    policy = Policy(PolicySettings("dt", "tiny"))
    for batch in Windows.open(tmp_path, WindowSettings(context=5)).batches(0, "train", 2, seed=0):
        arrays = batch.states, batch.returns_to_go, batch.previous_rewards, batch.actions, batch.mask
        *inputs, actions, mask = map(torch.from_numpy, arrays)
        whole = policy(*inputs)
        part = policy(*inputs, first=logits_needed(batch))
        torch.testing.assert_close(part, whole[..., : part.shape[-1]])
        losses = [action_loss(logits, actions, mask, batch.domain) for logits in (part, whole)]
        torch.testing.assert_close(*losses)
        assert part.shape[-1] == {"procgen": 15, "metaworld": 18 + 4 * 256}[batch.domain.name]


def test_settings_that_mean_nothing_are_refused(rooms, tmp_path):
    for fields, message in (
        ({"top": 0.0}, r"--top 0.0: expected a share"),
        ({"ema": 1.0}, r"--ema 1.0: expected a decay"),
        ({"per_domain": 0}, r"--per-domain 0: expected at least 1"),
        ({"episodes": 0}, r"--episodes 0: expected at least 1"),
        ({"readers": -1}, r"--readers -1: expected at least 0"),
        ({"learning_rate": float("nan")}, r"--learning-rate nan: expected at least 0"),
        ({"clip": 0.0}, r"--clip 0.0: expected a norm above 0"),
        ({"slstm": True, "backbone": "mamba"}, r"--slstm: mamba has no sLSTM blocks, only xlstm does"),
    ):
        with pytest.raises(BadInput, match=message):
            train(settings_for(rooms, tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_to_is_refused(rooms, tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(BadInput, match=r"log.jsonl: cannot be continued as a log of JSON lines \("):
            train(settings_for(rooms, tmp_path / place))
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(BadInput, match=r"cannot be continued as a log of JSON lines \('update'\)"):
        train(settings_for(rooms, tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_missing_is_said_before_anything_is_written(rooms, tmp_path):
    with pytest.raises(BadInput, match="--wandb needs a package that is not installed: pip install wandb"):
        train(settings_for(rooms, tmp_path / "run", wandb="project"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_policy_trains_the_same(rooms, tmp_path):
    settings = settings_for(rooms, tmp_path / "eager", backbone="dt", updates=3, per_domain=4)
    train(settings)
    train(replace(settings, out=tmp_path / "compiled", compile=True))
    assert np.allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), atol=1e-5)
    # Compiled or not, a checkpoint is the same to load.
    assert checkpoint.load_policy(tmp_path / "compiled")[0].settings.backbone == "dt"
