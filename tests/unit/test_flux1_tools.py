"""Fill, Canny, Depth and true guidance of FLUX.1: what each takes, needs and is given."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fluxmesh.errors import UsageError
from fluxmesh.images.edges import edges_of
from fluxmesh.models.flux1.conditions.channels import mask_channels
from fluxmesh.models.flux1.config import AutoencoderConfig, FluxConfig, input_kind
from fluxmesh.models.flux1.runtime import plan
from fluxmesh.models.registry import published
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import AdapterRef, GenerateRequest, SourceImage
from fluxmesh.sampling.takes import check_given, check_published, check_takes
from fluxmesh.weights import hub
from fluxmesh.weights.quantize import quantize_checkpoint
from fluxmesh_coordinator.artifacts.recipe import Recipe
from fluxmesh_coordinator.commands.generate import read_conditions
from fluxmesh_coordinator.commands.settings import GenerateSettings
from fluxmesh_coordinator.runtime.resolved import Resolved, ResolvedModel
from tests.checkpoints import TRANSFORMER, make_checkpoint
from tests.serving import Serving
from tests.unit.meshes import resolved

SIZES = {name: ModelSizes(published(name)) for name in ("dev", "schnell", "fill", "canny", "depth")}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def asked(**fields: Any) -> GenerateRequest:
    return GenerateRequest(**{"prompt": "a cat", "seed": 0, "model": "m", **fields})


def masked(height: int = 48, width: int = 64) -> SourceImage:
    mask = np.zeros((height, width), np.uint8)
    mask[3:20, 5:40] = 255
    return SourceImage(picture(height, width), 1.0, mask)


# What a checkpoint is


@pytest.mark.parametrize(
    ("in_channels", "kind"), [(64, "text"), (128, "control"), (384, "fill"), (96, None)]
)
def test_the_width_of_the_input_says_what_a_model_reads(in_channels: int, kind: Any) -> None:
    assert input_kind(FluxConfig(in_channels=in_channels), AutoencoderConfig()) == kind


def test_each_tool_takes_its_own_steps_and_guidance() -> None:
    defaults = {name: sizes.defaults for name, sizes in SIZES.items()}
    assert {name: (each.steps, each.guidance) for name, each in defaults.items()} == {
        "dev": (50, 4.0),
        "schnell": (4, 4.0),
        "fill": (50, 30.0),
        "canny": (50, 30.0),
        "depth": (50, 10.0),
    }


@pytest.mark.parametrize(
    ("name", "guidance", "follows"),
    [("flux1-depth-dev", 10.0, "depth"), ("flux1-canny-dev", 30.0, "edges"), ("mine", 30.0, None)],
)
def test_what_lies_here_is_told_by_its_name(
    tmp_path: Path, name: str, guidance: float, follows: Any
) -> None:
    wide = replace(TRANSFORMER, in_channels=128)
    made = make_checkpoint(tmp_path / name, layout="bfl", transformer=wide, guidance=True)
    file = made.path.rename(made.path.with_name(f"{name}.safetensors"))
    checkpoint = hub.resolve(str(file))
    model, content = checkpoint.architecture, checkpoint.content
    assert model.takes == {"control"} | (set() if follows == "depth" else {"control_from"})
    assert (model.defaults.guidance, model.follows) == (guidance, follows)
    other = file.rename(file.with_name("other.safetensors"))  # the same on a host that calls it so
    assert hub.resolve(str(other)).content == content


def test_a_folder_that_is_written_keeps_what_it_follows_under_any_name(tmp_path: Path) -> None:
    wide = replace(TRANSFORMER, in_channels=128)
    made = make_checkpoint(tmp_path / "flux1-depth-dev", transformer=wide, guidance=True)
    quantize_checkpoint(hub.resolve(str(made.path)), tmp_path / "mine", 4)
    assert hub.resolve(str(tmp_path / "mine")).architecture.follows == "depth"


def test_a_folder_is_fill_by_its_config(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, transformer=replace(TRANSFORMER, in_channels=384), guidance=True)
    model = hub.resolve(str(tmp_path)).architecture
    assert model.fills_by_channels and model.takes == frozenset()


# What it is asked


def test_who_is_guided_by_a_negative_prompt_and_how_strongly() -> None:
    dev = SIZES["dev"]
    assert dev.architecture.takes == {"negative", "cfg"}
    assert SIZES["schnell"].architecture.takes == frozenset()
    assert (dev.fill(asked()).negative, dev.fill(asked()).cfg) == (None, 1.0)
    assert dev.fill(asked(negative="blur")).cfg == 2.0
    alone = dev.fill(asked(cfg=3.0))
    assert (alone.negative, alone.cfg) == ("", 3.0)  # away from nothing in particular
    weak = dev.fill(asked(negative="blur", cfg=1.0))
    assert weak.negative is None  # nor read: made again from its recipe, it would be moved away
    assert Workload.of(weak, dev).shape.calls == 1
    assert Workload.of(alone, dev).shape.calls == 2
    plain, twice = Workload.of(weak, dev), Workload.of(alone, dev)
    assert twice.step_flops == 2 * plain.step_flops
    assert twice.sent_a_request("tensor", 2) == 2 * plain.sent_a_request("tensor", 2) > 0


def test_a_control_map_gives_the_picture_its_proportions_and_is_stretched_to_its_size() -> None:
    canny, control = SIZES["canny"], picture(300, 200)
    filled = canny.fill(asked(control=control))
    assert (filled.height, filled.width) == (624, 416)
    (name, pixels), *others = canny.architecture.pictures(filled).items()
    expected = Image.fromarray(control).resize((416, 624), Image.Resampling.LANCZOS)
    assert (name, others) == ("control", []) and np.array_equal(pixels, np.asarray(expected))
    filled = canny.fill(asked(control=control, height=64, width=80))
    assert canny.architecture.pictures(filled)["control"].shape == (64, 80, 3)


def test_fill_reads_the_picture_and_its_mask() -> None:
    source = masked()
    filled = SIZES["fill"].fill(asked(source=source))
    named = SIZES["fill"].architecture.pictures(filled)
    assert named["picture"] is source.pixels
    assert np.array_equal(named["mask"], source.mask[:, :, None])  # a grey travels once
    assert SIZES["dev"].architecture.pictures(filled) == {}  # the sampler puts it back instead


GREY, RGB = np.zeros((48, 64, 1), np.uint8), np.zeros((48, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("model", "named", "sentence"),
    [
        ("canny", {"control": RGB}, ""),
        ("canny", {"control": GREY}, r"'control' came as \[48, 64, 1\]; this model reads \["),
        ("canny", {"control": RGB[:40]}, r"'control' came as \[40, 64, 3\]; .* multiples of 16"),
        ("canny", {"picture": RGB, "mask": GREY}, "The pictures mask, picture came; .* control"),
        ("fill", {"picture": RGB, "mask": GREY}, ""),
        ("fill", {"picture": RGB, "mask": RGB}, r"'mask' came as .*; this model reads \[.* 1\]"),
        ("fill", {"picture": RGB}, "The pictures picture came; this model reads picture and mask"),
        ("fill", {"picture": RGB, "mask": GREY[:32]}, r"came as \[48, 64\] and \[32, 64\]"),
        ("dev", {"reference_1": RGB}, "'reference_1' came, which this model does not read"),
    ],
)
def test_an_engine_refuses_pictures_that_are_not_the_models(
    model: str, named: dict[str, np.ndarray], sentence: str
) -> None:
    check = SIZES[model].architecture.check_pictures
    if not sentence:
        check(named)
        return
    with pytest.raises(UsageError, match=sentence):
        check(named)


@pytest.mark.parametrize("shape", [(1, 5, 320), (6, 320), (1, 6, 64)])
def test_channels_that_are_not_of_the_image_or_the_model_are_refused(shape: Any) -> None:
    flow: Any = SimpleNamespace(config=published("fill").transformer)
    with pytest.raises(UsageError, match=r"channels beside the latents"):
        plan(flow, {}, [1.0, 0.0], (4, 6), 30.0, channels=mx.zeros(shape))


@pytest.mark.parametrize(
    ("model", "fields", "sentence"),
    [
        ("fill", {}, "fill paints a part of a picture; give the picture as `image`"),
        ("fill", {"source": replace(masked(), mask=None)}, "by `mask` or `outpaint`"),
        ("depth", {}, "depth follows a map of edges or depth, and `control` gives none"),
    ],
)
def test_a_tool_without_its_picture_is_refused(model: str, fields: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_given(asked(**fields), model, SIZES[model].architecture)


def test_nothing_else_is_needed() -> None:
    check_given(asked(source=masked()), "fill", SIZES["fill"].architecture)
    check_given(asked(control=picture(16, 16)), "depth", SIZES["depth"].architecture)
    check_given(asked(), "dev", SIZES["dev"].architecture)


def test_an_adapter_may_bring_a_control_map() -> None:
    with pytest.raises(UsageError, match="dev takes no control picture"):
        check_published(asked(model="dev", control=picture(16, 16)))
    adapters = (AdapterRef("canny.safetensors"),)
    check_published(asked(model="dev", control=picture(16, 16), adapters=adapters))
    dev = SIZES["dev"].architecture
    edges = dev.with_inputs({"img_in": 128}, "flux1-canny-dev-lora")
    assert edges.takes == {"control", "control_from"}
    depth = dev.with_inputs({"img_in": 128}, "flux1-depth-dev-lora")
    assert (depth.defaults.guidance, depth.takes) == (10.0, {"control"})


# What the transformer reads


def test_a_masks_pixels_are_channels_in_blacks_order() -> None:
    """Each pixel alone: where it comes out is what black-forest-labs' code says."""
    for y, x in ((0, 0), (0, 1), (1, 0), (9, 3), (13, 30), (31, 47)):
        painted = np.zeros((32, 48), bool)
        painted[y, x] = True
        channels = mask_channels(painted, 8)
        assert channels.shape == (1, 2 * 3, 256) and channels.sum() == 1
        token = (y // 16) * 3 + x // 16
        ph, pw = y % 16 // 8, x % 16 // 8
        assert channels[0, token, ((y % 8 * 8 + x % 8) * 2 + ph) * 2 + pw] == 1, (y, x)


# Edges


def test_edges_are_opencvs_at_the_thresholds_of_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def canny(pixels: np.ndarray, low: int, high: int) -> np.ndarray:
        seen.append((pixels.tobytes(), pixels.flags.c_contiguous, low, high))
        return pixels[:, :, 0]

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(Canny=canny))
    pixels = picture(8, 12)[:, ::-1]
    edges = edges_of(pixels)
    assert seen == [(pixels.tobytes(), True, 50, 200)]
    assert np.array_equal(edges, np.repeat(pixels[:, :, :1], 3, axis=2))


def test_without_opencv_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match="pip install opencv-python-headless`, or give a ready"):
        edges_of(picture(8, 8))


def test_opencv_is_not_asked_for_by_a_model_that_follows_no_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    file = tmp_path / "photo.png"
    Image.fromarray(picture(32, 48)).save(file)
    with pytest.raises(UsageError, match="klein-4b takes no control picture"):
        read_conditions(GenerateSettings(model="klein-4b", control_from=str(file)))
    for follows in ("canny", None):
        with pytest.raises(UsageError, match="pip install opencv-python-headless"):
            read_conditions(GenerateSettings(model=follows, control_from=str(file)))


FOUND = {"control": picture(16, 16), "control_is_found": True}


def test_edges_are_not_given_to_a_model_that_follows_depth() -> None:
    """What follows a map of which no name says the kind may follow edges: its user knows."""
    dev = SIZES["dev"].architecture
    depth, unknown = (dev.with_inputs({"img_in": 128}, name) for name in ("depth", "mine"))
    check_takes(asked(control=FOUND["control"]).conditions, (), "m", depth)
    check_takes(asked(**FOUND).conditions, (), "m", unknown)
    sentence = r"`control_from`: m follows a map of depth, .* edges alone; give .* `control`\."
    with pytest.raises(UsageError, match=sentence):
        check_takes(asked(**FOUND).conditions, (), "m", depth)


def test_edges_for_a_published_model_are_refused_before_anything_is_read_or_fetched() -> None:
    for model, adapters in (("depth", ()), ("FLUX.1-Depth-dev", (AdapterRef("style"),))):
        with pytest.raises(UsageError, match=f"{model} follows a map of depth"):
            check_published(asked(model=model, adapters=adapters, **FOUND))
    check_published(asked(model="canny", **FOUND))
    check_published(asked(model="dev", adapters=(AdapterRef("flux1-canny-lora"),), **FOUND))


def test_edges_are_refused_of_a_model_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command line asks, and a server."""
    found = SimpleNamespace(Canny=lambda pixels, *_: pixels[:, :, 0])
    monkeypatch.setitem(sys.modules, "cv2", found)
    file = tmp_path / "photo.png"
    Image.fromarray(picture(32, 48)).save(file)
    wide = replace(TRANSFORMER, in_channels=128)
    for name in ("my-depth", "my-canny"):
        model = make_checkpoint(tmp_path / name, transformer=wide, guidance=True).path
        settings = GenerateSettings(model=str(model), control_from=str(file))
        _, control, _ = read_conditions(settings)
        request = settings.request("a cat", 0, model=str(model), control=control)
        known = ResolvedModel.known(str(model))
        serving = Serving(tmp_path / name, model=str(model))
        fields = {"prompt": "a cat", "control_from": base64.b64encode(file.read_bytes()).decode()}
        with serving.client() as client:
            answer = client.post("/api/jobs", json=fields)
            takes = client.get("/api/models").json()["models"][0]["takes"]
        if name == "my-canny":
            assert Resolved.of(request, known).request.control is not None
            assert answer.status_code == 202 and "control_from" in takes
            continue
        with pytest.raises(UsageError, match="`control_from`: .*my-depth follows a map of depth"):
            Resolved.of(request, known)
        assert Resolved.of(replace(request, control_is_found=False), known)
        error = answer.json()["error"]
        assert (answer.status_code, error["setting"]) == (400, "control_from")
        assert "my-depth follows a map of depth" in error["message"]
        assert "control" in takes and "control_from" not in takes


def test_a_recipe_tells_the_picture_whose_edges_were_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "cv2", SimpleNamespace(Canny=lambda pixels, *_: 255 - pixels[:, :, 0])
    )
    file = tmp_path / "photo.png"
    Image.fromarray(picture(32, 48)).save(file)
    settings = GenerateSettings(control_from=str(file))
    _, control, files = read_conditions(settings)
    assert control is not None
    assert np.array_equal(control[:, :, 2], 255 - picture(32, 48)[:, :, 0])
    recipe = Recipe.of(resolved(asked(model="tiny")), conditions=files)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert list(recipe.file_hashes()) == [str(file)]
    assert GenerateSettings.of_recipe(recipe).control_from == str(file)
    assert "control" not in json.loads(recipe.to_json())
    with pytest.raises(UsageError, match="`control` and `control_from` both give a map"):
        read_conditions(replace(settings, control=str(file)))
