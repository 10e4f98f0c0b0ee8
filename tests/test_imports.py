"""The house: rooms that know only those below them, modules without circles, and empty __init__
files.
"""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

PACKAGE = ROOT / "src" / "tabletune"
FLOORS = [  # from the bottom to the top: what a floor imports is below it
    {"errors", "stats"},
    {"run"},
    {"chat"},
    {"data"},
    {"model"},
    {"merging"},
    {"training"},
    {"report"},
    {"evaluation"},
    {"export"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = {"__init__", "__main__"}


def module_name(path):
    """The name of a module within the package, such as "run.files"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def nodes_that_run(tree):
    """The nodes of a syntax tree, but for what is imported for types alone (`if
    TYPE_CHECKING:`).
    """
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from nodes_that_run(child)


def imported(path):
    """The modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in nodes_that_run(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            source = (node.module or "").split(".")
            candidates = [".".join([*source, alias.name]) for alias in node.names]
            names |= {node.module, *candidates}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    within = {name.removeprefix("tabletune.") for name in names if name.startswith("tabletune.")}
    return within & set(MODULES)


def test_every_room_has_its_floor():
    rooms = {name.split(".")[0] for name in MODULES} - ENTRANCES
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ENTRANCES])
def test_a_module_imports_its_own_room_and_those_below(name):
    room = name.split(".")[0]
    for other in imported(MODULES[name]):
        other_room = other.split(".")[0]
        assert other_room == room or FLOOR[other_room] < FLOOR[room], f"{name} imports {other}"


def test_no_modules_import_each_other_in_a_circle():
    try:
        TopologicalSorter({name: imported(path) for name, path in MODULES.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_are_one_level_deep():
    assert max(name.count(".") for name in MODULES) == 1


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith(".__init__")])
def test_the_init_file_of_a_room_is_empty(name):
    """What it imported would be loaded with every module of the room: start-up time is tested."""
    assert not MODULES[name].read_text(encoding="utf-8")


def test_an_upward_arrow_would_be_seen(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    from tabletune.cli import main\n")
    assert imported(tmp_path / "bad.py") == {"cli.main"}
