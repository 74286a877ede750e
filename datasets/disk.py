"""Files and folders that appear whole or not at all, their hashes, and one sentence when the disk is full.

    with whole(Path("data/index.parquet")) as file:
        file.write(image)
    with whole_folder(Path("runs/train/update-000001000")) as folder:
        save_file(weights, folder / "policy.safetensors")

They are written under a temporary name, synced and renamed, so that whoever sees one sees all of it, whenever the
writer was killed. Each file costs an fsync.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from lram.datasets.specs import BadInput


class DiskFull(BadInput):
    """No room is left where the output goes; nothing is wrong with the input, and no other task would fare better."""


@contextmanager
def whole(path: Path, sync: bool = True) -> Iterator[BufferedRandom]:
    """Gives a file to write and read that has its name once the block has ended well; otherwise it does not exist.

    Args:
        path: Its name.
        sync: Wait for the disk at the end; without, whoever writes it has done so.

    Raises:
        DiskFull: There is no room for it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if _says_full(error):
            raise disk_full(path) from error
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill that has its name once the block has ended well; otherwise it does not exist.

    Args:
        path: Its name; nothing is there yet.

    Raises:
        DiskFull: There is no room for it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        temporary.rename(path)
        _sync(path.parent)  # before the caller removes what this one replaces
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _says_full(error):
            raise disk_full(path) from error
        raise


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hex; the file may be larger than memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _says_full(error: BaseException | None) -> bool:
    """Says whether a full disk is behind an error; safetensors has only words for it, and torch hides the cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__context__
    return False


def disk_full(path: Path) -> DiskFull:
    """Returns the error that says which disk is full, and what to do."""
    place = path.absolute()
    mount = next(folder for folder in (place, *place.parents) if os.path.ismount(folder))
    said = f"no room left on the disk mounted at {mount}; make room there and run the same again"
    return DiskFull(f"{path}: {said}, it continues from what is whole")
