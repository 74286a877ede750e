"""Reads the pickles of strangers: arrays and plain containers come back, nothing is ever imported or called.

    buffer = load(Path("bigfish_0.gz"))            # a Placeholder for the class that was pickled
    actions = attributes(buffer)["actions"]        # a real array
    episode = load(Path("episode.npy")).item()     # a pickle inside an .npy: an object array

A pickle is a program for a small stack machine, and one of its instructions calls whatever function the file names.
This module is such a machine without that instruction: the few functions that rebuild arrays and containers are
looked up by name in the table of `rebuild`, every other class becomes a `Placeholder` that holds what it was given,
and a file that wants to call anything else is refused as unsafe.

The price: some two microseconds for each instruction, which arrays do not notice, and refusals of what recordings
do not hold (structured or date types, persistent ids, out-of-band buffers).
"""

from __future__ import annotations

import collections
import gzip
import io
import math
import os
import pickletools
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from lram.converters.npy import Damaged, header, lay
from lram.converters.rebuild import CALLS, INERT, Dtype, Name, Pending, Placeholder, key_of, objects
from lram.datasets.specs import BadInput

BLOCK = 1 << 24
"""Bytes asked of a stream at once: what it promises beyond is believed only as it comes."""
DEFLATE_RATIO = 1032
"""Bytes that one byte of a gzip stream stands for at most (zlib's technical details)."""

_UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, OverflowError, EOFError, OSError, MemoryError, RecursionError,
    zlib.error,
)  # fmt: skip
"""What reading bytes that are no pickle can end in."""


def load(path: Path) -> Any:
    """Reads a pickle, a gzip of one, or an `.npy` file, object arrays included.

    Args:
        path: The file; what it is shows in its first bytes.

    Returns:
        Arrays, containers, numbers and text as they were pickled, and a `Placeholder` for every other object.

    Raises:
        BadInput: The file is unsafe: loading it would have called a function or a class outside NumPy's arrays and
            Python's containers.
        Damaged: It cannot be read, ends early, or promises more bytes than it can hold.
    """
    try:
        with ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(open(path, "rb"))
            holds = os.fstat(file.fileno()).st_size
            if file.read(2) == b"\x1f\x8b":
                file.seek(0)
                # What deflates to more than the machine's memory cannot be a recording that fits into it.
                holds = min(DEFLATE_RATIO * holds + BLOCK, _memory())
                unzipped = stack.enter_context(gzip.GzipFile(fileobj=file))
                file = stack.enter_context(io.BufferedReader(unzipped, 1 << 16))
            else:
                file.seek(0)
            return load_stream(file, str(path), holds)
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error})") from error


def load_stream(file: IO[bytes], name: str, holds: int) -> Any:
    """Reads a pickle or an `.npy` file from a stream, to its end.

    Args:
        file: A binary stream, at the start of the file.
        name: What to call it in messages.
        holds: Bytes that can follow at most.

    Raises:
        BadInput: As `load`.
    """
    source = _Source(file, name, holds)
    try:
        value = _npy(source) if source.peek(2) == b"\x93N" else _Machine(source).run()
        # Reading on is also what makes gzip compare its checksum.
        if source.peek(1):
            raise Damaged(f"{name}: bytes follow the end of the pickle")
        return value
    except Damaged as error:
        raise error if str(error).startswith(name) else Damaged(f"{name}: {error}") from None
    except BadInput:
        raise
    except _UNREADABLE as error:
        raise Damaged(f"{name}: truncated, damaged or not a pickle ({type(error).__name__}: {error})") from error


def attributes(value: Any, name: str = "pickle") -> dict[str, Any]:
    """Returns the attributes of a pickled object by name, or the dict itself where one was pickled.

    Raises:
        BadInput: The object has none.
    """
    state = value.state if isinstance(value, Placeholder) else value
    if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
        state = {key: item for part in state if isinstance(part, dict) for key, item in part.items()}
    if not isinstance(state, dict):
        raise BadInput(f"{name}: holds a {type(value).__name__} without attributes, expected a recorded buffer")
    return state


def _npy(source: _Source) -> Any:
    shape, fortran, dtype = header(source, source.name)
    if not dtype.hasobject:
        return lay(source.take(math.prod(shape) * dtype.itemsize), dtype, shape, fortran)
    value = _Machine(source).run()
    if not isinstance(value, np.ndarray) or value.shape != shape:
        raise Damaged(f"the header says {shape} objects, but the pickle holds none such")
    return value


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Source:
    """A stream that refuses to be asked for more than it can hold, and keeps an account of copies made from it."""

    def __init__(self, file: IO[bytes], name: str, holds: int) -> None:
        self.file, self.name, self.left = file, name, holds
        self.ahead = b""
        # A few bytes of pickle can ask for a copy of something large again and again.
        self.copies = 4 * holds + BLOCK

    def peek(self, size: int) -> bytes:
        self.ahead += self.file.read(size - len(self.ahead)) if size > len(self.ahead) else b""
        return self.ahead[:size]

    def read(self, size: int) -> bytes:
        return bytes(self.take(size))

    def take(self, size: int) -> bytes | bytearray:
        """Reads `size` bytes, fewer at the end, and fills memory only with what came."""
        if size > self.left:
            raise Damaged(f"promises {size} bytes where at most {self.left} can follow")
        self.left -= size
        if size <= BLOCK and not self.ahead:
            return self.file.read(size)
        data, self.ahead = bytearray(self.ahead[:size]), self.ahead[size:]
        while len(data) < size and (block := self.file.read(min(size - len(data), BLOCK))):
            data += block
        return data

    def readline(self) -> bytes:
        start, newline, rest = self.ahead.partition(b"\n")
        line, self.ahead = start + newline, rest
        line += b"" if newline else self.file.readline(self.left)
        self.left -= len(line)
        return line

    def copy(self, size: int) -> None:
        self.copies -= size
        if self.copies < 0:
            raise Damaged("would take more memory than a recording of its size")


class _Machine:
    """The stack machine that pickles are programs for, without the instructions that import and call."""

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        stream: Any = self.source  # pickletools reads and reads lines, no more
        while self.source.left > 0 and (code := self.source.read(1)):
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise ValueError(f"{code!r} is no instruction of a pickle")
            if opcode.name == "STOP":
                return self._pop()
            if opcode.name == "BYTEARRAY8":  # pickletools would copy what it read, and these are the large ones
                self._push(self._bytearray())
            elif opcode.name in _DO:
                _DO[opcode.name](self, opcode.arg.reader(stream) if opcode.arg else None)
            else:
                raise Damaged(f"the pickle uses {opcode.name}, which no recording does")
        raise EOFError("it ends before its end")

    def _bytearray(self) -> bytearray:
        size = int.from_bytes(self.source.read(8), "little")
        data = self.source.take(size)
        if len(data) != size:
            raise EOFError(f"{size} bytes promised, {len(data)} found")
        return data if isinstance(data, bytearray) else bytearray(data)

    def _pop(self) -> Any:
        value = self.stack.pop()
        return value.value if type(value) is Pending and value.value is not None else value

    def _drop(self) -> None:
        # In protocol 0, popping may also take a mark.
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _marked(self) -> list[Any]:
        at = self.marks.pop()
        items, self.stack[at:] = self.stack[at:], []
        return items

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _get(self, place: Any) -> None:
        value = self.memo[int(place)]
        # An array was remembered before it was filled.
        self._push(value.value if type(value) is Pending and value.value is not None else value)

    def _put(self, place: Any) -> None:
        self.memo[int(place)] = self.stack[-1]

    def _global(self, both: str) -> None:
        self._push(Name(both.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a class without a name")
        self._push(Name(f"{module}.{name}"))

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise BadInput(f"{self.source.name}: unsafe pickle: it would call what it has made itself; not read")
        if function.name in CALLS:
            return CALLS[function.name](self.source.copy, *args)
        if function.name.startswith(INERT):
            return Placeholder(function.name, args)
        raise BadInput(f"{self.source.name}: unsafe pickle: it would call {function.name:.100} when loaded; not read")

    def _reduce(self, _: Any) -> None:
        args, function = self._pop(), self._pop()
        self._push(self._call(function, args))

    def _new(self, kind: Any, args: Any) -> None:
        if not isinstance(kind, Name) or not isinstance(args, tuple):
            raise BadInput(f"{self.source.name}: unsafe pickle: an object of what is no class; not read")
        self._push(Placeholder(kind.name, args))

    def _newobj(self, _: Any) -> None:
        args, kind = self._pop(), self._pop()
        self._new(kind, args)

    def _newobj_ex(self, _: Any) -> None:
        keywords, args, kind = self._pop(), self._pop(), self._pop()
        self._new(kind, (*args, keywords))

    def _inst(self, both: str) -> None:
        args = tuple(self._marked())
        kind = Name(both.replace(" ", ".", 1))
        # Without arguments these make an object and call nothing; with arguments they call the class, or a function.
        self._push(self._call(kind, args) if args else Placeholder(kind.name))

    def _obj(self, _: Any) -> None:
        kind, *args = self._marked()
        self._push(self._call(kind, tuple(args)) if args or not isinstance(kind, Name) else Placeholder(kind.name))

    def _build(self, _: Any) -> None:
        state, value = self._pop(), self.stack[-1]
        if isinstance(value, Placeholder | Dtype):
            value.state = state
        elif isinstance(value, Pending):
            _, shape, dtype, fortran, data = state
            resolved = dtype.resolve()
            if resolved.hasobject:
                self.source.copy(8 * len(data))
                value.value = objects(data, shape, fortran)
            else:
                value.value = lay(data, resolved, shape, fortran)
            self.stack[-1] = value.value
        else:
            raise ValueError(f"a state for a {type(value).__name__}")

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Placeholder):
            target.items.extend(items)
        elif isinstance(target, list | collections.deque):
            target.extend(items)
        elif isinstance(target, set):
            target.update([key_of(item) for item in items])
        else:
            raise ValueError(f"items for a {type(target).__name__}")

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, Placeholder):
            target.items.extend(pairs)
        elif isinstance(target, dict):
            target.update((key_of(key), value) for key, value in pairs)
        else:
            raise ValueError(f"items for a {type(target).__name__}")

    def _tuple(self, size: int) -> None:
        self._push(tuple([self._pop() for _ in range(size)][::-1]))

    def _pairs(self) -> dict[Any, Any]:
        items = self._marked()
        return {key_of(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_CONSTANTS = [
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
]  # fmt: skip
_DO: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_CONSTANTS, _Machine._push),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    "MEMOIZE": lambda machine, _: machine._put(len(machine.memo)),
    "NONE": lambda machine, _: machine._push(None),
    "NEWTRUE": lambda machine, _: machine._push(True),
    "NEWFALSE": lambda machine, _: machine._push(False),
    "EMPTY_LIST": lambda machine, _: machine._push([]),
    "EMPTY_DICT": lambda machine, _: machine._push({}),
    "EMPTY_SET": lambda machine, _: machine._push(set()),
    "EMPTY_TUPLE": lambda machine, _: machine._push(()),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "TUPLE": lambda machine, _: machine._push(tuple(machine._marked())),
    "LIST": lambda machine, _: machine._push(machine._marked()),
    "DICT": lambda machine, _: machine._push(machine._pairs()),
    "FROZENSET": lambda machine, _: machine._push(frozenset([key_of(item) for item in machine._marked()])),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": lambda machine, _: machine._drop(),
    "POP_MARK": lambda machine, _: machine._marked(),
    "DUP": lambda machine, _: machine._push(machine.stack[-1]),
    "APPEND": lambda machine, _: machine._extend([machine._pop()]),
    "APPENDS": lambda machine, _: machine._extend(machine._marked()),
    "ADDITEMS": lambda machine, _: machine._extend(machine._marked()),
    "SETITEM": lambda machine, _: machine._set([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set(machine._marked()),
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._newobj,
    "NEWOBJ_EX": _Machine._newobj_ex,
    "INST": _Machine._inst,
    "OBJ": _Machine._obj,
    "BUILD": _Machine._build,
}
"""What each instruction does. Missing: EXT and PERSID, which look objects up elsewhere, and out-of-band buffers."""
