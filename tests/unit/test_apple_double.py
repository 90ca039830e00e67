"""The `._NAME` companions that macOS leaves on exFAT and SMB are nobody's weights, data or keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxmesh.adapters.find import find_adapter
from fluxmesh.storage.keys import Allowlist, Keys
from fluxmesh.training.data import dataset
from fluxmesh.training.data.remarks import Remarks
from fluxmesh.training.data.rows import Columns
from fluxmesh.weights.checkpoint import from_folder
from fluxmesh.weights.hub import _in_snapshot
from tests.checkpoints import make_checkpoint

COMPANION = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "  # as they begin


def beside(path: Path) -> None:
    path.with_name(f"._{path.name}").write_bytes(COMPANION)


def test_an_adapter_in_a_folder_is_found_beside_one(tmp_path: Path) -> None:
    file = tmp_path / "dog.safetensors"
    file.touch()
    beside(file)
    assert find_adapter(tmp_path) == file


def test_a_single_file_of_the_hub_is_found_beside_one(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, layout="bfl")
    for file in (made.path, made.folder / "ae.safetensors"):
        beside(file)
    checkpoint = _in_snapshot(tmp_path, "owner/name")
    assert checkpoint.components["transformer"].files == (made.path,)
    assert checkpoint.components["vae"].files == (made.folder / "ae.safetensors",)


def test_a_folder_that_was_copied_to_a_stick_and_back_is_the_same_revision(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, dtype="bfloat16").path
    before = from_folder(folder, "copy").revision
    for path in list(folder.rglob("*.*")):
        beside(path)
    assert from_folder(folder, "copy").revision == before


def test_pictures_have_no_companions_and_no_folder_is_parquet_for_one(tmp_path: Path) -> None:
    (tmp_path / "._rows.parquet").write_bytes(COMPANION)
    assert list(dataset._rows(str(tmp_path), "train", Columns(), Remarks())) == []


def test_a_companion_of_a_key_is_not_even_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    allowlist, anna = Allowlist(tmp_path / "authorized"), Keys.new()
    allowlist.add("anna", anna.public)
    beside(tmp_path / "authorized" / "anna.pub")
    assert allowlist.users() == {anna.public: "anna"}
    assert caplog.records == []
