"""The house: who may import whom, one place where a model is asked, and names whose types are known."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import klflow_ext

PACKAGE = Path(klflow_ext.__file__).parent
ROOT = PACKAGE.parent
FLOORS = [  # each may import what stands before it, and nothing behind
    {"checks", "sharding"},
    {"reference", "muon", "files", "parts"},
    {"ops", "lock", "log"},
    {"path"},
    {"model", "oracle", "data"},
    {"checkpoint"},
    {"sample", "run"},
    {"hub", "evaluate", "serve"},
    {"train", "transformer"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def module_of(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file):
    """The modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "klflow_ext":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if (ROOT / (inner.replace(".", "/") + ".py")).exists() else node.module


def test_rooms_import_only_what_stands_below_them():
    for file in sources():
        room = module_of(file).split(".")[1:2]
        for module in imports(file):
            other = module.split(".")[1:2]
            if room and other and other != room:
                assert FLOOR[other[0]] < FLOOR[room[0]], f"{module_of(file)} imports {module}"


def test_no_circle_between_files():
    """Not even for the sake of types."""
    arrows = {module_of(file): set(imports(file)) for file in sources() if module_of(file) != "klflow_ext"}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a circle: {' -> '.join([*open_[open_.index(module) :], module])}"
        if module in done or module not in arrows:
            return
        open_.append(module)
        for other in arrows[module] - {module}:
            package = module.rpartition(".")[0]
            if other != package:  # a file of a package may name its own package only as a whole
                visit(other)
        done.add(open_.pop())

    for module in arrows:
        visit(module)


def test_models_are_asked_in_one_place():
    """hasattr and getattr with a name given as text, anywhere but on a config, an error or a module of another library."""
    allowed = {"klflow_ext.path.network", "klflow_ext.data", "klflow_ext.muon", "klflow_ext.run", "klflow_ext.checks"}
    for file in sources():
        if module_of(file) in allowed:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                asked = ast.unparse(node.args[0])
                assert not any(word in asked for word in ("model", "network", "path")), f"{module_of(file)}: {asked}"


def test_scripts_have_names_of_their_own():
    """The folders of benchmarks/ stand on one search path: of two files with one name, an import would find either."""
    names = [file.stem for file in (ROOT / "benchmarks").rglob("*.py") if file.stem != "__main__"]
    assert len(names) > 20 and sorted(set(names)) == sorted(names)


def test_every_public_name_is_there_and_typed():
    """Names are imported when they are asked for; type checkers and completion are told of all of them, and of the same."""
    (typed,) = (
        node
        for node in ast.parse((PACKAGE / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    told = {alias.name: node.module for node in typed.body for alias in node.names}
    assert {*told, "build_info", "ops"} == set(klflow_ext.__all__)
    for name, module in told.items():
        assert getattr(klflow_ext, name) is getattr(import_module(module), name)
    assert {*klflow_ext.__all__, "hub", "reference", "evaluate"} <= set(dir(klflow_ext))
    with pytest.raises(AttributeError, match="Smapler"):
        klflow_ext.Smapler  # noqa: B018
