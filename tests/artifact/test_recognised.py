"""What is written of a plain model whose tensors hold few values: these, bit for bit, whatever the way there."""

from __future__ import annotations

import copy
import pickle
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from models import EVERY_METHOD, bag, compressed, fill, net
from torch import Tensor, nn

from psc_lightning import compress, detach, load, load_into, measure, save
from psc_lightning.artifact import to_bytes
from psc_lightning.recognition import recognise
from psc_lightning.slots.layout import Layout
from psc_lightning.tying import TYINGS

HALF, MOST = ("magnitude", {"threshold": 0.3}), ("magnitude", {"threshold": 0.9})
ROWS = ("magnitude", {"threshold": 0.5, "granularity": "channel"})

LEVELS = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "uniform": "uniform",
    "4 bits of 50": ("uniform", {"bits": 4, "group": 50}),
    "3 bits of 64": ("uniform", {"bits": 3, "group": 64}),
    "8 bits of all": ("uniform", {"group": "tensor"}),
    "1 bit": ("uniform", {"bits": 1}),
    "learned step": ("uniform", {"bits": 4, "learned_step": True}),
    "binary": "binary",
    "binary of 24": ("binary", {"group": 24}),
    "0 and 1": ("binary", {"form": "01"}),
    "ternary": "ternary",
    "ternary of 32": ("ternary", {"group": 32}),
    "ttq": "ttq",
    "powers of two": ("log", {"bits": 4}),
    "roots of two": ("log", {"root": 8}),
    "codebook": "codebook",
    "codebook a row": ("codebook", {"k": 4, "group": "channel"}),
    "codebook of 64": ("codebook", {"k": 4, "group": 64}),
    **{
        f"{levels}, {scales}": (levels, {"scales": scales})
        for levels, scales in product(("uniform", "binary", "ternary", "codebook"), ("log8", "float32"))
    },
}


def layer(seed: int = 0, **slots: object) -> nn.Module:
    """One compressed matrix, 48 × 192."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(192, 48, bias=False))
    fill(model, ("0.weight",), **slots)
    return model


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


MASKED = [(levels, mask) for mask in (HALF, MOST, ROWS) for levels in ("uniform", "binary", "3 bits of 64", "codebook")]


@pytest.mark.parametrize(("levels", "mask"), [*((levels, None) for levels in LEVELS), *MASKED], ids=str)
def test_a_detached_weight_is_written_as_it_was_live(levels: str, mask, tmp_path: Path) -> None:
    model = layer(levels=LEVELS[levels], **({} if mask is None else {"mask": mask}))
    live = measure(model).tensors[0]
    detach(model)
    report = save(model, tmp_path / "model.psc")
    assert same(load(tmp_path / "model.psc")["0.weight"], model[0].weight.detach())
    assert report.tensors[0].method != "plain"
    # Few of a matrix of 9,216 are left where nine in ten are zero; whose scales are whose is then hard to tell.
    assert report.tensors[0].stored_bytes <= (1.25 if mask is MOST else 1.07) * live.stored_bytes


@pytest.mark.parametrize("levels", [None, "uniform", "ternary"])
@pytest.mark.parametrize("tying", TYINGS)
def test_ties_and_factors_come_back_bit_for_bit(tying: str, levels: str | None, tmp_path: Path) -> None:
    """Of which a weight alone tells little."""
    model = detach(compressed(tying=tying, **({} if levels is None else {"levels": levels})))
    save(model, tmp_path / "model.psc")
    read = load(tmp_path / "model.psc")
    assert all(same(read[name], model.state_dict()[name]) for name in ("0.weight", "3.weight"))


def test_what_is_stored_is_told() -> None:
    """Two rows of one size each; whole numbers of a quarter, -3 … 3; four values on no grid; zeros between; many values."""
    signs = torch.tensor([1.0, -1.0]).repeat(2, 32)
    quarters = torch.arange(64.0).remainder(7).sub(3).div(4).repeat(2, 1)
    four = torch.tensor([0.1, -0.35, 0.75, 1.3]).repeat(2, 16)
    dense = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    sparse = torch.where(torch.arange(64) % 4 == 0, dense, 0.0)
    weights = {"a": signs * torch.tensor([[0.5], [0.3125]]), "b": quarters, "c": four, "d": sparse, "e": dense}
    found = {
        name: [{spec.method: spec.options for spec in slots.specs.values()} for slots in recognise(weight, Layout())]
        for name, weight in weights.items()
    }
    assert found["a"][-1] == {"binary": {"group": "channel", "scales": "float16"}}
    assert found["b"][0] == {"uniform": {"group": "tensor", "scales": "float16", "bits": 3}}
    assert found["c"][0] == {"codebook": {"k": 4, "group": "tensor", "scales": "float32"}}
    assert found["d"][-1] == {"magnitude": {"threshold": 0.5}}
    assert found["e"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Linear(64, 32, bias=False).to(dtype)
    compress(model, levels="binary")
    detach(model)
    report = save(model, tmp_path / "model.psc")
    assert report.tensors[0].method == "binary"
    assert report.tensors[0].stored_bytes < 64 * 32 / 8 + 100
    read = load(tmp_path / "model.psc")["weight"]
    assert read.dtype == dtype
    assert torch.equal(read, model.weight)


def test_weights_of_transposed_layers_are_seen_by_output(tmp_path: Path) -> None:
    model = nn.ConvTranspose2d(16, 8, 3, bias=False)
    compress(model, levels="ternary")
    live = measure(model).file_bytes
    detach(model)
    assert save(model, tmp_path / "model.psc").file_bytes <= live + 2
    assert same(load(tmp_path / "model.psc")["weight"], model.weight.detach())


def test_a_tied_weight_is_stored_once() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(30, 40), "head": nn.Linear(40, 30, bias=False)})
    model["head"].weight = model["embed"].weight
    fill(model, ("embed.weight",), levels="ternary")
    detach(model)
    assert [row.method for row in measure(model).tensors] == ["ternary", "shared"]


def test_minus_zero_stays_minus_zero(tmp_path: Path) -> None:
    """Pruning by multiplication leaves it behind."""
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    pruned = weight * (weight.abs() > 1)
    assert torch.signbit(pruned[pruned == 0]).any()
    model = nn.Linear(32, 32, bias=False)
    model.weight.data.copy_(pruned)
    save(model, tmp_path / "model.psc")
    assert same(load(tmp_path / "model.psc")["weight"], pruned)
    model.weight.data.copy_(torch.where(weight > 0, 0.5, -0.0))
    save(model, tmp_path / "model.psc")
    assert same(load(tmp_path / "model.psc")["weight"], model.weight.detach())


def test_many_values_cost_a_glance(monkeypatch: pytest.MonkeyPatch) -> None:
    """No array of the tensor's size is sorted."""
    looked, unique = [], np.unique
    monkeypatch.setattr(np, "unique", lambda values: looked.append(len(values)) or unique(values))
    assert not list(recognise(torch.randn(256, 512, generator=torch.Generator().manual_seed(0)), Layout()))
    assert looked
    assert max(looked) <= 4096
    assert sum(looked) < 256 * 512 / 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_still_refused(bad: float) -> None:
    model = nn.Linear(64, 32)
    model.weight.data.fill_(0.5)[3, 4] = bad
    with pytest.raises(ValueError, match=r"^weight: expected finite numbers"):
        to_bytes(model)


def test_leftovers_that_are_asked_for_and_smaller_win(tmp_path: Path) -> None:
    """Half precision is recognised; eight bits an entry are fewer, and were asked for. Two values are fewer still."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).half().float()
    model[1].weight.data.copy_(torch.where(model[1].weight > 0, 0.125, -0.125))
    assert [row.method for row in measure(model).tensors] == ["float16", "binary"]
    report = save(model, tmp_path / "model.psc", leftovers={"0.*": "log8", "1.*": "log8"})
    assert [row.method for row in report.tensors] == ["plain", "binary"]


# ------------------------------------------------------------------------------------------ what a file has said


@pytest.mark.parametrize("methods", EVERY_METHOD, ids=lambda methods: "+".join(map(str, methods.values())))
def test_a_model_that_was_read_is_written_as_it_was(methods, tmp_path: Path) -> None:
    save(compressed(**methods), tmp_path / "model.psc")
    other = net(seed=5)
    load_into(other, tmp_path / "model.psc")
    assert to_bytes(other)[0] == (tmp_path / "model.psc").read_bytes()


@pytest.mark.parametrize("tying", ["cross_channel", "low_rank"])
def test_so_are_a_live_one_and_copies(tying: str, tmp_path: Path) -> None:
    best, other = net(seed=1), net()
    for model in (best, other):
        fill(model, ("0.weight", "3.weight"), tying=tying, levels="uniform")
    save(best, tmp_path / "model.psc")
    load_into(other, tmp_path / "model.psc")
    for one in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert to_bytes(one)[0] == (tmp_path / "model.psc").read_bytes()


def test_what_has_been_changed_since_counts(tmp_path: Path) -> None:
    save(compressed(tying=("low_rank", {"rank": 2})), tmp_path / "model.psc")
    other = net(seed=5)
    load_into(other, tmp_path / "model.psc")
    with torch.no_grad():
        other[3].weight[0, 0] += 1
    report = save(other, tmp_path / "again.psc")
    assert same(load(tmp_path / "again.psc")["3.weight"], other[3].weight.detach())
    assert [row.method for row in report.tensors if row.name in ("0.weight", "3.weight")] == ["low_rank", "plain"]
    save(net(seed=7), tmp_path / "other.psc")
    load_into(other, tmp_path / "other.psc")  # of which that file said nothing
    assert {row.method for row in measure(other).tensors} == {"plain"}


def test_a_read_model_is_plain(tmp_path: Path) -> None:
    save(compressed(tying="row", levels="uniform"), tmp_path / "model.psc")
    other, plain = net(seed=5), net(seed=5)
    load_into(other, tmp_path / "model.psc")
    plain.load_state_dict(load(tmp_path / "model.psc"))
    for one, twin in zip(other.modules(), plain.modules(), strict=True):
        assert type(one) is type(twin)
        assert not one._forward_pre_hooks
        assert not one._load_state_dict_pre_hooks
    assert list(other.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in plain.named_parameters()]
    detach(other)
    assert other[3].__dict__.keys() == plain[3].__dict__.keys()


# ------------------------------------------------------------------------------------------------------- warnings


def test_a_file_in_which_nothing_is_compressed_says_so(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"save: nothing in this file of [\d,]+ bytes is compressed: .*load_checkpoint"
    ):
        save(net(), tmp_path / "model.psc")


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: compressed(levels="binary"), {}),
        (lambda: detach(compressed(levels="binary")), {}),
        (net, {"leftovers": "float16"}),
        (lambda: nn.Linear(4, 4), {}),
        (lambda: bag({"n": torch.tensor(3)}), {}),
    ],
    ids=["live", "recognised", "rounded", "small", "no weight"],
)
def test_other_files_do_not(model, options, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model(), tmp_path / "model.psc", **options)


@pytest.mark.parametrize("tying", ["low_rank", "separable"])
def test_factors_of_another_state_are_told_from_these(tying: str, tmp_path: Path) -> None:
    """A product does not say what its factors were."""
    slots = {"tying": (tying, {"rank": 2}), "levels": "uniform"}
    best, model = net(seed=1), net()
    for one in (best, model):
        fill(one, ("0.weight",), **slots)
    hard = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best.state_dict())
    with pytest.warns(UserWarning, match=r"cannot hold to 0\.weight \(.*psc_lightning\.load_checkpoint\(model, path\)"):
        save(model, tmp_path / "model.psc")
    model.load_state_dict(hard)  # as they were they are known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, tmp_path / "model.psc")
    assert same(load(tmp_path / "model.psc")["0.weight"], model[0].weight.detach())


def test_few_values_loaded_into_other_slots_stay_what_they_are(tmp_path: Path) -> None:
    """Of a run of another method."""
    best, model = layer(levels=("codebook", {"k": 7})), layer(seed=1, levels="ternary")
    model.load_state_dict(best.state_dict())
    report = save(model, tmp_path / "model.psc")
    assert same(load(tmp_path / "model.psc")["0.weight"], best[0].weight.detach())
    assert report.tensors[0].method == "codebook"
