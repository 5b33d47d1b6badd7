"""Words that people bring from other libraries get a hint of the right one (case 39)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from torch import nn

from psc_lightning import (
    GradientClipping,
    MaskLearning,
    StraightThroughQuantization,
    WeightSharing,
    callbacks,
    preset,
    words,
)
from psc_lightning import compress as compress_
from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.configs import config_dir
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS, Mask
from psc_lightning.tying import TYINGS
from psc_lightning.words import hint, known

MEANT = {
    "threshold": ["amount", "sparsity", "ratio", "prune", "percentile", "Sparsity", "pruning-ratio", "threshhold"],
    "bits": ["nbits", "n_bits", "num_bits", "wbits", "bitwidth", "bit"],
    "k": ["clusters", "n_clusters", "num_clusters", "centroids"],
    "max_norm": ["clip_norm", "max_grad_norm", "max_nrom"],
    "targets": ["layers", "target_modules", "include", "parameters_to_prune"],
    "ignore": ["exclude", "skip", "ignored_layers"],
    "rank": ["n_components", "r"],
}


def compress(**given: Any) -> None:
    compress_(nn.Sequential(nn.Linear(64, 32)), **given)


TAKES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (MaskLearning, {}, "threshold"),
    (MaskLearning, {}, "targets"),
    (StraightThroughQuantization, {}, "bits"),
    (StraightThroughQuantization, {}, "k"),
    (WeightSharing, {"method": "low_rank"}, "rank"),
    (WeightSharing, {"method": "low_rank"}, "ignore"),
    (GradientClipping, {}, "max_norm"),
    (preset, {"compression": "binary"}, "threshold"),
    (preset, {"compression": "float"}, "bits"),
    (preset, {"compression": "codebook"}, "k"),
    (preset, {"compression": "binary"}, "targets"),
    (compress, {"compression": "binary"}, "threshold"),
    (compress, {"levels": "codebook"}, "k"),
    (compress, {"tying": "low_rank"}, "rank"),
]


@pytest.mark.parametrize(("function", "given", "ours"), TAKES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_another_librarys_word_is_an_error_that_names_ours(function: Any, given: dict[str, Any], ours: str):
    for word in MEANT[ours]:
        with pytest.raises((TypeError, ValueError), match=rf"{word}.*; did you mean {ours}( \(.*\))?\?$"):
            function(**given, **{word: 0.5})


def test_a_word_that_another_method_or_callback_takes_says_which():
    for word, said in (
        ("n_bits", "StraightThroughQuantization takes bits"),
        ("max_norm", "GradientClipping takes max_"),
    ):
        with pytest.raises(TypeError, match=rf"^MaskLearning: there is no argument '{word}'; it takes .*; {said}"):
            MaskLearning(**{word: 3})
    with pytest.raises(TypeError, match=r"; ActivationQuantization\(bits\) rounds the inputs of layers$"):
        StraightThroughQuantization(activations=8)
    for word, said in (
        ("num_bits", "bits is an option of levels='log', levels='uniform'$"),
        ("rank", "rank is an option of tying='low_rank', tying='separable'$"),
        ("abits", r"did you mean activations \(bits of the inputs of layers\)\?$"),
    ):
        with pytest.raises(ValueError, match=rf"^{word}: compression='binary' has no such option; .*; {said}"):
            preset("binary", **{word: 3})
    with pytest.raises(TypeError, match=r"it takes max_norm, max_value, adaptive, scope, log(, \w+)*$"):
        GradientClipping(colour=3)


def test_another_librarys_method_is_an_error_that_names_ours():
    for call, ours in (
        (lambda: MaskLearning("l1_unstructured"), "magnitude"),
        (lambda: MaskLearning("movment"), "movement"),
        (lambda: StraightThroughQuantization("int8"), "uniform"),
        (lambda: StraightThroughQuantization("kmeans"), "codebook"),
        (lambda: WeightSharing("svd"), "low_rank"),
        (lambda: preset("prune"), "mask"),
        (lambda: preset("binary", levels="fp16"), "float16"),
        (lambda: compress(compression="quantize"), "float"),
    ):
        with pytest.raises(ValueError, match=rf"expected one of .*; did you mean {ours}\?$"):
            call()


def test_every_name_that_is_suggested_exists():
    names = {*TYINGS, *MASKS, *LEVELS}
    for name in callbacks.__all__:
        names |= set(inspect.signature(getattr(callbacks, name)).parameters)
    names |= set(inspect.signature(preset).parameters)

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            names.add(key)
            walk(value)

    for path in config_dir().rglob("*.yaml"):
        names.add(path.stem)
        walk(yaml.safe_load(path.read_text()))
    suggested = set(vars(words)["_OURS"])
    assert suggested <= names, suggested - names


def test_our_own_words_come_first():
    assert known("mask", ["threshold", "mask"]) == "mask"
    assert hint("levels", ["method", "levels"]).startswith("; did you mean levels")
    assert hint("colour", ["threshold", "bits"]) == ""


def test_arguments_and_signatures_of_callbacks_are_as_written():
    assert [*inspect.signature(MaskLearning).parameters][:2] == ["method", "threshold"]
    assert MaskLearning("magnitude", 0.25).threshold == 0.25
    assert issubclass(MaskLearning, SlotCallback)


def test_what_threshold_means_stands_in_the_first_line():
    for kind in (Mask, MaskLearning, *MASKS.values()):
        first = (inspect.getdoc(kind) or "").splitlines()[0]
        assert "`threshold`" in first, kind
        assert "share" in first, kind
        assert "zero" in first, kind
