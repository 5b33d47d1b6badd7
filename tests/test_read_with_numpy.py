"""The reader of a stranger: NumPy, the standard library and the README's format, on every method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forge
import numpy as np
import pytest
import torch
from read_with_numpy import dictionary, read
from torch import nn
from training import COMBINATIONS, Net

import psc_lightning
from psc_lightning import MaskLearning, StraightThroughQuantization
from psc_lightning.artifact import container, directory
from psc_lightning.levels import LEVELS

RECIPE = Path(__file__).parents[1] / "recipes" / "read_with_numpy.py"


def same(path) -> None:
    """Every tensor has the bits that `load` gives."""
    expected = psc_lightning.load(path)
    found = read(Path(path).read_bytes())
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        array = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def compressed(callbacks, model):
    psc_lightning.compress(model, callbacks, **labels(callbacks))
    return model


def labels(callbacks):
    driven = any(getattr(callback, "method", "") in ("movement", "saliency") for callback in callbacks)
    if not driven:
        return {}
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    return {"batches": [x], "loss": lambda net, batch: net(batch).square().sum()}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_combination(name, tmp_path):
    psc_lightning.save(compressed(COMBINATIONS[name]("constant"), Net()), tmp_path / "model.psc")
    same(tmp_path / "model.psc")


OPTIONS = [
    *({"levels": name} for name in LEVELS),
    {"levels": "uniform", "bits": 1, "group": 7},
    {"levels": "binary", "form": "01", "group": "tensor"},
    {"levels": "log", "bits": 4, "root": 8, "group": 5},
    {"levels": "codebook", "k": 256, "group": "channel"},
    {"levels": "binary", "form": "01", "scales": "log8"},
    {"levels": "codebook", "scales": "log8"},
    {"levels": "ternary", "scales": "float32"},
    {"levels": "ttq", "scales": "log8", "group": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_level_in_every_type(options, dtype, tmp_path):
    torch.manual_seed(0)
    layers = [nn.Linear(9, 16), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv1d(4, 8, 3), nn.Embedding(11, 7)]
    model = nn.Sequential(*layers).to(dtype)
    psc_lightning.save(compressed([StraightThroughQuantization(**options)], model), tmp_path / "model.psc")
    same(tmp_path / "model.psc")


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("granularity", ["element", "row", "column", "channel"])
def test_every_granularity(granularity, block, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(4, 8, 3))
    blocks = {"block": block} if granularity in ("row", "column") else {}
    mask = MaskLearning("magnitude", threshold=0.5, granularity=granularity, min_size=1, **blocks)
    psc_lightning.save(compressed([mask], model), tmp_path / "model.psc")
    same(tmp_path / "model.psc")


def test_leftovers_of_every_type_and_an_alias(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128):
        model.register_buffer(f"of_{str(dtype)[6:]}", torch.randn(5).to(dtype))
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        model.register_buffer(
            str(dtype)[6:], torch.tensor([0, 1, 5, 120, 1]).to(dtype) * (-1 if dtype.is_signed else 1)
        )
    for leftovers in ("float32", "float16", "log8", {"*.weight": "log8", "*": "float16"}):
        psc_lightning.save(model, tmp_path / "model.psc", leftovers=leftovers)
        same(tmp_path / "model.psc")


def test_a_file_without_names(tmp_path):
    model = compressed(COMBINATIONS["float"]("constant"), Net())
    psc_lightning.save(model, tmp_path / "named.psc")
    psc_lightning.save(model, tmp_path / "model.psc", names=False)
    expected = read((tmp_path / "named.psc").read_bytes())
    data = (tmp_path / "model.psc").read_bytes()
    found = read(data, [(name, str(array.dtype), array.shape) for name, array in expected.items()])
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    with pytest.raises(ValueError, match="say what names"):
        read(data)


def test_its_dictionary_is_the_writers():
    assert dictionary() == directory._DICTIONARY


def test_a_damaged_file_is_refused(tmp_path):
    psc_lightning.save(Net(), tmp_path / "model.psc")
    data = bytearray((tmp_path / "model.psc").read_bytes())
    data[-1] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        read(bytes(data))


def test_as_a_program_without_torch(tmp_path):
    psc_lightning.save(compressed(COMBINATIONS["float"]("constant"), Net()), tmp_path / "model.psc")
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "assert not {'torch', 'constriction', 'psc_lightning'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(RECIPE), str(tmp_path / "model.psc"), str(tmp_path / "model.npz")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "net.0.weight  (8, 2, 3, 3)  float32" in done.stdout
    arrays = np.load(tmp_path / "model.npz")
    assert (
        arrays["net.0.weight"].tobytes() == psc_lightning.load(tmp_path / "model.psc")["net.0.weight"].numpy().tobytes()
    )


def test_its_one_limit(tmp_path):
    """The size, of what is declared and of the file, and how many tensors."""
    psc_lightning.save(nn.Linear(300, 10), tmp_path / "model.psc")
    size = 4 * 3010
    data = (tmp_path / "model.psc").read_bytes()
    assert len(read(data, largest=size)) == 2
    with pytest.raises(ValueError, match=f"at most {size - 1} bytes of tensors, found {size}"):
        read(data, largest=size - 1)
    with pytest.raises(ValueError, match="found 1901900 tensors"):
        read(forge.names(1_900_000), largest=1000)
    command = [sys.executable, str(RECIPE), "model.psc", "model.npz"]
    for largest, status in ((size - 1, 1), (size, 0)):
        done = subprocess.run([*command, str(largest)], cwd=tmp_path, capture_output=True, timeout=120)
        assert done.returncode == status
    assert "Its one limit is that size" in RECIPE.read_text()


def test_bytes_after_the_table_of_contents():
    tag, table = directory.encode([directory.Entry("a", directory.Kind.LEFTOVER, torch.bool, (0,))])
    assert tag == directory.PLAIN
    nameless = directory.encode_nameless([directory.Entry("a", directory.Kind.LEFTOVER, torch.bool, (0,))])[1]
    model = [("a", "bool", (0,))]
    for section, content, known in ((1, table, None), (4, nameless, model)):
        assert read(container.pack({section: content, 3: b"\1"}), known)["a"].shape == (0,)
        with pytest.raises(ValueError, match="left over after the table"):
            read(container.pack({section: content + b"\0", 3: b"\1"}), known)
    packed = directory._deflate(table, 0)
    assert len(read(container.pack({2: packed, 3: b"\1"}))) == 1
    with pytest.raises(ValueError, match="the table of contents is longer"):
        read(container.pack({2: packed + b"x", 3: b"\1"}))
