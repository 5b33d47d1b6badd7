"""A method says its options once; callbacks, configs, errors and docstrings follow."""

from __future__ import annotations

import inspect
import itertools
import os
from typing import Any

import pytest
import yaml

import psc_lightning
from psc_lightning import ByteBudget, MaskLearning, StraightThroughQuantization, WeightSharing, preset
from psc_lightning.callbacks.presets import composed
from psc_lightning.configs import config_dir
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.options import options_of
from psc_lightning.tying import TYINGS

FOLDER = config_dir() / "compression"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# slot: its callback, its methods, what its node in a configuration is called
SLOTS = {
    "tying": (WeightSharing, TYINGS, "sharing"),
    "mask": (MaskLearning, MASKS, "mask"),
    "levels": (StraightThroughQuantization, LEVELS, "levels"),
}
METHODS = [(slot, name) for slot, (_, methods, _) in SLOTS.items() for name in methods]
TRAINING = {"scope", "refresh", "calibration_steps", "step_lr", "score_lr", "factor_lr", "activations"}
COMMON = {"targets", "ignore", "min_size", "schedule", "refresh_batchnorm"}
VALUES: dict[str, Any] = {  # one of each option, other than any default
    "bits": 3, "group": 7, "learned_step": True, "scales": "log8", "form": "01", "root": 2, "k": 5, "threshold": 0.25,
    "granularity": "channel", "block": 2, "label": "fisher", "groups": 3, "labels": "magnitude", "rank": 2,
}  # fmt: skip
WRONG: dict[str, Any] = {
    "bits": 9, "group": "rows", "learned_step": 1, "scales": "int8", "form": "ab", "root": 3, "k": 1, "threshold": 1.0,
    "granularity": "row_", "block": 0, "label": "hessian", "groups": 1, "labels": "fisher", "rank": 1.5,
}  # fmt: skip


def build(slot: str, name: str, **options: Any) -> Any:
    return SLOTS[slot][0](name, **options)


@pytest.mark.parametrize(("slot", "name"), METHODS)
def test_a_callback_takes_every_option_and_no_other(slot: str, name: str):
    callback, methods, _ = SLOTS[slot]
    known = options_of(methods[name])
    for option, value in VALUES.items():
        taken = option in inspect.signature(callback).parameters
        if option in known:
            extra = {"granularity": "row"} if (slot, option) == ("mask", "block") else {}
            assert build(slot, name, **{option: value}, **extra).options[option] == value
            with pytest.raises(ValueError, match=rf"^{option}: expected .*, found "):
                build(slot, name, **{option: WRONG[option]})
        elif taken:
            with pytest.raises(ValueError, match=rf"^{option}: '{name}' does not read it; it takes"):
                build(slot, name, **{option: value})


@pytest.mark.parametrize(("slot", "name"), METHODS)
def test_a_rate_or_a_calibration_that_is_not_read_is_an_error(slot: str, name: str):
    callback, methods, _ = SLOTS[slot]
    rate = callback.rate[0]
    if methods[name].trains({}):
        assert build(slot, name, **{rate: 0.5}).lr == 0.5
    else:
        with pytest.raises(ValueError, match=rf"^{rate}: '{name}' does not read it"):
            build(slot, name, **{rate: 0.5})
    if "calibration_steps" in inspect.signature(callback).parameters:
        if methods[name].calibrates({}):
            assert build(slot, name, calibration_steps=7).calibration_steps == 7
        else:
            with pytest.raises(ValueError, match=rf"^calibration_steps: '{name}' does not read it"):
                build(slot, name, calibration_steps=7)


def test_an_option_may_decide_what_else_is_read():
    assert StraightThroughQuantization("uniform", learned_step=True, step_lr=0.5).lr == 0.5
    with pytest.raises(ValueError, match=r"^step_lr: 'uniform' does not read it"):
        StraightThroughQuantization("uniform", step_lr=0.5)
    with pytest.raises(ValueError, match=r"^calibration_steps: 'cross_channel' does not read it"):
        WeightSharing("cross_channel", labels="magnitude", calibration_steps=5)
    with pytest.raises(ValueError, match=r"^block: granularity='element' does not read it"):
        MaskLearning("magnitude", block=3)


@pytest.mark.parametrize("slot", SLOTS)
def test_signatures_are_the_union_of_the_methods_options(slot: str):
    callback, methods, _ = SLOTS[slot]
    found = inspect.signature(callback).parameters
    told = {option: value for cls in methods.values() for option, value in options_of(cls).items()}
    assert set(told) == set(found) - TRAINING - COMMON - {callback.argument}
    text = inspect.getdoc(callback) or ""
    for option in set(found) - {callback.argument}:
        assert f"{option}: " in text or f"{option}, " in text
    for option, known in told.items():
        assert found[option].default in (None, known.default)


@pytest.mark.parametrize(("slot", "name"), METHODS)
def test_a_methods_yaml_has_its_options_with_its_defaults(slot: str, name: str):
    callback, methods, node = SLOTS[slot]
    path = FOLDER / slot / f"{name}.yaml"
    assert path.read_text().startswith("# @package compression\n# ")
    given = composed("none", **{slot: name}).callbacks[node]
    known = options_of(methods[name])
    assert set(given) - {"_target_", callback.argument, *COMMON, *TRAINING} == set(known)
    assert given._target_ == f"psc_lightning.{callback.__name__}"
    read = yaml.safe_load(path.read_text())
    for option in set(given) & (TRAINING | set(known)):
        written = read["callbacks"][node][option]
        if isinstance(written, str) and written.startswith("$"):
            assert written == f"${{compression.{option}}}"
            written = read[option]
        if option in known and option != "rank":  # a preset's rank does more than a method's
            assert written == known[option].default, option
    for key in ("targets", "ignore", "min_size", "refresh_batchnorm"):
        lines = read["callbacks"][node][key]
        assert f"${{compression.{key}}}" in (lines if isinstance(lines, list) else [lines])


def test_every_method_has_a_yaml_and_every_yaml_a_method():
    for slot, (_, methods, _) in SLOTS.items():
        assert {path.stem for path in (FOLDER / slot).glob("*.yaml")} == {*methods, "none"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_composition_of_a_few_lines(name: str):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    config = yaml.safe_load(text)
    # beside the four parts: a threshold, and where a budget decides what is zero, what its levels need for that
    assert len(text.splitlines()) <= (17 if "budget" in config else 9)
    assert [key for default in config["defaults"][:-1] for key in default] == ["tensors", "tying", "mask", "levels"]
    assert config["name"] == name
    assert 0 <= config["threshold"] < 1


@pytest.mark.parametrize("name", PRESETS)
def test_any_methods_make_a_preset(name: str):
    """Each pair of two slots' methods, or all three by all three where asked for."""
    defaults = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())["defaults"][1:-1]
    default = {slot: method for d in defaults for slot, method in d.items()}
    ties, masks, levels = ([None, "none", *methods] for _, methods, _ in SLOTS.values())
    triples = itertools.product(ties, masks, levels)
    if "PSC_TRIPLES" not in os.environ:
        pairs = itertools.product(enumerate(ties), enumerate(levels))
        triples = ((tying, masks[(i + j) % len(masks)], level) for (i, tying), (j, level) in pairs)
    for three in triples:
        chosen = dict(zip(SLOTS, three, strict=True))
        built = preset(name, **chosen)
        wanted = [chosen[slot] or default[slot] for slot in SLOTS]
        assert any(isinstance(callback, ByteBudget) for callback in built) == (name == "small")
        slots = [callback for callback in built if not isinstance(callback, ByteBudget)]
        assert [callback.method for callback in slots] == [method for method in wanted if method != "none"]


def test_a_preset_takes_options_targets_and_a_schedule():
    mask, levels = preset("binary", threshold=0.3, group=8, targets="encoder", schedule="cosine")
    assert (mask.options["threshold"], levels.options["group"]) == (0.3, 8)
    assert mask.targets == levels.targets == ["encoder"]
    assert mask.schedule.kind == levels.schedule.kind == "cosine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "tiny"}, "^compression: expected one of .*binary.*, found 'tiny'"),
        ({"compression": "binary", "levels": "twonary"}, "^levels: expected one of .*ternary.*, found 'twonary'"),
        ({"compression": "binary", "k": 3}, "^k: compression='binary' has no such option; it has .*form"),
        ({"compression": "codebook", "k": 1}, "^k: expected a whole number from 2 to 256, found 1"),
    ],
    ids=str,
)
def test_a_wrong_preset_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        preset(**options)


def test_compress_takes_methods_by_slot():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    with pytest.raises(ValueError, match=r"^compression: expected a preset, callbacks, or a method"):
        psc_lightning.compress(model)
    report = psc_lightning.compress(model, tying="row", levels="binary")
    assert {tensor.method for tensor in report.tensors if tensor.method != "plain"} == {"row+binary"}
