"""Files and folders appear whole, and outlive a power cut: on macOS by a sync of another name."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.storage import atomic, bfloat16, durable, log_tail
from fluxmesh.storage.homes import write_private
from fluxmesh.storage.log_tail import last_lines
from fluxmesh.storage.safetensors import write_tensors
from fluxmesh_agent.adapter_store import AdapterStore
from tests.unit.test_imports import PACKAGES, modules

FULL = 51  # F_FULLFSYNC of <sys/fcntl.h> on macOS


class Disk:
    """What was asked of it: ("full" or "plain", inode)."""

    def __init__(self, *, knows_full: bool) -> None:
        self.knows_full = knows_full
        self.asked: list[tuple[str, int]] = []

    def fcntl(self, descriptor: int, command: int) -> int:
        assert command == FULL
        self.asked.append(("full", os.fstat(descriptor).st_ino))
        if not self.knows_full:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        return 0

    def fsync(self, descriptor: int) -> None:
        self.asked.append(("plain", os.fstat(descriptor).st_ino))


@pytest.fixture(params=[True, False], ids=["full", "network-share"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk(knows_full=request.param)
    monkeypatch.setattr(durable, "_FULL", FULL)
    monkeypatch.setattr(fcntl, "fcntl", made.fcntl)
    monkeypatch.setattr(os, "fsync", made.fsync)
    return made


def test_a_mac_is_asked_to_write_what_it_holds_and_a_share_what_it_can(
    disk: Disk, tmp_path: Path
) -> None:
    atomic.write_file(tmp_path / "a.png", b"whole")
    file, folder = (os.stat(path).st_ino for path in (tmp_path / "a.png", tmp_path))
    if disk.knows_full:
        assert disk.asked == [("full", file), ("full", folder)]
    else:
        assert disk.asked == [(how, at) for at in (file, folder) for how in ("full", "plain")]


def test_a_system_without_it_syncs_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Disk(knows_full=False)
    monkeypatch.setattr(durable, "_FULL", None)
    monkeypatch.setattr(os, "fsync", made.fsync)
    atomic.write_file(tmp_path / "a.png", b"whole")
    assert [how for how, _ in made.asked] == ["plain", "plain"]


def test_every_file_and_name_of_a_folder_is_on_the_disk_before_it_takes_its_name(
    disk: Disk, tmp_path: Path
) -> None:
    with atomic.whole_folder(tmp_path / "model") as partial:
        (partial / "transformer").mkdir()
        for name in ("a.json", "transformer/b.safetensors"):
            (partial / name).write_bytes(b"x")
        paths = [partial, *partial.rglob("*")]
        wanted = {path.stat().st_ino for path in paths} | {tmp_path.stat().st_ino}
        assert not (tmp_path / "model").exists()
    assert {at for _, at in disk.asked} == wanted
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic.whole_folder(tmp_path / "model") as partial:
        (partial / "half").write_bytes(b"x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_all_that_is_kept_is_synced(disk: Disk, tmp_path: Path) -> None:
    write_private(tmp_path / "agent.json", "{}")
    write_tensors(tmp_path / "x.safetensors", {"x": (np.zeros(3, np.float32), "F32")}, {})
    data = np.zeros(4, np.uint8)
    digest = "df3f619804a92fdb4057192dc43dd748ea778adc52bc498ce80524c014b81119"
    AdapterStore(tmp_path / "adapters").put(digest, 0, 4, data)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 3
    assert {path.stat().st_ino for path in kept} <= {at for _, at in disk.asked}


def test_only_one_module_says_what_a_sync_is() -> None:
    importers = [
        name
        for package in PACKAGES
        for name, path in modules(package)
        if "fsync(" in path.read_text(encoding="utf-8")
    ]
    assert importers == ["fluxmesh.storage.durable"]


def test_a_long_name_in_any_script_has_room_for_its_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / ("\U0001f436" * 60 + ".png")  # 244 bytes, of 255
    atomic.write_file(path, b"whole")
    assert path.read_bytes() == b"whole"


def test_a_file_that_is_there_gives_way_only_where_it_may(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic.new_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(FileExistsError), atomic.new_file(path) as file:
        file.write(b"second")
    assert path.read_bytes() == b"first"
    with atomic.replaced_file(path, 0o600) as file:
        file.write(b"third")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"third"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["a"]


def test_bfloat16_is_rounded_to_the_nearest_and_ties_to_even_and_read_exactly() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, 3e38], np.float32)
    bits = bfloat16.of_float32(values)
    read = bfloat16.to_float32(bits)
    assert read[:4].tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7]
    assert np.signbit(read[4]) and read[5] == pytest.approx(3e38, rel=2**-8)
    assert np.array_equal(bfloat16.of_float32(read), bits)
    assert (bfloat16.kind(bits), bfloat16.kind(values)) == ("BF16", "F32")


def test_the_end_of_a_log_is_read_from_where_it_may_begin(tmp_path: Path) -> None:
    log = tmp_path / "agent.log"
    assert last_lines(log, 3) == []
    log.write_bytes(b"one\ntwo\nthr\xffee\n")
    assert last_lines(log, 2) == ["two", "thr�ee"]
    assert last_lines(log, 9) == ["one", "two", "thr�ee"]
    assert last_lines(log, 0) == []
    assert last_lines(log, 9, begin=4) == ["two", "thr�ee"]
    assert last_lines(log, 9, begin=400) == []
    log.write_bytes(b"x" * log_tail.LOOKED_AT + b"\nlast\n")
    assert [len(line) for line in last_lines(log, 9)] == [log_tail.LOOKED_AT - 6, 4]
