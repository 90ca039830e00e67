"""FLUX.1 Redux before anything computes: who reads with it, what it costs, who sees on a mesh.

What it computes is in `tests/parity/test_redux.py`, on a mesh in `tests/integration/`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from fluxmesh import events
from fluxmesh.errors import NotFetchedError, UsageError, WeightsError
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.registry import published
from fluxmesh.planning.plan import plan
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.sampling.takes import check_takes, read_here, with_reader
from fluxmesh.weights import hub
from fluxmesh.weights.reference_readers import resolve_reader
from fluxmesh.wire import messages
from fluxmesh_coordinator.artifacts.recipe import ConditionFiles, NamedFile, Recipe, differences
from fluxmesh_coordinator.cli.parameters.types import ReferencePicture
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.jobs.input_log import InputLog
from fluxmesh_coordinator.jobs.replay import from_bytes, to_bytes
from fluxmesh_coordinator.runtime.mesh import Mesh
from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel
from tests.redux_checkpoint import make_redux
from tests.unit.meshes import GB, full, mac, reading, warm_text
from tests.unit.redux.pictures import PICTURE, SEEING, SIZES, cached
from tests.unit.simulated_jobs import PLACEMENTS, GenerationSimulation

READER = FLUX1.reader
assert READER is not None
WITH_REDUX = READER.published.architecture


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "seed": 0, "model": "m", **fields})


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
    for bad, sentence in ((f"{path}@much", "does not exist"), (f"{path}@nan", r"is not PATH\[@")):
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


def test_a_failed_job_with_redux_is_kept_and_comes_back() -> None:
    mesh = seeing("data")
    job = from_bytes(to_bytes(mesh.session, InputLog(), "It failed.")).session.state.job
    assert job.sizes.architecture == SEEING
    assert job.request.reference_strengths == (0.7, 0.4)
