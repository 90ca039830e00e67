"""`fluxmesh interactive`: settings that change, mistakes that are told, pictures that go on."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import FluxmeshError, ModelNotFoundError, NotFetchedError
from fluxmesh.events import Event, Picture
from fluxmesh.machine import memory
from fluxmesh.models.base import ModelDefaults
from fluxmesh.models.registry import published
from fluxmesh.request import FilledRequest
from fluxmesh.storage.file_stamps import FileStamps
from fluxmesh.weights import hub
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.agents.mesh_file import Member, MeshRecord
from fluxmesh_coordinator.artifacts.pictures import PicturePath
from fluxmesh_coordinator.cli.conversation import Conversation, choices
from fluxmesh_coordinator.commands.generate import Painter
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.console.generate_report import GenerateTerminalReporter
from fluxmesh_coordinator.runtime.resolved import Resolved
from tests.unit.meshes import small, with_defaults

REFERENCES = ("kontext", "klein-4b")  # models with sizes of their own
DEFAULTS = ModelDefaults(steps=4, guidance=4.0, height=32, width=48, t5_max_length=16)
SIZES = with_defaults(small(), DEFAULTS)


class CountingMesh:
    """Keeps what it was asked; a prompt "stop" is interrupted."""

    def __init__(self) -> None:
        self.requests: list[FilledRequest] = []
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def paint(self, resolved: Resolved, *_how: Any, **_more: Any) -> Iterator[Event]:
        request = resolved.request
        self.requests.append(request)
        if request.prompt == "stop":
            raise KeyboardInterrupt
        for k in range(request.n_images):
            pixels = np.zeros((request.height, request.width, 3), np.uint8)
            yield Picture(image=k, seed=request.seed_of(k), pixels=pixels)


@pytest.fixture
def talk(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Says lines to a conversation; returns the mesh's requests and what was shown."""

    def resolve(name: str, **_more: Any) -> Any:
        sizes = vars(SIZES)
        if name in REFERENCES:
            sizes = sizes | {"architecture": published(name)}
        about = sizes | {"defaults": SIZES.defaults, "stamps": FileStamps(), "content": ""}
        return SimpleNamespace(name=name, revision="r", **about)

    monkeypatch.setenv("FLUXMESH_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(hub, "resolve", resolve)
    monkeypatch.setattr(hub, "preferred_here", lambda: iter([resolve("tiny")]))

    def say(
        *said: str, settings: GenerateSettings | None = None
    ) -> tuple[list[FilledRequest], str]:
        screen = io.StringIO()
        lines = iter(said)

        def read() -> str:
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        reporter = GenerateTerminalReporter(console=Console(file=screen, width=200))
        conversation = Conversation(
            settings or GenerateSettings(), PicturePath(tmp_path), reporter, read=read
        )
        mesh = conversation.painter._mesh = CountingMesh()
        with reporter:
            conversation.run()
        assert mesh.is_closed
        return mesh.requests, screen.getvalue()

    return say


def test_settings_hold_until_they_are_changed_again(talk: Any) -> None:
    requests, _ = talk(
        *("/size 64x32", "/steps 2", "/seed 7", "/n 2", "/model dev", "/guidance 2", "a dog"),
        *("two dogs", "/size", "/steps", "/n", "/model", "/guidance", "a cat"),
    )
    asked = [(r.prompt, r.seed, r.n_images, r.height, r.width, r.steps, r.model) for r in requests]
    assert asked == [
        ("a dog", 7, 2, 64, 32, 2, "dev"),
        ("two dogs", 7, 2, 64, 32, 2, "dev"),
        ("a cat", 7, 1, 32, 48, 4, "tiny"),
    ]
    assert [request.guidance for request in requests] == [2.0, 2.0, 4.0]


def test_a_cache_is_a_setting_and_the_first_line_tells_it(talk: Any) -> None:
    requests, shown = talk("/cache 0.1", "a dog", "/cache 7", "/cache", "two dogs")
    assert [request.cache for request in requests] == [0.1, 0.0]
    assert shown.count("approximate: --cache 0.1).") == 1
    assert "Error: /cache is 7.0" in shown


def test_every_prompt_has_a_new_seed_and_a_file_of_its_own(talk: Any, tmp_path: Path) -> None:
    requests, shown = talk("a dog", "a dog", "", "a dog")
    assert shown.count("fluxmesh models pull klein-4b") == 1
    assert len({request.seed for request in requests}) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.png", "out-2.png", "out.png"]


def test_mistakes_are_told_and_change_nothing(talk: Any) -> None:
    requests, shown = talk(
        *("/size big", "/steps 0", "/steps many", "/seed -1", "/frobnicate", "/", "a dog"),
        settings=GenerateSettings(steps=3, seed=1),
    )
    assert shown.count("Error: ") == 6
    for part in ("not HEIGHTxWIDTH", "/steps is 0", "'many' is not", "/seed is -1", "/help"):
        assert part in shown
    assert [(request.steps, request.seed) for request in requests] == [(3, 1)]


@pytest.mark.parametrize(
    ("model", "given", "counts", "told"),
    [
        ("/model kontext", 1, [1, 1, 1], "kontext reads one reference, here the picture that was"),
        ("/model klein-4b", 1, [1, 2, 1], ""),
        (
            "/model klein-4b",
            10,
            [10, 10, 10],
            "klein-4b reads 10 references, here also the picture",
        ),
        # Which goes before the embedded one that reads both.
        ("/model", 1, [1, 1, 1], "kontext reads one reference, here the picture that was"),
    ],
)
def test_again_but_edits_the_last_picture_with_as_many_references_as_the_model_reads(
    talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    model: str, given: int, counts: list[int], told: str,
) -> None:  # fmt: skip
    here = [hub.resolve("kontext"), hub.resolve("klein-4b")]
    here[1].name = "tiny-klein"
    monkeypatch.setattr(hub, "preferred_here", lambda: iter(here))
    monkeypatch.setattr(memory, "accelerator_bytes", lambda: 1 << 40)
    mug = tmp_path / "mug.png"
    Image.new("RGB", (64, 64), (200, 0, 0)).save(mug)
    requests, shown = talk(
        *(
            model,
            f"/reference {' '.join([str(mug)] * given)}",
            "/size 64x64",
            "a cup",
            "again, but at night",
            "a cup",
        )
    )
    assert "Error" not in shown
    assert [len(request.references) for request in requests] == counts
    first, again, after = requests
    # What the mesh of this test paints is black, the set reference red.
    assert first.references[0].max() == 200 and after.references[0].max() == 200
    assert again.prompt == "at night" and again.references[0].max() == 0
    assert shown.count("left out for this prompt") == (1 if told else 0) and told in shown


def test_ctrl_c_stops_the_picture_and_not_the_conversation(talk: Any, tmp_path: Path) -> None:
    requests, shown = talk("stop", "a dog")
    assert [request.prompt for request in requests] == ["stop", "a dog"]
    assert "Cancelled." in shown
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_help_settings_and_the_end(talk: Any) -> None:
    requests, shown = talk("/help", "/size 32x64", "/settings", "/quit", "a dog")
    assert requests == []
    assert "/guidance 3.5" in shown
    assert "32x64" in shown and "by itself" in shown


def test_a_model_that_only_the_mesh_has_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Member(0, "mac1:47100", "", "", "", "")
    up = MeshRecord("macs.json", '[{"ssh": "mac1"}]', (member,), weights=ModelVariant("dev"))
    monkeypatch.setattr(mesh_file, "load", lambda: up)

    def resolve(name: str, *, download: bool = True, **_more: Any) -> Any:
        assert not download
        raise NotFetchedError(name)

    monkeypatch.setattr(hub, "resolve", resolve)
    reporter = GenerateTerminalReporter(console=Console(file=io.StringIO()))
    model = Painter(reporter, keep_warm=False).model(None, GenerateSettings().request("", 0))
    assert (model.name, model.revision, model.is_here) == ("dev", "", False)
    assert model.sizes.defaults.steps == 50


def test_a_mesh_that_holds_quantized_weights_paints_with_them(
    talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `up --quantize` was needed for the model to fit, `generate` must not load it whole."""
    member = Member(0, "mac1:47100", "", "", "", "")
    loaded = ModelVariant("dev", bits=4)
    up = MeshRecord("macs.json", '[{"ssh": "mac1"}]', (member,), weights=loaded)
    monkeypatch.setattr(mesh_file, "load", lambda: up)
    requests, shown = talk("a dog", "/model schnell", "a cat")
    assert [(r.model, r.bits, r.dtype) for r in requests] == [
        ("dev", 4, "bfloat16"),
        ("schnell", None, "bfloat16"),
    ]
    assert "Painting with dev (32x48, 4 bits, 4 steps" in shown
    (request,), _ = talk("a dog", settings=GenerateSettings(dtype="float32"))
    assert (request.bits, request.dtype) == (None, "float32")


def test_a_picture_and_what_is_done_to_it_are_settings(talk: Any, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), "red").save(tmp_path / "in.png")
    Image.new("L", (48, 32), 255).save(tmp_path / "mask.png")
    (tmp_path / "my dog.safetensors").touch()
    picture, mask = str(tmp_path / "in.png"), str(tmp_path / "mask.png")
    requests, shown = talk(
        *("/strength 0.5", f"/image {picture}", "/strength 0.5", "a dog", "/strength"),
        *(f"/mask {mask}", "/outpaint 16,0,0,0", "a cat", "/settings", "/image", "a bird"),
    )
    assert shown.count("Error: /strength says how to change /image") == 1
    dog, cat, bird = (request.source for request in requests)
    assert dog.strength == 0.5 and dog.mask is None and dog.pixels.shape == (32, 48, 3)
    assert cat.strength == 1.0 and cat.pixels.shape == (32, 64, 3) and cat.mask.min() == 255
    assert bird is None  # and mask and margins went with the picture
    settings = [line.split() for line in shown.splitlines()]
    assert ["/image", picture] in settings and ["/outpaint", "16,0,0,0"] in settings


def test_adapters_are_named_with_their_strengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my dog.safetensors", "cat.safetensors"):
        (tmp_path / name).touch()
    reporter = GenerateTerminalReporter(console=Console(file=io.StringIO(), width=200))
    conversation = Conversation(GenerateSettings(), PicturePath(tmp_path), reporter, read=str)
    conversation.answer("/adapter 'my dog.safetensors:0.5' cat.safetensors")
    adapters = (("my dog.safetensors", 0.5), ("cat.safetensors", 1.0))
    assert conversation.settings.adapter == adapters
    for wrong, sentence in (
        ("/adapter cta.safetensors", "does not exist; did you mean cat.safetensors"),
        ("/adapter 'my dog", "a quote that is not closed"),
        ("/image nothing.png", "`image` nothing.png does not exist"),
        ("/mask nothing.png", "`mask` nothing.png does not exist"),
        ("/control-from nothing.png", "`control_from` nothing.png does not exist"),
        ("/reference nothing.png@0.5", "`reference` nothing.png does not exist"),
        ("/stpes 3", "/stpes is not known; did you mean /steps?"),
    ):
        with pytest.raises(FluxmeshError, match=sentence):
            conversation.answer(wrong)
    assert conversation.settings.adapter == adapters
    conversation.answer("/adapter")
    assert conversation.settings.adapter == ()


def test_a_wrong_model_is_refused_at_once_with_names(tmp_path: Path) -> None:
    reporter = GenerateTerminalReporter(console=Console(file=io.StringIO(), width=200))
    conversation = Conversation(GenerateSettings(), PicturePath(tmp_path), reporter, read=str)
    with pytest.raises(ModelNotFoundError, match=r"'schnel'; did you mean schnell\?.*krea-dev"):
        conversation.answer("/model schnel")
    assert conversation.settings.model is None
    for name in ("schnell", "FLUX-dev", "owner/repo", str(tmp_path)):
        conversation.answer(f"/model {name}")
        assert conversation.settings.model == name


def test_tab_knows_settings_models_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    (tmp_path / "plain.txt").touch()
    assert choices("/s") == ["/size", "/steps", "/seed", "/strength", "/settings"]
    assert choices("/model ti") == ["tiny", "tiny-klein"]
    assert choices("/image p") == ["pictures/", "plain.txt"]
    assert choices("/mask pictures/") == ["pictures/a.png"]
    assert choices("/adapter x.safetensors pl") == ["plain.txt"]
    assert choices("a red apple p") == [] and choices("/steps p") == []


def test_ctrl_c_at_the_prompt_ends_it_the_second_time_in_a_row(tmp_path: Path) -> None:
    def say(*lines: str | None) -> tuple[int, str]:
        """How many were read of what was typed (None: Ctrl-C), and what was shown."""
        screen, left = io.StringIO(), list(lines)

        def read() -> str:
            line = left.pop(0)
            if line is None:
                raise KeyboardInterrupt
            return line

        reporter = GenerateTerminalReporter(console=Console(file=screen, width=200))
        Conversation(GenerateSettings(), PicturePath(tmp_path), reporter, read=read).run()
        return len(lines) - len(left), screen.getvalue()

    assert say(None, None, "/steps 3")[0] == 2
    read, shown = say(None, "/steps 3", None, "/quit")
    assert read == 4 and shown.count("Ctrl-C again") == 2


def test_words_that_the_embedded_checkpoint_can_not_read_are_told_once(talk: Any) -> None:
    _, shown = talk("a hyena and an appel", "a hyena on a red background", "a cat")
    assert shown.count('tiny does not know "hyena", "appel" (apple?): it paints 90') == 1
    assert shown.count("does not know") == 1


def test_an_edit_of_no_picture_is_told_who_edits(talk: Any) -> None:
    _, shown = talk("make the background blue", "a hyena")
    assert 'tiny does not know "make". tiny-klein does' in shown
    assert "--reference" in shown or "/reference" in shown
    assert 'tiny does not know "hyena": it paints 90' in shown
