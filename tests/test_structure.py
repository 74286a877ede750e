"""The rules of the tree that no single module can keep: who imports whom, packaging, and sizes."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each package may import beside itself.
MAY_IMPORT = {
    "datasets": set(),
    "collectors": {"datasets"},
    "converters": {"datasets"},
    "model": {"datasets"},
    "train": {"datasets", "model", "collectors"},
    "flows": {"datasets", "model", "collectors", "converters", "train"},
}
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).glob("*.py"))]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_run_downward_only(path):
    package = path.parent.name
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("lram.")}
    assert ours <= MAY_IMPORT[package] | {package}
    if package != "flows":
        assert not {name for name in imports(path) if name.split(".")[0] == "prefect"}
    if package == "model":
        simulators = {
            "gymnasium",
            "mujoco",
            "dm_control",
            "metaworld",
            "ale_py",
            "envpool",
            "robosuite",
            "h5py",
            "pyarrow",
        }
        assert not {name.split(".")[0] for name in imports(path)} & simulators


def test_trainer_and_evaluator_take_only_environments_from_collectors():
    for path in (ROOT / "train").glob("*.py"):
        taken = {name.split(".")[2] for name in imports(path) if name.startswith("lram.collectors.")}
        makers = {"sb3", "specialists", "off_policy", "on_policy", "networks", "resume", "defaults", "scripted"}
        assert not taken & makers, path


def test_every_directory_with_python_is_packaged():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/*.py")} - {Path("tests")}
    assert {"lram"} | {f"lram.{folder}" for folder in folders} == set(packages)
    assert not list(ROOT.glob("[a-z]*/*/*.py")), "directories stay one level deep"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_stay_readable(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    assert ast.get_docstring(ast.parse(text)), "a module says what it does"
    for unsafe in ("pickle.load", "weights_only=False", "extractall("):
        assert unsafe not in text


def test_nothing_of_one_machine_is_committed():
    pages = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "tests" / "data").glob("*/README.md"))
    kept = (*SOURCES, *pages, ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "prefect.yaml", ROOT / ".ci" / "run")
    for path in kept:
        text = path.read_text()
        assert "/root/" not in text and "/work/" not in text and "/home/" not in text, path


def test_test_data_is_small():
    size = sum(path.stat().st_size for path in (ROOT / "tests" / "data").rglob("*") if path.is_file())
    assert size <= 5_000_000


def test_constraints_pin_every_dependency():
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    # Kernels for CUDA have no build for the machines that these pins were made on.
    wanted = [*project["dependencies"], *(name for extra in extras if extra != "gpu" for name in extras[extra])]
    names = {name.split("==")[0].split("[")[0].lower().replace("_", "-") for name in wanted}
    assert names <= pinned
