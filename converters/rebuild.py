"""What a pickle may have rebuilt, and what stands for everything else: the tables behind `unpickle`.

Arrays, containers, bytes and numbers are made here and by nobody else; NumPy's own functions for it, which the file
names, are never looked up. NumPy's `__setstate__` is not used either: with crafted flags it copies bytes of the file
into places where Python expects pointers. What it trades away: structured, date and text-object types.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lram.converters.npy import Damaged, lay

Copy = Callable[[int], None]
"""Keeps the account of bytes that are copied out of a file."""
NAMED = re.compile(r"(b1|[iu][1248]|f[248]|c(8|16)|[SU][1-9]\d{0,5}|O[48]?)")
"""Array types that are rebuilt, in NumPy's short names."""


@dataclass(eq=False)
class Placeholder:
    """Stands for an object of a class that was not imported.

    Attributes:
        name: "<module>.<class>" as the file says it.
        args: What the class would have been called with.
        state: What its `__setstate__` would have been given, usually its attributes.
        items: What would have been appended or set on it.
    """

    name: str
    args: tuple = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Name:
    """A class or function that the file names: no more than the name."""

    name: str


class Pending:
    """An array between the instruction that makes it and the one that fills it."""

    value: np.ndarray | None = None


@dataclass
class Dtype:
    """An array type, as the file describes it."""

    code: Any
    state: Any = None

    def resolve(self) -> np.dtype:
        """Returns the type; of what the file says, only name and byte order are believed."""
        code = self.code.decode("ascii") if isinstance(self.code, bytes) else self.code
        if not isinstance(code, str) or not NAMED.fullmatch(code):
            raise Damaged(f"arrays of type {code!r} are not rebuilt")
        order = "|"
        if self.state is not None:
            _, order, subtype, names, fields = self.state[:5]
            if subtype is not None or names is not None or fields is not None:
                raise Damaged("structured arrays are not rebuilt")
        order = order.decode("ascii") if isinstance(order, bytes) else order
        return np.dtype(code).newbyteorder(">" if order == ">" else "<" if order == "<" else "=")


def objects(items: Any, shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    """Makes an array of objects."""
    if not isinstance(items, list) or len(items) != math.prod(shape) or any(type(item) is Pending for item in items):
        raise Damaged(f"an array of objects of shape {shape!r:.80} and another number of them")
    flat = np.empty(len(items), object)
    for place, item in enumerate(items):  # an assignment of the whole list would look into lists of lists
        flat[place] = item
    return flat.reshape(shape, order="F" if fortran else "C")


def key_of(key: Any, depth: int = 0) -> Any:
    """Passes what may be a key: hashing a tuple nested a million deep would overflow the C stack."""
    if isinstance(key, tuple):
        if depth > 8:
            raise Damaged("a key nested too deep")
        for part in key:
            key_of(part, depth + 1)
    return key


# What a file may call. Each function gets what keeps the account of memory, and the arguments.


def _frombuffer(copy: Copy, data: Any, dtype: Any, shape: Any, order: Any = "C", axes: Any = None) -> Any:
    if axes is not None or order not in ("C", "F"):
        raise Damaged("an array in an order of axes that is not rebuilt")
    resolved = dtype.resolve()
    if resolved.hasobject:
        raise Damaged("an array of objects made of bytes")
    return lay(data, resolved, shape, order == "F")


def _scalar(copy: Copy, dtype: Any, data: Any = None) -> Any:
    resolved = dtype.resolve()
    return data if resolved.hasobject else lay(data, resolved, (1,), False)[0]


def _encode(copy: Copy, text: Any, encoding: Any = None) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Damaged("bytes in an encoding other than latin1")
    copy(len(text))
    return text.encode("latin-1")


def _bytes(kind: type) -> Callable[..., Any]:
    def make(copy: Copy, data: Any = b"", encoding: Any = "latin-1") -> Any:
        if not isinstance(data, str | bytes | bytearray | list) or encoding not in ("latin1", "latin-1"):
            raise Damaged(f"{kind.__name__} of {type(data).__name__}")
        copy(len(data))
        return kind(data.encode("latin-1") if isinstance(data, str) else data)

    return make


def _container(kind: type) -> Callable[..., Any]:
    def make(copy: Copy, items: Any = (), *limit: Any) -> Any:
        if not isinstance(items, list | tuple) or len(limit) > (kind is collections.deque):
            raise Damaged(f"a {kind.__name__} of {type(items).__name__}")
        copy(64 * len(items))
        if kind is collections.OrderedDict:
            return collections.OrderedDict((key_of(key), value) for key, value in items)
        return kind([key_of(item) for item in items] if kind in (set, frozenset) else items, *limit)

    return make


def _defaultdict(copy: Copy, factory: Any = None) -> Any:
    kinds = {f"{module}.{kind.__name__}": kind for module in _BUILTINS for kind in (list, dict, set, int, float)}
    return collections.defaultdict(kinds.get(factory.name) if isinstance(factory, Name) else None)


def _instance(copy: Copy, kind: Any, *args: Any) -> Placeholder:
    return Placeholder(kind.name, args)


def _dtype(copy: Copy, code: Any, *flags: Any) -> Dtype:
    return Dtype(code)


def _reconstruct(copy: Copy, *args: Any) -> Pending:
    return Pending()


_BUILTINS = ("builtins", "__builtin__")
_CORES = ("numpy.core", "numpy._core")
CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _instance,
    "copy_reg._reconstructor": _instance,
    "collections.OrderedDict": _container(collections.OrderedDict),
    "collections.deque": _container(collections.deque),
    "collections.defaultdict": _defaultdict,
    **{f"{core}.multiarray._reconstruct": _reconstruct for core in _CORES},
    **{f"{core}.multiarray.scalar": _scalar for core in _CORES},
    **{f"{core}.numeric._frombuffer": _frombuffer for core in _CORES},
    **{f"{module}.{kind.__name__}": _container(kind) for module in _BUILTINS for kind in (set, frozenset)},
    **{f"{module}.{kind.__name__}": _bytes(kind) for module in _BUILTINS for kind in (bytes, bytearray)},
    **{f"{module}.complex": lambda copy, *parts: complex(*parts) for module in _BUILTINS},
}
INERT = (
    "torch.device",
    "numpy.random.",
    "gym.utils.seeding.RandomNumberGenerator._generator_ctor",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
)
"""How the calls begin that recorded buffers hold for a reason, a device or the random generator of an action space:
they are not made either, but leave a `Placeholder`."""
