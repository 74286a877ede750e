"""`lram export`, again and again: what is there stays, what has changed is made anew, what is not ours is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lram.datasets.specs import BadInput
from lram.datasets.writer import TaskWriter
from lram.flows.export import ExportSettings, export_dataset


def export(root: Path, out: Path, to: str) -> list[Path]:
    return export_dataset.fn(ExportSettings(root, out, to, workers=1))


@pytest.mark.parametrize("to", ["minari", "lram"])
def test_only_what_has_changed_is_exported_again(write, make, tmp_path, monkeypatch, to):
    if to == "minari":
        pytest.importorskip("minari", reason="Minari is not installed")
    monkeypatch.chdir(tmp_path)
    root, out = Path("data"), Path("out")  # as on a command line
    write(root, task="one", count=3)
    write(root, task="two", count=3)
    one, two = export(root, out, to)
    before = {folder: folder.stat().st_ino for folder in (one, two)}
    assert export(root, out, to) == [one, two]
    assert before == {folder: folder.stat().st_ino for folder in (one, two)}
    with TaskWriter(root, "darkroom", "two", {"maker": "test"}) as writer:
        writer.add(make(episode=3, task="two"))
        writer.finish()
    export(root, out, to)
    assert one.stat().st_ino == before[one]
    if to == "lram":
        assert json.loads((two / "stats.json").read_text())["episodes"] == 4
        assert len(list(two.glob("*.hdf5"))) == 4 and len(list(one.glob("*.hdf5"))) == 3
    else:
        import minari

        assert minari.MinariDataset(two / "data").total_episodes == 4
    assert not list(out.rglob(".*.partial"))


def test_a_folder_that_is_no_export_stays(write, tmp_path):
    write(tmp_path / "data", count=2)
    precious = tmp_path / "out" / "darkroom" / "task" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(BadInput, match="darkroom/task: exists already and was not exported by lram"):
        export(tmp_path / "data", tmp_path / "out", "lram")
    assert precious.read_text() == "mine"
