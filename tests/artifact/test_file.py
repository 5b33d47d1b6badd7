from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EVERY_METHOD, bag, compressed, fill, net
from read_with_numpy import read as reference_read
from torch import Tensor, nn

from psc_lightning import symbols
from psc_lightning.app.models import LeNet5
from psc_lightning.artifact import (
    ArtifactError,
    container,
    inspect,
    load,
    load_into,
    measure,
    save,
    to_bytes,
    verify,
)
from psc_lightning.artifact.model import summary
from psc_lightning.numerics.precision import PRECISIONS, power_of_two
from psc_lightning.slots.live import held, hold


def raw(tensor: Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].is_contiguous(), name
        assert raw(found[name]) == raw(tensor), name


# --------------------------------------------------------------------------------------------- law 1, law 3, law 7


@pytest.mark.parametrize("slots", EVERY_METHOD, ids=lambda slots: "+".join(map(str, slots.values())))
def test_every_method_returns_bit_for_bit(slots: dict[str, str], tmp_path: Path) -> None:
    model = compressed(**slots)
    path = tmp_path / "model.psc"
    report = save(model, path)
    assert_same(load(path), dict(model.state_dict()))
    assert report.file_bytes == path.stat().st_size
    assert sum(row.stored_bytes for row in report.tensors) + report.overhead_bytes == report.file_bytes
    assert to_bytes(model)[0] == path.read_bytes()
    plain = net(seed=1)
    plain.load_state_dict(load(path))
    model.eval()
    plain.eval()
    inputs = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(inputs), model(inputs))


@pytest.mark.parametrize("group", ["tensor", "channel", 50])
def test_how_much_is_taken_at_a_time_changes_nothing(group: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [compressed(**slots) for slots in EVERY_METHOD if "tying" not in slots]
    models.append(compressed(mask="magnitude", levels=("codebook", {"k": 16, "group": group})))
    expected = [to_bytes(model) for model in models]
    for module in (symbols, summary):
        monkeypatch.setattr(module, "PIECE", 7)
    for model, (data, report) in zip(models, expected, strict=True):
        assert to_bytes(model) == (data, report)
        assert_same(load(data), dict(model.state_dict()))


def test_same_model_same_bytes() -> None:
    first, second = to_bytes(compressed(levels="ternary")), to_bytes(compressed(levels="ternary"))
    assert first == second


def test_same_bytes_in_another_process() -> None:
    code = "import models; from psc_lightning.artifact import to_bytes as t\n"
    code += "print(t(models.compressed(levels='binary'))[0].hex())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == to_bytes(compressed(levels="binary"))[0].hex()


floats = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
types = floats | st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
names = st.lists(st.text("abé0_ []", min_size=1, max_size=3), min_size=1, max_size=3).map(".".join)


@st.composite
def bags(draw: st.DrawFn) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    for name in draw(st.lists(names, max_size=6, unique=True)):
        if any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in out):
            continue
        values = torch.randn(draw(shapes), generator=generator) * 10
        out[name] = values.to(draw(types))
    return out


@given(bags())
@settings(max_examples=60, deadline=None)
def test_any_tensors_return_and_a_stranger_reads_them(tensors: dict[str, Tensor]) -> None:
    model = bag(tensors)
    data, report = to_bytes(model)
    stranger = reference_read(data)
    assert list(stranger) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no bfloat16
        assert (str(stranger[name].dtype), stranger[name].shape) == (str(known.dtype)[6:], tuple(tensor.shape))
        assert stranger[name].tobytes() == raw(known)
    assert report.dense_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sum(row.stored_bytes for row in report.tensors) + report.overhead_bytes == len(data)


def test_a_stranger_reads_large_and_rounded_leftovers() -> None:
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(4097, generator=generator).sign() * 0.5
    data, _ = to_bytes(bag({"a.bias": large, "b.bias": torch.tensor([0.1])}), leftovers="float16")
    found = reference_read(data)
    assert torch.equal(torch.from_numpy(found["a.bias"]), large)
    assert found["b.bias"].view("int32").tolist() == [0x3DCCC000]  # 0.1 as float16 has it


# ---------------------------------------------------------------------------------------------------- leftovers


def test_leftovers_in_float16(tmp_path: Path) -> None:
    model = compressed(levels="binary")
    report = save(model, tmp_path / "half.psc", leftovers="float16")
    full = save(model, tmp_path / "full.psc")
    found, expected = load(tmp_path / "half.psc"), dict(model.state_dict())
    for name, tensor in expected.items():
        rounded = tensor.is_floating_point() and not name.endswith(("0.weight", "3.weight"))
        assert torch.equal(found[name], tensor.half().to(tensor.dtype) if rounded else tensor), name
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert report.file_bytes < full.file_bytes - 60
    assert report.dense_bytes == full.dense_bytes


def test_float16_overflow_names_the_tensor(tmp_path: Path) -> None:
    model = bag({"a.bias": torch.tensor([1.0, 7e4])})
    with pytest.raises(ValueError, match=r"a\.bias: .*65504.*found 70000: use leftovers='float32'"):
        save(model, tmp_path / "model.psc", leftovers="float16")
    assert os.listdir(tmp_path) == []


def test_leftovers_has_three_values() -> None:
    with pytest.raises(ValueError, match="leftovers must be one of float32, float16, log8, got 'int8'"):
        to_bytes(net(), leftovers="int8")
    with pytest.raises(
        ValueError, match=r"'\*\.mean' matches none of the tensors outside the slots: 0\.weight, 0\.bias"
    ):
        to_bytes(net(), leftovers={"*.bias": "float16", "*.mean": "log8"})


def test_leftovers_by_name(tmp_path: Path) -> None:
    """The first glob that matches counts; what none matches stays as it is."""
    model = compressed(levels="binary")
    save(model, tmp_path / "model.psc", leftovers={"*.running_*": "log8", "1.*": "float16"})
    found, expected = load(tmp_path / "model.psc"), dict(model.state_dict())
    for name in ("1.weight", "1.bias"):
        assert torch.equal(found[name], expected[name].half().float())
    for name in ("1.running_mean", "1.running_var"):
        unit = power_of_two(expected[name])
        assert torch.equal(found[name], PRECISIONS["log8"].round(expected[name], unit, positive=False)), name
        assert not torch.equal(found[name], expected[name])
    for name in ("0.bias", "3.bias", "0.weight", "1.num_batches_tracked"):
        assert torch.equal(found[name], expected[name])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var"])
def test_a_number_that_is_none_names_the_tensor(tmp_path: Path, bad: float, name: str) -> None:
    (tmp_path / "model.psc").write_bytes(b"old")
    model = compressed(levels="uniform")
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[name].view(-1)[1] = bad
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        save(model, tmp_path / "model.psc")
    assert (tmp_path / "model.psc").read_bytes() == b"old"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_none_is_found_in_every_type(dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        for at in (0, 40, 99):
            values = torch.linspace(-1, 1, 100, dtype=dtype)
            values[at] = bad
            with pytest.raises(ValueError, match=r"a\.b: expected finite numbers"):
                to_bytes(bag({"a.b": values}))
    assert to_bytes(bag({"a.b": torch.zeros(0, dtype=dtype)}))


@pytest.mark.parametrize("names", [True, False])
def test_complex_numbers_are_two_planes(tmp_path: Path, names: bool) -> None:
    """Parameters and buffers, a conjugate view, a scalar, zeros of both signs: bit for bit, beside compressed weights."""
    values = torch.randn(6, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    values[0, 0] = complex(-0.0, 0.0)
    tensors = {"a": values, "b": values.t().conj(), "c": torch.tensor(1 + 2j, dtype=torch.complex128)}
    tensors["d"] = values.conj()  # the same memory, but not the same numbers
    model = nn.ModuleList([compressed(levels="binary"), bag(tensors)])
    plain = nn.ModuleList([net(), bag({name: torch.zeros_like(value) for name, value in tensors.items()})])
    for leftovers in ("float32", "float16", "log8"):
        report = save(model, tmp_path / "model.psc", leftovers, names)
        load_into(plain, tmp_path / "model.psc")
        for name, value in tensors.items():
            assert torch.equal(plain[1].state_dict()[name].resolve_conj(), value)
        assert plain[1].state_dict()["a"].real.signbit()[0, 0]
        assert [row.dense_bytes for row in report.tensors[-4:]] == [240, 240, 16, 240]
    with pytest.raises(ValueError, match=r"a: expected finite numbers"):
        to_bytes(bag({"a": torch.tensor([1.0, complex(0.0, torch.inf)])}))


def test_a_tensor_that_cannot_be_stored_is_named() -> None:
    for tensor in (torch.zeros(2, dtype=torch.uint16), torch.eye(2).to_sparse(), torch.zeros(2, device="meta")):
        with pytest.raises(ValueError, match=r"a\.b: expected a dense tensor"):
            to_bytes(bag({"a.b": tensor}))


# ------------------------------------------------------------------------------------------------ shared tensors


def test_tied_leftovers_are_stored_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(40, 30), "b": nn.Linear(40, 30), "c": nn.Linear(40, 30)})
    alone = to_bytes(model)[1]
    model["c"].weight = model["a"].weight
    report = save(model, tmp_path / "model.psc")
    assert report.dense_bytes == alone.dense_bytes - 4800
    assert report.file_bytes < alone.file_bytes - 3900
    row = report.tensors[4]
    assert (row.name, row.method, row.dense_bytes, row.stored_bytes) == ("c.weight", "shared", 0, 0)
    found = load(tmp_path / "model.psc")
    assert found["c.weight"] is found["a.weight"]
    assert_same(found, dict(model.state_dict()))


def test_tied_compressed_weights_are_stored_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(30, 40), "head": nn.Linear(40, 30)})
    model["head"].weight = model["embed"].weight
    fill(model, ("embed.weight",), levels="binary")
    tensor = held(model["embed"], "weight")
    assert tensor is not None
    hold([(model["head"], "weight")], tensor)
    report = save(model, tmp_path / "model.psc")
    assert [row.method for row in report.tensors] == ["binary", "shared", "plain"]
    found = load(tmp_path / "model.psc")
    assert found["head.weight"] is found["embed.weight"]
    assert_same(found, dict(model.state_dict()))


def test_a_parameter_held_with_and_without_slots_is_one_tensor(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(30, 40), "head": nn.Linear(40, 30)})
    model["head"].weight = model["embed"].weight
    fill(model, ("embed.weight",), levels="binary")
    report = save(model, tmp_path / "model.psc")
    assert [row.method for row in report.tensors] == ["binary", "shared", "plain"]
    assert_same(load(tmp_path / "model.psc"), dict(model.state_dict()))


def test_a_shared_tensor_is_reported_as_the_weight_and_not_as_its_core(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(30, 40), "head": nn.Linear(40, 30)})
    model["head"].weight = model["embed"].weight
    fill(model, ("embed.weight",), tying="row", mask=("magnitude", {"threshold": 0.5}))
    tensor = held(model["embed"], "weight")
    assert tensor is not None
    hold([(model["head"], "weight")], tensor)
    report = save(model, tmp_path / "model.psc")
    assert [row.core_shape for row in report.tensors] == [(30, 10), (30, 40), (30,)]
    assert [row.sparsity for row in report.tensors] == [0.5, 0.5, 0.0]
    assert [row.core_shape for row in inspect(tmp_path / "model.psc").tensors] == [(30, 10), (30, 40), (30,)]


def test_views_of_one_storage_are_not_taken_for_one_tensor() -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    square = torch.arange(9.0).reshape(3, 3)
    model = bag({"a": whole, "b": whole[0], "c": whole[1], "d": square, "e": square.T, "f": whole[0]})
    data, report = to_bytes(model)
    assert [row.method for row in report.tensors] == ["plain"] * 5 + ["shared"]
    assert reference_read(data)["e"].tolist() == square.T.tolist()


# ------------------------------------------------------------------------------------------------------ strength


def test_slots_that_have_not_begun_are_leftovers(tmp_path: Path) -> None:
    model = net()
    fill(model, ("0.weight",), hard=False, levels="binary")
    report = save(model, tmp_path / "model.psc")
    assert {row.method for row in report.tensors} == {"plain"}
    assert_same(load(tmp_path / "model.psc"), dict(net().state_dict()))


def softened() -> nn.Module:
    """`net`, its convolution half way to binary."""
    model = net()
    fill(model, ("0.weight",), hard=False, levels="binary")
    tensor = held(model[0], "weight")
    assert tensor is not None
    tensor.set_strength("levels", 0.5, model[0].weight)
    tensor.show(model[0].weight)
    return model


def test_soft_slots_are_stored_hard_and_stay_soft(tmp_path: Path) -> None:
    """In mid-ramp a file holds what the ramp leads to; the model goes on where it is."""
    model, hard = softened(), softened()
    before = pickle.dumps(model)
    report = save(model, tmp_path / "model.psc")
    assert measure(model) == report
    assert pickle.dumps(model) == before
    assert len(model[0].weight[0].unique()) > 2
    tensor = held(hard[0], "weight")
    assert tensor is not None
    tensor.harden(hard[0].weight)
    assert_same(load(tmp_path / "model.psc"), dict(hard.state_dict()))
    assert len(load(tmp_path / "model.psc")["0.weight"][0].unique()) == 2
    assert to_bytes(hard)[0] == (tmp_path / "model.psc").read_bytes()


@pytest.mark.parametrize("slots", EVERY_METHOD, ids=lambda slots: "+".join(map(str, slots.values())))
def test_writing_and_measuring_change_nothing(slots: dict[str, str], tmp_path: Path) -> None:
    model = compressed(**slots)
    for layer in (model[0], model[3]):
        tensor = held(layer, "weight")
        if tensor is not None:
            for slot in tensor.slots.specs:
                tensor.set_strength(slot, 0.5, layer.weight)
            tensor.show(layer.weight)
    before = pickle.dumps(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = measure(model)
        assert save(model, tmp_path / "model.psc") == report
        assert to_bytes(model)[1] == report
    assert report.file_bytes == (tmp_path / "model.psc").stat().st_size
    assert pickle.dumps(model) == before


def test_measuring_counts_what_saving_with_the_same_options_does(tmp_path: Path) -> None:
    model = compressed(mask="magnitude", levels="ternary")
    for options in ({}, {"leftovers": "log8"}, {"names": False}, {"leftovers": {"1.*": "float16"}, "names": False}):
        assert measure(model, **options) == save(model, tmp_path / "model.psc", **options)
        assert measure(model, **options).file_bytes == (tmp_path / "model.psc").stat().st_size
    with pytest.raises(ValueError, match="leftovers must be one of float32, float16, log8, got 'int8'"):
        measure(model, leftovers="int8")


# ------------------------------------------------------------------------------------------------------ load_into


def test_load_into_a_plain_model(tmp_path: Path) -> None:
    model = compressed(mask="magnitude", levels="ternary")
    save(model, tmp_path / "model.psc")
    plain = net(seed=5)
    load_into(plain, tmp_path / "model.psc")
    assert_same(dict(plain.state_dict()), dict(model.state_dict()))
    double = net(seed=5).double()
    load_into(double, tmp_path / "model.psc")
    assert torch.equal(double[3].weight, plain[3].weight.double())


@pytest.mark.parametrize("hard", [False, True], ids=["not begun", "hard"])
def test_load_into_a_live_model(hard: bool, tmp_path: Path) -> None:
    """It holds the file's weights then, as they are; and writes them again, bit for bit."""
    model = compressed(levels="binary")
    save(model, tmp_path / "model.psc")
    other = net(seed=5)
    fill(other, ("0.weight",), hard=hard, levels="binary")
    load_into(other, tmp_path / "model.psc")
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    report = save(other, tmp_path / "again.psc")
    assert_same(load(tmp_path / "again.psc"), dict(model.state_dict()))
    assert report.tensors[0].method == "binary"  # recognised as made by these levels, begun or not


def test_another_model_is_refused_whole(tmp_path: Path) -> None:
    save(net(), tmp_path / "model.psc")
    other = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 9), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ArtifactError) as caught:
        load_into(other, tmp_path / "model.psc")
    message = str(caught.value)
    assert "4 differences" in message
    assert "3.weight has shape [8, 32] in the file, [9, 32] in the model" in message
    assert "4.bias is missing in the file" in message
    assert_same(dict(other.state_dict()), before)
    save(other, tmp_path / "model.psc")
    with pytest.raises(ArtifactError, match=r"4\.weight is not in the model"):
        load_into(net(), tmp_path / "model.psc")


# ----------------------------------------------------------------------------------------------------- bad places


def test_a_file_beyond_the_limit_takes_no_memory(tmp_path: Path) -> None:
    report = save(bag({"a": torch.zeros(1000, 1000), "b": torch.zeros(3)}), tmp_path / "model.psc")
    assert report.file_bytes < 60
    assert report.dense_bytes == 4_000_012
    with pytest.raises(ArtifactError, match=r"max_bytes = 4000011 bytes, found 4000012: pass a larger max_bytes"):
        load(tmp_path / "model.psc", max_bytes=4_000_011)
    load(tmp_path / "model.psc", max_bytes=4_000_012)
    with mock.patch.object(torch, "zeros", side_effect=AssertionError), pytest.raises(ArtifactError, match="max_bytes"):
        load(tmp_path / "model.psc", max_bytes=100)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    for action in (load, verify, inspect):
        with pytest.raises(FileNotFoundError):
            action(tmp_path / "nowhere.psc")


def test_a_failing_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.psc"
    save(net(), path)
    old = path.read_bytes()
    full = OSError(28, "No space left on device")
    with (
        mock.patch.object(os, "fsync", side_effect=full),
        pytest.raises(OSError, match=r"cannot write model"),
    ):
        save(net(seed=3), path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model.psc"]


_watched: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    codes = ("import", "exec", "compile", "pickle.find_class", "marshal.loads", "subprocess.Popen", "os.system")
    if _watched is not None and event in codes:
        _watched.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_note)  # cannot be taken back


@pytest.mark.parametrize("slots", EVERY_METHOD, ids=lambda slots: "+".join(map(str, slots.values())))
def test_reading_imports_unpickles_and_runs_nothing(
    slots: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(compressed(**slots), tmp_path / "model.psc")
    load(tmp_path / "model.psc")  # what this package imports late is there from now on
    events: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "_watched", events)
        load(tmp_path / "model.psc")
    assert events == []


def test_reading_needs_no_lightning() -> None:
    code = (
        "import sys, psc_lightning.artifact\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning', 'hydra', 'rich')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


class Extra(nn.Linear):
    """Has a state that is no tensor."""

    kept = "own"

    def get_extra_state(self) -> str:
        return self.kept

    def set_extra_state(self, state: str) -> None:
        self.kept = state


def test_a_state_that_is_no_tensor_is_left_out_with_a_word(tmp_path: Path) -> None:
    saved, other = nn.Sequential(Extra(2, 2)), nn.Sequential(Extra(2, 2))
    saved[0].kept = "another"
    with pytest.warns(
        UserWarning, match=r"leaves out 0\._extra_state \(str\): load_into\(model, path\) leaves the model's"
    ):
        save(saved, tmp_path / "model.psc")
    assert list(load(tmp_path / "model.psc")) == ["0.weight", "0.bias"]
    load_into(other, tmp_path / "model.psc")
    assert torch.equal(other[0].weight, saved[0].weight)
    assert other[0].kept == "own"


# ------------------------------------------------------------------------------------------------------ without names


def test_a_file_without_names_goes_into_its_model_only(tmp_path: Path) -> None:
    model = compressed(levels="binary")
    model[3].bias = model[0].bias  # an alias
    path = tmp_path / "model.psc"
    save(model, path, names=False)
    plain = net(seed=1)
    plain[3].bias = plain[0].bias
    load_into(plain, path)
    assert_same(dict(plain.state_dict()), dict(model.state_dict()))
    other = nn.Sequential(*(nn.Identity() for _ in range(2)), *net())
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"other names, types or shapes.*build the model that was saved"):
        load_into(other, path)
    assert_same(dict(other.state_dict()), before)
    for read in (load, verify, inspect):
        with pytest.raises(ArtifactError, match=r"saved without \(names=False\): psc_lightning.load_into"):
            read(path)


@pytest.mark.parametrize(("names", "header"), [(True, 49), (False, 22)])
@pytest.mark.parametrize("levels", ["binary", "ternary"])
def test_the_header_of_lenet5_is_short(names: bool, header: int, levels: str) -> None:
    """Its eight tensors: magic, version, checksum, kinds, and names and shapes or a fingerprint of them."""
    model = LeNet5(10)
    fill(model, tuple(name for name in model.state_dict() if name.endswith("weight")), levels=levels)
    data, _ = to_bytes(model, names=names)
    sections = container.unpack(data, frozenset({1, 2, 3, 4, 5}))
    plain = sections.get(5, b"")
    assert (len(plain) > 0) == (levels == "binary")  # balanced signs; their section has a tag and a length, too
    own = 1 + len(container.varint(len(plain))) if plain else 0
    less = len(container.varint(50_000)) - len(container.varint(len(sections[3])))  # a shorter length of the other's
    assert len(data) - len(sections[3]) - len(plain) == header + own - less


def test_cut_and_flipped_kinds_are_refused(tmp_path: Path) -> None:
    sections = container.unpack(to_bytes(net(), names=False)[0], frozenset({3, 4}))
    for content in (sections[4][:5], sections[4] + b"\0", sections[4][:4] + b"\x77" + sections[4][5:], b""):
        (tmp_path / "model.psc").write_bytes(container.pack({4: content, 3: sections[3]}))
        with pytest.raises(ArtifactError):
            load_into(net(), tmp_path / "model.psc")
