"""Foreign HDF5 files: what is refused, in which words, and that nothing outside the file is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from lram.converters.safe_hdf5 import array, group, opened
from lram.datasets.specs import BadInput

ROWS = np.arange(60, dtype=np.float32).reshape(20, 3)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Another file, unread so far: reading it moves its time of access."""
    path = tmp_path / "secret.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=ROWS, maxshape=(None, 3))
    os.utime(path, (0, path.stat().st_mtime))
    return path


def refusal(path: Path, name: str = "x") -> str:
    """Returns the sentence with which asking for an array is refused."""
    with pytest.raises(BadInput) as error, opened(path) as file:
        array(file, name, (None, 3))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


def made(path: Path, make: Callable[[h5py.File], object]) -> Path:
    with h5py.File(path, "w") as file:
        make(file)
    return path


def virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout(ROWS.shape, "f4", maxshape=(None, 3))
    source = h5py.VirtualSource(secret, "x", ROWS.shape, maxshape=(None, 3))
    layout[0 : h5s.UNLIMITED] = source[0 : h5s.UNLIMITED]
    file.create_virtual_dataset("x", layout)


OUTSIDE: dict[str, tuple[Callable[[h5py.File, Path], object], str]] = {
    "external link": (lambda f, s: f.__setitem__("x", h5py.ExternalLink(s, "x")), "'x' is a link to another file"),
    "deep in another group": (
        lambda f, s: (f.__setitem__("x", ROWS), f.create_group("a/b").__setitem__("c", h5py.ExternalLink(s, "x"))),
        "'a/b/c' is a link to another file",
    ),
    "soft link through it": (
        lambda f, s: (f.__setitem__("y", h5py.ExternalLink(s, "/")), f.__setitem__("x", h5py.SoftLink("/y/x"))),
        "'x' is a soft link",
    ),
    "virtual": (virtual, "x is a virtual dataset"),
    "external storage": (
        lambda f, s: f.create_dataset("x", ROWS.shape, "f4", external=[(s, 0, h5py.h5f.UNLIMITED)]),
        "x keeps its values in other files",
    ),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_points_outside_is_refused_and_not_read(kind, secret, tmp_path):
    make, said = OUTSIDE[kind]
    path = made(tmp_path / "file.hdf5", lambda file: make(file, secret))
    os.utime(secret, (0, secret.stat().st_mtime))
    assert refusal(path).startswith(said)
    assert secret.stat().st_atime == 0


CONTENT: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "petabytes": (
        lambda f: f.create_dataset("x", (2**48, 3), "f4", chunks=(1000, 3), compression=4),
        "x declares shape (281474976710656, 3), but the file does not hold that much",
    ),
    "a gigabyte of chunks that are not there": (
        lambda f: f.create_dataset("x", (2**27, 3), "f4", chunks=(2**20, 3), compression=4),
        "x declares shape (134217728, 3), but",
    ),
    "never written": (lambda f: f.create_dataset("x", (1000, 3), "f4"), "x declares shape (1000, 3), but"),
    "chunks too large": (
        lambda f: f.create_dataset("x", (2**30, 3), "f4", chunks=(2**28, 3)),
        "x is in chunks of shape (268435456, 3), more than 1 GiB each",
    ),
    "100,000 columns": (
        lambda f: f.create_dataset("x", (2, 100_000), "f4"),
        "x has shape (2, 100000), expected (any, 3)",
    ),
    "32 dimensions": (lambda f: f.create_dataset("x", (1,) * 32, "f4"), "x has 32 dimensions, expected 2: (any, 3)"),
    "no dimension": (lambda f: f.__setitem__("x", np.float32(1)), "x has 0 dimensions"),
    "no value": (lambda f: f.__setitem__("x", h5py.Empty("f4")), "x has 0 dimensions"),
    "integers": (lambda f: f.__setitem__("x", ROWS.astype(int)), "x is int64, expected float"),
    "texts": (lambda f: f.__setitem__("x", [["a", "b", "c"]]), "x is object, expected float"),
    "a group": (lambda f: f.create_group("x"), "x is no array"),
    "nothing": (lambda f: None, "x is missing, expected an array"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_absurd_or_wrong_arrays_are_refused(kind, tmp_path):
    make, said = CONTENT[kind]
    assert refusal(made(tmp_path / "file.hdf5", make)).startswith(said)


def test_a_header_of_200_dimensions_is_refused(tmp_path):
    path = made(tmp_path / "file.hdf5", lambda file: file.__setitem__("x", ROWS))
    data = bytearray(path.read_bytes())
    # A dataspace message: version 1, rank 2, then the sizes. HDF5 has one byte for the rank and reads 32 at most.
    at = data.find(b"".join(size.to_bytes(8, "little") for size in ROWS.shape)) - 7
    assert data[at - 1 : at + 1] == b"\x01\x02"
    data[at] = 200
    path.write_bytes(data)
    assert refusal(path).startswith("x has an unreadable header")


def test_cut_foreign_and_missing_files_are_refused(tmp_path):
    path = made(tmp_path / "file.hdf5", lambda file: file.__setitem__("x", ROWS))
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(path).startswith("not a whole HDF5 file")
    path.write_bytes(b"PK\x03\x04" * 1000)
    assert refusal(path).startswith("not a whole HDF5 file")
    assert "No such file" in refusal(tmp_path / "nowhere.hdf5")


def test_what_is_in_the_file_is_read_whatever_its_storage(tmp_path):
    def compact(file: h5py.File) -> None:
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_layout(h5d.COMPACT)
        h5d.create(file.id, b"x", h5t.IEEE_F32LE, h5s.create_simple(ROWS.shape), creation)
        file["x"][:] = ROWS

    for make in (
        compact,
        lambda file: file.create_dataset("x", data=ROWS),
        lambda file: file.create_dataset("x", data=ROWS, chunks=(7, 2), compression="gzip", shuffle=True),
    ):
        with opened(made(tmp_path / "file.hdf5", make)) as file:
            assert np.array_equal(array(file, "x", (None, 3))[3:17], ROWS[3:17])
    with opened(made(tmp_path / "file.hdf5", lambda file: file.create_dataset("x", (0, 3), "f4"))) as file:
        assert len(array(file, "x", (None, 3))) == 0


def test_places_are_named_in_full(tmp_path):
    path = made(tmp_path / "file.hdf5", lambda file: file.create_dataset("data/demo_0/x", data=ROWS))
    with opened(path) as file:
        demo = group(group(file, "data"), "demo_0")
        assert len(array(demo, "x", (20, 3))) == 20
        with pytest.raises(BadInput, match=f"^{path}: data/demo_0/x has shape \\(20, 3\\), expected \\(any, 4\\)$"):
            array(demo, "x", (None, 4))
        with pytest.raises(BadInput, match=f"^{path}: data/demo_0/x is no group$"):
            group(demo, "x")
        with pytest.raises(BadInput, match=f"^{path}: data/demo_0/obs is missing, expected a group$"):
            group(demo, "obs")
