"""References, control maps and negative prompts: who takes them, at what cost, and how they travel.

What models compute of them is in `tests/parity/` and `tests/parallel/`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fluxmesh import events
from fluxmesh.cluster.snapshot import ModelVariant, StepTiming
from fluxmesh.errors import NotFetchedError, UsageError
from fluxmesh.models.base import Architecture
from fluxmesh.models.flux1.conditions import kontext
from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.flux2.family import FLUX2
from fluxmesh.models.registry import published
from fluxmesh.planning.cost import step_time
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import MAX_REFERENCES, GenerateRequest, SourceImage
from fluxmesh.sampling.takes import check_published, check_takes
from fluxmesh.weights import hub
from fluxmesh.wire import messages
from fluxmesh_coordinator.artifacts.pictures import PicturePath
from fluxmesh_coordinator.artifacts.recipe import (
    ConditionFiles,
    NamedFile,
    Recipe,
    differences,
)
from fluxmesh_coordinator.cli.conversation import Conversation, choices
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.console.generate_report import GenerateTerminalReporter
from fluxmesh_coordinator.jobs.input_log import InputLog
from fluxmesh_coordinator.jobs.replay import from_bytes, to_bytes
from tests.unit.meshes import mac, resolved
from tests.unit.simulated_jobs import PLACEMENTS, GenerationSimulation

KLEIN = ModelSizes(published("klein-4b"))
BASE = ModelSizes(published("klein-base-4b"))
KV = ModelSizes(published("klein-9b-kv"))
KONTEXT = ModelSizes(published("kontext"))
SQUARE = np.zeros((1024, 1024, 3), np.uint8)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "seed": 0, "model": "m", **fields})


# What is asked


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"references": ["a.png"]}, "`references` must be arrays of uint8"),
        ({"references": [np.zeros((4, 4), np.uint8)]}, r"`references` has the shape \[4, 4\]"),
        ({"references": [SQUARE] * (MAX_REFERENCES + 1)}, "`references` are 11; give 10 at most"),
        ({"control": np.zeros((4, 4, 3))}, "`control` must be arrays of uint8"),
        ({"cfg": float("nan")}, "`cfg` is nan"),
        ({"negative": "\udcff"}, "The negative prompt is not valid UTF-8"),
    ],
)
def test_conditions_that_nothing_could_be_made_of_are_refused(fields: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        asked(**fields)


def test_the_first_reference_says_the_size_unless_the_user_does() -> None:
    pictures = [picture(70, 101), picture(640, 480)]
    filled = KLEIN.fill(asked(references=pictures))
    assert (filled.height, filled.width) == (64, 96)
    assert [each.shape for each in filled.references] == [(64, 96, 3), (640, 480, 3)]
    assert KLEIN.fill(filled) == filled  # what is filled in already is not cut again
    assert KLEIN.fill(asked(references=pictures, height=32, width=48)).height == 32
    assert KLEIN.fill(asked()).height == 1024


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((48, 80), "of 48x80 pixels is too small; each side must have 64 at least"),
        ((64, 640), "of 64x640 pixels is too narrow; one side may be 8 times the other at most"),
    ],
)
def test_a_reference_that_the_model_does_not_read_is_named(
    size: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(UsageError, match=f"^`references`: A reference picture {sentence}"):
        KLEIN.fill(asked(references=[picture(*size)]))
    second = f"^`references`: picture 2 of 2: A reference picture {sentence}"
    with pytest.raises(UsageError, match=second):
        KLEIN.fill(asked(references=[picture(70, 101), picture(*size)]))


def test_kontext_reads_a_picture_at_the_nearest_of_its_own_sizes() -> None:
    filled = KONTEXT.fill(asked(references=[picture(300, 410)]))
    assert filled.references[0].shape == (880, 1184, 3)
    assert (filled.height, filled.width) == (880, 1184)
    assert (filled.steps, filled.guidance) == (30, 2.5)
    for width, height in kontext.SIZES:
        kept = np.zeros((height, width, 3), np.uint8)
        assert kontext.fitted(kept) is kept


def test_a_base_models_guidance_is_what_others_call_cfg() -> None:
    filled = BASE.fill(asked(cfg=2.5))
    assert (filled.guidance, filled.cfg) == (2.5, 1.0)
    assert BASE.fill(asked()).guidance == 4.0


# Who takes it


HERE = {"schnell": published("schnell"), "klein": KLEIN.architecture, "b": BASE.architecture}


def put_here(monkeypatch: pytest.MonkeyPatch, known: Mapping[str, Architecture]) -> None:
    """These models are on this machine, beside a folder that is broken."""

    def resolve(name: str, **_more: Any) -> Any:
        if name not in known:
            raise NotFetchedError("It is broken.")
        return SimpleNamespace(architecture=known[name])

    monkeypatch.setattr(hub, "names_here", lambda: iter([*known, "broken"]))
    monkeypatch.setattr(hub, "resolve", resolve)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """schnell, klein and its base model are on this machine."""
    put_here(monkeypatch, HERE)


def test_what_a_model_does_not_take_is_refused_with_the_names_of_those_here_that_do(
    here: None,
) -> None:
    schnell = published("schnell")
    with pytest.raises(
        UsageError, match=r"schnell takes no reference pictures; of the .*klein and b"
    ):
        check_takes(("references",), [SQUARE], "schnell", schnell)
    with pytest.raises(UsageError, match="klein takes no negative prompt; of .* machine, b does"):
        check_takes(("negative",), (), "klein", KLEIN.architecture)
    with pytest.raises(UsageError, match="no control picture; no model on this machine does"):
        check_takes(("control",), (), "klein", KLEIN.architecture)
    check_takes(("references", "negative", "cfg"), [SQUARE, SQUARE], "b", BASE.architecture)
    with pytest.raises(UsageError, match="no more than 1, and 2 were given; of .*, klein and b do"):
        check_takes(("references",), [SQUARE, SQUARE], "kontext", KONTEXT.architecture)


def test_who_takes_a_map_or_a_negative_prompt_and_no_reference_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_here(monkeypatch, {**HERE, **{name: published(name) for name in ("dev", "canny")}})
    with pytest.raises(UsageError, match="klein takes no negative prompt; of .*, b and dev do"):
        check_takes(("negative",), (), "klein", KLEIN.architecture)
    with pytest.raises(UsageError, match="no control picture; of .* this machine, canny does"):
        check_takes(("control",), (), "klein", KLEIN.architecture)


def test_named_is_who_takes_all_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: published(name) for name in ("dev", "canny", "kontext")}
    put_here(monkeypatch, {**HERE, **models})
    schnell = published("schnell")
    both = ("references", "negative")
    with pytest.raises(UsageError, match="no reference pictures; .* machine, b and kontext do"):
        check_takes(both, [SQUARE], "schnell", schnell)
    with pytest.raises(UsageError, match=r"no reference pictures; .* machine, b does\."):
        check_takes(both, [SQUARE, SQUARE], "schnell", schnell)
    nobody = r"no control picture; .* machine, canny does, but none takes all else that is given\."
    with pytest.raises(UsageError, match=nobody):
        check_takes(("references", "control"), [SQUARE], "klein", KLEIN.architecture)


def test_what_a_config_file_gives_to_every_model_can_be_put_aside_for_one() -> None:
    of_file = GenerateSettings(negative_prompt="blur", cfg=3.0)
    assert of_file.request("a cat", 1).conditions == ("negative", "cfg")
    aside = of_file.with_chosen({"negative_prompt": "", "cfg": 1.0})
    assert aside.request("a cat", 1).conditions == ()


def test_a_published_model_is_refused_before_it_is_fetched(here: None) -> None:
    with pytest.raises(UsageError, match="fill takes no reference pictures"):
        check_published(asked(model="flux-fill", references=[SQUARE]))
    check_published(asked(model="flux-schnell", references=[SQUARE]))  # which Redux may read
    check_published(asked(model="klein-4b", references=[SQUARE]))
    check_published(asked(model="some/folder", references=[SQUARE]))


def test_a_request_is_refused_where_it_is_resolved(here: None) -> None:
    with pytest.raises(UsageError, match="tiny takes no negative prompt"):
        resolved(asked(model="tiny", negative="blur"))
    assert resolved(asked(model="tiny", cfg=1.0)).request.cfg == 1.0  # which is none at all


# What it costs


def work(sizes: ModelSizes, **fields: Any) -> Workload:
    return Workload.of(sizes.fill(asked(height=1024, width=1024, **fields)), sizes)


@pytest.mark.parametrize(
    ("sizes", "plain", "with_one"), [(KLEIN, 34.8e12, 76.7e12), (KONTEXT, 74.4e12, 165.5e12)]
)
def test_the_tokens_of_references_are_counted(
    sizes: ModelSizes, plain: float, with_one: float
) -> None:
    alone, edit = work(sizes), work(sizes, references=[SQUARE])
    assert edit.tokens == alone.tokens + 4096
    assert alone.step_flops == pytest.approx(plain, rel=0.01)
    assert edit.step_flops == pytest.approx(with_one, rel=0.01)
    assert edit.memory("data", 1, 1).denoise > alone.memory("data", 1, 1).denoise
    assert edit.sent_a_step("sequence", 2) > 1.8 * alone.sent_a_step("sequence", 2)
    assert alone.is_plain and not edit.is_plain


def test_guidance_costs_two_calls_and_only_where_there_are_two() -> None:
    guided, free = work(BASE), work(BASE, cfg=1.0)
    assert guided.step_flops == 2 * free.step_flops
    assert guided.sent_a_step("tensor", 2) == 2 * free.sent_a_step("tensor", 2)
    assert guided.is_plain and not free.is_plain  # steps are timed as the model is by itself
    assert work(KLEIN).step_flops == work(KLEIN, guidance=4.0).step_flops


def test_kept_references_are_in_the_memory_of_the_plan_and_not_in_the_tokens() -> None:
    """Keys and values of a reference of 1024x1024 in klein 9B: 2.1 GB."""
    alone, edit = work(KV), work(KV, references=[SQUARE])
    assert edit.tokens == alone.tokens
    assert alone.step_flops < edit.step_flops < 1.3 * alone.step_flops
    kept = 2 * 4096 * 4096 * 32 * 2
    for placement, hosts, part in (("data", 1, 1), ("sequence", 2, 1), ("tensor", 2, 2)):
        with_one, plain = (each.memory(placement, hosts, 1) for each in (edit, alone))
        # What encoded the reference is kept too, as its keys and values are for the next image.
        assert with_one.denoise - plain.denoise == kept // part + edit.autoencoder_bytes
        assert with_one.decode - plain.decode == kept // part


def test_a_step_with_references_is_predicted_from_plain_ones_by_its_arithmetic() -> None:
    weights = ModelVariant.of(KLEIN.fill(asked()), None)
    timed = StepTiming(
        model=weights.model, height=1024, width=1024, dtype="bfloat16", bits=None, step_seconds=1.0
    )
    host = replace(mac(0), measured=(timed,))
    plain, edit = (step_time(host, w) for w in (work(KLEIN), work(KLEIN, references=[SQUARE])))
    assert (plain.seconds, plain.figure) == (1.0, "step")
    assert edit.seconds == pytest.approx(2.2, rel=0.01)
    assert edit.figure == "step of another size"


# On a mesh


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated model reads references at this size."""
    monkeypatch.setattr(kontext, "SIZES", ((48, 32),))


def edits(placement: Any, faults: Any = None) -> GenerationSimulation:
    pair = (picture(32, 48, 1), picture(32, 48, 2))
    start = SourceImage(picture(32, 32, 3), 1.0)
    keys = {"n_images": 3, "steps": 3, "references": pair, "source": start, "placement": placement}
    return GenerationSimulation(3, **keys, faults=faults)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_references_travel_to_one_host_once_and_what_is_made_of_them_to_all(
    small_sizes: None, placement: Any
) -> None:
    done = edits(placement).run()
    done.check()
    (sent,) = done.messages(messages.EncodePictures)
    assert len(done.messages(messages.EncodeSource)) == 1
    assert list(sent.named) == ["reference_1", "reference_2"]
    paints = done.messages(messages.Paint)
    assert len(paints) == 3 * (1 if placement == "data" else len(done.session.state.members))
    assert all(paint.conditions is paints[0].conditions for paint in paints)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("fault", ["kill_engine", "lose"])
@pytest.mark.parametrize("moment", ["source", "references", "step 1", "step 2", "last step"])
def test_a_death_encodes_no_picture_again_that_was_encoded(
    small_sizes: None, placement: Any, fault: str, moment: str
) -> None:
    """Of whoever encodes, before what it made is here, or of the first host at any step."""
    struck: list[int] = []

    def break_one(mesh: GenerationSimulation) -> None:
        if struck:
            return
        steps = mesh.of(events.Step)
        encoders = [each.rank for each in mesh.sent if _is_encoding(each.message)]
        state = mesh.session.state
        if moment in ("source", "references"):
            is_here = state.source if moment == "source" else state.conditions
            has_others = moment == "source" or state.source is not None
            if encoders and is_here is None and has_others:
                struck.append(encoders[0])
        elif len(steps) >= {"step 1": 1, "step 2": 2, "last step": 8}[moment]:
            struck.append(encoders[0])
        if struck:
            getattr(mesh, fault)(struck[0])

    done = edits(placement, break_one).run()
    done.check()
    assert struck
    sent = [len(done.messages(kind)) for kind in (messages.EncodeSource, messages.EncodePictures)]
    assert sent == {"source": [2, 2], "references": [1, 2]}.get(moment, [1, 1])


def test_a_failed_job_is_kept_with_the_sizes_of_its_pictures_and_without_the_users_words(
    small_sizes: None,
) -> None:
    mesh = GenerationSimulation(1, references=(picture(32, 48, 1),), negative="a castle")
    kept = to_bytes(mesh.session, InputLog(), "It failed.")
    assert b"castle" not in kept
    state = from_bytes(kept).session.state
    assert [array.shape for array in state.pictures.values()] == [(32, 48, 3)]


def _is_encoding(message: messages.Message) -> bool:
    return isinstance(message, messages.EncodePictures)


# What a picture tells


def test_a_recipe_tells_references_by_name_and_hash_and_leaves_out_what_was_not_given(
    tmp_path: Path, small_sizes: None
) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(picture(32, 48)).save(file)
    ready = resolved(asked(model="tiny"))
    plain = Recipe.of(ready)
    assert not {"references", "control", "negative", "cfg"} & json.loads(plain.to_json()).keys()
    files = ConditionFiles((NamedFile.of(str(file)), NamedFile.of(b"pixels")))
    recipe = replace(Recipe.of(ready, conditions=files), negative="blur", cfg=2.0)
    assert Recipe.from_json(recipe.to_json()) == recipe
    settings = GenerateSettings.of_recipe(recipe)
    assert (
        settings.reference == ((str(file), 1.0), ("", 1.0)) and settings.negative_prompt == "blur"
    )
    with pytest.raises(UsageError, match="was no file by name; give `reference`"):
        settings.request("a cat", 0)
    Image.fromarray(picture(32, 48, 1)).save(file)
    now = replace(recipe, references=(NamedFile.of(str(file)), recipe.references[1]))
    assert differences(recipe, now) == [
        f"{file} is not the file that it was when the picture was made."
    ]


@pytest.mark.parametrize("bad", ['{"name": 3}', "7", '{"sha256": "x"}'])
def test_a_forged_recipe_is_refused(bad: str, small_sizes: None) -> None:
    text = Recipe.of(resolved(asked(model="tiny"))).to_json()
    with pytest.raises(ValueError, match="file|name"):
        Recipe.from_json(text[:-1] + f', "references": [{bad}]}}')


# Interactive


class StubPainter:
    """Paints a file of its own for each prompt."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.prompts = folder, [], []

    def resolve(self, settings: GenerateSettings, prompt: str, *_rest: Any, **_more: Any) -> None:
        self.asked.append(settings.reference)
        self.prompts.append(prompt)

    def reads(self, _settings: GenerateSettings) -> tuple[str, int]:
        return "klein-4b", KLEIN.architecture.most_references

    def paint(self, *_ready: Any, **_more: Any) -> list[Path]:
        return [self.folder / f"painted-{len(self.asked)}.png"]


def test_again_but_takes_the_picture_that_was_painted_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(32, 48)).save("my cat.png")
    reporter = GenerateTerminalReporter(console=Console(file=io.StringIO(), width=200))
    talk = Conversation(GenerateSettings(), PicturePath(tmp_path), reporter, read=str)
    painter: Any = StubPainter(tmp_path)
    talk.painter = painter
    talk.answer("/reference last 'my cat.png'")
    with pytest.raises(UsageError, match="nothing was painted yet"):
        talk.answer("a dog")
    talk.answer("/reference")
    for line in ("a dog", "/reference last 'my cat.png'@0.5", "again, but at night", "and snow"):
        talk.answer(line)
    first, second = (str(tmp_path / f"painted-{k}.png") for k in (1, 2))
    cat = ("my cat.png", 0.5)
    assert painter.asked == [(), ((first, 1.0), cat), ((second, 1.0), cat)]
    assert painter.prompts == ["a dog", "at night", "and snow"]
    for line in ("/reference 'my cat.png'@0.5", "AGAIN but with a hat", "a house", "/reference"):
        talk.answer(line)
    third = (str(tmp_path / "painted-3.png"), 1.0)
    assert painter.asked[3:] == [(third, cat), (cat,)]  # for that prompt alone
    assert painter.prompts[3:] == ["with a hat", "a house"]
    talk.answer("/n 4")
    talk.answer("four dogs")
    talk.answer("/reference last")
    with pytest.raises(UsageError, match="is a grid of 4 pictures"):
        talk.answer("again")
    with pytest.raises(UsageError, match="does not exist"):
        talk.answer("/reference none.png")
    assert "last" in choices("/reference ") and choices("/reference my") == ["my cat.png"]


def test_both_families_have_models_that_take_references() -> None:
    for family, names in ((FLUX1, {"kontext"}), (FLUX2, set(FLUX2.published))):
        takes = {n for n, m in family.published.items() if "references" in m.architecture.takes}
        assert takes == names
