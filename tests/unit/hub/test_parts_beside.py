"""What a single file takes from beside it, from the environment or from the cache."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.errors import (
    ModelNotFoundError,
    NoSuchNameError,
    NotFetchedError,
    WeightsError,
)
from fluxmesh.models.flux1.files.completion import VOCABULARIES
from fluxmesh.storage.safetensors import read_header, write_tensors
from fluxmesh.weights import hub
from tests import checkpoints
from tests.checkpoints import make_checkpoint
from tests.unit.hub.caches import COMMIT, cached


def test_environment_variables_name_single_files(tmp_path, monkeypatch):
    made = make_checkpoint(tmp_path / "flux", layout="bfl", guidance=True)
    moved = shutil.move(made.folder / "ae.safetensors", tmp_path / "elsewhere.safetensors")
    monkeypatch.setenv("FLUX_DEV", str(made.path))
    monkeypatch.setenv("AE", str(moved))
    checkpoint = hub.resolve("dev")
    assert checkpoint.name == "dev"
    assert checkpoint.components["transformer"].files == (made.path,)
    assert checkpoint.components["vae"].files == (Path(moved),)


@pytest.mark.parametrize("variable", ["FLUX_SCHNELL", "AE"])
def test_a_variable_that_names_no_file_is_an_error(tmp_path, monkeypatch, variable):
    made = make_checkpoint(tmp_path / "flux", layout="bfl")
    monkeypatch.setenv("FLUX_SCHNELL", str(made.path))
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    with pytest.raises(ModelNotFoundError, match=variable):
        hub.resolve("schnell")


def test_an_autoencoder_that_is_named_must_be_one(tmp_path, monkeypatch):
    made = make_checkpoint(tmp_path, layout="bfl")
    monkeypatch.setenv("AE", str(made.path))
    with pytest.raises(ModelNotFoundError, match="no autoencoder"):
        hub.resolve(str(made.path))


def test_a_single_file_takes_what_it_lacks_from_a_model_in_the_cache(tmp_path, empty_cache):
    made = make_checkpoint(tmp_path / "full", layout="bfl")
    alone = tmp_path / "alone" / "flux1.safetensors"
    alone.parent.mkdir()
    shutil.copy(made.path, alone)
    with pytest.raises(NotFetchedError, match="No text encoders") as caught:
        hub.resolve(str(alone))  # asks nobody: the cache is empty, and there is no network
    assert f"fluxmesh models pull {alone}" in str(caught.value) and "9.9 GB" in str(caught.value)
    snapshot = cached(empty_cache, hub.REPOS["schnell"])
    checkpoint = hub.resolve(str(alone), download=False)
    assert checkpoint.components["vae"].layout == "diffusers"
    assert checkpoint.components["vae"].files[0].parent.parent == snapshot
    assert checkpoint.tokenizers["clip"].parent == snapshot


def vocabularies(cache: Path, folder: Path) -> None:
    """The two repositories of vocabularies alone, as `pull` leaves them in the cache."""
    for repo, part in VOCABULARIES.items():
        repository = cache / f"models--{repo.replace('/', '--')}"
        shutil.copytree(folder / part, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


def test_files_that_hold_all_but_vocabularies_say_so_and_find_them_in_the_cache(
    tmp_path, empty_cache
):
    made = make_checkpoint(tmp_path / "made", layout="bfl")
    files = tmp_path / "files"
    files.mkdir()
    for source, name in (
        ("flux1-test.safetensors", "flux1-test.safetensors"),
        ("ae.safetensors", "ae.safetensors"),
        ("text_encoder/model.safetensors", "clip_l.safetensors"),
        ("text_encoder_2/model.safetensors", "t5xxl_fp16.safetensors"),
    ):
        shutil.copy(made.folder / source, files / name)
    with pytest.raises(NotFetchedError) as caught:
        hub.resolve(str(files))
    sentence = str(caught.value)
    assert sentence.startswith("No tokenizers (CLIP's and T5's) for ")
    assert f"fluxmesh models pull {files}" in sentence and "(6 MB)" in sentence
    vocabularies(empty_cache, made.folder)
    checkpoint = hub.resolve(str(files))
    assert checkpoint.architecture.t5 == made.t5 and checkpoint.components["vae"].layout == "bfl"
    assert checkpoint.tokenizers["t5"].is_relative_to(empty_cache)


def test_of_several_files_that_fit_the_usual_one_and_the_unrounded_one_is_taken(tmp_path):
    made = make_checkpoint(tmp_path / "made", layout="bfl")
    encoders = made.folder / "text_encoders"
    encoders.mkdir()
    t5 = made.folder / "text_encoder_2" / "model.safetensors"
    for name in ("a-finetune.safetensors", "t5xxl_fp16.safetensors"):
        shutil.copy(t5, encoders / name)
    entries = read_header(t5).entries
    rounded = {key: (np.zeros(entry.shape, np.uint8), "F8_E4M3") for key, entry in entries.items()}
    write_tensors(encoders / "t5xxl_a_fp8.safetensors", rounded, {})
    (encoders / "broken.safetensors").write_bytes(b"x")
    (encoders / "._t5xxl_fp16.safetensors").write_bytes(b"x")
    component = hub.resolve(str(made.path)).components["text_encoder_2"]
    assert component.files == (encoders / "t5xxl_fp16.safetensors",)


def test_an_encoder_of_other_sizes_is_passed_over(tmp_path):
    made = make_checkpoint(tmp_path / "made", layout="bfl")
    other = make_checkpoint(tmp_path / "other", t5=dataclasses.replace(checkpoints.T5, d_model=48))
    t5 = other.folder / "text_encoder_2" / "model.safetensors"
    shutil.copy(t5, made.folder / "t5xxl_fp16.safetensors")
    component = hub.resolve(str(made.path)).components["text_encoder_2"]
    assert component.files == (made.folder / "text_encoder_2" / "model.safetensors",)


@pytest.mark.parametrize(
    ("folder", "name", "content", "said"),
    [
        ("text_encoder_2", "t5xxl_fp16.safetensors", b"", "t5xxl_fp16.safetensors is empty"),
        ("vae", "ae.safetensors", b"version https://git-lfs", "ae.safetensors is a pointer of Git"),
        ("text_encoder", "clip_l.safetensors", bytes(8), "clip_l.safetensors has a corrupt header"),
    ],
)
def test_a_part_that_is_beside_and_damaged_is_told_and_not_missed(
    tmp_path, folder, name, content, said
):
    made = make_checkpoint(tmp_path, layout="bfl")
    shutil.rmtree(made.folder / folder, ignore_errors=True)
    (made.folder / name).write_bytes(content)
    with pytest.raises((ModelNotFoundError, WeightsError), match=said) as caught:
        hub.resolve(str(made.path))
    assert "models pull" not in str(caught.value)


def test_an_autoencoder_under_other_names_is_told_by_what_it_is(tmp_path):
    made = make_checkpoint(tmp_path / "made", layout="bfl")
    folder = make_checkpoint(tmp_path / "other").path
    (file,) = (Path(folder) / "vae").glob("*.safetensors")
    (made.folder / "ae.safetensors").unlink()
    shutil.copy(file, made.folder / "aesthetic.safetensors")
    with pytest.raises(NotFetchedError, match="No autoencoder"):
        hub.resolve(str(made.path))
    shutil.copy(file, made.folder / "ae.safetensors")
    with pytest.raises(
        ModelNotFoundError, match="ae.safetensors is the autoencoder of a diffusers"
    ):
        hub.resolve(str(made.path))


def test_endings_may_be_in_capitals(tmp_path):
    """As on disks of Windows, and after some cameras' habits."""
    made = make_checkpoint(tmp_path, layout="bfl")
    for file in (made.path, made.folder / "ae.safetensors"):
        file.rename(file.with_suffix(".SAFETENSORS"))
    checkpoint = hub.resolve(str(made.folder))
    assert checkpoint.components["vae"].files[0].name == "ae.SAFETENSORS"
    with pytest.raises(NoSuchNameError):  # and no Hub id
        hub.resolve("models/FLUX1.SAFETENSORS", download=False)


def test_a_folder_with_several_transformers_asks_for_one(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    shutil.copy(made.path, made.folder / "flux1-second.safetensors")
    with pytest.raises(ModelNotFoundError, match="flux1-second.safetensors, flux1-test"):
        hub.resolve(str(made.folder))


def test_the_autoencoder_is_no_model_by_itself(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    with pytest.raises(ModelNotFoundError, match="autoencoder"):
        hub.resolve(str(made.folder / "ae.safetensors"))
