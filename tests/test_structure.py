"""Promises about the tree itself: one direction of imports, safe loading, a README that is true."""

import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [
    path
    for folder in ("self_supervised", "supervised", "semi_supervised", "eval")
    for path in sorted((ROOT / folder).glob("*.py"))
]
HUB = ROOT / "hubconf.py"
UTILS = sorted(path for path in (ROOT / "utils").rglob("*.py"))

# What each room of utils may import of the others.
ROOMS = {
    "runtime": set(),
    "method": {"runtime"},
    "data": {"runtime"},
    "evaluation": {"runtime", "method", "data"},
    "training": {"runtime", "method", "data", "evaluation"},
    "reporting": {"runtime", "method", "data", "evaluation", "training"},
    "cli": {"runtime", "method", "data", "evaluation", "training"},
}


def imported(path: Path) -> set[str]:
    """Every module a file imports, dotted; `from utils import a` counts as utils.a."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


def test_every_module_lives_in_a_room():
    folders = {path.relative_to(ROOT / "utils").parts[0] for path in UTILS}
    assert folders == {*ROOMS, "__init__.py"}


@pytest.mark.parametrize("path", UTILS, ids=name_of)
def test_rooms_import_only_what_lies_below_them(path):
    names = [name.split(".") for name in imported(path)]
    room = path.relative_to(ROOT / "utils").parts[0]
    allowed = ROOMS.get(room, set()) | {room}
    assert {parts[1] for parts in names if parts[0] == "utils"} <= allowed
    folders = {script.parent.name for script in SCRIPTS}
    assert not [parts for parts in names if parts[0] in folders]


def test_modules_of_a_room_import_each_other_without_circles():
    modules = {name_of(path).replace("/", "."): path for path in UTILS}
    parts = {module: imported(path) for module, path in modules.items()}
    graph = {
        module: {name for name in modules if any(_is_of(part, name) for part in parts[module])}
        for module in modules
    }
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names a circle


def _is_of(imported_name: str, module: str) -> bool:
    return imported_name == module or imported_name.rpartition(".")[0] == module


@pytest.mark.parametrize("path", [*SCRIPTS, HUB], ids=name_of)
def test_no_script_imports_another(path):
    folders = {script.parent.name for script in SCRIPTS} - {"semi_supervised"}
    assert not [name for name in imported(path) if name.split(".")[0] in folders]


@pytest.mark.parametrize("path", [*UTILS, *SCRIPTS, HUB], ids=name_of)
def test_every_load_is_weights_only_and_none_is_lax(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        keywords = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
        if ast.unparse(node.func) == "torch.load":
            assert keywords.get("weights_only") is True
        assert not ("load" in ast.unparse(node.func) and keywords.get("strict") is False)
