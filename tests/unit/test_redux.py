"""FLUX.1 Redux before anything computes: whose files it is, who reads with it, what it costs.

What it computes is in `tests/parity/test_redux.py`, on a mesh in `tests/integration/`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest

from fluxmesh import events
from fluxmesh.errors import (
    FluxmeshError,
    ModelNotFoundError,
    NoSuchNameError,
    NotFetchedError,
    UsageError,
    WeightsError,
)
from fluxmesh.models.flux1.config import ReduxConfig
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.flux1.files.redux import REPO, SIGLIP
from fluxmesh.models.registry import published
from fluxmesh.planning.plan import plan
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.sampling.takes import check_takes, read_here, with_reader
from fluxmesh.weights import hub
from fluxmesh.weights.reader import verify
from fluxmesh.weights.reference_readers import resolve_reader
from fluxmesh.wire import messages
from fluxmesh_agent.model_paths import Roots
from fluxmesh_agent.parcels.packing import packed
from fluxmesh_coordinator.artifacts.recipe import ConditionFiles, NamedFile, Recipe, differences
from fluxmesh_coordinator.cli.parameter_types import ReferencePicture
from fluxmesh_coordinator.commands.models import check
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.jobs.input_log import InputLog
from fluxmesh_coordinator.jobs.replay import from_bytes, to_bytes
from fluxmesh_coordinator.runtime import model_list
from fluxmesh_coordinator.runtime.mesh import Mesh
from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel
from tests.redux_checkpoint import SIGLIP as SMALL
from tests.redux_checkpoint import Form, make_redux
from tests.unit.meshes import GB, full, mac, reading, small, warm_text
from tests.unit.simulated_jobs import PLACEMENTS, GenerationSimulation

READER = FLUX1.reader
assert READER is not None
WITH_REDUX = READER.published.architecture
SIZES = ModelSizes(
    replace(
        small().architecture,
        transformer=replace(small().architecture.transformer, in_channels=64),  # from text
    )
)
SEEING = replace(SIZES.architecture, siglip=SMALL, redux=ReduxConfig(24, 32))
PICTURE = np.random.default_rng(1).integers(0, 256, (30, 44, 3), dtype=np.uint8)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(cache: Path, repo: str) -> Path:
    """The folder of a snapshot that was fetched."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abcdef0123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    return snapshot


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "seed": 0, "model": "m", **fields})


# Files


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


# Who reads with it


def test_models_that_paint_from_text_read_with_redux_and_no_others() -> None:
    reads = {n: m.architecture.reading_with(WITH_REDUX) for n, m in FLUX1.published.items()}
    assert {n for n, m in reads.items() if m is not None} == {"schnell", "dev", "krea-dev"}
    dev = reads["dev"]
    assert dev is not None and published("dev").identity == dev.identity[:6] + dev.identity[-1:]
    assert dev.takes == {"references", "reference_strengths", "negative", "cfg"}
    assert published("klein-4b").reading_with(WITH_REDUX) is None
    assert published("dev").reading_with(published("schnell")) is None


def test_a_model_that_reads_none_says_what_to_get_and_others_refuse(
    tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(NotFetchedError, match="`fluxmesh models pull redux`.*as `redux`"):
        with_reader(published("dev"), "dev", "", download=False)
    for name in ("kontext", "klein-4b"):
        model = published(name)
        assert with_reader(model, name, "").architecture is model
        with pytest.raises(UsageError, match=f"`redux` reads references, and {name} reads them by"):
            with_reader(model, name, "redux")
    fill = published("fill")
    assert with_reader(fill, "fill", "").architecture is fill
    with pytest.raises(UsageError, match="fill takes no reference pictures"):
        check_takes(("references",), [PICTURE], "fill", fill)
    folder = str(make_redux(tmp_path / "redux"))
    with pytest.raises(UsageError, match="was not made for dev: .* of the same width"):
        with_reader(published("dev"), "dev", folder)
    reading = with_reader(SIZES.architecture, "m", folder)
    assert reading.reader is not None and reading.architecture == SEEING
    assert read_here(published("dev")) == published("dev")


def test_strengths_are_for_models_that_read_with_redux(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub, "names_here", lambda: iter(["dev", "kontext"]))
    monkeypatch.setattr(
        hub, "resolve", lambda name, **_: SimpleNamespace(architecture=published(name))
    )
    here = SimpleNamespace(architecture=WITH_REDUX)
    monkeypatch.setattr("fluxmesh.sampling.takes.resolve_reader", lambda *_a, **_k: here)
    one_picture = asked(references=[PICTURE], reference_strengths=[0.5])
    assert one_picture.conditions == ("references", "reference_strengths")
    with pytest.raises(UsageError, match="kontext takes no strength of a ref.*machine, dev does"):
        check_takes(one_picture.conditions, [PICTURE], "kontext", published("kontext"))
    check_takes(one_picture.conditions, [PICTURE], "dev", read_here(published("dev")))
    assert asked(references=[PICTURE], reference_strengths=[1]).conditions == ("references",)
    for bad, sentence in (
        ([0.5, 1.0], "are 2 for 1 references"),
        ([float("nan")], "has nan"),
        ([-1.0], "has -1.0; each must be 0 to 10"),
    ):
        with pytest.raises(UsageError, match=sentence):
            asked(references=[PICTURE], reference_strengths=bad)


def test_a_strength_stands_behind_a_path_and_a_file_wins_over_it(tmp_path: Path) -> None:
    for name in ("a.png", "b@2"):
        (tmp_path / name).touch()
    kind, path = ReferencePicture(), str(tmp_path / "a.png")
    assert kind.convert(f"{path}@0.8", None, None) == (path, 0.8)
    assert kind.convert(path, None, None) == (path, 1.0)
    assert kind.convert(str(tmp_path / "b@2"), None, None) == (str(tmp_path / "b@2"), 1.0)
    for bad, sentence in ((f"{path}@much", "does not exist"), (f"{path}@nan", "is not PATH or")):
        with pytest.raises(click.BadParameter, match=sentence):
            kind.convert(bad, None, None)


def resolved(tmp_path: Path, **fields: Any) -> Resolved:
    folder = tmp_path / "redux"
    if not folder.exists():
        make_redux(folder)
    model = ResolvedModel("m", "m", SIZES, "abc")
    request = asked(references=[PICTURE], reference_strengths=[0.7], redux=str(folder), **fields)
    return Resolved.of(request, model)


def test_a_request_is_resolved_with_what_reads_it(tmp_path: Path, cache: Path) -> None:
    ready = resolved(tmp_path)
    model, request = ready.model.sizes.architecture, ready.request
    assert model == SEEING and request.references[0].shape == (30, 30, 3)
    assert (request.height, request.width) == (64, 64)  # the model's own, not the reference's
    assert model.added_tokens(request.references) == 4 == model.added_tokens([PICTURE] * 3)
    assert request.redux == str(tmp_path / "redux") and ready.reader_revision
    content = resolve_reader(request.redux, FLUX1).content
    mesh: Any = SimpleNamespace(keeps_warm=True)
    assert ready.reader_content == content == Mesh._job(mesh, ready, None, False, True).reader
    plain = Resolved.of(asked(redux="anything"), ResolvedModel("m", "m", SIZES, "abc"))
    assert plain.request.redux == plain.reader == ""
    elsewhere = ResolvedModel("dev", "dev", ModelSizes(published("dev")), fetches=False)
    there = Resolved.of(asked(references=[PICTURE]), elsewhere)
    assert there.request.redux == "redux" and there.request.references[0].shape == (384, 384, 3)
    with pytest.raises(NotFetchedError):
        Resolved.of(asked(references=[PICTURE], redux="some/repo"), elsewhere)


def test_redux_is_fetched_as_a_model_is_once_its_licence_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine; where other machines paint, they have it."""
    told: list[str] = []

    def fetch(repo: str, _cache: Path, progress: Any, choose: Any) -> Path:
        assert len(told) == 1 and "gated" in told[0]
        progress(5, 10)
        return make_redux(cached(cache, repo))

    monkeypatch.setattr("fluxmesh.weights.download.download_files", fetch)
    monkeypatch.setattr("fluxmesh.sampling.takes.reader_of", lambda model: READER)
    heard: list[Any] = []
    model = ResolvedModel("m", "m", SIZES, "abc")
    request = asked(references=[PICTURE])
    ready = Resolved.of(request, model, lambda *bytes_here: heard.append(bytes_here), told.append)
    assert ready.reader == "redux" and ready.reader_revision == "abcdef0123"
    assert heard == [("redux", 5, 10)]
    Resolved.of(request, model, note=told.append)
    assert len(told) == 1


def test_a_picture_tells_how_it_was_read(tmp_path: Path, cache: Path) -> None:
    ready = resolved(tmp_path)
    files = ConditionFiles((NamedFile.of(b"pixels"),))
    recipe = replace(Recipe.of(ready, conditions=files), references=(NamedFile("a.png", "x"),))
    assert recipe.reference_strengths == (0.7,) and recipe.redux == str(tmp_path / "redux")
    assert Recipe.from_json(recipe.to_json()) == recipe
    settings = GenerateSettings.of_recipe(recipe)
    assert settings.reference == (("a.png", 0.7),) and settings.redux == recipe.redux
    other = replace(recipe, redux_revision="another")
    assert "revision another of" in differences(other, recipe)[0]
    assert differences(recipe, recipe) == []
    # Where the files lie on other machines alone, nobody here knows the revision.
    assert differences(replace(recipe, revision="", redux_revision=""), recipe) == []
    elsewhere = differences(recipe, replace(recipe, revision="", redux_revision=""))
    assert len(elsewhere) == 2 and all(text.endswith("has none.") for text in elsewhere)
    plain = json.loads(Recipe.of(Resolved.of(asked(), ready.model)).to_json())
    assert not {"redux", "redux_revision", "reference_strengths"} & plain.keys()
    with pytest.raises(ValueError, match="not as many"):
        Recipe.from_json(recipe.to_json().replace("[0.7]", "[0.7,1]"))


# What it costs


def test_redux_is_in_the_memory_of_who_reads_the_prompt_and_its_tokens_in_every_step() -> None:
    sizes = ModelSizes(WITH_REDUX)
    side = {"height": 1024, "width": 1024}
    plain = Workload.of(sizes.fill(asked(**side)), sizes)
    edit = Workload.of(sizes.fill(asked(references=[PICTURE], bits=4, **side)), sizes)
    two = Workload.of(sizes.fill(asked(references=[PICTURE] * 2, **side)), sizes)
    assert two.tokens == edit.tokens == plain.tokens + 729
    assert plain.vision_bytes == 0 and edit.vision_bytes == two.vision_bytes == 954_982_112
    assert two.text_bytes - plain.text_bytes == two.text_file_bytes - plain.text_file_bytes
    assert two.text_bytes - plain.text_bytes == 954_982_112


@pytest.mark.parametrize(("gigabytes", "way"), [(25.1, "remembered"), (24.8, "turns")])
def test_a_remembered_prompt_is_no_reason_to_see_where_there_is_no_room(
    gigabytes: float, way: str
) -> None:
    """The denoiser's 24 GB are there; Redux takes another one."""
    sizes = ModelSizes(WITH_REDUX)
    request = sizes.fill(asked(references=[PICTURE], height=256, width=256, steps=4))
    room = {"memory_bytes": int(gigabytes * GB), "free_bytes": int((gigabytes - 24) * GB)}
    host = mac(0, **room, text=warm_text(nbytes=0))
    settled = plan(request, full(host), sizes, placement="data")
    assert reading(settled) == (0, way), settled.reason


# On a mesh


def seeing(placement: Any, faults: Any = None) -> GenerationSimulation:
    keys = {"n_images": 3, "references": (PICTURE, PICTURE), "reference_strengths": (0.7, 0.4)}
    more = {"sizes": ModelSizes(SEEING), "redux": "redux", "placement": placement}
    return GenerationSimulation(3, **keys, **more, faults=faults)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_who_reads_the_prompt_sees_the_pictures_once_for_all(placement: Any) -> None:
    done = seeing(placement).run()
    done.check()
    (sent,) = done.messages(messages.EncodePictures)
    assert (sent.reader, sent.strengths, sent.makes_room) == ("redux", (0.7, 0.4), False)
    ranks = {
        each.rank
        for each in done.sent
        if isinstance(each.message, messages.Encode | messages.EncodePictures)
    }
    assert len(ranks) == 1
    paints = done.messages(messages.Paint)
    assert all(paint.conditions is paints[0].conditions for paint in paints)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("fault", ["kill_engine", "lose"])
@pytest.mark.parametrize("moment", ["prompt", "seeing", "step 2"])
def test_a_death_sees_again_only_what_was_not_seen(placement: Any, fault: str, moment: str) -> None:
    struck: list[int] = []

    def break_one(mesh: GenerationSimulation) -> None:
        state = mesh.session.state
        sent = [e.rank for e in mesh.sent if isinstance(e.message, messages.EncodePictures)]
        when = {
            "prompt": state.features is None,
            "seeing": state.features is not None and state.conditions is None,
            "step 2": len(mesh.of(events.Step)) >= 2,
        }[moment]
        if sent and when and not struck:
            struck.append(sent[0])
            getattr(mesh, fault)(sent[0])

    done = seeing(placement, break_one).run()
    done.check()
    assert struck
    counts = [len(done.messages(kind)) for kind in (messages.Encode, messages.EncodePictures)]
    assert counts == {"prompt": [2, 2], "seeing": [1, 2], "step 2": [1, 1]}[moment]
    if moment == "seeing":  # the memory of what sees was looked for once more
        place = done.session.state.text
        assert place is not None and place.nbytes > 0
        assert placement != "data" or place.rank != struck[0]


def test_a_host_without_redux_is_left_out_and_another_sees() -> None:
    """It would say so again; where all do, the sentence is how the job ends."""
    without: set[int] = set()

    def refuse(mesh: GenerationSimulation) -> None:
        sent = [e.rank for e in mesh.sent if isinstance(e.message, messages.EncodePictures)]
        state = mesh.session.state
        sees = bool(sent) and state.features is not None and state.conditions is None
        if sees and sent[-1] not in without and len(without) < most:
            without.add(sent[-1])
            mesh.fail(sent[-1], "NotFetchedError", "FLUX.1 Redux is not on this machine.")

    most = 1
    done = seeing("data", refuse).run()
    done.check()
    (unfit,) = done.of(events.HostUnfit)
    assert {unfit.host} == without and done.of(events.HostLost) == []
    without.clear()
    most = 3
    error = seeing("data", refuse).run().error
    assert isinstance(error, NotFetchedError)
    assert "FLUX.1 Redux is not on this machine." in str(error)


def test_a_host_that_reads_with_another_redux_ends_the_job() -> None:
    """The same request would be another picture on each mesh."""
    for name, remedy in (
        ("redux", "run `fluxmesh models pull redux`"),
        ("/a/b", "copy the one"),
        ("a/b", "copy the"),
    ):
        mesh = seeing("data")
        job = mesh.session.state.job
        request = replace(job.request, redux=name)
        mesh.session.state.job = replace(job, request=request, reader="another")
        error = mesh.run().error
        assert isinstance(error, WeightsError) and mesh.of(events.Step) == []
        assert str(error).startswith("Host ") and f"under the name {name}, which" in str(error)
        assert remedy in str(error) and str(error).count(". ") == 0
    mesh = seeing("data")
    mesh.session.state.job = replace(mesh.session.state.job, reader="same")
    mesh.run().check()


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


def test_a_failed_job_with_redux_is_kept_and_comes_back() -> None:
    mesh = seeing("data")
    job = from_bytes(to_bytes(mesh.session, InputLog(), "It failed.")).session.state.job
    assert job.sizes.architecture == SEEING
    assert job.request.reference_strengths == (0.7, 0.4)
