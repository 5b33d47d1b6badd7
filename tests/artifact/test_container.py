from __future__ import annotations

import os
import stat
import zlib
from pathlib import Path

import pytest
import torch

from psc_lightning.artifact import container, directory
from psc_lightning.artifact.container import Cursor, pack, unpack, varint
from psc_lightning.artifact.directory import DEFLATED, PLAIN, Entry, Kind
from psc_lightning.artifact.errors import ArtifactError
from psc_lightning.files import write_atomic

KNOWN = frozenset({1, 3})


def test_shell_by_hand() -> None:
    body = b"\1\2ab" + b"\3\0"
    assert pack({1: b"ab", 3: b""}) == b"PSC\1" + zlib.crc32(body).to_bytes(4, "little") + body
    assert unpack(pack({1: b"ab", 3: b"x" * 300}), KNOWN) == {1: b"ab", 3: b"x" * 300}


@pytest.mark.parametrize("value", [0, 1, 127, 128, 16383, 16384, 2**40, 2**63 - 1])
def test_varints_return(value: int) -> None:
    cursor = Cursor(varint(value), "test")
    assert cursor.varint() == value
    assert cursor.done


def test_varints_end() -> None:
    with pytest.raises(ArtifactError, match="at most 9 bytes"):
        Cursor(b"\xff" * 20, "test").varint()
    with pytest.raises(ArtifactError, match="expected 1 more bytes, found 0"):
        Cursor(b"\xff", "test").varint()


def resealed(data: bytes) -> bytes:
    return data[:4] + zlib.crc32(data[8:]).to_bytes(4, "little") + data[8:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a .psc file"),
        (b"PK\3\4 something else", r"starts with b'PSC', found b'PK\\x03'"),
        (b"PSC\1", "expected at least 8 bytes, found 4"),
        (pack({1: b"ab"})[:-1], "checksum"),
        (pack({1: b"ab"}) + b"\0", "checksum"),
        (b"PSC\2" + pack({1: b"ab"})[4:], "expected format version 1, found 2: update psc_lightning"),
        (pack({7: b"ab"}), "found section 7: update psc_lightning"),
        (resealed(pack({1: b"ab"}) + b"\1\0"), "expected one section 1, found two"),
        (resealed(pack({1: b"ab"})[:-1]), "expected 2 more bytes, found 1"),
        (resealed(pack({1: b"ab"}) + b"\3\xff\xff\xff\xff\x7f"), "more bytes, found 0"),
    ],
)
def test_damage_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        unpack(data, KNOWN)


def test_unknown_optional_sections_are_skipped() -> None:
    assert unpack(pack({1: b"ab", 200: b"from the future"}), KNOWN) == {1: b"ab"}


# ------------------------------------------------------------------------------------------------------ writing


def test_write_replaces_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model.psc"
    write_atomic(target, b"old")
    write_atomic(str(target), b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["model.psc"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    target = tmp_path / "model.psc"
    write_atomic(target, b"old")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(error)) as caught:
            write_atomic(target, b"new")
    if isinstance(error, OSError):
        assert "cannot write model.psc: No space left on device" in str(caught.value)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.psc"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write model\.psc: .*writable folder.*nowhere"):
        write_atomic(tmp_path / "nowhere" / "model.psc", b"new")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cannot write model\.psc"):
        write_atomic(tmp_path / "file" / "model.psc", b"new")


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write to a folder whatever its mode, so the system's answer is played
    def refused(*args: object, **options: object) -> int:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(PermissionError, match=r"cannot write model\.psc: .*writable folder"):
        write_atomic(tmp_path / "model.psc", b"new")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.psc").symlink_to(tmp_path / "model.psc")
    write_atomic(tmp_path / "link.psc", b"new")
    assert (tmp_path / "link.psc").is_symlink()
    assert (tmp_path / "model.psc").read_bytes() == b"new"


def test_long_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.psc").write_bytes(bytes(11))
    with pytest.raises(ArtifactError, match="max_bytes = 10 bytes, found 11"):
        container.read(tmp_path / "model.psc", 10)
    assert container.read(tmp_path / "model.psc", 11) == bytes(11)


# ------------------------------------------------------------------------------------------- table of contents

ENTRIES = [
    Entry("a.b.weight", Kind.SLOTS, torch.float32, (300, 2)),
    Entry("a.b.bias", Kind.HALF, torch.float64, (300,)),
    Entry("a.b", Kind.LEFTOVER, torch.bool, ()),
    Entry("a", Kind.LEFTOVER, torch.bfloat16, (0, 3)),
    Entry("c.weight", Kind.ALIAS, torch.float32, (300, 2), 0),
]
BY_HAND = (
    b"\x05"
    + b"\0a.b.weight\n\2bias\n\1b\n\0a\n\0c.weight\n"
    + bytes([0x00, 0x23, 0x19, 0x12, 0x30])
    + (b"\2\xac\2\2" + b"\1\xac\2" + b"\0" + b"\2\0\3" + b"\0")
)


def test_table_of_contents_by_hand() -> None:
    assert directory.decode(PLAIN, BY_HAND) == ENTRIES
    tag, content = directory.encode(ENTRIES)
    assert tag == DEFLATED
    assert zlib.decompressobj(-15, directory._DICTIONARY).decompress(content) == BY_HAND
    assert directory.decode(tag, content) == ENTRIES
    assert directory.decode(*directory.encode([])) == []


def test_common_names_are_short() -> None:
    names = [f"{layer}.{leaf}" for layer in ("conv1", "conv2", "fc1", "fc2") for leaf in ("weight", "bias")]
    shapes = [(20, 1, 5, 5), (20,), (50, 20, 5, 5), (50,), (500, 800), (500,), (10, 500), (10,)]
    entries = [Entry(n, Kind(int(len(s) == 1)), torch.float32, s) for n, s in zip(names, shapes, strict=True)]
    assert len(pack(dict([directory.encode(entries)]))) <= 56


def test_the_preset_dictionary_never_changes() -> None:
    assert (len(directory._DICTIONARY), zlib.crc32(directory._DICTIONARY)) == (1031, 1166792478)


@pytest.mark.parametrize("at", range(len(BY_HAND)))
def test_cut_tables_of_contents(at: int) -> None:
    with pytest.raises(ArtifactError, match="table of contents"):
        directory.decode(PLAIN, BY_HAND[:at])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (BY_HAND + b"\0", "expected the end"),
        (b"\1\1a\n\x10\0", "shares at most 0 parts"),
        (b"\1\0\xff\n\x10\0", "UTF-8"),
        (b"\2\0a\n\0a\n\x10\x10\0\0", "2 different names"),
        (b"\1\0a\n\x50\0", "known kind"),
        (b"\1\0a\n\x1f\0", "known kind"),
        (b"\1\0a\n\x10\x21", "at most 32 axes"),
        (b"\1\0a\n\x30\0", "alias"),
        (b"\2\0a\n\0b\n\x10\x31\0\0", "alias"),
    ],
)
def test_damaged_tables_of_contents(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        directory.decode(PLAIN, data)


def test_a_deflate_bomb_is_not_inflated() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, directory._DICTIONARY)
    bomb = packer.compress(bytes(1 << 25)) + packer.flush()
    with pytest.raises(ArtifactError, match="at most 16777216 bytes"):
        directory.decode(DEFLATED, bomb)
    with pytest.raises(ArtifactError, match="deflated data"):
        directory.decode(DEFLATED, b"\xff\xff")


@pytest.mark.parametrize("name", ["a\nb", "a" * 4097, "a\ud800"])
def test_names_that_no_reader_would_take(name: str) -> None:
    with pytest.raises(ValueError, match="newline, half a surrogate pair, nor more than 4096 characters"):
        directory.encode([Entry(name, Kind.LEFTOVER, torch.float32, ())])


def test_names_too_long_together(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(name, Kind.LEFTOVER, torch.float32, ()) for name in ("a.weight", "b.weight")]
    section = directory.encode(entries)
    monkeypatch.setattr(directory, "_ALL_NAMES", 16)
    assert directory.decode(*directory.encode(entries)) == entries
    monkeypatch.setattr(directory, "_ALL_NAMES", 15)
    with pytest.raises(ValueError, match="more than 15 characters in all"):
        directory.encode(entries)
    with pytest.raises(ArtifactError, match="2 different names"):
        directory.decode(*section)


def test_a_table_that_no_reader_would_inflate_is_not_deflated(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry(f"layer.{i}.weight", Kind.LEFTOVER, torch.float32, (1,)) for i in range(50)]
    assert directory.encode(entries)[0] == DEFLATED
    monkeypatch.setattr(directory, "_INFLATED", 100)
    tag, content = directory.encode(entries)
    assert tag == PLAIN
    assert directory.decode(tag, content) == entries
