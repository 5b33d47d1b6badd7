"""The house of DESIGN §5: what lies where, who may import whom, and what a method must tell about itself."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch import nn

import psc_lightning
from psc_lightning import callbacks, config_dir
from psc_lightning.levels import LEVELS, Levels
from psc_lightning.masks import MASKS, Mask
from psc_lightning.tying import TYINGS, Tying

PACKAGE = Path(psc_lightning.__file__).parent
TESTS = Path(__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = {"tying": (TYINGS, Tying), "masks": (MASKS, Mask), "levels": (LEVELS, Levels)}
METHODS = [(folder, name, cls) for folder, (methods, _) in FOLDERS.items() for name, cls in methods.items()]

# Lower layers first; a module may import from its own package and from lower layers.
LAYERS = [
    {"symbols", "strips", "selection", "clustering", "grid"},
    {"bits", "functional", "schedule", "layout", "configs", "sharding", "checkpoint"},
    {"precision"},
    {"tying", "masks", "levels", "activations"},
    {"stored", "chain", "spec"},
    {"slots"},
    {"latent"},
    {"live"},
    {"folding", "targets"},
    {"training", "artifact"},
    {"callbacks", "report"},
    {"oneshot", "export"},
    {"app"},
    {"cli"},
]


def home(path: Path) -> str:
    """The first part of a module's name within the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """What a module imports from the package when it is imported: not under TYPE_CHECKING, not in functions."""
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
            elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
                visit(node.body)

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
        files = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", "base"}
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
        assert cls.__bases__[0].__bases__ == (nn.Module,), name
    for name in callbacks.__all__:
        assert len([c for c in getattr(callbacks, name).__mro__ if c.__module__.startswith("psc_lightning")]) <= 2, name


@pytest.mark.parametrize(("folder", "name", "cls"), METHODS, ids=[f"{folder}.{name}" for folder, name, _ in METHODS])
def test_a_method_tells_all_about_itself(folder: str, name: str, cls: type):
    text = inspect.getdoc(cls)
    first, _, rest = text.partition("\n")
    assert first.endswith((".", ":")) or ": " in first
    assert "Stored: " in rest
    assert "Args" in rest
    assert "Source: " in rest
    assert ">>> " in rest
    assert "radient" in rest or "∂" in rest
    assert "Forward" in rest or "x̂" in text or "score" in text
    own = {key for key, value in vars(cls).items() if inspect.isfunction(value) and not key.startswith("_")}
    assert all(inspect.getdoc(vars(cls)[key]) for key in own)


# ------------------------------------------------------------------------------------------------------- presets

PRESETS = sorted((config_dir() / "compression").glob("*.yaml"))
# DESIGN §7
NAMES = {"none", "float", "binary", "ternary", "mask", "cross_channel", "row", "column", "separable", "low_rank", "log"}
NAMES |= {"codebook", "deep"}


def test_one_file_a_preset():
    assert {path.stem for path in PRESETS} == NAMES


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_says_what_it_does_and_has_its_options_on_top(path: Path):
    text = path.read_text()
    assert text.startswith("# ")
    config = yaml.safe_load(text)
    assert config["name"] == path.stem
    assert 0 <= config["threshold"] < 1
    if path.stem == "none":
        return
    assert {"targets", "ignore", "min_size"} <= set(config)
    for part in config["callbacks"].values():
        assert part["_target_"].removeprefix("psc_lightning.") in callbacks.__all__
        for key in ("targets", "ignore", "min_size"):
            given = part[key] if isinstance(part[key], list) else [part[key]]
            assert f"${{compression.{key}}}" in given, f"{key} does not reach {part['_target_']}"
    used = text.partition("callbacks:")[2]
    for key in set(config) - {"name", "callbacks"}:
        assert f"${{compression.{key}}}" in used, f"{key} is read by nobody"


def test_every_method_is_in_a_preset_or_an_option():
    text = "".join(path.read_text() for path in PRESETS)
    for folder, name, _ in METHODS:
        assert name in text or name in ("float16", "bfloat16"), f"{folder}/{name}"


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
