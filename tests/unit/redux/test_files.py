"""FLUX.1 Redux as files: in whose form it is read, where it is looked for, how it is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.errors import (
    FluxmeshError,
    ModelNotFoundError,
    NoSuchNameError,
    NotFetchedError,
    WeightsError,
)
from fluxmesh.models.flux1.config import ReduxConfig
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.flux1.files.redux import REPO, SIGLIP
from fluxmesh.weights import hub
from fluxmesh.weights.reader import verify
from fluxmesh.weights.reference_readers import resolve_reader
from fluxmesh_agent.model_paths import Roots
from fluxmesh_agent.parcels.packing import packed
from fluxmesh_coordinator.commands.models import check
from fluxmesh_coordinator.runtime import model_list
from tests.redux_checkpoint import SIGLIP as SMALL
from tests.redux_checkpoint import Form, make_redux
from tests.unit.redux.pictures import cached


@pytest.mark.parametrize("form", ["folder", "bfl"])
def test_redux_is_read_as_people_have_it(form: Form, tmp_path: Path, cache: Path) -> None:
    named = make_redux(tmp_path / "redux", form)
    made = [resolve_reader(str(named), FLUX1)]
    if form == "bfl":
        made.append(resolve_reader(str(tmp_path / "redux"), FLUX1))
    for checkpoint in made:
        verify(checkpoint)
        assert checkpoint.architecture.siglip == SMALL
        assert checkpoint.architecture.redux == ReduxConfig(24, 32)
    assert len({checkpoint.revision for checkpoint in made}) == 1


def test_comfyuis_files_need_no_config_where_siglip_is_the_published_one(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes tell no heads, and the small one is not known by its shapes."""
    file = make_redux(tmp_path / "models", "comfy")
    with pytest.raises(WeightsError, match="is not the SigLIP with which FLUX.1 Redux sees"):
        resolve_reader(str(file), FLUX1)
    monkeypatch.setattr("fluxmesh.models.flux1.files.redux.SiglipConfig", lambda: SMALL)
    for name in (file, tmp_path / "models", tmp_path):
        verify(resolve_reader(str(name), FLUX1))
    (encoder,) = (tmp_path / "models" / "clip_vision").iterdir()
    encoder.rename(tmp_path / "models" / "style_models" / "any name.safetensors")
    verify(resolve_reader(str(file), FLUX1))


def test_what_is_in_the_hubs_cache_serves(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(
        NotFetchedError, match="not on this machine; fetch it with `fluxmesh models"
    ):
        resolve_reader("", FLUX1, download=False)
    with pytest.raises(NotFetchedError, match="with `hf download owner/redux`, or name its folder"):
        resolve_reader("owner/redux", FLUX1, download=False)
    make_redux(cached(cache, REPO))
    for name in (
        "",
        "redux",
        "FLUX.1-Redux-dev",
        REPO,
        str(cache / "models--black-forest-labs--FLUX.1-Redux-dev"),
    ):
        assert resolve_reader(name, FLUX1, download=False).revision == "abcdef0123"
    assert hub.resolve_any("redux", download=False).content
    (info,) = hub.list_readers()
    assert info.revision == "abcdef0123" and info.nbytes > 0
    alone = make_redux(tmp_path / "x", "bfl").rename(tmp_path / "flux1-redux-dev.safetensors")
    assert resolve_reader(str(alone), FLUX1).architecture.siglip == SMALL  # the cache's SigLIP


def test_a_folder_with_nothing_of_redux_is_not_taken_for_the_one_in_the_cache(
    tmp_path: Path, cache: Path
) -> None:
    make_redux(cached(cache, REPO))
    (tmp_path / "pictures" / "of dogs").mkdir(parents=True)
    with pytest.raises(NotFetchedError, match="of dogs has nothing of FLUX.1 Redux; name a folder"):
        resolve_reader(str(tmp_path / "pictures" / "of dogs"), FLUX1)
    other = cached(cache, "owner/painter")
    (other / "model_index.json").write_text("{}")
    with pytest.raises(NotFetchedError, match="owner/painter has nothing of FLUX.1 Redux"):
        resolve_reader("owner/painter", FLUX1, download=False)


def test_siglip_may_come_from_its_own_repository(tmp_path: Path, cache: Path) -> None:
    """In which it stands beside the encoder of texts, and its config inside another."""
    file = make_redux(tmp_path / "x", "bfl")
    encoder, snapshot = tmp_path / "x" / "image_encoder", cached(cache, SIGLIP)
    shutil.copy(encoder / "model.safetensors", snapshot / "model.safetensors")
    config = json.loads((encoder / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({"vision_config": config, "text_config": {}}))
    shutil.rmtree(encoder)
    assert resolve_reader(str(file), FLUX1).architecture.siglip == SMALL


@pytest.mark.parametrize(
    ("spoil", "kind", "sentence"),
    [
        ("image_encoder", NotFetchedError, "lacks the picture encoder of FLUX.1 Redux .*sigclip"),
        ("image_embedder", NotFetchedError, "lacks the embedder .*flux1-redux-dev.safetensors"),
        ("config", WeightsError, "config.json"),
        ("shape", WeightsError, "mlp.fc1.weight has shape"),
        ("width", WeightsError, "the embedder of Redux must be as wide as SigLIP"),
        ("activation", ModelNotFoundError, "hidden_act 'relu', as no SigLIP does"),
    ],
)
def test_what_lacks_or_is_broken_is_told_in_a_sentence(
    spoil: str, kind: type[FluxmeshError], sentence: str, tmp_path: Path, cache: Path
) -> None:
    folder = make_redux(tmp_path / "redux")
    config = folder / "image_encoder" / "config.json"
    if spoil in ("image_encoder", "image_embedder"):
        shutil.rmtree(folder / spoil)
    elif spoil == "config":
        config.write_text("{")
    else:
        changes = {
            "shape": {"intermediate_size": 48},
            "width": {"hidden_size": 48},
            "activation": {"hidden_act": "relu"},
        }
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[spoil]))
    with pytest.raises(kind, match=sentence) as error:
        verify(resolve_reader(str(folder), FLUX1))
    assert str(error.value).count(". ") == 0


def test_redux_is_no_model_and_other_models_are_no_redux(tmp_path: Path, cache: Path) -> None:
    folder = make_redux(tmp_path / "redux")
    for name in ("redux", REPO):
        with pytest.raises(NoSuchNameError, match="paints nothing by itself.*such as dev"):
            hub.resolve(name, download=False)
        with pytest.raises(NoSuchNameError, match="paints nothing"):
            hub.check_name(name)
    with pytest.raises(ModelNotFoundError, match="holds FLUX.1 Redux, which paints nothing"):
        hub.resolve(str(folder))
    with pytest.raises(ModelNotFoundError, match="give it as `redux` beside dev or schnell"):
        hub.resolve(str(make_redux(tmp_path / "single", "bfl")))
    with pytest.raises(ModelNotFoundError, match="and not FLUX.1 Redux; name the file of the emb"):
        file = hub.tiny_folder() / "vae" / "diffusion_pytorch_model.safetensors"
        resolve_reader(str(file), FLUX1)
    with pytest.raises(NoSuchNameError, match="No FLUX.1 Redux is called 'rdx'; name redux"):
        resolve_reader("rdx", FLUX1)


def test_pull_knows_redux_and_its_terms(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Only what is read is fetched, of the newest revision."""
    names = ["README.md", "flux1-redux-dev.safetensors", "model_index.json"]
    names += ["image_encoder/config.json", "image_encoder/model.safetensors"]
    names += ["image_embedder/config.json", "image_embedder/diffusion_pytorch_model.safetensors"]
    chosen: list[list[str]] = []

    def fetch(repo: str, _cache: Path, _progress: Any, choose: Any) -> Path:
        chosen.append(choose(names))
        return make_redux(cached(cache, repo))

    monkeypatch.setattr("fluxmesh.weights.download.download_files", fetch)
    assert hub.pull("FLUX.1-Redux-dev").name == "redux"
    assert chosen == [sorted(names[5:], key=lambda n: "config" in n) + [names[4], names[3]]]
    assert "gated" in hub.notice_of("redux") and hub.download_bytes("redux") == 10**9
    (line,) = [model for model in model_list.listed() if model.name == "redux"]
    assert line.revision and line.takes == () and line.is_gated and not line.is_commercial
    assert line.reads_for == ("schnell", "dev", "krea-dev")
    with pytest.raises(ModelNotFoundError, match="has no image_encoder with weights"):
        names.remove("image_encoder/config.json")
        hub.pull("redux")


def test_redux_is_copied_to_hosts_and_opened_there_as_models_are(
    tmp_path: Path, cache: Path
) -> None:
    roots = Roots(tmp_path / "adapters", tmp_path / "models", [tmp_path / "lent"])
    assert roots.model("redux") == "redux" and roots.model(REPO) == REPO
    folder = make_redux(tmp_path / "lent" / "mine")
    assert roots.model(str(folder)) == str(folder)
    with pytest.raises(ModelNotFoundError, match="no model /elsewhere"):
        roots.model("/elsewhere")
    make_redux(cached(cache, REPO))
    parcel = packed("redux", "redux").parcel
    assert parcel.name == REPO and parcel.commit == "abcdef0123"
    assert {file.path for file in parcel.files} >= {
        "image_encoder/model.safetensors",
        "image_embedder/config.json",
        "model_index.json",
    }
    assert parcel.content == hub.resolve_any("redux", download=False).content
    assert check("redux", lambda done, total: None).name == "redux"
