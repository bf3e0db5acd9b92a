"""Which package may import which: from the command down to the mesh, without a circle."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "t5x_lite"

# A room may import those named before it, and itself. Families and tools stand above what they use; `cli` above all.
ORDER = [
    "errors",
    "sharding_rules",
    "sharding",
    "storage",
    "distributed",
    "model",
    "data",
    "metrics",
    "training",
    "checkpoint",
    "convert",
    "inference",
    "t5_model",
    "bert",
    "t5_encoder",
    "t5gemma",
    "plan",
    "export",
    "linear_probe",
    "report",
    "options",
    "run_config",
    "cli",
]
COMMANDS = ("load", "features")  # `python -m t5x_lite.load` and the like: a file of a few lines


def modules():
    return [file for file in PACKAGE.rglob("*.py") if room(file) not in ("__init__", *COMMANDS)]


def room(file: pathlib.Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file: pathlib.Path) -> set[tuple[str, bool]]:
    """The rooms that a module imports, and whether it does so as soon as it is imported itself."""
    tree = ast.parse(file.read_text())
    late = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    late |= {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE" in ast.dump(i.test) for n in ast.walk(i)}
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "t5x_lite":
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("t5x_lite."):
            names = [str(node.module).split(".")[1]]
        found |= {(name, id(node) not in late) for name in names}
    return found


def test_every_room_has_its_place():
    assert {room(file) for file in modules()} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_room_imports_only_what_lies_below_it(name):
    for file in (file for file in modules() if room(file) == name):
        above = {other for other, at_once in imports(file) if at_once} - set(ORDER[: ORDER.index(name) + 1])
        assert not above, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(above))}"


def test_only_the_command_knows_the_run_config():
    knowing = {room(file) for file in modules() if ("run_config", True) in imports(file)}
    assert knowing == {"cli"}
