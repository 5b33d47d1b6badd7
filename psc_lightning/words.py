"""The words that people bring from other libraries, and what they are called here: what an error suggests."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

__all__ = ["elsewhere", "hint", "hinting", "known"]

P = ParamSpec("P")
R = TypeVar("R")

#: our word: what others call it
_OURS = {
    "threshold": "amount sparsity target_sparsity final_sparsity sparsity_level sparsity_ratio sparse ratio prune_ratio "
    "pruning_ratio prune pruning prune_amount pruning_amount percentile percent fraction zeros density keep keep_ratio",
    "bits": "bit nbit nbits n_bit n_bits num_bits wbit wbits w_bits weight_bits weight_bit bitwidth bit_width bit_depth "
    "n_bits_w num_bits_weight precision",
    "activations": "abits a_bits act_bits activation_bits num_bits_act n_bits_a quantize_activations",
    "k": "clusters cluster n_clusters num_clusters number_of_clusters centroids n_centroids num_centroids codebook_size",
    "rank": "r ranks n_components num_components components lora_r",
    "groups": "n_groups num_groups ngroups number_of_groups",
    "group": "group_size groupsize q_group_size per_channel channelwise axis ch_axis qscheme",
    "block": "block_size blocksize blocks",
    "granularity": "structured unstructured structure pattern dim unit use_global_unstructured",
    "scales": "scale scale_dtype scale_bits",
    "learned_step": "lsq learn_step learnable_step learned_scale",
    "refresh": "frequency freq update_freq update_every interval every pruning_freq",
    "calibration_steps": "calibration calibration_batches num_calibration_steps warmup_steps",
    "method": "kind type mode algorithm strategy criterion importance pruning_fn fn norm levels",
    "levels": "quantizer quantize quantization dtype weight_dtype method",
    "tying": "sharing weight_sharing share",
    "mask": "pruner pruning prune sparse unstructured",
    "targets": "target include included modules module layers target_modules module_names layer_types parameters params "
    "parameter_names parameters_to_prune",
    "ignore": "exclude excluded skip skip_modules ignored ignored_layers ignore_layers modules_to_not_convert except",
    "min_size": "min_numel min_params minimum_size",
    "schedule": "scheduler ramp sparsity_schedule pruning_schedule anneal",
    "refresh_batchnorm": "batchnorm bn_batches reestimate_bn update_bn precise_bn",
    "max_norm": "norm clip clip_norm max_grad_norm grad_clip gradient_clip_val gradient_clip clip_grad_norm",
    "max_value": "value clip_value clip_grad_value",
    "adaptive": "agc clip_factor clipping_factor clipping",
    "score_lr": "mask_lr scores_lr lr learning_rate",
    "step_lr": "scale_lr centroid_lr lr learning_rate",
    "factor_lr": "lr learning_rate",
    # settings of the app
    "lr": "learning_rate learningrate lrate",
    "max_epochs": "epochs epoch n_epochs num_epochs num_train_epochs",
    "max_steps": "steps n_steps num_steps iterations",
    "batch_size": "batch bs batchsize train_batch_size",
    "devices": "gpus gpu n_gpus num_gpus device",
    "seed": "random_state random_seed manual_seed",
    "folder": "root data_dir data_path path",
    "checkpoint": "ckpt ckpt_path pretrained weights",
    # methods and presets
    "float": "quantize quantization quant int8",
    "uniform": "int int8 int4 int2 linear affine qat fake_quantize 8bit 4bit lsq dorefa quantize quantization",
    "float16": "fp16 half f16 16bit",
    "bfloat16": "bf16",
    "binary": "bnn xnor sign 1bit binarize binaryconnect one_bit",
    "ternary": "twn ternarize 3level",
    "log": "pow2 power_of_two powers_of_two logarithmic apot",
    "codebook": "kmeans k_means clustering weight_clustering cluster palettize palettization lut",
    "magnitude": "l1 l1_unstructured l1_norm l2 absolute weight prune pruning",
    "movement": "soft_movement learned scores",
    "saliency": "snip taylor gradient grad fisher hessian obd",
    "low_rank": "svd lowrank factorize factorization factorized tucker lora",
    "separable": "depthwise depthwise_separable dsc",
    "cross_channel": "channel_sharing weight_sharing sharing",
    "deep": "deep_compression",
}  # fmt: skip

_MEANING = {
    "threshold": "the share of weights that are zero, 0 to 1",
    "bits": "of a level",
    "k": "how many centroids a codebook has",
    "group": "weights that share a scale: tensor, channel, or how many",
    "granularity": "what becomes zero together",
    "activations": "bits of the inputs of layers",
}

#: what functions take whose unknown arguments are explained
_TAKEN: dict[str, list[str]] = {}


def _theirs() -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for ours, words in _OURS.items():
        for word in words.split():
            found.setdefault(word, []).append(ours)
    return found


def known(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed name (dotted ones by their last part) that is this word, or that people mean by it.

    >>> known("n_bits", ["k", "bits"]), known("epochs", ["trainer.max_epochs"]), known("k", ["bits"])
    ('bits', 'trainer.max_epochs', None)
    """
    wanted = _theirs().get(word.lower().replace("-", "_"), [])
    named = {name.rpartition(".")[2]: name for name in reversed(list(allowed))}  # the first of several
    return next((named[one] for one in (word, *wanted) if one in named), None)


def _nearest(word: str, names: list[str]) -> str | None:
    return known(word, names) or next(iter(get_close_matches(word, names, n=1, cutoff=0.7)), None)


def hint(word: str, allowed: Iterable[str]) -> str:
    """What an error adds to say which name was meant: a synonym first, then the nearest spelling; "" for none.

    Args:
        word: what was given.
        allowed: the names there are; of dotted ones the last part counts.

    >>> hint("sparsity", ["bits", "threshold"])
    '; did you mean threshold (the share of weights that are zero, 0 to 1)?'
    >>> hint("max_nrom", ["max_norm", "scope"]), hint("colour", ["max_norm"])
    ('; did you mean max_norm?', '')
    """
    found = _nearest(word, list(allowed))
    if found is None:
        return ""
    meaning = _MEANING.get(found.rpartition(".")[2])
    return f"; did you mean {found}{f' ({meaning})' if meaning else ''}?"


def elsewhere(word: str) -> str:
    """What an error adds where callbacks take this word, or what people mean by it.

    >>> from psc_lightning.callbacks import WeightSharing
    >>> elsewhere("n_components")
    '; WeightSharing takes rank'
    """
    if known(word, ["activations"]):
        return "; ActivationQuantization(bits) rounds the inputs of layers"
    found = ((who, _nearest(word, taken)) for who, taken in _TAKEN.items())
    return "".join(f"; {who} takes {name}" for who, name in found if name)


def hinting(function: Callable[P, R]) -> Callable[P, R]:
    """Let an unknown argument of a function, or of a class by its `__init__`, be an error that says what was meant."""
    taken = [name for name in inspect.signature(function).parameters if name != "self"]
    who = function.__qualname__.removesuffix(".__init__")
    _TAKEN[who] = taken

    @functools.wraps(function)
    def called(*args: P.args, **given: P.kwargs) -> R:
        for word in given:
            if word not in taken:
                meant = hint(word, taken) or elsewhere(word)
                raise TypeError(f"{who}: there is no argument {word!r}; it takes {', '.join(taken)}{meant}")
        return function(*args, **given)

    return called
