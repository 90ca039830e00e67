"""From names to checkpoints on this machine: aliases, folders, single files, the cache."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxmesh.errors import ModelNotFoundError, WeightsError
from fluxmesh.weights import hub
from fluxmesh.weights.checkpoint import from_folder
from tests import checkpoints
from tests.checkpoints import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A Hub cache of the test's own, and none of the user's overrides."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
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
    assert checkpoint.transformer == made.transformer
    assert checkpoint.t5 == made.t5
    assert checkpoint.clip == made.clip
    assert checkpoint.autoencoder == made.autoencoder
    assert checkpoint.schedule == made.schedule
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


@pytest.mark.parametrize("name", ["schnell", "flux-schnell", "FLUX-Schnell"])
def test_an_alias_has_several_spellings(empty_cache, name):
    cached(empty_cache, hub.REPOS["schnell"])
    assert hub.resolve(name, download=False).name == "schnell"


def test_the_default_is_tiny_until_a_flux_is_here(empty_cache):
    assert hub.default_model() == "tiny"
    cached(empty_cache, hub.REPOS["dev"], guidance=True)
    assert hub.default_model() == "dev"
    cached(empty_cache, hub.REPOS["schnell"])
    assert hub.default_model() == "schnell"


@pytest.mark.parametrize("declared", [False, True])
def test_the_embedded_model_paints_the_size_that_it_was_trained_at(tmp_path, monkeypatch, declared):
    made = make_checkpoint(tmp_path / "tiny")  # declares 2 steps, 32 by 32
    if not declared:
        (made.folder / "fluxmesh.json").unlink()
    monkeypatch.setattr(hub, "tiny_folder", lambda: made.folder)
    defaults = hub.resolve("tiny").defaults
    expected = (2, 32, 32) if declared else (4, 128, 128)
    assert (defaults.steps, defaults.height, defaults.width) == expected


def test_a_half_fetched_model_is_not_the_default(empty_cache):
    snapshot = cached(empty_cache, hub.REPOS["schnell"], shards=3)
    next(snapshot.glob("transformer/*00002*")).unlink()
    assert hub.default_model() == "tiny"
    info = {model.name: model for model in hub.list_models()}["schnell"]
    assert info.revision is None
    assert "missing" in info.note


def test_models_in_the_cache_are_listed_and_others_are_not(empty_cache):
    cached(empty_cache, "someone/paints")
    cached(empty_cache, hub.REPOS["dev"], guidance=True)
    edit(cached(empty_cache, "someone/else") / "model_index.json", _class_name="Flux2Pipeline")
    edit(cached(empty_cache, "some/sd") / "model_index.json", _class_name="StableDiffusion")
    listed = {model.name: model for model in hub.list_models()}
    assert set(listed) == {"tiny", "schnell", "dev", "krea-dev", "someone/paints"}
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
    with pytest.raises(ModelNotFoundError, match="No text encoders"):
        hub.resolve(str(alone), download=False)
    snapshot = cached(empty_cache, hub.REPOS["schnell"])
    checkpoint = hub.resolve(str(alone), download=False)
    assert checkpoint.components["vae"].layout == "diffusers"
    assert checkpoint.components["vae"].files[0].parent.parent == snapshot
    assert checkpoint.tokenizer.parent == snapshot


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
    with pytest.raises(ModelNotFoundError, match=missing.split("/")[0]):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "Flux2Pipeline", None])
def test_another_family_of_models_is_refused_by_name(tmp_path, pipeline):
    make_checkpoint(tmp_path)
    edit(tmp_path / "model_index.json", _class_name=pipeline)
    with pytest.raises(ModelNotFoundError, match=str(pipeline)):
        hub.resolve(str(tmp_path))


def test_a_fill_model_is_refused_because_of_its_channels(tmp_path):
    make_checkpoint(tmp_path)
    edit(tmp_path / "transformer" / "config.json", in_channels=384)
    with pytest.raises(WeightsError, match="384"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"in_channels": 64}', '{"num_layers": null}'])
def test_a_broken_config_is_refused_by_name(tmp_path, text):
    make_checkpoint(tmp_path)
    (tmp_path / "transformer" / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"transformer.config\.json"):
        hub.resolve(str(tmp_path))


def test_a_single_file_of_another_model_is_refused(tmp_path):
    made = make_checkpoint(tmp_path, layout="bfl")
    checkpoints.write_safetensors(made.path, {"unet.conv_in.weight": checkpoints.np.ones((4, 4))})
    with pytest.raises(WeightsError, match="not a FLUX.1 transformer"):
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
