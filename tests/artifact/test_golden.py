"""Version 1 as it was written: it is read for ever, and a change of what is written now is made on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import golden
import pytest
from fuzz import sealed

from psc_lightning.artifact import ArtifactError, container, load, reading, to_bytes
from psc_lightning.levels import LEVELS
from psc_lightning.tying import TYINGS

FILES = sorted(golden.FOLDER.glob("*.psc"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_of_version_1_is_read(path: Path) -> None:
    assert golden.digests(load(path)) == json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("name", golden.NETWORKS)
def test_the_writer_writes_the_newest_file(name: str) -> None:
    """If it is on purpose: python tests/artifact/golden.py, which adds a file and keeps the old ones."""
    assert (
        to_bytes(golden.NETWORKS[name](), **golden.OPTIONS.get(name, {}))[0].hex()
        == golden.generations(name)[-1].read_bytes().hex()
    )


def test_every_method_has_a_file() -> None:
    assert {*LEVELS, *TYINGS, "plain", "every_type"} <= set(golden.NETWORKS)
    assert {path.name.partition(".")[0] for path in FILES} == set(golden.NETWORKS)


def test_plain_symbols_are_in_a_section_of_their_own() -> None:
    """Of the planes of `noise`, all but the one that is a byte too short; others have no such section."""
    sections = container.unpack(golden.generations("noise")[-1].read_bytes(), frozenset(range(6)))
    assert len(sections[5]) == 8193 + 8193 + 8192 + 8193
    bits = "".join(str(bit) for bit in golden.noise(65_537, 2).tolist())
    assert sections[5][:8193] == int(bits + "0000000", 2).to_bytes(8193, "big")
    assert sections[5][-8193:] == bytes(golden.noise(8193, 256).tolist())
    for path in set(FILES) - set(golden.generations("noise")):
        assert 5 not in container.unpack(path.read_bytes(), frozenset(range(6)))


def test_rare_bits_are_written_as_distances() -> None:
    """Of the second there are too few for it to pay."""
    streams = reading.read(golden.generations("rare")[-1], 1 << 20).streams
    assert [stream.coding for stream in streams] == ["gaps", "adaptive"]


def test_optional_sections_are_skipped_and_others_refused(tmp_path: Path) -> None:
    data = golden.generations("ternary")[0].read_bytes()
    for tag, optional in ((6, False), (127, False), (128, True), (255, True)):
        (tmp_path / "f").write_bytes(sealed(data[8:] + bytes([tag, 3]) + b"new"))
        if optional:
            assert golden.digests(load(tmp_path / "f")) == golden.digests(load(golden.generations("ternary")[0]))
        else:
            with pytest.raises(ArtifactError, match=f"found section {tag}: update psc_lightning"):
                load(tmp_path / "f")


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    data = golden.generations("ternary")[0].read_bytes()
    (tmp_path / "f").write_bytes(data[:3] + b"\2" + data[4:])
    with pytest.raises(ArtifactError, match="expected format version 1, found 2: update psc_lightning"):
        load(tmp_path / "f")
