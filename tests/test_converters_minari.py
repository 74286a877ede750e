from pathlib import Path

import numpy as np
import pytest

from lram.converters.minari import Options, jobs, trajectories
from lram.converters.source import Count
from lram.datasets.export import export_minari
from lram.datasets.specs import BadInput

minari = pytest.importorskip("minari", reason="needs the extra minari")


def convert(src: Path, options: Options = Options()):  # noqa: B008
    (job,) = jobs(src, options)
    count = Count()
    made = list(trajectories(job, options, count))
    count.check()
    return job, made, count


@pytest.mark.parametrize(("domain", "task"), [("dmcontrol", "walker-stand"), ("procgen", "bigfish")])
def test_what_was_exported_comes_back(tmp_path, write, make, domain, task):
    folder = write(tmp_path / "data", domain, task, count=3)
    job, made, count = convert(export_minari(folder, tmp_path / "out"))
    assert (job.name, count.read, count.written, count.episodes) == (f"{domain}/{task}", 60, 60, 3)
    assert job.files and all(path.is_relative_to(job.src) for path in job.files)
    for t in made:
        original = make(domain, t.episode, task=task)
        for name in ("states", "actions", "rewards", "final_state", "seed", "terminated", "truncated", "state_layout"):
            assert np.array_equal(getattr(t, name), getattr(original, name))


def test_a_dataset_that_does_not_say_is_told(tmp_path, write):
    exported = export_minari(write(tmp_path / "data", "metaworld", "reach-v2", count=1), tmp_path / "out")
    metadata = exported / "data" / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"lram"', '"other"'))
    with pytest.raises(BadInput, match="expected --domain and --task"):
        jobs(exported, Options(domain="metaworld"))
    job, made, _ = convert(exported, Options(domain="metaworld", task="push-v2"))
    assert job.task == made[0].task == "push-v2"


def test_what_is_no_dataset_is_refused(tmp_path):
    for text in (None, "[]", "no json", '{"lram": "no json"}', '{"lram": 3}'):
        if text is not None:
            (tmp_path / "data").mkdir(exist_ok=True)
            (tmp_path / "data" / "metadata.json").write_text(text)
        with pytest.raises(BadInput, match="not a Minari dataset"):
            jobs(tmp_path, Options())
