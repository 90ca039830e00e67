"""Where pushed files come to lie: as the Hub's library has it, on full disks, beside links."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fluxmesh.errors import FluxmeshError, OutputError, UsageError
from fluxmesh_agent.parcels import landing as landing_module
from fluxmesh_agent.parcels import receiving
from tests.unit.parcels.pushes import COMMIT, ModelDisk, sent


def test_a_snapshot_lies_in_the_cache_as_the_hubs_own_library_lays_it(
    source: ModelDisk, target: ModelDisk
) -> None:
    import huggingface_hub

    parcel = source.parcel()
    sent(source, target, parcel)
    repo = target.cache / "models--somebody--flux"
    for file in parcel.files:
        name = repo / "snapshots" / COMMIT / file.path
        assert os.readlink(name) == os.path.relpath(repo / "blobs" / file.blob, name.parent)
        got = huggingface_hub.try_to_load_from_cache(
            "somebody/flux", file.path, cache_dir=target.cache
        )
        assert got == str(name)
    (info,) = huggingface_hub.scan_cache_dir(target.cache).repos
    assert info.repo_id == "somebody/flux" and info.size_on_disk == parcel.nbytes
    assert not huggingface_hub.scan_cache_dir(target.cache).warnings


def test_a_disk_without_links_holds_files_where_others_hold_links(
    source: ModelDisk, target: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refused)
    parcel = source.parcel()
    sent(source, target, parcel)
    assert target.has(parcel)
    # What was fetched on such a disk has no blobs to be called by.
    nameless = replace(parcel, files=tuple(replace(file, blob="") for file in parcel.files))
    other = ModelDisk(target.folder / "other", {})
    sent(source, other, nameless)
    assert other.has(parcel)


def test_a_full_disk_is_told_before_the_first_byte(
    source: ModelDisk, target: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landing_module, "LEFT_FREE", 1 << 60)
    with pytest.raises(OutputError, match=r"needs 0.0 GB more.*make room there"):
        sent(source, target, source.parcel())
    assert not [path for path in target.everything if path.endswith(".pushed")]


def test_a_disk_that_fills_meanwhile_is_told_and_the_push_goes_on_later(
    source: ModelDisk, target: ModelDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel, written = source.parcel(), []
    write = os.write

    def full(handle: int, data: memoryview) -> int:
        written.append(len(data))
        if sum(written) > 7 << 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(receiving.os, "write", full)
    with pytest.raises(OutputError, match="disk is full"):
        sent(source, target, parcel)
    monkeypatch.undo()
    assert target.landing(parcel).missing < parcel.nbytes
    sent(source, target, parcel)
    assert target.has(parcel)


@pytest.mark.parametrize("link", ["models--somebody--flux", "models--somebody--flux/blobs"])
def test_a_link_in_the_cache_leads_no_file_out_of_it(
    source: ModelDisk, target: ModelDisk, tmp_path: Path, link: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (target.cache / link).parent.mkdir(parents=True)
    (target.cache / link).symlink_to(outside)
    with pytest.raises(UsageError, match="is a link"):
        sent(source, target, source.parcel())
    assert not list(outside.iterdir())


def test_a_link_where_a_file_is_to_be_written_is_not_followed(
    source: ModelDisk, target: ModelDisk, tmp_path: Path
) -> None:
    parcel = source.parcel()
    place = target.landing(parcel)
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    with place.opened():
        place.partial(parcel.files[0]).symlink_to(precious)
    with pytest.raises(OutputError):
        sent(source, target, parcel)
    assert precious.read_bytes() == b"mine"


def test_another_checkpoint_of_that_name_stays(source: ModelDisk, target: ModelDisk) -> None:
    other = target.models / "flux-4bit" / "model_index.json"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    with pytest.raises(UsageError, match="another checkpoint"):
        sent(source, target, source.parcel(hub=False))
    assert other.read_text() == "mine"


def test_what_a_push_of_another_version_left_gives_its_room_back(
    source: ModelDisk, target: ModelDisk
) -> None:
    for hub in (True, False):
        parcel = source.parcel(hub=hub)
        files = (*parcel.files[1:], replace(parcel.files[0], blob="f" * 64 if hub else ""))
        old = replace(parcel, commit="d" * 40 if hub else "", content="f" * 16, files=files)
        place = target.landing(old)
        with place.opened():
            place.partial(files[-1]).write_bytes(b"x" * 1000)
        left = place.partial(files[-1])
        sent(source, target, parcel)
        assert target.has(parcel) and not left.exists()


def test_a_second_push_of_the_same_waits_for_nobody(source: ModelDisk, target: ModelDisk) -> None:
    parcel = source.parcel()
    refused = pytest.raises(FluxmeshError, match="on its way to this host already")
    with target.landing(parcel).opened(), refused:
        sent(source, target, parcel)
    sent(source, target, parcel)
