"""The house of DESIGN §5: what lies where, who may import whom, and what a method must tell about itself."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from torch import nn

import psc_lightning
from psc_lightning import callbacks
from psc_lightning.levels import LEVELS, Levels
from psc_lightning.masks import MASKS, Mask
from psc_lightning.options import options_of
from psc_lightning.tying import TYINGS, Tying

PACKAGE = Path(psc_lightning.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = {"tying": (TYINGS, Tying), "masks": (MASKS, Mask), "levels": (LEVELS, Levels)}
METHODS = [(folder, name, cls) for folder, (methods, _) in FOLDERS.items() for name, cls in methods.items()]

# Lower layers first; a module may import from its own package and from lower layers.
LAYERS = [
    {"words"},
    {"symbols", "options", "files", "strict_json", "terminal", "arguments", "copies"},
    {"prices", "schedule", "configs", "sharding", "checkpoint"},
    {"report", "numerics"},
    {"tying", "masks", "levels", "activations"},
    {"slots"},
    {"folding", "recognition"},
    {"training", "artifact"},
    {"coarseness"},
    {"callbacks"},
    {"export", "oneshot", "loading", "pages", "probing"},
    {"app"},
    {"cli", "search"},
]


def home(path: Path) -> str:
    """The first part of a module's name within the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Which parts of the package a module imports, in functions too; not under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "psc_lightning":
                parts = node.module.split(".")[1:]
                found.update(parts[:1] or [alias.name for alias in node.names])
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".") for alias in node.names]
                found.update(parts[1] for parts in names if parts[0] == "psc_lightning" and len(parts) > 1)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
            elif not isinstance(node, ast.ImportFrom):
                visit([child for child in ast.walk(node) if isinstance(child, ast.Import | ast.ImportFrom)])

    visit(ast.parse(path.read_text()).body)
    return found


def layer_of(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} is new: give it a layer, here and in pyproject.toml"
    return found[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    own = home(path)
    if own == "__init__":
        assert not imports(path)  # names are imported on first use
        return
    for other in imports(path) - {own}:
        assert layer_of(other) < layer_of(own), f"{own} imports {other}"


def test_no_module_imports_itself_by_a_detour():
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("psc_lightning"):
                for alias in node.names:
                    tries = (f"{node.module}.{alias.name}", node.module, f"{node.module}.__init__")
                    found |= {one for one in tries if one in names} if tries[0] not in names else {tries[0]}
        graph[name] = found
    lazy = "psc_lightning.__init__"  # for type checkers only
    TopologicalSorter({name: found for name, found in graph.items() if name != lazy}).prepare()


def test_rooms_are_small():
    rooms: dict[Path, list[int]] = {}
    for path in MODULES:
        if path.parent != PACKAGE:
            rooms.setdefault(path.parent, []).append(len(path.read_text().splitlines()))
    for room, lines in rooms.items():
        assert len(lines) <= 13, room
        assert sum(lines) <= 2100, room


def test_import_linter_is_told_the_same_layers():
    told = (TESTS.parent / "pyproject.toml").read_text().partition("\nlayers = ")[2].partition("]")[0] + "]"
    assert [set(layer.split(" | ")) for layer in reversed(ast.literal_eval(told))] == LAYERS


def test_no_drawer_for_odds_and_ends():
    names = {part for path in MODULES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not names & {"utils", "util", "helpers", "helper", "misc", "common", "core", "tools"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_and_is_not_long(path: Path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert "TODO" not in text
    assert "FIXME" not in text
    assert len(text.splitlines()) <= 450


def test_one_method_one_file_one_test():
    for folder, (methods, _) in FOLDERS.items():
        homes = {cls.__module__.rpartition(".")[2] for cls in methods.values()}
        files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", "base", "units"}
        assert homes == files, folder
        tests = {path.stem.removeprefix("test_") for path in (TESTS / folder).glob("test_*.py")}
        assert homes <= tests, folder


def test_numbers_in_a_file_are_never_shared():
    for methods in (TYINGS, LEVELS):
        numbers = [cls.code_number for cls in methods.values()]
        assert len(set(numbers)) == len(numbers)
        assert min(numbers) > 0  # 0 is an empty slot


def test_inheritance_is_one_level_deep():
    for _, base in FOLDERS.values():
        assert base.__bases__ == (nn.Module,)
    for _, name, cls in METHODS:
        base = cls.__bases__[0]
        if base.__module__ == cls.__module__:  # the same method with other constants
            assert not any(inspect.isfunction(value) for value in vars(cls).values()), name
            base = base.__bases__[0]
        assert base.__bases__ == (nn.Module,), name
    for name in callbacks.__all__:
        assert len([c for c in getattr(callbacks, name).__mro__ if c.__module__.startswith("psc_lightning")]) <= 2, name


@pytest.mark.parametrize(("folder", "name", "cls"), METHODS, ids=[f"{folder}.{name}" for folder, name, _ in METHODS])
def test_a_method_tells_all_about_itself(folder: str, name: str, cls: type):
    text = inspect.getdoc(cls)
    first, _, rest = text.partition("\n")
    assert first.endswith((".", ":")) or ": " in first
    assert "Stored: " in rest
    assert "Args" in rest or not options_of(cls)
    assert "Shapes:" in rest or "Args, shapes: see" in rest
    assert "Raises:" in rest or folder != "tying"  # each applies to some weights only
    assert "Source: " in rest
    assert ">>> " in rest
    assert "radient" in rest or "∂" in rest
    assert "Forward" in rest or "x̂" in text or "score" in text
    own = {key for key, value in vars(cls).items() if inspect.isfunction(value) and not key.startswith("_")}
    assert all(inspect.getdoc(vars(cls)[key]) for key in own)


# -------------------------------------------------------------------------------------------------- lazy imports


def fresh(code: str) -> str:
    """The output of a new Python process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_reading_a_file_needs_torch_only(tmp_path):
    path = tmp_path / "model.psc"
    psc_lightning.save(nn.Linear(3, 3), path)
    heavy = ["lightning", "pytorch_lightning", "hydra", "omegaconf", "matplotlib", "sklearn", "rich", "torchmetrics"]
    code = f"""
import sys, psc_lightning
assert "torch" not in sys.modules
print(len(psc_lightning.load({str(path)!r})), *[name for name in {heavy} if name in sys.modules])
psc_lightning.verify({str(path)!r})
"""
    assert fresh(code) == "2"


def test_every_public_name_is_there():
    for name in psc_lightning.__all__:
        assert getattr(psc_lightning, name) is not None
        assert name in dir(psc_lightning)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = psc_lightning.nothing
