"""`torch.compile` around a live model: the same numbers, and one compilation, whatever the slots do."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from training import INPUTS, LABELS, QUIET, RUNS, Loader, Net, differences, fit, latents, sidecars, trainer

from psc_lightning import load, load_into, save
from psc_lightning.slots.live import compressed
from psc_lightning.slots.slots import SLOTS

# Dynamo itself makes an instance of each autograd.Function that it traces.
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")]


COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")


def attached(name: str) -> Net:
    model = Net()
    for callback in RUNS[name]("constant"):
        callback.attach(model)
    return model


def strengthen(model: nn.Module, value: float) -> None:
    for _, tensor, weight in compressed(model):
        for slot in SLOTS:
            tensor.set_strength(slot, value, weight)
        tensor.show(weight)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("float", "eager"),
        *((name, "aot_eager") for name in ("float", "binary01", "ternary_movement", "deep", "row", "integers")),
        pytest.param("separable_lsq", "inductor", marks=COMPILER),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")  # inductor's own; from torch 2.14 on a FutureWarning
def test_a_compiled_model_gives_the_same_outputs_and_gradients(name, backend):
    """In one graph: nothing of ours breaks it."""
    torch.compiler.reset()
    model = attached(name)
    strengthen(model, 1.0)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for net, call in ((model, model), (twin, compiled)):
        nn.functional.cross_entropy(call(INPUTS[:8]), LABELS[:8]).backward()
        net.eval()
    with torch.no_grad():
        if backend == "inductor":  # has kernels of its own
            torch.testing.assert_close(compiled(INPUTS), model(INPUTS), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(model(INPUTS), compiled(INPUTS))
    gradients = [{key: p.grad for key, p in net.named_parameters()} for net in (model, twin)]
    for key, gradient in gradients[0].items():
        other = gradients[1][key]
        assert (gradient is None) == (other is None), key
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["float", "separable_lsq"])
def test_an_annealed_strength_is_compiled_once(name):
    """Before the ramp, at fifty strengths, at the end: one graph, for a weight is a Parameter whatever is in it."""
    torch.compiler.reset()
    model = attached(name)
    graphs = []

    def count(module, example):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(model, backend=count, fullgraph=True)
    outputs = []
    for step in range(51):
        strengthen(model, step / 50)
        outputs.append(compiled(INPUTS[:8]).detach())
        model.zero_grad()
    assert len(graphs) == 1
    assert not torch.equal(outputs[0], outputs[-1])
    with torch.no_grad():
        model.eval()
        expected = model(INPUTS[:8])
        assert torch.equal(compiled(INPUTS[:8]), expected)


@pytest.mark.parametrize(
    ("name", "most"), [*((name, 1) for name in ("float", "separable_lsq", "deep", "cross_channel")), ("integers", 3)]
)
def test_a_run_compiles_once(name, most):
    """Off, ramp, hard: one graph; inputs' rounding adds its own phases; and what is trained is what an eager run trains."""
    torch.compiler.reset()
    graphs = []

    class Compiled(Net):
        def on_fit_start(self):
            self.__dict__["fast"] = torch.compile(
                self.net, backend=lambda graph, _: graphs.append(graph) or graph.forward
            )

        def forward(self, inputs):
            return self.fast(inputs)

    ramp = {"kind": "linear", "begin": 2, "end": 14}
    model, _ = fit(RUNS[name](ramp), Compiled("sgd"), max_steps=20, limit_val_batches=0)
    assert 1 <= len(graphs) <= most
    eager, _ = fit(RUNS[name](ramp), Net("sgd"), max_steps=20, limit_val_batches=0)
    assert differences(dict(eager.state_dict()), dict(model.state_dict())) == []
    assert differences(latents(eager), latents(model)) == []
    assert differences(sidecars(eager), sidecars(model)) == []


def test_a_compiled_module_is_what_a_trainer_takes_it_for(tmp_path):
    """Lightning trains `torch.compile(module)` by the module's own hooks; its checkpoint is plain."""
    torch.compiler.reset()

    class Silent(Net):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])  # dynamo does not get through `self.log`

    ramp = {"kind": "linear", "begin": 2, "end": 14}
    model = Silent("sgd")
    seed_everything(0, verbose=False)
    made = trainer(RUNS["ternary_movement"](ramp), limit_val_batches=0)
    made.fit(torch.compile(model, backend="eager"), Loader(), Loader(count=1))
    eager, _ = fit(RUNS["ternary_movement"](ramp), Net("sgd"), limit_val_batches=0)
    assert differences(dict(eager.state_dict()), dict(model.state_dict())) == []
    assert differences(latents(eager), latents(model)) == []
    assert differences(sidecars(eager), sidecars(model)) == []
    made.save_checkpoint(tmp_path / "model.ckpt")
    Net().load_state_dict(torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"])


def test_a_compiled_model_is_saved_under_its_plain_names(tmp_path):
    model = attached("float")
    strengthen(model, 1.0)
    save(torch.compile(model, backend="eager"), tmp_path / "model.psc")
    plain = Net()
    plain.load_state_dict(load(tmp_path / "model.psc"))
    load_into(torch.compile(Net(), backend="eager"), tmp_path / "model.psc")
    assert torch.equal(plain.eval()(INPUTS), model.eval()(INPUTS))
