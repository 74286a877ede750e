import collections
import gzip
import io
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lram.converters.npy import Damaged, npz
from lram.converters.unpickle import Placeholder, attributes, load, load_stream
from lram.datasets.specs import BadInput

SAMPLES = Path(__file__).parent / "data" / "procgen"


def loads(data: bytes, name: str = "file"):
    return load_stream(io.BytesIO(data), name, len(data))


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        kinds = type(b) is np.ndarray and a.dtype == b.dtype and a.shape == b.shape
        return kinds and (all(map(same, a.flat, b.flat)) if a.dtype == object else a.tobytes() == b.tobytes())
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | collections.deque):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.binary().map(bytearray)
    | st.floats(width=32).map(np.float32)
    | arrays.arrays(st.sampled_from(["u1", "<i8", ">f4", "?", "c16", "S3", "U2"]), arrays.array_shapes(min_side=0))
    | st.frozensets(st.integers())
    | st.sets(st.text()),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(collections.deque)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner)
        | st.dictionaries(st.text(), inner).map(collections.OrderedDict)
    ),
    max_leaves=8,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_gives_back_what_pickle_would(value, protocol):
    assert same(value, loads(pickle.dumps(value, protocol)))


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_reads_numpy_by_its_old_and_new_names(core, protocol):
    values = {"frames": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "one": np.float32(0.5)}
    values["columns"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    values["shared"] = [values["frames"], values["frames"]]
    data = pickle.dumps(values, protocol)
    if core == b"numpy.core":
        for module in (b"multiarray", b"numeric"):
            new, old = (name + b"." + module for name in (b"numpy._core", core))
            # From protocol 4 on, the length of a name comes before it; frames are not looked at.
            data = data.replace(bytes([len(new)]) + new, bytes([len(old)]) + old).replace(new, old)
        assert b"_core" not in data
    back = loads(data)
    assert same(values["frames"], back["frames"]) and same(values["one"], back["one"])
    assert (back["columns"] == values["columns"]).all() and back["shared"][0] is back["shared"][1] is back["frames"]


def test_reads_arrays_of_objects_and_defaultdicts():
    objects = np.empty((2, 2), object)
    objects[0, 0], objects[0, 1], objects[1, 0] = [1, 2], [3, 4], {"a": np.arange(3)}
    assert same(objects, loads(pickle.dumps(objects)))
    counts = collections.defaultdict(list, {"a": [1]})
    back = loads(pickle.dumps(counts))
    assert back == counts and back["new"] == []


def test_other_classes_become_placeholders(monkeypatch):
    module = types.ModuleType("strange_module")
    monkeypatch.setitem(sys.modules, "strange_module", module)

    class Buffer:
        def __setstate__(self, state):
            raise AssertionError("ran")

    class Items(list):
        pass

    for kind in (Buffer, Items):
        kind.__module__, kind.__qualname__ = "strange_module", kind.__name__
        setattr(module, kind.__name__, kind)
    buffer, items = Buffer(), Items([1, 2])
    buffer.actions, buffer.items, buffer.kind = np.arange(4), items, Buffer
    for protocol in range(6):
        data = pickle.dumps(buffer, protocol)
        back = loads(data)
        assert isinstance(back, Placeholder) and back.name == "strange_module.Buffer"
        assert same(attributes(back)["actions"], np.arange(4))
        assert type(attributes(back)["items"]) is Placeholder
        assert attributes(back)["items"].items == [1, 2] or protocol < 2
    with pytest.raises(BadInput, match="without attributes"):
        attributes(loads(pickle.dumps([1])))


def test_a_random_generator_stays_inert():
    back = loads(pickle.dumps({"rng": np.random.default_rng(0), "old": np.random.RandomState(0)}))
    assert all(isinstance(value, Placeholder) for value in back.values())


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


UNSAFE = {
    "command": lambda path: Calls(os.system, f"touch {path}"),
    "process": lambda path: Calls(subprocess.Popen, ["touch", str(path)]),
    "eval": lambda path: Calls(eval, f"open({str(path)!r}, 'w')"),
    "open": lambda path: Calls(open, str(path), "w"),
    "attribute": lambda path: Calls(getattr, "", "join"),
    "import": lambda path: Calls(__import__, "antigravity"),
    "array": lambda path: Calls(np.fromfile, str(path)),
}


@pytest.mark.parametrize("kind", UNSAFE)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_would_run_a_command_does_not(tmp_path, kind, protocol):
    touched = tmp_path / "touched"
    bad = {"actions": np.arange(3), "bad": [UNSAFE[kind](touched)]}
    plain, zipped, inside = tmp_path / "a.pkl", tmp_path / "bigfish_0.gz", tmp_path / "a.npy"
    plain.write_bytes(pickle.dumps(bad, protocol))
    zipped.write_bytes(gzip.compress(pickle.dumps(bad, protocol)))
    inside.write_bytes(npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }", pickle.dumps(bad, protocol)))
    for path in (plain, zipped, inside):
        with pytest.raises(BadInput, match=f"{path.name}: unsafe pickle: it would call") as caught:
            load(path)
        assert not isinstance(caught.value, Damaged)
    assert not touched.exists() and "antigravity" not in sys.modules


def npy(header: str, body: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body


@pytest.mark.parametrize(
    "data",
    [
        b"(S'touch touched'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch touched'\no.",  # OBJ
        b"cos\nsystem\n(S'touch touched'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\rtouch touched\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x02os\x8c\x06system\x86R\x8c\rtouch touched\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93q\x00\x85\x85h\x00R.",
        b"\x80\x02]S'touch touched'\n\x85R.",  # what it made itself
    ],
)
def test_every_way_to_call_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="file: unsafe"):
        loads(data)
    assert not list(tmp_path.iterdir())


def test_a_class_that_is_only_named_or_made_empty_is_no_call():
    assert loads(b"cos\nsystem\n.").name == "os.system"
    made = loads(b"\x80\x02csubprocess\nPopen\n)\x81}X\x01\x00\x00\x00aK\x01sb.")
    assert made.name == "subprocess.Popen" and made.state == {"a": 1}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x80\x04\x8e" + (1 << 60).to_bytes(8, "little") + b"x.", "promises"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.", "promises"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "IndexError"),  # a memo of two thousand million places
        (b"\x80\x02]r\xff\xff\xff\x7f.", None),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"Pname\n.", "PERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02]", "ends before its end"),
        (b"\x80\x02].more", "bytes follow"),
        (b"}(]K\x01u.", "unhashable"),
        (b"(" + b")" + b"\x85" * 2_000 + b"K\x01d.", "nested too deep"),
        (b"\xff", "no instruction"),
        (b"", "ends before its end"),
    ],
)
def test_damage_and_promises_are_said(data, said):
    if said is None:
        assert loads(data) == []
        return
    with pytest.raises(Damaged, match=f"file: .*{said}"):
        loads(data)


def built(array: np.ndarray, state: tuple) -> bytes:
    """A pickle of an array whose state is `state`, as anyone can write it."""
    real = array.__reduce__()
    return pickle.dumps(Reduced(real[0], real[1], state))


class Reduced:
    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def test_crafted_arrays_are_refused():
    numbers = np.arange(4)
    for state in (
        (1, (1 << 40,), numbers.dtype, False, b"1234"),
        (1, (4,), numbers.dtype, False, b"1234"),
        (1, (-4,), numbers.dtype, False, numbers.tobytes()),
        # Bytes for objects would be pointers.
        (1, (1,), np.dtype(object), False, b"\x41" * 8),
        (1, (2, 2), np.dtype(object), False, [1, 2, 3]),
        (1, (1,), np.dtype([("a", "i4"), ("b", "i4")]), False, b"\x41" * 8),
        (1, (1,), np.dtype("M8[s]"), False, b"\x41" * 8),
        (1, (0, 1 << 62, 1 << 62), numbers.dtype, False, b""),
        (1, (1,) * 40, np.dtype("u1"), False, b"x"),
    ):
        with pytest.raises(Damaged):
            loads(built(numbers, state))
    frombuffer = pickle.dumps(numbers, 5).replace(b"i8", b"O8")
    with pytest.raises(Damaged):
        loads(frombuffer)
    flags = pickle.dumps(np.array([None]), 2).replace(b"K?t", b"K\x00t")
    assert same(loads(flags), np.array([None]))  # flags are not believed


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,), }",
        "__import__('os').system('true')",
        "(" * 5000,
        "x",
    ],
)
def test_npy_headers_are_not_believed(tmp_path, header):
    path = tmp_path / "a.npy"
    path.write_bytes(npy(header, b"12345678"))
    with pytest.raises(BadInput, match=r"a\.npy"):
        load(path)


def test_npy_of_numbers_and_of_objects(tmp_path):
    for value in (np.arange(6.0).reshape(2, 3), np.array({"actions": np.arange(3)}), np.array([1, "a"], object)):
        np.save(tmp_path / "a.npy", value)
        assert same(load(tmp_path / "a.npy"), value)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    zipped = tmp_path / "a.gz"
    zipped.write_bytes(gzip.compress(b"\x80\x05\x96" + (1 << 36).to_bytes(8, "little") + b"x."))
    with pytest.raises(Damaged, match="promises"):
        load(zipped)
    text = b"\x80\x02X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"q\x000"
    copies = b"".join([b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R"] * 1000)
    with pytest.raises(Damaged, match="more memory"):
        loads(text + copies + b".")


def test_truncated_and_corrupt_gzip_is_damage(tmp_path):
    whole = (SAMPLES / "buffers" / "bigfish_1.gz").read_bytes()
    path = tmp_path / "bigfish_1.gz"
    for data in (whole[: len(whole) // 2], whole[:-9], whole[:-1], whole[:500] + b"xxxx" + whole[504:], b"\x1f\x8b"):
        path.write_bytes(data)
        with pytest.raises(Damaged, match=r"bigfish_1\.gz"):
            load(path)
    with pytest.raises(Damaged, match="cannot be read"):
        load(tmp_path / "missing.gz")


@settings(max_examples=200)
@given(data=st.binary(max_size=60), seed=st.integers(0, 1 << 30))
def test_no_crafted_pickle_imports_or_runs_anything(data, seed):
    rng = np.random.default_rng(seed)
    real = bytearray(pickle.dumps({"a": np.arange(3), "b": [Calls(os.getpid), {1, 2}]}, int(rng.integers(6))))
    at = int(rng.integers(len(real)))
    real[at : at + int(rng.integers(4))] = data[:8]
    modules = set(sys.modules)
    with Forbidden() as ran:
        for pick in (data, b"\x80\x04" + data, bytes(real)):
            try:
                loads(pick)
            except BadInput as error:
                assert str(error).startswith("file: ")
    assert set(sys.modules) == modules and not ran.events


class Forbidden:
    """Notes what Python reports to audit hooks while it is entered."""

    events: list = []  # noqa: RUF012
    active = False

    def __enter__(self):
        if not Forbidden.installed:
            sys.addaudithook(Forbidden.hook)
            Forbidden.installed = True
        Forbidden.events, Forbidden.active = [], True
        return Forbidden

    def __exit__(self, *_):
        Forbidden.active = False

    installed = False

    @staticmethod
    def hook(event, args):
        if Forbidden.active and event.split(".")[0] in (
            "import",
            "exec",
            "compile",
            "open",
            "os",
            "subprocess",
            "pickle",
        ):
            Forbidden.events.append((event, args))


def test_npz_is_read_in_rows_and_checked(tmp_path):
    values = {"a": np.arange(20.0).reshape(10, 2), "b": np.float32(3), "c": np.zeros((0, 4))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **values)
        with npz(tmp_path / "a.npz") as columns:
            assert same(columns["a"].rows(4), values["a"][:4]) and same(columns["a"].rows(6), values["a"][4:])
            assert columns["b"].whole() == 3 and columns["c"].whole().shape == (0, 4)
            with pytest.raises(Damaged, match=r"a\.npz: a"):
                columns["a"].rows(1)
    np.savez(tmp_path / "f.npz", a=np.asfortranarray(values["a"]))
    np.savez(tmp_path / "o.npz", a=np.array([{}]))
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no zip")
    for name in ("f.npz", "o.npz", "x.npz"):
        with pytest.raises(BadInput, match=name), npz(tmp_path / name):
            pass
