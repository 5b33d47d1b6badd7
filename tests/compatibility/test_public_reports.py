"""What others report of compression libraries, tried here; PUBLIC_REPORTS.md links each report to its test."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from training import COMBINATIONS, INPUTS, QUIET, Loader, Net, differences, fit, run_state, slotted

from psc_lightning import (
    MaskLearning,
    StraightThroughQuantization,
    compress,
    config_dir,
    detach,
    load,
    load_checkpoint,
    measure,
    save,
)

pytestmark = QUIET

M, Q = MaskLearning, StraightThroughQuantization
NOW = "constant"
RAMP = {"kind": "linear", "begin": 4, "end": 20}


def levels(weight):
    return [len(row.unique()) for row in weight.detach().reshape(len(weight), -1)]


def computes_its_file(model, plain, path):
    save(model, path)
    plain.load_state_dict(load(path))
    with torch.no_grad():
        assert torch.equal(plain.eval()(INPUTS), model.eval()(INPUTS))


# --------------------------------------------------------------------------------- averages, copies, checkpoints


def test_a_reused_callback_keeps_no_tensors_of_earlier_fits():
    model, callbacks, numbers = Net("sgd"), COMBINATIONS["ternary_movement"](NOW), []
    for _ in range(3):
        fit(callbacks, model, max_epochs=1)
        gc.collect()
        numbers.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert numbers[0] >= numbers[1] >= numbers[2]  # what tests before have left may go meanwhile


def test_winning_tickets():
    """Prune, rewind to the first weights, prune more: three times; each round's zeros are zeros in the next."""
    model = Net("sgd")
    first, pruned = copy.deepcopy(model.state_dict()), {}
    for share in (0.5, 0.75, 0.875):
        detach(model)
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(torch.where(pruned[name], 0.0, first[name]) if name in pruned else first[name])
        fit([M("movement", threshold=share, scope="layer", schedule=NOW)], model)
        zeros = {name: value == 0 for name, _, value in slotted(model)}
        assert [int(zero.sum()) for zero in zeros.values()] == [int(share * n + 0.5) for n in (144, 576, 512)]
        assert all(bool(zeros[name][pruned[name]].all()) for name in pruned)
        pruned = zeros


def test_a_copy_of_what_an_interruption_left():
    class Stops(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 5:
                raise RuntimeError("stop")
            return loss

    model = Stops("sgd")
    with pytest.raises(RuntimeError, match="stop"):
        fit(COMBINATIONS["ternary_movement"](NOW), model)
    twin = copy.deepcopy(model)
    assert differences(dict(model.state_dict()), dict(twin.state_dict())) == []
    assert max(levels(twin.net[3].weight)) == 3
    assert measure(twin) == measure(model)


def test_a_copy_in_half_precision_pickled_whole_and_back():
    """As trainers keep an average: the zeros are the same, each row has its three levels, rounded to float16 at most."""
    model, _ = fit(COMBINATIONS["ternary_movement"](NOW), Net("sgd"))
    model.trainer = None
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model).half(), buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False).float()
    for (_, _, own), (_, _, other) in zip(slotted(model), slotted(back)):
        assert torch.equal(own == 0, other == 0)
        assert max(levels(other)) <= 3
        assert torch.equal(own.half().float(), other)


def test_a_dense_average_of_ones_own_is_compressed_afterwards():
    """An average of ternary weights is not ternary; its file is that of a dense network until `compress`."""

    class Average(Callback):
        def on_train_start(self, made, model):
            self.net = copy.deepcopy(model.net)

        def on_train_batch_end(self, made, model, *args):
            now = model.net.state_dict()
            for name, value in self.net.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(now[name], 0.1)

    average = Average()
    model, _ = fit([*COMBINATIONS["ternary_movement"](NOW), average], Net("sgd"))
    dense = measure(average.net)
    assert {tensor.method for tensor in dense.tensors} == {"plain"}
    report = compress(detach(average.net), mask="magnitude", threshold=0.6, levels="ternary")
    assert max(levels(average.net[3].weight)) == 3
    assert report.file_bytes < 1.1 * measure(model).file_bytes < dense.file_bytes / 5


def test_a_rate_is_found_then_the_best_is_tested_and_saved(tmp_path):
    class Rated(Net):
        lr = 0.05

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.lr)

    saver = ModelCheckpoint(tmp_path, monitor="val")
    finder = LearningRateFinder(min_lr=1e-4, max_lr=0.1, num_training_steps=20)
    model, made = fit([finder, *COMBINATIONS["ternary_movement"](NOW), saver], Rated(), default_root_dir=tmp_path)
    made.test(model, Loader(count=2), ckpt_path="best", verbose=False, weights_only=True)
    assert max(levels(model.net[3].weight)) == 3
    fresh = Rated()
    load_checkpoint(fresh, saver.best_model_path)
    files = [tmp_path / "live.psc", tmp_path / "fresh.psc"]
    for file, net in zip(files, (model, fresh)):
        save(net, file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["float", "ternary_movement"])
def test_checkpoints_without_a_frozen_backbone_resume(name, tmp_path):
    class Adapted(Net):
        strict_loading = False

        def __init__(self):
            super().__init__("sgd")
            self.net[0].requires_grad_(False)

        def on_save_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: state[key] for key in state if not key.startswith("net.0.")}

    def run(ckpt=None):
        saver = ModelCheckpoint(tmp_path / str(ckpt is None), filename="{step}", save_top_k=-1)
        with pytest.warns(match="net.0.weight"):  # is frozen, and not compressed
            return run_state(*fit([*COMBINATIONS[name](RAMP), saver], Adapted(), ckpt=ckpt))

    expected = run()
    assert "net.0.weight" not in torch.load(tmp_path / "True" / "step=12.ckpt", weights_only=True)["state_dict"]
    assert differences(expected, run(tmp_path / "True" / "step=12.ckpt")) == []


# ------------------------------------------------------------------------------------------- layers and their weights


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", NORMS)
def test_a_weight_that_a_norm_makes_is_refused_by_name_and_may_be_left_out(name):
    model = Net("sgd")
    model.net[7] = NORMS[name](model.net[7])
    with pytest.raises(ValueError, match=r"net\.7\..* cannot be compressed: .*remove.*ignore="):
        fit([Q("ternary", schedule=NOW)], model)
    fit([Q("ternary", schedule=NOW, ignore="net.7.*")], model, max_epochs=1)
    assert max(levels(model.net[3].weight)) == 3 < max(levels(model.net[7].weight))
    if not name.startswith("old"):
        parametrize.remove_parametrizations(model.net[7], "weight")
        fit([Q("ternary", schedule=NOW, targets="net.7")], detach(model), max_epochs=1)
        assert max(levels(model.net[7].weight)) == 3


class Own(Net):
    """A network of the test's own."""

    def __init__(self, net):
        super().__init__("sgd")
        torch.manual_seed(0)
        self.net = net()


def test_each_output_channel_of_a_grouped_transposed_convolution_has_its_own_levels():
    """(in, out/groups, …): 4 groups of 2 inputs and 3 outputs; and depthwise, with one output a group."""

    def net():
        up, deep = nn.ConvTranspose2d(8, 12, 3, groups=4), nn.ConvTranspose2d(12, 12, 3, groups=12)
        return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), up, nn.ReLU(), deep, nn.Flatten(), nn.Linear(768, 4))

    model, _ = fit([Q("ternary", schedule=NOW)], Own(net), max_epochs=1)
    up = model.net[2].weight.detach().reshape(4, 2, 3, 9).transpose(1, 2).reshape(12, 18)
    for rows in (up, model.net[4].weight.detach().reshape(12, 9)):
        assert max(levels(rows)) <= 3
        assert len(rows.abs().amax(1).unique()) == 12


class Recurrent(nn.Module):
    """`wrap` may wrap its LSTM."""

    def __init__(self, wrap=lambda lstm: lstm):
        super().__init__()
        self.lstm, self.head = wrap(nn.LSTM(12, 16, num_layers=2, batch_first=True)), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.lstm(x.reshape(len(x), 6, 12))[0][:, -1])


def test_a_pruned_lstm_under_bfloat16(tmp_path):
    model, _ = fit([M("magnitude", threshold=0.5, schedule=NOW)], Own(Recurrent), precision="bf16-mixed")
    assert [float((weight == 0).float().mean()) for _, _, weight in slotted(model)] == [0.5] * 5
    flat = model.net.lstm._flat_weights
    assert all(held is own for held, own in zip(flat, model.net.lstm.parameters(), strict=True))
    computes_its_file(model, Own(Recurrent), tmp_path / "model.psc")


class WeightDropped(nn.Module):
    """Drops entries of the recurrent matrix: what the layer computes with is made of `weight_hh_l0_raw` in each call."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        raw = lstm._parameters.pop("weight_hh_l0")
        lstm.register_parameter("weight_hh_l0_raw", raw)
        lstm.weight_hh_l0 = raw.detach().clone()

    def forward(self, x):
        raw = self.lstm.weight_hh_l0_raw
        self.lstm.weight_hh_l0 = nn.functional.dropout(raw, 0.3, self.training).clone()
        return self.lstm(x)


def test_dropped_recurrent_weights_are_dropped_from_hard_ones(tmp_path):
    model, _ = fit([Q("ternary", schedule=NOW)], Own(lambda: Recurrent(WeightDropped)))
    assert max(levels(model.net.lstm.lstm.weight_hh_l0_raw)) == 3
    computes_its_file(model, Own(lambda: Recurrent(WeightDropped)), tmp_path / "model.psc")
    assert torch.equal(model.net.lstm.lstm.weight_hh_l0, model.net.lstm.lstm.weight_hh_l0_raw)


class Attention(nn.Module):
    """Of other sizes of keys and values: four matrices instead of one."""

    def __init__(self):
        super().__init__()
        self.values = nn.Linear(12, 16)
        self.attention, self.head = nn.MultiheadAttention(12, 2, vdim=16, batch_first=True), nn.Linear(12, 4)

    def forward(self, x):
        x = x.reshape(len(x), 6, 12)
        return self.head(self.attention(x, x, self.values(x), need_weights=False)[0].mean(1))


def test_all_matrices_of_attention_are_compressed(tmp_path):
    model, _ = fit([Q("ternary", schedule=NOW, min_size=1)], Own(Attention))
    names = {name.removeprefix("net."): max(levels(weight)) for name, _, weight in slotted(model)}
    heads = [f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
    assert names == dict.fromkeys(["values.weight", *heads, "head.weight"], 3)
    computes_its_file(model, Own(Attention), tmp_path / "model.psc")


class Experts(nn.Module):
    """Three experts whose matrices are one Parameter."""

    def __init__(self):
        super().__init__()
        self.gate, self.w1 = nn.Linear(72, 3), nn.Parameter(torch.randn(3, 72, 4) / 8)

    def forward(self, x):
        x = x.flatten(1)
        return torch.einsum("bi,eio,be->bo", x, self.w1, self.gate(x).softmax(-1))


def test_stacked_experts_are_told_of_and_compressed_by_name(tmp_path):
    with pytest.warns(match=r"not compressed: net\.w1"):
        fit([Q("ternary", schedule=NOW)], Own(Experts), max_epochs=1)
    model, _ = fit([Q("ternary", schedule=NOW, targets="*.w1")], Own(Experts), max_epochs=1)
    assert levels(model.net.w1) == [3, 3, 3]
    assert len(model.net.w1.abs().amax((1, 2)).unique()) == 3  # each expert has its own scale
    computes_its_file(model, Own(Experts), tmp_path / "model.psc")


class Language(nn.Module):
    """A table that is the output layer as well."""

    def __init__(self):
        super().__init__()
        self.table, self.middle, self.head = nn.Embedding(10, 72), nn.Linear(72, 72), nn.Linear(72, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.middle(x.flatten(1)).relu())


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"ignore": "net.head"}, ["net.middle.weight"]),
        ({"ignore": "net.table"}, ["net.middle.weight"]),
        ({"targets": "net.head"}, ["net.table.weight"]),
    ],
)
def test_a_tied_table_goes_by_either_of_its_names(options, taken):
    model, _ = fit([Q("ternary", schedule=NOW, **options)], Own(Language), max_epochs=1)
    assert [name for name, _, _ in slotted(model)] == taken
    assert model.net.head.weight is model.net.table.weight
    assert (max(levels(model.net.head.weight)) == 3) is ("net.table.weight" in taken)


# ------------------------------------------------------------------------------------------------ zeros and sizes


OPTIMIZERS = {
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_revives_no_weight(name):
    """The mask is chosen once, after three steps of full momentum; from there on the same entries are zero."""
    seen = []

    class Moved(Net):
        def configure_optimizers(self):
            return OPTIMIZERS[name](self.parameters())

        def on_train_batch_end(self, *args):
            seen.append([weight.detach() == 0 for _, _, weight in slotted(self)])

    fit([M("saliency", threshold=0.6, calibration_steps=3, scope="layer", schedule=NOW)], Moved())
    assert [int(zero.sum()) for zero in seen[-1]] == [86, 346, 307]
    assert all(torch.equal(one, last) for zeros in seen[4:] for one, last in zip(zeros, seen[-1]))


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_a_share_of_zero_prunes_nothing(method):
    (plain, _), (masked, _) = fit([], Net("sgd")), fit([M(method, threshold=0.0, schedule=NOW)], Net("sgd"))
    assert differences(dict(plain.named_parameters()), dict(masked.named_parameters())) == []


def test_more_zeros_are_fewer_bytes(tmp_path):
    """Of a dense 4,928 bytes; a pickled state dict has the same size whatever is zero."""
    dense = sum(4 * weight.numel() for _, weight in Net().named_parameters())
    sizes = [
        measure(fit([M(threshold=share, schedule=NOW), Q(schedule=NOW)], max_epochs=1)[0]).file_bytes / dense
        for share in (0.3, 0.6, 0.9)
    ]
    assert 0.3 > sizes[0] > sizes[1] + 0.05 > sizes[2] + 0.1


# --------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(8, track_running_stats=False), lambda: nn.InstanceNorm2d(8)])
def test_a_norm_of_the_batch_itself_in_onnx(norm, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from psc_lightning import export_onnx

    model = Net("sgd")
    model.net[1] = norm()
    fit([Q("binary", schedule=NOW)], model)
    export_onnx(model.eval(), tmp_path / "model.onnx", INPUTS[:8])
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: INPUTS[:8].numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model(INPUTS[:8]), atol=1e-6)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("compression.ignore=net.conv*", "net.conv*"),
        ("compression.targets=[Linear,*.conv1]", ["Linear", "*.conv1"]),
        ("compression.targets='re:.*conv[12]'", "re:.*conv[12]"),
    ],
)
def test_patterns_on_the_command_line(override, found):
    with initialize_config_dir(str(config_dir()), version_base=None):
        chosen = compose("train", ["compression=binary", override]).compression
    assert chosen[override.split("=")[0].removeprefix("compression.")] == found
