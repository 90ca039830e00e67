"""A checkpoint of any layout, packed as a push sends it, is the same one where it lands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fluxmesh.weights import hub
from fluxmesh.weights.models_folder import entry_in
from fluxmesh.wire.messages import AskModel, ReceiveModel
from fluxmesh.wire.protocol import encode
from fluxmesh_agent.parcels.packing import packed
from tests.wild_layouts import LAYOUTS, original


def landed(model: str, folder: Path) -> str:
    """The content of what lands in a folder of models when `model` is sent there."""
    sent = packed(model, model)
    encode(ReceiveModel(model, sent.parcel, b"t" * 32, ()))  # its names may travel
    encode(AskModel(model))
    for path, file in sent.paths.items():
        (folder / sent.parcel.name / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / sent.parcel.name / path)
    arrived = hub.resolve(str(entry_in(folder, model)), download=False)
    assert arrived.content == sent.parcel.content
    for component in arrived.components.values():
        assert all(file.is_relative_to(folder) for file in component.files)
    assert all(path.is_relative_to(folder) for path in arrived.tokenizers.values())
    return arrived.content


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_lands_whole_in_one_folder(layout: str, tmp_path: Path) -> None:
    model = LAYOUTS[layout](tmp_path / "home" / "mine")
    assert landed(str(model), tmp_path / "models")


def test_a_folder_of_the_hubs_cache_on_another_disk_lands_as_a_folder(tmp_path: Path) -> None:
    repository = tmp_path / "disk" / "models--someone--paints"
    original(repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    assert landed(str(repository), tmp_path / "models")


def test_what_a_file_takes_from_the_hubs_cache_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text encoders of a transformer alone lie in another repository's snapshot."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--black-forest-labs--FLUX.1-schnell"
    original(repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef0123456789abcdef01234567")
    whole = LAYOUTS["files side by side"](tmp_path / "whole")
    alone = tmp_path / "my transformer.safetensors"
    os.rename(whole, alone)
    assert landed(str(alone), tmp_path / "models")
