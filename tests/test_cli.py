from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from inspect import getsource
from pathlib import Path

import onnxruntime
import pytest
import torch
import training
from lightning import LightningModule, Trainer
from models import bag, compressed, net
from safetensors.torch import load_file, save_file
from torch import nn

from psc_lightning.artifact import container, inspect, load_into, save
from psc_lightning.cli import main


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(small(), tmp_path / "model.psc")
    return tmp_path / "model.psc"


def test_inspect(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert "12 others" in out
    assert f"{file.stat().st_size:,}" in out
    assert main(["inspect", "--all", str(file)]) == 0
    assert "0.weight" in capsys.readouterr().out


def test_inspect_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file_bytes"] == file.stat().st_size
    assert found["tensors"][0]["shape"] == [4, 6]


def test_a_runs_folder_stands_for_its_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        assert main([command, str(file)]) == 0
        told = capsys.readouterr()
        assert main([command, str(file.parent)]) == 0
        assert capsys.readouterr() == told
    assert main(["diff", str(file.parent), str(file)]) == 0
    assert main(["inspect", str(file.parent.parent)]) == 1
    assert "model.psc: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["inspect", "--all"], ["--help"]])
def test_a_closed_pipe_is_no_traceback(file: Path, arguments: list[str]) -> None:
    """As `psc … | head` where head has gone."""
    command = [
        sys.executable,
        "-m",
        "psc_lightning.cli",
        *arguments,
        *([str(file)] if arguments[0] == "inspect" else []),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode in (141, 0)  # argparse itself passes over a help that nobody reads


def test_verify_is_silent(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(file)]) == 0
    assert capsys.readouterr() == ("", "")


def test_inspect_prints_what_verify_takes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(file)])
    digest = capsys.readouterr().out.splitlines()[-1].removeprefix("sha256 ")
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert main(["verify", str(file), "--sha256", digest.upper()]) == 0
    save(nn.Linear(2, 1), file)  # another good file
    assert main(["verify", str(file), "--sha256", digest]) == 1
    assert f"expected SHA-256 {digest}, found " in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(file), "--sha256", digest[1:]])
    assert caught.value.code == 2


def test_verify_of_a_file_without_names_says_what_it_could_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.psc"
    save(net(), file, names=False)
    torch.save(net().state_dict(), tmp_path / "own.pt")
    torch.save(net(seed=1).state_dict(), tmp_path / "other.pt")
    assert main(["verify", str(file)]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"psc verify: {file}: checksum and sections are good; names and shapes are not in this file")
    assert "--model" in err
    assert main(["verify", str(file), "--model", "models:net"]) == 0
    assert main(["verify", str(file), "--model", "models:net", "--against", str(tmp_path / "own.pt")]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["verify", str(file), "--model", "models:net", "--against", str(tmp_path / "other.pt")]) == 1
    assert main(["verify", str(file), "--model", "test_cli:small"]) == 1
    assert "build the model that was saved" in capsys.readouterr().err
    for arguments in (["verify", "--against", str(tmp_path / "own.pt")], ["inspect"]):
        assert main([*arguments, str(file)]) == 2  # nothing is wrong with the file
        assert "saved without (names=False)" in capsys.readouterr().err
    sections = container.unpack(file.read_bytes(), frozenset({3, 4}))
    file.write_bytes(container.pack({4: sections[4]}))  # the checksum is right, the symbols are missing
    assert main(["verify", str(file)]) == 1
    data = bytearray(container.pack(sections))
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["verify", str(file)]) == 1
    assert "checksum" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- verify --against, diff


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_verify_against_a_checkpoint_of_any_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = compressed(mask="magnitude", levels="ternary")
    save(model, tmp_path / "model.psc")
    state = dict(model.state_dict())
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": prefixed("model.net.", state), "epoch": 3}, tmp_path / "lightning.ckpt")
    save_file(state, tmp_path / "dense.safetensors")
    for name in ("plain.pt", "lightning.ckpt", "dense.safetensors"):
        assert main(["verify", str(tmp_path / "model.psc"), "--against", str(tmp_path / name)]) == 0, name
    save(bag(prefixed("net.", state)), tmp_path / "wrapped.psc")
    assert main(["verify", str(tmp_path / "wrapped.psc"), "--against", str(tmp_path / "plain.pt")]) == 0
    assert capsys.readouterr() == ("", "")


def test_verify_against_another_checkpoint_names_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(net(), tmp_path / "model.psc")
    state = dict(net().state_dict())
    state["0.weight"][1, 2, 0, 0] += 0.25
    state["0.bias"] = state["0.bias"][:4]
    del state["3.bias"]
    torch.save(state, tmp_path / "other.pt")
    assert main(["verify", str(tmp_path / "model.psc"), "--against", str(tmp_path / "other.pt")]) == 1
    err = capsys.readouterr().err
    assert f"differs from {tmp_path / 'other.pt'} in 3 of 9 tensors: 0.weight in 1 entries, by up to 0.25" in err
    assert "0.bias is float32 [8] in the file, float32 [4] in the checkpoint; 3.bias is only in the file" in err
    assert err.count("\n") == 1
    zero = net()
    zero[0].bias.data.zero_()
    save(zero, tmp_path / "model.psc")
    torch.save({**zero.state_dict(), "0.bias": -torch.zeros(8)}, tmp_path / "other.pt")
    assert (
        main(["verify", str(tmp_path / "model.psc"), "--against", str(tmp_path / "other.pt")]) == 1
    )  # bits, not numbers


def test_verify_against_what_is_no_checkpoint(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "nowhere.pt": "no such file",
        "x.safetensors": "damaged",
        "object.pt": "weights_only=True",
        "list.pt": "list",
    }
    torch.save(small(), file.parent / "object.pt")  # pickled
    torch.save([1], file.parent / "list.pt")
    (file.parent / "x.safetensors").write_bytes(b"nothing")
    for name, said in bad.items():
        assert main(["verify", str(file), "--against", str(file.parent / name)]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert name in err


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(tmp_path / "a.psc"), str(tmp_path / "b.psc")
    model = compressed(mask="magnitude", levels="ternary")
    save(model, a)
    save(bag(dict(model.state_dict())), b)  # the same weights, in another file
    assert main(["diff", a, b]) == 0
    equal = capsys.readouterr().out
    assert "9 equal" in equal
    assert f"{Path(a).stat().st_size:,}" in equal
    assert f"{Path(b).stat().st_size:,}" in equal
    state = dict(model.state_dict())
    state["3.weight"] = state["3.weight"] + 0.5
    state["0.bias"] = torch.zeros(3)
    del state["3.bias"]
    save(bag(state), b)
    assert main(["diff", a, b]) == 1
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["3.weight"][1:5] == ["8x32", "float32", "100.0", "0.5"]
    assert lines["0.bias"][1:5] == ["8", "float32", "3", "float32"]
    assert lines["3.bias"][1:4] == ["8", "float32", "missing"]
    assert "0.weight" not in lines
    assert main(["diff", a, b, "--all"]) == 1
    assert "0.weight" in capsys.readouterr().out


def test_diff_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(tmp_path / "a.psc"), str(tmp_path / "b.psc")
    save(bag({"w": torch.tensor([1.0, 2.0]), "x": torch.tensor(1)}), a)
    save(bag({"w": torch.tensor([1.0, 2.5])}), b)
    assert main(["diff", a, b, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert found["file_bytes"] == [Path(a).stat().st_size, Path(b).stat().st_size]
    weight, missing = found["tensors"]
    assert (weight["differing"], weight["max_abs_difference"]) == (1, 0.5)
    assert weight["stored_bytes"] == [inspect(a).tensors[0].stored_bytes, inspect(b).tensors[0].stored_bytes]
    assert (missing["name"], missing["shapes"], missing["stored_bytes"][1]) == ("x", [[], None], None)
    assert main(["diff", a, a, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True


def test_diff_of_a_bad_file_names_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = file.parent / "bad.psc"
    bad.write_bytes(b"no")
    for pair in ((file, bad), (bad, file)):
        assert main(["diff", *map(str, pair)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"psc diff: {bad}: expected a .psc file")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_bad_file_is_one_line_and_status_1(command: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    for path in (file, file.parent / "nowhere.psc", file.parent):
        assert main([command, str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        named = file if path.is_dir() else path  # a run's folder stands for its model.psc
        assert err.startswith(f"psc {command}: {named}: ")
        assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["destroy", "x"], ["inspect", "x", "--yaml"], ["diff", "x"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: psc" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "export", "pack"])
def test_help_of_each_command_has_its_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    examples = capsys.readouterr().out.partition("examples:")[2].partition("exit status: 0 good")[0]
    lines = examples.strip().splitlines()
    assert lines
    assert all(line.strip().startswith(f"psc {command} ") for line in lines)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "psc inspect model.psc --json" in out
    assert "exit status: 0 good, 1 the file is bad, 2 wrong usage" in out
    assert "diff: 0 equal tensors, 1 different ones or a bad file" in out


def test_as_a_process(file: Path) -> None:
    file.write_bytes(b"no")
    command = [sys.executable, "-m", "psc_lightning.cli", "verify", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "expected a .psc file" in found.stderr


# ------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("names", [True, False])
def test_export_writes_onnx_and_safetensors(tmp_path: Path, names: bool) -> None:
    file, onnx, dense = (tmp_path / name for name in ("m.psc", "m.onnx", "m.safetensors"))
    save(compressed(levels="ternary"), file, names=names)
    arguments = ["export", str(file), "--onnx", str(onnx), "--safetensors", str(dense)]
    assert main([*arguments, "--model", "models:net", "--example", "2,4,4,4"]) == 0
    model = net(seed=1)
    load_into(model, file)
    weights, found = model.state_dict(), load_file(dense)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), model.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to write"),
        (["--onnx", "m.onnx"], "needs --example"),
        (["--onnx", "m.onnx", "--example", "1,3,8,8"], "holds no graph"),
        (["--safetensors", "m.safetensors", "--onnx", "m.onnx"], "needs --example"),
        (["--onnx", "m.onnx", "--example", "1,3,8,8", "--model", "no.such:thing"], "no.such:thing"),
        (["--onnx", "m.onnx", "--example", "1,5", "--model", "test_cli:small"], "does not take such an input"),
    ],
)
def test_export_says_what_is_missing(
    arguments: list[str], said: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(file.parent)
        assert main(["export", str(file), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(file.parent.iterdir()) == [file]  # nothing is written before all is known


def test_export_of_nothing_is_what_inspect_says_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert main(["export", nowhere, "--onnx", "m.onnx", "--example", "1,3,8,8"]) == 1
    assert capsys.readouterr().err == f"psc export: {nowhere}: No such file or directory\n"


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))


def test_export_takes_whole_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(words(), tmp_path / "m.psc")
    (tmp_path / "own_words.py").write_text("from torch import nn\n\n\n" + getsource(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        arguments = ["export", "m.psc", "--onnx", "m.onnx", "--model", "own_words:words", "--example"]
        assert main([*arguments, "1,3:int64"]) == 0
    made = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert made.get_inputs()[0].type == "tensor(int64)"
    for wrong in ("1,x", "1,3:word", "", "1,-3"):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, wrong])
        assert caught.value.code == 2
        assert "expected whole numbers as in 1,3,32,32" in capsys.readouterr().err


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.linear = nn.Embedding(20, 8), nn.Linear(5, 8)

    def forward(self, words: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.words(words).mean(1) + self.linear(x)


def test_export_takes_several_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Sum(), tmp_path / "m.psc")
    (tmp_path / "own_sum.py").write_text("import torch\nfrom torch import nn\n\n\n" + getsource(Sum))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        arguments = ["export", "m.psc", "--onnx", "m.onnx", "--model", "own_sum:Sum", "--example", "2,3:int64"]
        assert main(arguments) == 2  # one is missing
        assert "--example: the model does not take such an input" in capsys.readouterr().err
        assert main([*arguments, "--example", "2,5"]) == 0
    made = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [(one.type, one.shape) for one in made.get_inputs()] == [
        ("tensor(int64)", [2, 3]),
        ("tensor(float)", [2, 5]),
    ]


class Asks(nn.Linear):
    """What it does depends on numbers, which no graph can know."""

    def __init__(self) -> None:
        super().__init__(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x if float(x.sum()) > 0 else x)


@pytest.mark.filterwarnings("ignore")  # torch warns of much on its way to the error
def test_export_says_what_torch_cannot_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(Asks(), tmp_path / "m.psc")
    arguments = ["--onnx", str(tmp_path / "m.onnx"), "--model", "test_cli:Asks", "--example", "1,6"]
    assert main(["export", str(tmp_path / "m.psc"), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("psc export: model: torch cannot export this model's code: ")
    assert "data-dependent" in said
    assert not (tmp_path / "m.onnx").exists()


class Fixed(nn.Linear):
    """Takes the batch's length as a number, which tracing makes a constant."""

    def __init__(self) -> None:
        super().__init__(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).expand(len(x), 4)


def test_export_leaves_the_batch_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "m.onnx", str(tmp_path / "m.psc")
    save(small(), file)
    arguments = ["export", file, "--onnx", str(out), "--dynamic-batch", "--example", "1,6", "--model"]
    assert main([*arguments, "test_cli:small"]) == 0
    assert onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"]).get_inputs()[0].shape == ["batch", 6]
    out.unlink()
    save(Fixed(), file)
    assert main([*arguments, "test_cli:Fixed"]) == 2
    assert "psc export: dynamic_batch: the model's code fixes" in capsys.readouterr().err
    assert not out.exists()


# -------------------------------------------------------------------------------------------- sources, lengths, names


class Tagger(nn.Module):
    """A label for each word, of sentences of any length up to twelve."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places, self.labels = nn.Embedding(20, 8), nn.Embedding(12, 8), nn.Linear(8, 4)

    def forward(self, words: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.labels((self.words(words) + self.places.weight[: words.shape[1]]) * weights.unsqueeze(-1))


class Module(LightningModule):
    """As a user's own is: the model under a name, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tagger()


def checkpointed(folder: Path) -> Path:
    """A checkpoint of Lightning's."""
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(Module())
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=True)
    return folder / "last.ckpt"


def saved(folder: Path) -> Path:
    """A file of ours."""
    save(Tagger(), folder / "tagger.psc")
    return folder / "tagger.psc"


def as_run(folder: Path) -> Path:
    """A folder with a model.psc."""
    save(Tagger(), folder / "model.psc")
    return folder


def as_state_dict(folder: Path) -> Path:
    """A plain state dict, in the form that others read, too."""
    save_file(Tagger().state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("make", [checkpointed, as_run])
def test_export_of_any_source_with_open_lengths_and_names(make: Callable[[Path], Path], tmp_path: Path) -> None:
    source, out, dense = make(tmp_path), tmp_path / "m.onnx", tmp_path / "m.safetensors"
    arguments = ["export", str(source), "--onnx", str(out), "--safetensors", str(dense), "--model", "test_cli:Tagger"]
    arguments += ["--example", "1,5:int64", "--example", "1,5", "--dynamic-batch", "--dynamic", "1=length"]
    assert main([*arguments, "--input-names", "ids,share", "--output-names", "label"]) == 0
    made, model = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"]), Tagger()
    assert [(one.name, one.shape) for one in made.get_inputs()] == [
        ("ids", ["batch", "length"]),
        ("share", ["batch", "length"]),
    ]
    assert [(one.name, one.shape) for one in made.get_outputs()] == [("label", ["batch", "length", 4])]
    for batch, length in ((1, 5), (3, 12), (2, 1)):
        words, weights = torch.arange(batch * length).reshape(batch, length) % 20, torch.rand(batch, length)
        (found,) = made.run(None, {"ids": words.numpy(), "share": weights.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(words, weights), rtol=1e-5, atol=1e-6)
    state = {name.removeprefix("net."): tensor for name, tensor in load_file(dense).items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dynamic", "nobody:1=length"], "dynamic_shapes: 'nobody' is none of the inputs, which are words, weights"),
        (["--dynamic", "2=length"], "dynamic_shapes: words has 2 axes in the example, found axis 2"),
        (["--input-names", "a"], "input_names: expected 2 different names, found ['a']"),
    ],
)
def test_export_says_what_does_not_fit_the_model(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path)
    asked = ["export", str(source), "--onnx", str(tmp_path / "m.onnx"), "--model", "test_cli:Tagger"]
    assert main([*asked, "--example", "1,5:int64", "--example", "1,5", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("wrong", ["length", "x=length", "1=", "1=a-b", ":1=length"])
def test_an_open_axis_that_is_none_is_wrong_usage(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "m.psc", "--dynamic", wrong])
    assert caught.value.code == 2
    assert "expected an axis and a name as in 1=length or ids:1=length" in capsys.readouterr().err


def test_export_of_what_does_not_belong_together_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = ["--onnx", str(tmp_path / "m.onnx"), "--example", "1,6"]
    source = str(as_state_dict(tmp_path))
    assert main(["export", source, *onnx]) == 2
    assert "a checkpoint holds no graph: give --model" in capsys.readouterr().err
    assert main(["export", source, *onnx, "--model", "test_cli:small"]) == 1
    assert "another architecture than the model: missing 0.weight" in capsys.readouterr().err
    assert main(["export", str(tmp_path), *onnx]) == 2
    assert "is a folder without a model.psc" in capsys.readouterr().err
    assert main(["export", str(as_run(tmp_path)), *onnx]) == 2
    assert "holds no config.yaml, which says what a run's model is: give --model" in capsys.readouterr().err
    (tmp_path / "noise.ckpt").write_bytes(b"no")
    assert main(["export", str(tmp_path / "noise.ckpt"), *onnx, "--model", "test_cli:small"]) == 1
    assert "neither a .psc file nor a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "FILE"],
        ["verify", "FILE"],
        ["verify", "FILE", "--model", "test_cli:large"],
        ["verify", "FILE", "--sha256", "0" * 64],
        ["diff", "FILE", "FILE"],
        ["export", "FILE", "--safetensors", "OUT"],
        ["export", "FILE", "--onnx", "OUT", "--example", "1,600", "--model", "test_cli:large"],
    ],
    ids=" ".join,
)
def test_every_command_keeps_to_its_limit(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of memory for tensors, 1.44 MB of them here, and of the file, which may be a mebibyte longer than these."""
    file, out = tmp_path / "model.psc", tmp_path / "out"
    save(large(), file)
    arguments = [{"FILE": str(file), "OUT": str(out)}.get(word, word) for word in command]
    for limit in (100, 1_000_000):
        if limit == 100 or "--sha256" not in command:
            assert main([*arguments, "--max-bytes", str(limit)]) == 1
            assert "max_bytes" in capsys.readouterr().err
            assert not out.exists()
    if "--onnx" not in command:
        assert main([*arguments, "--max-bytes", "1440000"]) == ("--sha256" in command)
    with pytest.raises(SystemExit):
        main([*arguments, "--max-bytes", "1e6"])
    assert "expected a whole number of bytes, found '1e6'" in capsys.readouterr().err


def large() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(600, 600, bias=False)


def test_a_command_reads_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    save(small(), "memory://model.psc")
    assert main(["inspect", "memory://model.psc"]) == main(["verify", "memory://model.psc"]) == 0
    assert main(["inspect", "memory://nowhere.psc"]) == 1
    assert capsys.readouterr().err == "psc inspect: memory://nowhere.psc: No such file or directory\n"
    assert main(["inspect", "nosuch://model.psc"]) == 1
    assert "not a URL that can be opened" in capsys.readouterr().err


def test_a_part_is_verified_for_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, part, whole = Tagger(), str(tmp_path / "part.psc"), tmp_path / "whole.safetensors"
    save(model, part, only="labels")
    save_file(model.state_dict(), whole)
    for more in (["--model", "test_cli:Tagger"], ["--against", str(whole)]):
        assert main(["verify", part, *more]) == 0, more
    model.labels.bias.data[0] += 1
    save_file(model.state_dict(), whole)
    assert main(["verify", part, "--against", str(whole)]) == 1
    assert "in 1 of 2 tensors: labels.bias" in capsys.readouterr().err
    assert main(["export", part, "--safetensors", str(tmp_path / "out"), "--model", "test_cli:Tagger"]) == 0
    assert sorted(load_file(tmp_path / "out")) == ["labels.bias", "labels.weight"]


# --------------------------------------------------------------------------------------------------------- pack


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose factors only our entry in it knows."""
    folder = tmp_path_factory.mktemp("run")
    model, made = training.fit(training.COMBINATIONS["separable_lsq"]("constant"), max_epochs=1)
    made.save_checkpoint(folder / "best.ckpt")
    made.save_checkpoint(folder / "weights.ckpt", weights_only=True)
    save(model, folder / "trained.psc")
    save(model.net, folder / "net.psc")
    return folder / "best.ckpt"


def test_pack_as_a_process(checkpoint: Path, tmp_path: Path) -> None:
    """The file is the one that training would have written, and the report's table is printed."""
    command = [
        sys.executable,
        "-m",
        "psc_lightning.cli",
        "pack",
        str(checkpoint),
        "--model",
        "training:Net",
        "-o",
        "new.psc",
    ]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}
    )
    assert (tmp_path / "new.psc").read_bytes() == (checkpoint.parent / "trained.psc").read_bytes()
    assert "separable+magnitude+uniform" in done.stdout
    assert f"{(tmp_path / 'new.psc').stat().st_size:,}" in done.stdout
    assert "psc pack" not in done.stderr


def test_pack_of_the_network_in_it(checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["pack", str(checkpoint), "--model", "training:layers", "--out", str(tmp_path / "new.psc")]
    assert main(arguments) == 0
    assert (tmp_path / "new.psc").read_bytes() == (checkpoint.parent / "net.psc").read_bytes()
    full = (tmp_path / "new.psc").stat().st_size
    assert main([*arguments, "--leftovers", "log8", "--fold-batchnorm", "--no-names"]) == 0
    assert (tmp_path / "new.psc").stat().st_size < full - 100
    folded = training.layers()
    load_into(folded, tmp_path / "new.psc")
    assert set(folded[1].weight.tolist()) <= {1.0, -1.0}


def test_pack_of_weights_alone_says_so(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = checkpoint.with_name("weights.ckpt")
    assert main(["pack", str(weights), "--model", "training:Net", "-o", str(tmp_path / "new.psc")]) == 0
    out, err = capsys.readouterr()
    assert "uniform" in out
    assert err.startswith(f"psc pack: {weights} holds weights only")
    assert err.count("\n") == 1
    assert main(["verify", str(tmp_path / "new.psc"), "--against", str(weights)]) == 0


def test_pack_of_what_is_none(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "damaged.ckpt").write_bytes(checkpoint.read_bytes()[:3000])
    out = str(tmp_path / "new.psc")
    for file, factory, target, status, said in (
        (tmp_path / "nowhere.ckpt", "training:Net", out, 1, "No such file"),
        (tmp_path / "damaged.ckpt", "training:Net", out, 1, "damaged"),
        (checkpoint, "test_cli:small", out, 1, "0.weight is missing"),
        (checkpoint, "training:Nothing", out, 2, "expected PACKAGE.MODULE:FACTORY"),
        (checkpoint, "training:Net", str(tmp_path / "no" / "new.psc"), 2, "no such folder"),
    ):
        assert main(["pack", str(file), "--model", factory, "-o", target]) == status, said
        written, err = capsys.readouterr()
        assert written == ""
        assert said in err
        assert err.startswith("psc pack: ")
        assert err.count("\n") == 1
    assert not Path(out).exists()
    with pytest.raises(SystemExit) as caught:
        main(["pack", str(checkpoint), "--model", "training:Net", "-o", out, "--leftovers", "int8"])
    assert caught.value.code == 2
