"""Other people's networks under mask, levels, tying and clipping in one fit; what is found is the README's table.

pytest tests/zoo               # needs pip install -e ".[test,zoo]"
pytest tests/zoo --write-zoo   # and writes the tables, recipes/results/zoo.md and the README's
"""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from nets import difference, session
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.data import DataLoader
from training import QUIET, differences, latents, run_state, slotted, trainer
from zoo_models import MODELS, Entry

from psc_lightning import (
    GradientClipping,
    MaskLearning,
    StraightThroughQuantization,
    WeightSharing,
    compress,
    detach,
    export_onnx,
    load,
    load_into,
    measure,
    plan,
    save,
    verify,
)
from psc_lightning.artifact import to_bytes

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft of transformers
]

ROOT = Path(__file__).resolve().parents[2]
CHECKS = ("keys", "step", "file", "load", "copy", "resume", "onnx")


class Task(LightningModule):
    """Trains what is trainable of a network of the zoo."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry = entry
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = entry.build()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        seed_everything(self.global_step, verbose=False)  # a resumed run drops out the same entries
        return self.entry.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.entry.output(self.net.eval(), self.entry.batch)


def callbacks(entry: Entry) -> list[Callback]:
    """One of each slot, and clipping; cross-channel sharing takes what has an even number of inputs."""
    ignore = entry.ignore[0] if entry.ignore else None
    which = {"targets": entry.targets, "ignore": ignore, "schedule": "constant"}
    return [
        GradientClipping(adaptive=0.1, log=False),
        StraightThroughQuantization("uniform", bits=4, **which),
        WeightSharing("cross_channel", labels="magnitude", **which),
        MaskLearning("movement", threshold=0.5, **which),
    ]


def run(entry: Entry, folder: Path, resume: Path | None = None) -> tuple[Task, Trainer]:
    """Two epochs of two steps, a checkpoint after each."""
    seed_everything(0, verbose=False)
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    model, made = Task(entry), trainer([*callbacks(entry), saver], max_epochs=2)
    made.fit(
        model,
        DataLoader([entry.batch] * 2, batch_size=None),
        ckpt_path=resume,
        **({"weights_only": True} if resume else {}),
    )
    return model, made


def sides(model: nn.Module) -> list[list[str]]:
    """The names of each Parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@dataclass
class Whole:
    """A network after its run, and its row of the table."""

    name: str
    entry: Entry
    model: Task
    made: Trainer
    folder: Path
    row: dict[str, str] = field(default_factory=dict)


ROWS: dict[str, dict[str, str]] = {}


@pytest.fixture
def whole_lora(tmp_path: Path) -> Task:
    return run(MODELS["LoRA on GPT-2"], tmp_path)[0]


@pytest.fixture(scope="module", params=MODELS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    entry, folder = MODELS[request.param], tmp_path_factory.mktemp("zoo")
    model, made = run(entry, folder)
    return Whole(request.param, entry, model, made, folder, ROWS.setdefault(request.param, {"from": entry.home}))


def test_keys(whole: Whole) -> None:
    """Names and order are those of the plain class, of states, of parameters, of checkpoints; so are its modules."""
    plain = Task(whole.entry)
    ours = list(whole.model.state_dict())
    assert ours == list(plain.state_dict())
    assert [name for name, _ in whole.model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    pairs = zip(whole.model.named_modules(), plain.named_modules(), strict=True)
    for (name, module), (other, fresh) in pairs:
        assert name == other
        assert type(module) is type(fresh) or is_parametrized(fresh)  # of which each has a class of its own
    assert str(whole.model) == str(plain)
    checkpoint = torch.load(whole.folder / "epoch=1.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ours
    whole.row["keys"] = "yes"


def test_step(whole: Whole) -> None:
    """Every slot is in force; trained weights and scores were stepped, frozen weights were not."""
    start = dict(Task(whole.entry).named_parameters())
    state = whole.made.optimizers[0].state
    rows = {row.name: row for row in to_bytes(whole.model)[1].tensors}
    seen, dense = list(slotted(whole.model)), latents(whole.model)
    for name, slots, weight in seen:
        assert all(slots.phase[i] == 2 for i, slot in enumerate(("tying", "mask", "levels")) if slot in slots.specs)
        assert {"mask", "levels"} <= set(slots.specs), name
        assert all(bool(scores.any()) for scores in slots.sidecars("mask")), name
        assert rows[name].levels <= 15
        assert rows[name].sparsity >= 0.5
        if weight.requires_grad:
            assert int(state[weight]["step"]) == 4, name
            assert bool(weight.grad.any()), name
        else:
            assert weight.grad is None
            assert slots.tying is not None or torch.equal(dense[name], start[name])
    frozen = [p for p in whole.model.parameters() if not p.requires_grad]
    whole.row["compressed"] = f"{len(seen)} of {sum(p.dim() > 1 for p in start.values())}"
    whole.row["tied"] = str(sum(slots.tying is not None for _, slots, _ in seen))
    whole.row["frozen"] = str(len(frozen))
    whole.row["step"] = "yes"


def test_file(whole: Whole, tmp_path: Path, same_bits: Any) -> None:
    """What is read has the bits of the hard weights; tensors that are one in the model are stored once."""
    report = save(whole.model, tmp_path / "model.psc")
    verify(tmp_path / "model.psc")
    read, expected = load(tmp_path / "model.psc"), whole.model.state_dict()
    assert list(read) == list(expected)
    assert all(same_bits(read[key], expected[key]) for key in expected)
    again = sum(len(names) - 1 for names in sides(Task(whole.entry)))
    shared = [row for row in report.tensors if row.method == "shared"]
    assert len(shared) == again
    assert sum(row.dense_bytes for row in shared) == 0
    whole.row["shared"] = str(again)
    whole.row["file"] = "yes"


def test_shared(whole: Whole) -> None:
    """What is one tensor in the plain model still is: one Parameter, one hard weight on every side."""
    plain = sides(Task(whole.entry))
    assert sides(whole.model) == plain
    state = whole.model.state_dict()
    for names in plain:
        assert all(torch.equal(attrgetter(name)(whole.model), state[names[0]]) for name in names)


def test_load(whole: Whole, tmp_path: Path) -> None:
    """A file, and a checkpoint, load strictly in the plain class, which then computes the same."""
    save(whole.model, tmp_path / "model.psc")
    states = load(tmp_path / "model.psc"), torch.load(whole.folder / "epoch=1.ckpt", weights_only=True)["state_dict"]
    for state in states:
        plain = Task(whole.entry)
        plain.load_state_dict(state)
        assert torch.equal(plain.logits(), whole.model.logits())
    whole.row["load"] = "yes"


def test_copy(whole: Whole) -> None:
    """A copy computes the same, and baking it leaves the original as it was."""
    before, state = whole.model.logits(), deepcopy(whole.model.state_dict())
    copy = deepcopy(whole.model)
    assert torch.equal(copy.logits(), before)
    detach(copy)
    assert str(copy) == str(Task(whole.entry))  # every layer has its own class back
    assert torch.equal(copy.logits(), before)
    assert torch.equal(whole.model.logits(), before)
    assert differences(dict(whole.model.state_dict()), dict(state)) == []
    assert not list(slotted(copy))
    whole.row["copy"] = "yes"


def test_resume(whole: Whole, tmp_path: Path) -> None:
    """A run that goes on from its first epoch ends with the bits of the whole run."""
    resumed = run(whole.entry, tmp_path, resume=whole.folder / "epoch=0.ckpt")
    assert differences(run_state(whole.model, whole.made), run_state(*resumed)) == []
    assert to_bytes(resumed[0])[0] == to_bytes(whole.model)[0]
    whole.row["resume"] = "yes"


class Bare(nn.Module):
    """A network as a function of its batch's tensors."""

    def __init__(self, entry: Entry, net: nn.Module) -> None:
        super().__init__()
        self.entry, self.net = entry, net

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.entry.output(self.net, dict(zip(self.entry.batch, inputs)))


def test_onnx(whole: Whole, tmp_path: Path) -> None:
    """Onnxruntime computes what the network does, in its default options, for a batch of any length."""
    model, inputs = Bare(whole.entry, deepcopy(whole.model.net)).eval(), tuple(whole.entry.batch.values())
    export_onnx(model, tmp_path / "model.onnx", inputs, dynamic_batch=True)
    made = session(tmp_path / "model.onnx")
    for number in (2, 3):
        batch = tuple(torch.cat((x, x.flip(0)))[:number] for x in inputs)
        feed = {one.name: x.numpy() for one, x in zip(made.get_inputs(), batch, strict=True)}
        with torch.no_grad():
            assert difference(torch.from_numpy(made.run(None, feed)[0]), model(*batch)) <= 1e-5
    whole.row["onnx"] = "yes"


def test_pretrained(whole: Whole, tmp_path: Path) -> None:
    """What `save_pretrained` writes of a baked model is read by plain transformers and peft."""
    if whole.entry.home not in ("transformers", "peft"):
        pytest.skip("save_pretrained belongs to transformers and peft")
    baked, read = detach(deepcopy(whole.model)), Task(whole.entry)
    baked.net.save_pretrained(tmp_path)
    if whole.entry.home == "peft":  # only adapters are in its file
        read.net = PeftModel.from_pretrained(baked.net.unload(), tmp_path)
    else:
        read.net = type(baked.net).from_pretrained(tmp_path)
    assert torch.equal(read.logits(), whole.model.logits())


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.ignore])
def test_what_cannot_be_compressed_is_refused_by_name(name: str) -> None:
    """Before training; `ignore` leaves it out, and the plan says so."""
    entry = MODELS[name]
    assert entry.ignore is not None
    pattern, reason = entry.ignore
    with pytest.raises(ValueError, match=r"cannot be compressed: .*weight_norm.*or leave it out: ignore="):
        plan(entry.build(), callbacks(replace(entry, ignore=None)))
    found = plan(entry.build(), callbacks(entry))
    assert [why for tensor, why in found.left.items() if "parametrizations" in tensor] == ["ignored"] * 2
    ROWS.setdefault(name, {})["refused"] = f"{reason}: `{pattern}`"


def test_adapters_are_merged_after_detaching(whole_lora: Task) -> None:
    """Merging writes into `weight.data`, and what is merged is on no grid: the slots are let go before."""
    expected = whole_lora.logits()
    whole_lora.net = detach(whole_lora).net.merge_and_unload()
    torch.testing.assert_close(whole_lora.logits(), expected, rtol=1e-4, atol=1e-5)


def test_adapters_alone_are_a_file(whole_lora: Task, tmp_path: Path) -> None:
    """In training, under levels and a mask; what they are put into keeps its own base."""
    report = save(whole_lora.net, tmp_path / "adapter.psc", only="*.lora_?")
    adapter = {name: tensor for name, tensor in whole_lora.net.state_dict().items() if ".lora_" in name}
    assert [row.name for row in report.tensors] == list(adapter)
    assert all("uniform" in row.method for row in report.tensors)
    other = whole_lora.entry.build()
    base = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    left = load_into(other, tmp_path / "adapter.psc")
    assert left == [name for name in base if name not in adapter]
    assert all(torch.equal(tensor, {**base, **adapter}[name]) for name, tensor in other.state_dict().items())


def test_what_is_saved_of_a_live_model_is_what_is_saved_of_it_detached(whole: Whole, tmp_path: Path) -> None:
    """`save_pretrained` in the midst of training: the hard weights, in plain files."""
    if whole.entry.home != "transformers":
        pytest.skip("save_pretrained of whole models belongs to transformers")
    whole.model.net.save_pretrained(tmp_path)
    read = Task(whole.entry)
    read.net = type(whole.model.net).from_pretrained(tmp_path)
    assert torch.equal(read.logits(), whole.model.logits())
    assert set(load_file(tmp_path / "model.safetensors")) <= set(whole.entry.build().state_dict())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * measure(whole.model.net).dense_bytes
    # And its few values are seen again, if not what ties them.
    assert measure(read.net).file_bytes < 2 * measure(whole.model.net).file_bytes


def test_conv1d_is_seen_with_its_outputs_first() -> None:
    """A dropped output channel of a Conv1D is a column of the weight that it stores."""
    net = MODELS["GPT-2"].build()
    compress(net, [MaskLearning("magnitude", threshold=0.5, granularity="channel", targets="*.c_fc")])
    weight = net.transformer.h[0].mlp.c_fc.weight  # 24 inputs, 96 outputs
    dropped = (weight == 0).all(0)
    assert int(dropped.sum()) == 48
    assert bool((weight[:, ~dropped] != 0).all())


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
@pytest.mark.filterwarnings("ignore:.*mean_resizing")
def test_token_embeddings_are_resized_while_compressed(name: str, tmp_path: Path) -> None:
    """The longer table is compressed, its old rows are as they were, and a tied head has it too."""
    net = MODELS[name].build().eval()
    compress(net, "ternary")
    before = net.get_input_embeddings().weight.detach().clone()
    net.resize_token_embeddings(len(before) + 8)
    save(net, tmp_path / "model.psc")
    detach(net)
    state, found = net.state_dict(), load(tmp_path / "model.psc")
    assert all(torch.equal(found[key], value) for key, value in state.items())
    weight = net.get_input_embeddings().weight
    assert torch.equal(weight[: len(before)], before)
    assert all(row.unique().numel() <= 3 for row in weight)


def rows(*columns: str) -> str:
    """What the tests above have found, a row for each network."""
    head = f"| network | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|\n"
    return head + "".join(f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |\n" for name, row in ROWS.items())


def test_the_tables_are_what_was_found(request: pytest.FixtureRequest) -> None:
    """The whole table in its file, and fewer columns of it in the README."""
    if any(check not in row for row in ROWS.values() for check in CHECKS) or list(ROWS) != list(MODELS):
        pytest.skip("a part of the zoo was run, or some test failed: no table")
    tables = {
        ROOT / "recipes/results/zoo.md": rows("from", "compressed", "tied", "frozen", "shared", *CHECKS, "refused"),
        ROOT / "README.md": rows("from", "compressed", "tied", "shared", "refused"),
    }
    for path, table in tables.items():
        if request.config.getoption("--write-zoo", False):
            path.write_text(re.sub(r"\| network \|.*\n(\|.*\n)+", lambda _, found=table: found, path.read_text()))
        assert table in path.read_text(), f"{path.name}: what works has changed: pytest tests/zoo --write-zoo"
