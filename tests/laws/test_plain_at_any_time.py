"""Law 6, live: whatever people do with a layer's weight in training, they do it to the plain model."""

from __future__ import annotations

import copy
import pickle
import warnings
from io import BytesIO

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from training import (
    COMBINATIONS,
    INPUTS,
    LABELS,
    QUIET,
    RUNS,
    Loader,
    Net,
    differences,
    fit,
    layers,
    run_state,
    trainer,
)

from psc_lightning import MaskLearning, StraightThroughQuantization, detach, load, load_into, measure, save
from psc_lightning.slots.live import compressed

pytestmark = QUIET

Q, M = StraightThroughQuantization, MaskLearning
RAMP = {"kind": "linear", "begin": 4, "end": 12}


def levels(weight):
    """Most distinct values in a row."""
    return max(row.unique().numel() for row in weight.detach().reshape(weight.shape[0], -1))


class Look(Callback):
    """Calls a function within each batch (after backward), after it, and in validation."""

    def __init__(self, look):
        self.look, self.calls = look, 0

    def call(self, made, model):
        self.calls += 1
        self.look(made, model)

    def on_train_batch_start(self, made, model, *args):
        self.call(made, model)

    def on_after_backward(self, made, model):
        self.call(made, model)

    def on_train_batch_end(self, made, model, *args):
        self.call(made, model)

    def on_validation_batch_end(self, made, model, *args):
        self.call(made, model)


# ----------------------------------------------------------------------------------------------- what a model is


@pytest.mark.parametrize("name", RUNS)
def test_types_names_modules_and_parameters_are_the_plain_ones(name):
    plain = Net()
    kept = {id(p) for p in plain.parameters()}
    found = {
        "types": [type(m) for m in plain.modules()],
        "names": [key for key, _ in plain.named_parameters()],
        "state": list(plain.state_dict()),
        "buffers": [key for key, _ in plain.named_buffers()],
    }

    def look(made, model):
        assert [type(m) for m in model.modules()] == found["types"]
        assert [key for key, _ in model.named_parameters()] == found["names"]
        assert list(model.state_dict()) == found["state"]
        assert [key for key, _ in model.named_buffers()] == found["buffers"]
        assert {id(p) for p in model.parameters()} == kept
        assert all(type(p) is nn.Parameter and p.requires_grad and p.is_leaf for p in model.parameters())
        hooked = name == "integers"  # inputs that are rounded are another thing
        assert hooked or not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())
        assert not any(p._backward_hooks for p in model.parameters())

    watch = Look(look)
    fit([*RUNS[name](RAMP), watch], plain)
    assert watch.calls == 24 * 3 + 4


def test_between_steps_the_state_is_the_hard_model(tmp_path):
    """Few values in every row, what a file would hold, and what a fresh plain model computes the same with."""
    seen = []

    class After(Callback):
        def on_train_batch_end(self, made, model, *args):
            assert levels(model.net[3].weight) <= 3
            plain = layers()
            plain.load_state_dict(
                {key.removeprefix("net."): value.clone() for key, value in model.state_dict().items()}
            )
            with torch.no_grad():
                assert torch.equal(plain.eval()(INPUTS), copy.deepcopy(model.net).eval()(INPUTS))
            seen.append(1)

    model, _ = fit([Q("ternary", schedule="constant"), After()])
    assert len(seen) == 24
    save(model, tmp_path / "model.psc")
    assert differences(load(tmp_path / "model.psc"), dict(model.state_dict())) == []


@pytest.mark.parametrize("name", RUNS)
def test_measuring_changes_nothing(name):
    """In a step, in the ramp, after it: the run with a call at every turn is the run without, bit for bit."""

    def look(made, model):
        before = copy.deepcopy(dict(model.state_dict())), torch.get_rng_state()
        sizes.append(measure(model).file_bytes)
        assert differences(before[0], dict(model.state_dict())) == []
        assert torch.equal(before[1], torch.get_rng_state())

    sizes, ramp = [], {"kind": "linear", "begin": 2, "end": 8}
    expected = run_state(*fit(RUNS[name](ramp), max_epochs=1))
    model, made = fit([*RUNS[name](ramp), Look(look)], max_epochs=1)
    assert differences(expected, run_state(model, made)) == []
    assert len(sizes) == 12 * 3 + 2
    assert sizes[-1] == measure(model).file_bytes < 0.6 * sizes[0]


def test_what_is_measured_is_what_is_saved(tmp_path):
    """At every moment, and in the ramp at full strength."""

    def look(made, model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = save(model, tmp_path / "model.psc")
        assert measure(model) == report
        assert report.file_bytes == (tmp_path / "model.psc").stat().st_size

    fit([*COMBINATIONS["deep"](RAMP), Look(look)])


@pytest.mark.parametrize("name", ["float", "deep", "separable_lsq", "cross_channel"])
def test_copies_and_pickles_have_their_own_latent_weights(name):
    model, _ = fit(COMBINATIONS[name]("constant"), max_epochs=1)
    model.trainer = None
    for twin in (copy.deepcopy(model.net), pickle.loads(pickle.dumps(model.net)), saved(model.net)):
        assert differences(dict(model.net.state_dict()), dict(twin.state_dict())) == []
        assert measure(twin) == measure(model.net)
        for (_, own, _), (_, other, parameter) in zip(compressed(model.net), compressed(twin)):
            assert own.latent.data_ptr() != other.latent.data_ptr()
            assert torch.equal(own.latent, other.latent)
            with torch.no_grad():
                parameter.mul_(2)
            other.show(parameter)
            assert not torch.equal(own.latent, other.latent)


def saved(module):
    buffer = BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


# ----------------------------------------------------------------- code that takes a weight for what it is (case 21)


def test_autograd_grad_at_a_weight():
    """Adaptive loss weights ask for it: the gradient at the weight that was computed with."""
    found = []

    class Asks(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            (gradient,) = torch.autograd.grad(loss, self.net[3].weight, retain_graph=True)
            plain = copy.deepcopy(self.net).train()
            expected = nn.functional.cross_entropy(plain(batch[0]), batch[1])
            assert torch.allclose(gradient, torch.autograd.grad(expected, plain[3].weight)[0], atol=1e-7)
            found.append(float(gradient.norm()))
            return loss * found[-1]

    fit([Q("binary", schedule="constant")], Asks())
    assert len(found) == 24
    assert min(found) > 0


class Renormed(nn.Linear):
    """Keeps its rows' norms below a limit, as a max-norm layer does."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.data.renorm_(2, 0, 0.5)
        self.seen = float(self.weight.detach().norm(dim=1).max())
        return super().forward(x)


def test_a_layer_that_renorms_its_weight():
    model = Net("sgd")
    model.net[7] = Renormed(128, 4)
    seen = []
    fit([Q("uniform", bits=4, schedule="constant"), Look(lambda made, m: seen.append(m.net[7]))], model)
    assert seen[-1].seen <= 0.5 + 1e-6
    (tensor,) = [tensor for name, tensor, _ in compressed(model) if name == "net.7.weight"]
    assert float(tensor.latent.norm(dim=1).max()) < 0.75  # so is what the optimizer moves, but for its last steps


def test_prototypes_that_are_normalised_before_each_batch():
    class Prototypes(Net):
        def on_train_batch_start(self, batch, batch_idx):
            with torch.no_grad():
                self.net[7].weight.copy_(nn.functional.normalize(self.net[7].weight, dim=1))

        def training_step(self, batch, batch_idx):
            norms.append(float((self.net[7].weight.norm(dim=1) - 1).abs().max().detach()))
            return super().training_step(batch, batch_idx)

    norms = []
    fit([Q("uniform", schedule="constant")], Prototypes("sgd"))
    assert max(norms) < 1e-6


def test_what_is_written_between_steps_is_not_lost():
    """A row set to zero is zero, a new weight is that weight, up to a step of the grid; nothing is a silent no-op."""

    class Writes(Net):
        def on_train_batch_start(self, batch, batch_idx):
            with torch.no_grad():
                if batch_idx == 3:
                    self.net[7].weight[0] = 0
                if batch_idx == 6:
                    self.net[3].weight.data = new.clone()

        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                assert not self.net[7].weight[0].any()
            if batch_idx == 6:
                assert torch.equal(self.net[3].weight.detach(), new)
            return super().training_step(batch, batch_idx) * 0.0

    new = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(3))
    model = Writes("sgd")
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.1)
    fit([Q("uniform", schedule="constant")], model, max_epochs=1, limit_val_batches=0)
    assert not model.net[7].weight[0].any()
    step = new.abs().flatten(1).amax(1) / 127
    assert bool(((model.net[3].weight.detach() - new).abs().flatten(1).amax(1) <= 0.51 * step).all())


@pytest.mark.parametrize("write", ["kaiming", "assign", "load", "data"])
def test_a_new_weight_replaces_the_old_one(write):
    model, _ = fit([Q("uniform", schedule="constant")], max_epochs=1)
    new = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(4))
    layer = model.net[3]
    if write == "kaiming":
        nn.init.kaiming_uniform_(layer.weight)
        new = layer.weight.detach().clone()
    elif write == "assign":
        layer.weight = nn.Parameter(new.clone())
    elif write == "load":
        new = layer.weight.detach() * 1.05
        layer.load_state_dict({"weight": new, "bias": layer.bias.detach()})
    else:
        layer.weight.data = new.clone()
    _, tensor, parameter = list(compressed(model))[1]
    tensor.absorb(parameter)
    assert torch.equal(tensor.latent, new)


def test_a_constraint_that_the_levels_cannot_hold_is_told_once_by_layer():
    """Two values, neither of them zero, for a weight of which half is set to zero before each batch."""

    class Prunes(Net):
        def on_train_batch_start(self, batch, batch_idx):
            with torch.no_grad():
                self.net[7].weight[:, ::2] = 0

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit([Q("binary", schedule="constant")], Prunes("sgd"))
    found = [str(one.message) for one in told if "most of it is undone" in str(one.message)]
    assert len(found) == 1
    assert found[0].startswith("net.7.weight was written to while it is compressed (binary)")


def test_a_gradient_hook_a_norm_and_clipping_see_the_plain_gradient():
    seen = {}

    class Uses(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[3].weight.register_hook(lambda g: seen.setdefault("hook", []).append(g.norm()) or g * 0.5)

        def on_before_optimizer_step(self, optimizer):
            if self.current_epoch == 1:
                seen.setdefault("grad", []).append(self.net[3].weight.grad.norm())
                nn.utils.clip_grad_norm_([self.net[3].weight], 1e-4)
                seen.setdefault("clipped", []).append(self.net[3].weight.grad.norm())

    fit([M("movement", schedule="constant")], Uses("sgd"))
    torch.testing.assert_close([0.5 * norm for norm in seen["hook"]], seen["grad"])
    assert max(seen["clipped"]) <= 1e-4 * 1.0001
    assert len(seen["clipped"]) == 12


def test_freezing_in_mid_training():
    """`requires_grad = False` stops a weight, `True` lets it go on, as in the plain model."""

    class Freezes(Net):
        def on_train_epoch_start(self):
            self.net[3].weight.requires_grad = self.current_epoch != 1

        def on_train_epoch_end(self):
            kept.append(self.net[3].weight.detach().clone())

    kept = []
    fit([Q("uniform", schedule="constant")], Freezes("sgd"), max_epochs=3)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_an_optimizer_within_backward():
    """A hook steps each Parameter as soon as its gradient is there; what it writes goes to the latent weight."""

    class Within(Net):
        def on_train_start(self):
            self.automatic_optimization = True
            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(step(torch.optim.SGD([parameter], 0.05)))

        def configure_optimizers(self):
            return None

    def step(optimizer):
        def hook(parameter):
            optimizer.step()
            optimizer.zero_grad()

        return hook

    model = Within()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit([Q("uniform", bits=4, schedule="constant")], model, limit_val_batches=0, max_epochs=4)
    for _, tensor, parameter in compressed(model):
        assert levels(parameter) <= 15
        assert not torch.equal(tensor.latent, parameter)
    assert nn.functional.cross_entropy(model.eval()(INPUTS), LABELS) < 1.36


# ------------------------------------------------------------------------------ code that walks the model (case 22)


def test_decay_groups_that_know_every_name():
    class Groups(Net):
        def configure_optimizers(self):
            decay = {n for n, p in self.named_parameters() if p.dim() > 1}
            rest = {n for n, p in self.named_parameters() if p.dim() <= 1}
            known = {f"{m}.{n}" for m, layer in self.named_modules() for n, _ in layer.named_parameters(recurse=False)}
            assert decay | rest == known
            assert all(n.endswith(("weight", "bias")) for n in known)
            byname = dict(self.named_parameters())
            return torch.optim.AdamW([{"params": [byname[n] for n in sorted(s)]} for s in (decay, rest)], 1e-3)

    fit(COMBINATIONS["separable_lsq"](RAMP), Groups())


@pytest.mark.parametrize("how", ["parameters", "state"])
def test_a_target_network_is_kept_by_momentum(how):
    """Only the online network is compressed; its target follows the hard weights, by zipping or by states."""

    class Twin(Net):
        def __init__(self):
            super().__init__("sgd")
            self.target = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, *args):
            with torch.no_grad():
                if how == "parameters":
                    pairs = list(zip(self.target.parameters(), self.net.parameters()))
                else:
                    own, other = self.target.state_dict(), self.net.state_dict()
                    pairs = [(own[key], other[key]) for key in own if own[key].is_floating_point()]
                for mine, theirs in pairs:
                    mine.mul_(0.5).add_(theirs, alpha=0.5)

    model = Twin()
    fit([Q("binary", schedule="constant", targets="net.*.weight")], model)
    assert [name for name, _, _ in compressed(model)] == ["net.0.weight", "net.3.weight", "net.7.weight"]
    assert levels(model.target[3].weight) > 3
    ratio = (model.target[3].weight - model.net[3].weight).norm() / model.net[3].weight.norm()
    assert 0 < float(ratio.detach()) < 0.2


def test_a_compressed_target_keeps_its_momentum():
    """A change smaller than a step of the grid is not lost: it goes to the latent weight."""

    class Target(Net):
        def __init__(self):
            super().__init__("sgd")
            self.target = copy.deepcopy(self.net)
            with torch.no_grad():
                self.target[3].weight.add_(1.0)
            self.target.requires_grad_(False)

        def on_train_batch_end(self, *args):
            with torch.no_grad():
                for mine, theirs in zip(self.target.parameters(), self.net.parameters()):
                    mine.mul_(0.98).add_(theirs, alpha=0.02)

    model = Target()
    before = float((model.target[3].weight - model.net[3].weight).detach().norm())
    fit([Q("uniform", bits=3, schedule="constant", targets="target.*.weight")], model)
    after = float((model.target[3].weight - model.net[3].weight).detach().norm())
    assert after == pytest.approx(before * 0.98**24, rel=0.15)


def test_a_layer_with_a_deepcopy_of_its_own():
    class Odd(nn.Linear):
        def __deepcopy__(self, memo):
            new = Odd(self.in_features, self.out_features)
            new.load_state_dict(self.state_dict())
            return new

    model = Net("sgd")
    model.net[7] = Odd(128, 4)
    fit([Q("ternary", schedule="constant")], model)
    twin = copy.deepcopy(model.net)
    assert torch.equal(twin[7].weight, model.net[7].weight)


def test_states_that_drop_or_rename_keys():
    class Renames(Net):
        def state_dict(self, *args, **kwargs):
            return {key.replace("net.", "body."): v for key, v in super().state_dict(*args, **kwargs).items()}

        def load_state_dict(self, state, *args, **kwargs):
            return super().load_state_dict({k.replace("body.", "net."): v for k, v in state.items()}, *args, **kwargs)

    model, _ = fit(COMBINATIONS["float"]("constant"), Renames("sgd"))
    assert all(key.startswith("body.") for key in model.state_dict())
    again = Renames("sgd")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.net[3].weight, model.net[3].weight)


def test_a_network_that_is_compiled_in_init_has_plain_names_in_its_file(tmp_path):
    class Compiled(Net):
        def __init__(self):
            super().__init__("sgd")
            self.net = torch.compile(self.net, backend="eager")

    model, _ = fit([Q("ternary", schedule="constant")], Compiled())
    report = save(model, tmp_path / "model.psc")
    state = load(tmp_path / "model.psc")
    assert list(state) == list(Net().state_dict())
    assert [row.method for row in report.tensors].count("ternary") == 3
    Net().load_state_dict(state)
    twin = Compiled()
    load_into(twin, tmp_path / "model.psc")
    assert differences(dict(twin.state_dict()), dict(model.state_dict())) == []


# --------------------------------------------------------------------------------- torch's own transforms (case 23)


@pytest.fixture(scope="module")
def live():
    model, _ = fit(COMBINATIONS["float"]("constant"), max_epochs=1)
    return model.net.eval()


def test_torch_func(live):
    from torch.func import functional_call, grad, jacrev, vmap

    state = {key: value.detach() for key, value in live.state_dict().items()}
    plain = layers().eval()
    plain.load_state_dict(state)

    def loss(params, x, y):
        return nn.functional.cross_entropy(functional_call(live, params, (x[None],)), y[None])

    def expected(params, x, y):
        return nn.functional.cross_entropy(functional_call(plain, params, (x[None],)), y[None])

    params = dict(live.named_parameters())
    each = vmap(grad(loss), in_dims=(None, 0, 0))(params, INPUTS[:4], LABELS[:4])
    other = vmap(grad(expected), in_dims=(None, 0, 0))(dict(plain.named_parameters()), INPUTS[:4], LABELS[:4])
    assert all(torch.equal(each[key], other[key]) for key in each)
    assert each["3.weight"].any()
    assert jacrev(lambda w: live[7](w))(torch.ones(128)).equal(live[7].weight)


def test_double_backward(live):
    x = INPUTS[:4].clone().requires_grad_()
    (first,) = torch.autograd.grad(live(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert live[3].weight.grad.any()
    live.zero_grad()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated")
def test_script_trace_export_fx_and_compile(live):
    with torch.no_grad():
        expected = live(INPUTS)
        for made in (
            torch.jit.script(live),
            torch.jit.trace(live, INPUTS),
            torch.export.export(live, (INPUTS,)).module(),
            torch.fx.symbolic_trace(live),
            torch.compile(live, backend="aot_eager", fullgraph=True),
        ):
            torch.testing.assert_close(made(INPUTS), expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------ checkpoints' sizes (case 24)


def size(path):
    return path.stat().st_size


class Wide(Net):
    """Weights that outweigh a checkpoint's own words."""

    def __init__(self):
        super().__init__("sgd")
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(72, 1024), nn.ReLU(), nn.Linear(1024, 4))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("name", ["float", "binary", "deep", "low_rank"])
def test_checkpoints_are_no_larger_than_what_they_hold(name, tmp_path):
    made = fit((), Wide())[1]
    made.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    model, made = fit(COMBINATIONS[name]("constant"), Wide())
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    made.save_checkpoint(tmp_path / "whole.ckpt")
    weights = sum(4 * parameter.numel() for _, _, parameter in compressed(model))
    sidecars = sum(4 * p.numel() for _, tensor, _ in compressed(model) for p in tensor.slots.parameters())
    assert size(tmp_path / "weights.ckpt") <= size(tmp_path / "plain.ckpt") + 2048
    assert size(tmp_path / "whole.ckpt") <= size(tmp_path / "plain.ckpt") + weights + 3 * sidecars + 32_000


# --------------------------------------------------------------------------------- optimizers that do it their way


class Again(Net):
    """LBFGS asks for the loss several times a step."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

    def training_step(self, batch, batch_idx):
        asked.append(levels(self.net[3].weight))
        return super().training_step(batch, batch_idx)


asked = []


def test_an_optimizer_that_asks_several_times_sees_hard_weights_each_time():
    asked.clear()
    model, _ = fit([Q("ternary", schedule="constant")], Again(), limit_val_batches=0)
    assert len(asked) > 40
    assert max(asked) <= 3
    assert levels(model.net[3].weight) <= 3


class Sharpness(torch.optim.SGD):
    """SAM: climbs, asks for the loss there, goes back and steps."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        climbed = {}
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                climbed[p] = 0.5 * p.grad
                p.add_(climbed[p])
        with torch.enable_grad():
            loss = closure()
        with torch.no_grad():
            for p, step in climbed.items():
                p.sub_(step)
        super().step()
        return loss


def test_an_optimizer_that_climbs_first():
    class Sharp(Net):
        def configure_optimizers(self):
            return Sharpness(self.parameters(), 0.02)

        def training_step(self, batch, batch_idx):
            seen.append(self.net[3].weight.detach().clone())
            return super().training_step(batch, batch_idx)

    seen = []
    model, _ = fit([Q("uniform", bits=4, schedule="constant")], Sharp(), limit_val_batches=0)
    assert len(seen) == 48
    assert all(levels(weight) <= 15 for weight in seen)
    assert not any(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2]))
    for _, tensor, parameter in compressed(model):
        assert not torch.equal(tensor.latent, parameter)


def test_a_step_that_calls_that_of_its_base_is_one_step():
    class Nested(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    class Outer(Net):
        def configure_optimizers(self):
            return Nested(self.parameters(), 1e-3)

    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-3)

    runs = [dict(fit(COMBINATIONS["ternary_movement"](RAMP), cls())[0].state_dict()) for cls in (Plain, Outer)]
    assert differences(*runs) == []


def test_an_error_within_a_step_leaves_hard_weights():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            if torch.is_grad_enabled():
                raise RuntimeError("in the middle of a step")

    class Breaks(Net):
        def configure_optimizers(self):
            return Fails(self.parameters(), 0.05)

    model = Breaks()
    with pytest.raises(RuntimeError, match="in the middle"):
        fit([Q("ternary", schedule="constant")], model)
    assert levels(model.net[3].weight) <= 3
    detach(model)
    assert levels(model.net[3].weight) <= 3


def test_other_stages_attach_nothing():
    model = Net()
    trainer([Q("binary")]).validate(model, Loader(count=1), verbose=False)
    assert not list(compressed(model))


# ------------------------------------------------------------------------------------------ loading hard weights


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("separable_lsq", "low_rank")])
def test_hard_weights_loaded_into_a_live_model_stay_what_they_are(name, tmp_path):
    """The best checkpoint, of which only the state is at hand: the same values in the file, bit for bit."""
    best = {key: value.clone() for key, value in fit(RUNS[name](RAMP), Net("sgd"))[0].state_dict().items()}
    model, _ = fit(RUNS[name](RAMP), max_epochs=1)
    model.load_state_dict(best)
    save(model, tmp_path / "model.psc")
    assert differences(load(tmp_path / "model.psc"), best) == []
    assert all(row.method != "plain" for row in measure(model).tensors if row.name.endswith(("0.weight", "3.weight")))
    for _, tensor, parameter in compressed(model):
        tensor.absorb(parameter)
        tensor.show(parameter)
    assert differences(dict(model.state_dict()), best) == []


def test_learned_steps_are_found_again(tmp_path):
    lsq = [Q("uniform", bits=4, learned_step=True, schedule="constant")]
    best = {key: value.clone() for key, value in fit(lsq, Net("sgd"))[0].state_dict().items()}
    model, _ = fit([Q("uniform", bits=4, learned_step=True, schedule="constant")], max_epochs=1)
    model.load_state_dict(best)
    save(model, tmp_path / "model.psc")
    assert differences(load(tmp_path / "model.psc"), best) == []


def test_a_file_loaded_into_a_live_model_is_saved_as_it_was(tmp_path):
    model, _ = fit(COMBINATIONS["deep"]("constant"))
    report = save(model, tmp_path / "model.psc")
    twin, _ = fit(COMBINATIONS["deep"]("constant"), Net("sgd"), max_epochs=1)
    load_into(twin, tmp_path / "model.psc")
    assert save(twin, tmp_path / "again.psc").file_bytes <= 1.02 * report.file_bytes
    assert differences(load(tmp_path / "again.psc"), load(tmp_path / "model.psc")) == []
