"""`lram bench convert --part runners`: the same conversion through threads, processes and a Dask cluster."""

from __future__ import annotations

import re

from lram.flows.bench_runners import content, make_source


def test_three_ways_to_convert_write_the_same_bytes(lram, tmp_path):
    done = lram("bench", "convert", "--part", "runners", "--quick", "--work", tmp_path)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head == "the same conversion, 8 tasks of 1,000 × 93, 2 workers"
    names = [re.split("  +", line.strip())[0] for line in lines]
    assert names == [
        *(f"{runner}, {what}" for runner in ("threads", "processes", "dask cluster") for what in NAMES),
        "what the three wrote, by SHA-256",
    ]
    # Of each task two trajectories, an index, what is known of its source, and a lock.
    assert re.search(r"40 files, identical +identical +met$", lines[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["runners-1000"]
    sources = list(tmp_path.glob("runners-1000/expert/*/data.hdf5"))
    assert len(sources) == 8 and len({path.stat().st_ino for path in sources}) == 1
    make_source(tmp_path / "runners-1000", 1000)
    assert len(list(tmp_path.glob("runners-1000/expert/*"))) == 8


NAMES = ("all tasks", "overhead of a task")


def test_content_tells_bytes_and_names_apart(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    before = content(tmp_path)
    (tmp_path / "one").write_bytes(b"2")
    assert content(tmp_path) != before and content(tmp_path).keys() == before.keys()
