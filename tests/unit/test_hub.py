"""From names to checkpoints on this machine: aliases, folders, single files, the cache."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.errors import (
    IncompleteModelError,
    ModelNotFoundError,
    NoSuchNameError,
    NotFetchedError,
    WeightsError,
)
from fluxmesh.models.flux1.files.completion import VOCABULARIES
from fluxmesh.models.registry import BY_PREFERENCE, PUBLISHED
from fluxmesh.storage.safetensors import read_header, read_tensor, write_tensors
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import from_folder
from fluxmesh.weights.embedded import checkpoints as embedded
from tests import checkpoints
from tests.checkpoints import make_checkpoint
from tests.flux2_checkpoint import make_flux2

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A Hub cache of the test's own, and none of the user's overrides."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path / "state"))
    for variable in ("AE", "FLUX_DEV", "FLUX_SCHNELL"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


def cached(cache: Path, repo: str, **options) -> Path:
    """A random model where the Hub's library would have put it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    make_checkpoint(folder / "snapshots" / COMMIT, **options)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_every_size_is_read_from_either_layout(tmp_path, layout, guidance):
    made = make_checkpoint(tmp_path, layout=layout, guidance=guidance)
    checkpoint = hub.resolve(str(made.path))
    assert checkpoint.architecture.transformer == made.transformer
    assert checkpoint.architecture.t5 == made.t5
    assert checkpoint.architecture.clip == made.clip
    assert checkpoint.architecture.autoencoder == made.autoencoder
    assert checkpoint.architecture.schedule == made.schedule
    assert checkpoint.kind == layout
    assert checkpoint.bits is None


def test_a_guided_model_takes_many_steps_and_a_distilled_one_few(tmp_path):
    steps = {}
    for guidance in (False, True):
        made = make_checkpoint(tmp_path / str(guidance), layout="bfl", guidance=guidance)
        defaults = hub.resolve(str(made.path)).defaults
        assert (defaults.height, defaults.width, defaults.guidance) == (512, 512, 4.0)
        steps[guidance] = defaults.steps
    assert steps == {False: 4, True: 50}


@pytest.mark.parametrize(
    ("guidance", "declared", "length"),
    [(False, 512, 256), (True, 512, 512), (False, 32, 32), (True, 32, 32), (False, 10**30, 256)],
)
def test_prompts_are_as_long_as_the_tokenizer_says_and_256_at_most_for_schnell(
    tmp_path, guidance, declared, length
):
    make_checkpoint(tmp_path, guidance=guidance, t5_max_length=declared)
    assert hub.resolve(str(tmp_path)).defaults.t5_max_length == length


def test_the_revision_of_a_folder_changes_with_its_weights(tmp_path):
    first = make_checkpoint(tmp_path / "a", seed=1)
    again = make_checkpoint(tmp_path / "b", seed=1)
    other = make_checkpoint(tmp_path / "c", seed=2)
    a, b, c = (hub.resolve(str(made.path)).revision for made in (first, again, other))
    assert a == b != c
    assert a.startswith("local-")


def test_the_revision_of_a_hub_model_is_its_commit(empty_cache):
    cached(empty_cache, "someone/paints")
    assert hub.resolve("someone/paints", download=False).revision == COMMIT


@pytest.mark.parametrize(
    ("alias", "names"),
    [
        ("schnell", ("schnell", "flux-schnell", "FLUX-Schnell", "FLUX.1-schnell", "flux1-schnell")),
        ("dev", ("dev", "FLUX.1-dev", "black-forest-labs/FLUX.1-dev")),
        ("krea-dev", ("krea-dev", "flux1-krea-dev", "FLUX.1-Krea-dev")),
        ("klein-4b", ("klein", "klein-4b", "flux2-klein-4b", "flux-2-klein-4b", "FLUX.2-klein-4B")),
        ("klein-4b", ("black-forest-labs/FLUX.2-klein-4B", "black-forest-labs/flux.2-klein-4b")),
        ("klein-9b", ("klein-9b", "flux2-klein-9b", "FLUX.2-klein-9B")),
        ("klein-9b-kv", ("klein-9b-kv", "flux-2-klein-9b-kv", "FLUX.2-klein-9b-kv")),
        ("klein-base-4b", ("klein-base", "klein-base-4b", "FLUX.2-klein-base-4B")),
        ("klein-base-9b", ("klein-base-9b", "flux2-klein-base-9b")),
        ("flux2-dev", ("flux2-dev", "flux-2-dev", "FLUX.2-dev", "black-forest-labs/FLUX.2-dev")),
    ],
)
def test_a_model_has_several_spellings(alias, names, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)  # importing it would fail
    monkeypatch.chdir(tmp_path)
    for name in names:
        assert (hub.alias_of(name), hub.full_name(name)) == (alias, alias)
        hub.check_name(name)
        with pytest.raises(NotFetchedError, match=f"models pull {alias}`"):
            hub.resolve(name, download=False)


@pytest.mark.parametrize("name", ["flux", "klein-4b.safetensors", "other/FLUX.2-dev", "2-dev", ""])
def test_what_no_model_is_called_is_no_alias(name):
    assert hub.alias_of(name) is None


def test_a_folder_here_goes_before_the_long_spelling_of_an_alias(tmp_path, monkeypatch):
    """As `hf download` with a folder of the repository's own name leaves it."""
    made = make_checkpoint(tmp_path / "FLUX.2-klein-4B").folder
    make_checkpoint(tmp_path / "black-forest-labs" / "FLUX.1-dev")
    monkeypatch.chdir(tmp_path)
    assert hub.full_name("FLUX.2-klein-4B") == str(made)
    assert hub.resolve("FLUX.2-klein-4B").revision.startswith("local-")
    assert hub.resolve("black-forest-labs/FLUX.1-dev").revision.startswith("local-")


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


def test_a_file_with_a_block_missing_in_its_middle_is_refused(tmp_path):
    """A count of what is there without a gap would paint with the blocks before it alone."""
    made = make_checkpoint(
        tmp_path,
        layout="bfl",
        transformer=dataclasses.replace(checkpoints.TRANSFORMER, depth_single_blocks=3),
    )
    entries = read_header(made.path).entries
    assert hub.resolve(str(made.path)).architecture.transformer.depth_single_blocks == 3
    arrays = {
        key: read_tensor(entry) for key, entry in entries.items() if "single_blocks.1." not in key
    }
    checkpoints.write_safetensors(made.path, arrays)
    with pytest.raises(WeightsError, match=r"lacks single_blocks\.1\.linear1\.weight and has what"):
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


def test_an_encoder_of_other_sizes_is_passed_over(tmp_path):
    made = make_checkpoint(tmp_path / "made", layout="bfl")
    other = make_checkpoint(tmp_path / "other", t5=dataclasses.replace(checkpoints.T5, d_model=48))
    t5 = other.folder / "text_encoder_2" / "model.safetensors"
    shutil.copy(t5, made.folder / "t5xxl_fp16.safetensors")
    component = hub.resolve(str(made.path)).components["text_encoder_2"]
    assert component.files == (made.folder / "text_encoder_2" / "model.safetensors",)


def test_a_folder_with_several_transformers_asks_for_one(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    shutil.copy(made.path, made.folder / "flux1-second.safetensors")
    with pytest.raises(ModelNotFoundError, match="flux1-second.safetensors, flux1-test"):
        hub.resolve(str(made.folder))


def test_an_autoencoder_that_is_named_must_be_one(tmp_path, monkeypatch):
    made = make_checkpoint(tmp_path, layout="bfl")
    monkeypatch.setenv("AE", str(made.path))
    with pytest.raises(ModelNotFoundError, match="no autoencoder"):
        hub.resolve(str(made.path))


def test_the_autoencoder_is_no_model_by_itself(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    with pytest.raises(ModelNotFoundError, match="autoencoder"):
        hub.resolve(str(made.folder / "ae.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "nonesuch",
        "../../etc/passwd",
        "owner/../repo",
        "a/b/c",
        "owner/repo/../..",
        "-owner/repo",
        "owner/repo--x",
        "",
        "\0/x",
        "~nobody-of-this-name/x",
        "x" * 5000,
    ],
)
def test_a_name_that_leads_nowhere_is_refused_without_asking_the_network(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)  # importing it would fail
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(name)
    assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "flux.ckpt"
    file.write_bytes(b"pickle")
    with pytest.raises(ModelNotFoundError, match="no other format"):
        hub.resolve(str(file))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"model_index\.json"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize(
    "missing",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder_2/model.safetensors",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer_2/spiece.model",
    ],
)
def test_a_folder_that_lacks_a_file_says_which_folder_or_file(tmp_path, missing):
    make_checkpoint(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(IncompleteModelError, match=missing.split("/")[0]) as caught:
        hub.resolve(str(tmp_path))
    assert "models pull" not in str(caught.value)  # which would not mend a folder of the user's


def test_a_model_of_the_hub_that_lacks_files_is_completed_by_pull(empty_cache):
    (cached(empty_cache, "someone/paints") / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(NotFetchedError, match="fluxmesh models pull someone/paints") as caught:
        hub.resolve("someone/paints", download=False)
    assert "tokenizer/vocab.json" in str(caught.value)


@pytest.mark.parametrize("below", ["", "snapshots", f"snapshots/{COMMIT}"])
def test_a_path_into_the_hubs_cache_is_a_model(tmp_path, below):
    """Of any cache, also one on another disk."""
    snapshot = cached(tmp_path / "elsewhere", "someone/paints")
    repository = snapshot.parent.parent
    checkpoint = hub.resolve(str(repository / below))
    assert checkpoint.revision == COMMIT
    assert checkpoint.tokenizers["clip"].parent == snapshot.resolve()
    assert hub.full_name(str(repository)) == str(repository)


def test_a_path_into_the_hubs_cache_needs_no_main(tmp_path):
    """A model that was fetched at a revision of its own has no `refs/main`."""
    snapshot = cached(tmp_path / "elsewhere", "someone/paints")
    repository = snapshot.parent.parent
    shutil.rmtree(repository / "refs")
    assert hub.resolve(str(repository)).revision == COMMIT
    shutil.copytree(snapshot, snapshot.with_name("f" * 40))
    with pytest.raises(NotFetchedError, match="models pull someone/paints"):
        hub.resolve(str(repository))


def test_a_part_of_a_folder_is_told_by_the_folder_above(tmp_path):
    made = make_checkpoint(tmp_path)
    with pytest.raises(ModelNotFoundError, match="name the folder above"):
        hub.resolve(str(made.folder / "transformer"))


def test_weights_that_another_library_quantized_are_told_by_its_name(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path / "transformer" / "config.json", quantization_config={"quant_method": "quanto"})
    with pytest.raises(ModelNotFoundError, match="quantized by quanto"):
        hub.resolve(str(tmp_path))


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


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "Flux3Pipeline", None])
def test_another_family_of_models_is_refused_by_name(tmp_path, pipeline):
    make_checkpoint(tmp_path)
    edit(tmp_path / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelNotFoundError, match=str(pipeline)):
        hub.resolve(str(tmp_path))


def test_a_model_of_an_unknown_input_is_refused_because_of_its_channels(tmp_path):
    make_checkpoint(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    edit(config, in_channels=96, out_channels=64)
    with pytest.raises(WeightsError, match="takes 96 channels"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"in_channels": 64}', '{"num_layers": null}'])
def test_a_broken_config_is_refused_by_name(tmp_path, text):
    make_checkpoint(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"transformer.config\.json"):
        hub.resolve(str(tmp_path))


def test_a_value_that_a_config_leaves_null_is_the_usual_one(tmp_path):
    make_checkpoint(tmp_path)
    expected = hub.resolve(str(tmp_path))
    edit(tmp_path / "transformer" / "config.json", guidance_embeds=None)
    edit(tmp_path / "scheduler" / "scheduler_config.json", base_shift=None, shift_terminal=None)
    edit(tmp_path / "vae" / "config.json", latents_mean=None, mid_block_add_attention=None)
    nulls = hub.resolve(str(tmp_path))
    assert nulls.architecture == expected.architecture
    edit(tmp_path / "transformer" / "config.json", num_layers=None)
    with pytest.raises(WeightsError, match="lacks 'num_layers'"):
        hub.resolve(str(tmp_path))


def test_an_autoencoder_of_another_model_is_told_as_such(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path / "vae" / "config.json", latent_channels=1)
    with pytest.raises(WeightsError, match="autoencoder of .* has 1 channels.* two models"):
        hub.resolve(str(tmp_path))


def test_a_cache_with_a_broken_note_of_its_revision_is_one_without(empty_cache):
    snapshot = cached(empty_cache, "someone/flux")
    (snapshot.parent.parent / "refs" / "main").write_bytes(b"\xff\xfe")
    assert "someone/flux" not in list(hub.names_here())
    listed = {model.name for model in hub.list_models()}
    assert listed == {*embedded.embedded_names(), *hub.REPOS}
    with pytest.raises(NotFetchedError):
        hub.resolve("someone/flux", download=False)


def test_a_single_file_of_another_model_is_refused(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    checkpoints.write_safetensors(made.path, {"unet.conv_in.weight": checkpoints.np.ones((4, 4))})
    with pytest.raises(WeightsError, match="not a FLUX transformer"):
        hub.resolve(str(made.path))


def test_resolving_imports_neither_mlx_nor_the_hubs_library(tmp_path):
    make_checkpoint(tmp_path)
    program = (
        "import sys; from fluxmesh.weights import hub; hub.resolve(sys.argv[1]); hub.list_models();"
        "print([m for m in ('mlx', 'torch', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_name_is_full_as_resolve_reads_it(tmp_path, monkeypatch):
    """A folder that happens to be called like a model changes nothing."""
    for folder in ("tiny", "dev", "mine"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    assert [hub.full_name(name) for name in ("tiny", "flux-Dev", "FLUX-schnell")] == [
        "tiny",
        "dev",
        "schnell",
    ]
    assert hub.full_name("mine") == str(tmp_path / "mine")
    assert hub.full_name("someone/flux") == "someone/flux"


def test_content_tells_models_apart_and_knows_a_copy(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path / "one", seed=1).folder
    copy = shutil.copytree(made, tmp_path / "elsewhere")
    (copy / "transformer" / "notes.json").write_text("{}")
    other = make_checkpoint(tmp_path / "two", seed=2).folder
    original = from_folder(made, "m")
    again = from_folder(copy, "m", revision="a" * 40)
    assert original.content == again.content and original.revision != again.revision
    assert from_folder(other, "m").content != original.content
    spiece = copy / "tokenizer_2" / "spiece.model"
    spiece.write_bytes(spiece.read_bytes()[:-1] + b"x")
    assert from_folder(copy, "m").content != original.content
    config = made / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_shift": 0.25}))
    assert from_folder(made, "m").content != original.content


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("schnel", "schnell"),
        ("TINNY", "tiny"),
        ("my-modle", "my-model"),
        ("models/dev-4bti", "models/dev-4bit"),
        ("./my-modle", "./my-model"),
    ],
)
def test_a_misspelt_name_is_told_with_the_one_that_was_meant(name, meant, tmp_path, monkeypatch):
    """Also where it could be a Hub id: a folder that is here is looked at first."""
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)  # importing it would fail
    monkeypatch.chdir(tmp_path)
    for folder in ("my-model", "models/dev-4bit"):
        (tmp_path / folder).mkdir(parents=True)
    for ask in (hub.resolve, hub.check_name):
        with pytest.raises(ModelNotFoundError, match=rf"did you mean {re.escape(meant)}\?"):
            ask(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("https://huggingface.co/owner/repo", "owner/repo"),
        ("https://huggingface.co/owner/re.po/blob/main/flux1-dev.safetensors", "owner/re.po"),
        ("hf.co/owner/repo?x=1", "owner/repo"),
        ("owner/repo/", "owner/repo"),
        ("file:///my%20models/flux", "/my models/flux"),
    ],
)
def test_an_address_is_told_with_the_name_that_it_stands_for(name, meant, monkeypatch):
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)
    for ask in (hub.resolve, hub.check_name):
        with pytest.raises(NoSuchNameError, match=rf"did you mean {re.escape(meant)}\?"):
            ask(name)


def test_what_stands_in_the_place_of_a_file_is_told(tmp_path, monkeypatch):
    """Also where the name could be a Hub id, which nobody is asked for."""
    monkeypatch.setitem(sys.modules, "fluxmesh.weights.download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "flux").symlink_to("/Volumes/T7/flux")
    (tmp_path / "models" / "loop").symlink_to("loop")
    (tmp_path / "models" / ".dev.safetensors.icloud").write_bytes(b"bplist00")
    (tmp_path / "models" / "schnell.safetensors.crdownload").write_bytes(b"x")
    for name, said in (
        ("models/flux", "models/flux is a link to /Volumes/T7/flux, where nothing is; connect"),
        ("models/flux/transformer", "models/flux/transformer is behind models/flux, a link to"),
        ("models/loop", "a link to loop"),
        ("models/dev.safetensors", ".dev.safetensors.icloud, which iCloud keeps elsewhere"),
        ("models/schnell.safetensors", "schnell.safetensors.crdownload, a download that has not"),
    ):
        for ask in (hub.resolve, hub.check_name):
            with pytest.raises(NoSuchNameError, match=re.escape(said)):
                ask(name)


def test_no_name_is_not_this_folder(tmp_path, monkeypatch):
    make_checkpoint(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(".").kind == "diffusers"
    with pytest.raises(NoSuchNameError, match="No model is called ''"):
        hub.resolve("")


def test_a_folder_of_an_owners_name_hides_no_repository(tmp_path, monkeypatch):
    """What is not nearly the name of something there, the Hub is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "black-forest-labs" / "FLUX.2-dev").mkdir(parents=True)
    for name in ("black-forest-labs/FLUX.1-dev", "black-forest-labs/other"):
        hub.check_name(name)
        with pytest.raises(ModelNotFoundError, match="is not on this machine"):
            hub.resolve(name, download=False)
