"""What lies where a file should be, and what a save does to what was there: pipes, devices, giants, owners, leavings."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from fuzz import little_memory
from torch import nn

from psc_lightning import files
from psc_lightning.artifact import ArtifactError, load, save, to_bytes, verify
from psc_lightning.cli import main

fcntl = pytest.importorskip("fcntl")


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 1)


def test_a_pipe_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.psc")
    for read in (load, verify):
        with pytest.raises(OSError, match="found a pipe or a device: open it, and pass the stream"):
            read(tmp_path / "f.psc")
    assert main(["verify", str(tmp_path / "f.psc"), "--sha256", "0" * 64]) == 1
    assert main(["export", str(tmp_path / "f.psc"), "--safetensors", str(tmp_path / "out")]) == 1
    assert os.listdir(tmp_path) == ["f.psc"]


def test_a_pipe_without_a_reader_is_not_waited_for_in_saving(model: nn.Module, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.psc")
    with pytest.raises(OSError) as caught:  # noqa: PT011  # its number is what it is about
        save(model, tmp_path / "f.psc")
    assert caught.value.errno == errno.ENXIO
    assert stat.S_ISFIFO((tmp_path / "f.psc").stat().st_mode)


def test_endless_devices_are_refused() -> None:
    with little_memory(), pytest.raises(OSError, match="found a pipe or a device"):
        verify("/dev/zero")
    assert main(["verify", "/dev/zero", "--sha256", "0" * 64]) == 1


def test_a_device_that_takes_nothing_is_not_replaced(model: nn.Module) -> None:
    """/dev/full fails as a full disk does; root could have put a file in its place."""
    with mock.patch.object(os, "replace", side_effect=AssertionError), pytest.raises(OSError) as caught:  # noqa: PT011
        save(model, "/dev/full")
    assert caught.value.errno == errno.ENOSPC
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_a_giant_is_refused_by_its_size(tmp_path: Path) -> None:
    """A hundred gigabytes of holes take no room on the disk."""
    (tmp_path / "f.psc").touch()
    os.truncate(tmp_path / "f.psc", 100 << 30)
    with little_memory(), pytest.raises(ArtifactError, match=f"at most max_bytes = .* bytes, found {100 << 30}"):
        verify(tmp_path / "f.psc")
    with little_memory():
        assert main(["verify", str(tmp_path / "f.psc"), "--sha256", "0" * 64]) == 1


def test_a_command_reads_a_file_once(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "f.psc")
    report = save(model, path)
    torch.save(model.state_dict(), tmp_path / "f.ckpt")
    for arguments in (
        ["inspect", path],
        ["verify", path, "--sha256", report.sha256, "--against", str(tmp_path / "f.ckpt")],
        ["export", path, "--safetensors", str(tmp_path / "out")],
    ):
        with mock.patch("psc_lightning.artifact.container.read_bytes", wraps=files.read_bytes) as read:
            assert main(arguments) == 0
        assert [call.args[0] for call in read.call_args_list if not isinstance(call.args[0], bytes)] == [path]
    with mock.patch("psc_lightning.artifact.container.read_bytes", wraps=files.read_bytes) as read:
        assert main(["diff", path, path]) == 0
    assert [call.args[0] for call in read.call_args_list if not isinstance(call.args[0], bytes)] == [path, path]
    capsys.readouterr()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_file_keeps_its_mode(model: nn.Module, tmp_path: Path, mode: int) -> None:
    (tmp_path / "f.psc").touch()
    (tmp_path / "f.psc").chmod(mode)
    save(model, tmp_path / "f.psc")
    assert stat.S_IMODE((tmp_path / "f.psc").stat().st_mode) == mode


def test_what_replaces_a_private_file_is_private_from_the_start(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "f.psc").touch(0o600)
    modes = []
    with mock.patch.object(files, "_give", side_effect=lambda handle, _: modes.append(os.fstat(handle).st_mode)):
        save(model, tmp_path / "f.psc")
    assert [stat.S_IMODE(one) for one in modes] == [0o600]


def test_a_new_file_has_the_mode_of_any_new_file(model: nn.Module, tmp_path: Path) -> None:
    save(model, tmp_path / "f.psc")
    (tmp_path / "g").touch()
    assert (tmp_path / "f.psc").stat().st_mode == (tmp_path / "g").stat().st_mode


def test_a_file_keeps_its_owner_if_the_system_lets_us(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "f.psc").touch()
    status = (tmp_path / "f.psc").stat()
    with mock.patch.object(os, "fchown", side_effect=PermissionError) as given:
        save(model, tmp_path / "f.psc")
    assert given.call_args.args[1:] == (status.st_uid, status.st_gid)
    assert load(tmp_path / "f.psc").keys() == model.state_dict().keys()


def test_a_folder_that_cannot_be_listed_is_no_error_after_the_fact(model: nn.Module, tmp_path: Path) -> None:
    with (
        mock.patch.object(files, "_sync", side_effect=PermissionError),
        mock.patch.object(os, "listdir", side_effect=PermissionError),
    ):
        save(model, tmp_path / "f.psc")
    assert load(tmp_path / "f.psc").keys() == model.state_dict().keys()


def test_what_a_killed_save_left_is_removed_and_nothing_else(model: nn.Module, tmp_path: Path) -> None:
    stale = tmp_path / ".f.psc.0123abcd.part"
    others = [".g.psc.0123abcd.part", ".f.psc.0123abcd.partial", ".f.psc.xyz.part", "f.psc.0123abcd.part"]
    for name in (stale.name, *others):
        (tmp_path / name).touch()
    save(model, tmp_path / "f.psc")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "f.psc"])


def test_what_another_process_writes_now_stays(model: nn.Module, tmp_path: Path) -> None:
    with (tmp_path / ".f.psc.0123abcd.part").open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(model, tmp_path / "f.psc")
        assert sorted(os.listdir(tmp_path)) == [".f.psc.0123abcd.part", "f.psc"]


def test_saves_clean_up_only_what_is_not_theirs(model: nn.Module, tmp_path: Path) -> None:
    """One that is cleaned up between its birth and its lock takes another name."""
    honest, calls = files._lock, []

    def lock(handle: int) -> bool | None:
        calls.append(handle)
        if len(calls) == 1:
            (path,) = tmp_path.glob(".f.psc.*.part")
            path.unlink()
        return honest(handle)

    with mock.patch.object(files, "_lock", lock):
        save(model, tmp_path / "f.psc")
    assert len(calls) == 2
    assert os.listdir(tmp_path) == ["f.psc"]


def test_standard_input_is_this_processs_own(model: nn.Module) -> None:
    code = "import psc_lightning; print(*psc_lightning.load('/dev/stdin'))"
    made = subprocess.run(
        [sys.executable, "-c", code], input=to_bytes(model)[0], capture_output=True, check=True, timeout=120
    )
    assert made.stdout.split() == [b"weight", b"bias"]
