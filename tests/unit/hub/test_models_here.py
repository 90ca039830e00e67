"""Which models are on this machine, and which of them comes first."""

from __future__ import annotations

import shutil

import pytest

from fluxmesh.errors import (
    NoSuchNameError,
    NotFetchedError,
)
from fluxmesh.models.registry import BY_PREFERENCE, PUBLISHED
from fluxmesh.weights import hub
from fluxmesh.weights.embedded import checkpoints as embedded
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import make_flux2
from tests.unit.hub.caches import COMMIT, cached, edit


def preferred() -> list[str]:
    """Names of models that stand in, but for other embedded ones than tiny."""
    names = [checkpoint.name for checkpoint in hub.preferred_here()]
    return [name for name in names if name == "tiny" or name not in embedded.embedded_names()]


def test_the_best_model_that_is_here_comes_first_and_tiny_last(empty_cache):
    assert preferred() == ["tiny"]
    cached(empty_cache, hub.REPOS["dev"], guidance=True)
    cached(empty_cache, hub.REPOS["klein-base-4b"])
    assert preferred() == ["dev", "klein-base-4b", "tiny"]
    for alias in ("schnell", "klein-4b", "flux2-dev"):
        cached(empty_cache, hub.REPOS[alias])
    few, many = ["klein-4b", "schnell"], ["dev", "klein-base-4b", "flux2-dev"]
    assert preferred() == [*few, *many, "tiny"]


def test_every_name_has_a_place_among_those_to_prefer_or_needs_a_picture():
    assert len(set(BY_PREFERENCE)) == len(BY_PREFERENCE)
    assert set(BY_PREFERENCE) <= PUBLISHED.keys()
    waits = [PUBLISHED[alias].architecture.defaults.steps > 8 for alias in BY_PREFERENCE]
    assert waits == sorted(waits)  # a few steps first


def test_a_file_that_the_environment_names_is_here(tmp_path, monkeypatch):
    made = make_checkpoint(tmp_path / "flux", layout="bfl", guidance=True)
    monkeypatch.setenv("FLUX_DEV", str(made.path))
    assert preferred() == ["dev", "tiny"]
    monkeypatch.setenv("FLUX_DEV", str(tmp_path / "absent"))
    assert preferred() == ["tiny"]


def test_a_model_that_was_pushed_to_this_machine_is_here(tmp_path):
    made = make_checkpoint(tmp_path / "state" / "models" / "schnell")
    checkpoint = next(hub.preferred_here())
    assert (checkpoint.name, hub.full_name(checkpoint.name)) == ("schnell", "schnell")
    assert checkpoint.components["transformer"].files[0].is_relative_to(made.folder)
    assert {model.name: model for model in hub.list_models()}["schnell"].revision is not None
    next((made.folder / "transformer").glob("*.safetensors")).unlink()
    assert preferred() == ["tiny"]


@pytest.mark.parametrize("declared", [False, True])
def test_the_embedded_model_paints_the_size_that_it_was_trained_at(tmp_path, monkeypatch, declared):
    made = make_checkpoint(tmp_path / "tiny")  # declares 2 steps, 32 by 32
    if not declared:
        (made.folder / "fluxmesh.json").unlink()
    monkeypatch.setattr(embedded, "folder_of", lambda name: made.folder)
    defaults = hub.resolve("tiny").defaults
    expected = (2, 32, 32) if declared else (4, 128, 128)
    assert (defaults.steps, defaults.height, defaults.width) == expected


def test_an_embedded_model_has_a_name_where_its_files_are(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "folder_of", tmp_path.joinpath)
    with pytest.raises(NoSuchNameError, match="No model is called 'tiny-klein'"):
        hub.resolve("tiny-klein", download=False)
    assert "tiny-klein" not in hub.names_here()
    klein = make_flux2(tmp_path / "tiny-klein")
    (klein / "fluxmesh.json").unlink()
    checkpoint = hub.resolve("tiny-klein", download=False)
    assert (checkpoint.name, checkpoint.defaults.height) == ("tiny-klein", 128)
    assert hub.pull("tiny-klein").content == checkpoint.content
    assert list(hub.names_here())[:1] == ["tiny-klein"]
    assert [(model.name, model.source) for model in hub.list_models()][0] == (
        "tiny-klein", "embedded"
    )  # fmt: skip


def test_a_half_fetched_model_is_not_the_default(empty_cache):
    snapshot = cached(empty_cache, hub.REPOS["schnell"], shards=3)
    next(snapshot.glob("transformer/*00002*")).unlink()
    assert preferred() == ["tiny"]
    info = {model.name: model for model in hub.list_models()}["schnell"]
    assert info.revision is None
    assert "missing" in info.note


def test_models_in_the_cache_are_listed_and_others_are_not(empty_cache):
    cached(empty_cache, "someone/paints")
    cached(empty_cache, hub.REPOS["dev"], guidance=True)
    edit(cached(empty_cache, "someone/else") / "model_index.json", _class_name="Flux3Pipeline")
    edit(cached(empty_cache, "some/sd") / "model_index.json", _class_name="StableDiffusion")
    listed = {model.name: model for model in hub.list_models()}
    assert set(listed) == {*embedded.embedded_names(), *hub.REPOS, "someone/paints"}
    assert {"schnell", "dev", "krea-dev", "klein-4b", "flux2-dev"} < set(listed)
    assert listed["schnell"].note == "not here"
    assert listed["dev"].revision == COMMIT
    assert listed["dev"].nbytes > 10**6


def test_models_of_other_layouts_in_the_cache_are_listed_and_other_files_are_not(empty_cache):
    made = make_checkpoint(empty_cache / "made", layout="bfl")
    for repo, file in (("some/finetune", "flux1-x.safetensors"), ("some/ae", "ae.safetensors")):
        snapshot = empty_cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        source = made.path if "flux1" in file else made.folder / "ae.safetensors"
        shutil.copy(source, snapshot / file)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    listed = {model.name: model for model in hub.list_models()}
    assert "some/finetune" in listed and "some/ae" not in listed
    assert listed["some/finetune"].revision is None
    assert "No text encoders" in listed["some/finetune"].note


def test_a_cache_with_a_broken_note_of_its_revision_is_one_without(empty_cache):
    snapshot = cached(empty_cache, "someone/flux")
    (snapshot.parent.parent / "refs" / "main").write_bytes(b"\xff\xfe")
    assert "someone/flux" not in list(hub.names_here())
    listed = {model.name for model in hub.list_models()}
    assert listed == {*embedded.embedded_names(), *hub.REPOS}
    with pytest.raises(NotFetchedError):
        hub.resolve("someone/flux", download=False)
