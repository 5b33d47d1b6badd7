"""The fuzzers' corpus, which reaches every answer the reader has, and a few seconds of `fuzz.py`."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from read_with_numpy import read as reference_read

from psc_lightning.artifact import ArtifactError, load
from psc_lightning.artifact.directory import Kind

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.psc"))


def same_for_a_stranger(data: bytes, path: Path) -> None:
    """The reader of the format's description gives the same bits.

    Left out is what no writer writes and the description leaves open: which NaN it is, and leftovers rounded to float16 that
    are then rounded again.
    """
    with np.errstate(all="ignore"):
        found = reference_read(data)
    kinds = {entry.name: entry.kind for entry in fuzz.opened(data)[0]}
    for name, tensor in load(path, max_bytes=fuzz.LIMIT).items():
        if kinds[name] is Kind.SLOTS or tensor.dtype in (torch.float32, torch.float64):
            known = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
            bits = [np.where(np.isnan(array), 0, array).tobytes() for array in (found[name], known)]
            assert bits[0] == bits[1], name


def test_the_corpus_is_small_and_of_both_kinds() -> None:
    assert sum(path.stat().st_size for path in CORPUS) < 100_000
    assert {path.name.partition("-")[0] for path in CORPUS} == {"reads", "refused"}


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_corpus(path: Path, tmp_path: Path) -> None:
    """What once was read is read; what once was refused may be a later coding's, but is never anything worse."""
    data = path.read_bytes()
    answer = fuzz.judge(data, tmp_path / "f")
    if path.name.startswith("reads"):
        assert not isinstance(answer, ArtifactError), answer
        same_for_a_stranger(data, path)


def test_a_few_seconds_of_fuzzing(tmp_path: Path) -> None:
    answers: Counter[tuple[str, bool]] = Counter()
    for how, data in islice(fuzz.mutants(fuzz.seeds(step=9), seed=1), 500):
        answer = fuzz.judge(data, tmp_path / "f")
        answers[how, isinstance(answer, ArtifactError)] += 1
        small = not isinstance(answer, ArtifactError) and answer.dense_bytes < 1000
        if small and answers[how, False] % 4 == 0:
            same_for_a_stranger(data, tmp_path / "f")
    assert answers["unsealed", False] == 0  # a checksum sees every flipped bit
    for how in ("flipped", "spliced", "table_edited", "plain_edited", "forged", "invented"):
        assert min(answers[how, True], answers[how, False]) > 0, how
