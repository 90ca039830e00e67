"""Recipes go into pictures and come out again; what others wrote into one is checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fluxmesh.errors import ModelNotFoundError, UsageError
from fluxmesh.request import AdapterRef, GenerateRequest
from fluxmesh.storage.hashing import sha256_of
from fluxmesh_coordinator.artifacts.pictures import encode_png
from fluxmesh_coordinator.artifacts.recipe import (
    Recipe,
    SourceFiles,
    differences,
    read_recipe,
)
from fluxmesh_coordinator.commands.settings import GenerateSettings
from tests.adapter_files import write
from tests.unit.meshes import resolved, small

RECIPE = Recipe(
    prompt='a "猫"\nand\x00 a dog 🐕',
    model="schnell",
    seed=2**62,
    height=64,
    width=96,
    steps=4,
    guidance=3.5,
    revision="abc",
    bits=4,
    adapters=(("dog.safetensors", 0.5, "12"),),
    source=SourceFiles("photo.png", 0.75, "34", "mask.png", "56", (1, 2, 3, 4), sized=True),
    n_images=3,
    n_rows=2,
)


def test_a_recipe_survives_a_png(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(pixels, RECIPE.to_json(step=3)))
    assert read_recipe(tmp_path / "a.png") == RECIPE


@given(st.text(), st.integers(0, 2**63 - 1), st.floats(0, 100))
def test_any_prompt_seed_and_guidance_survive(prompt: str, seed: int, guidance: float) -> None:
    recipe = replace(RECIPE, prompt=prompt, seed=seed, guidance=guidance)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_holds_all_that_a_request_says(tmp_path: Path) -> None:
    out, into = small().architecture.transformer_tensors["img_in.weight"].shape
    key = "lora_unet_img_in.lora"
    arrays = {f"{key}_down.weight": np.ones((1, into), np.float32),
              f"{key}_up.weight": np.ones((out, 1), np.float32)}  # fmt: skip
    adapter = write(tmp_path / "dog.safetensors", arrays)
    settings = GenerateSettings(
        model="tiny",
        n_images=2,
        image_size=(32, 48),
        steps=3,
        guidance=2.0,
        seed=8,
        n_rows=2,
        dtype="float32",
        quantize=True,
        adapter=((str(adapter), 0.25),),
        fuse_adapter=True,
        no_t5_padding=True,
        decoding_batch_size=2,
        cache=0.12,
    )
    request = settings.request("a dog", 8, model="tiny")
    recipe = Recipe.of(resolved(request), None, settings.n_rows)
    assert recipe.adapters == ((str(adapter), 0.25, sha256_of(adapter)),)
    again = GenerateSettings.of_recipe(Recipe.from_json(recipe.to_json()))
    assert again.request("a dog", 8, model="tiny") == request
    assert (again.seed, again.n_rows) == (8, 2)


def test_a_picture_that_a_cache_approximated_says_so() -> None:
    exact, cached = (json.loads(replace(RECIPE, cache=cache).to_json()) for cache in (0.0, 0.12))
    assert "approximate" not in exact
    assert (cached["cache"], cached["approximate"]) == (0.12, True)
    assert Recipe.from_json(json.dumps(cached)).cache == 0.12
    older = {key: value for key, value in exact.items() if key != "cache"}
    assert Recipe.from_json(json.dumps(older)).cache == 0.0


def test_bits_of_text_encoders_are_told_where_they_have_their_own() -> None:
    asked = GenerateRequest("a cat", 1, model="m", bits=4)
    same, own = (replace(asked, text_bits=bits) for bits in (4, 8))
    for request in (asked, same):
        assert "text_bits" not in Recipe.of(resolved(request)).to_json()
    recipe = Recipe.from_json(Recipe.of(resolved(own)).to_json())
    assert recipe.text_bits == 8
    assert GenerateSettings.of_recipe(recipe).request("a cat", 1).text_bits == 8


def test_a_missing_adapter_is_named() -> None:
    request = GenerateRequest(
        "a", 1, height=16, width=16, steps=1, adapters=(AdapterRef("no.safetensors"),)
    )
    with pytest.raises(ModelNotFoundError, match=r"No adapter file no\.safetensors"):
        resolved(request)


def test_one_image_of_many_has_the_recipe_of_its_seed_alone() -> None:
    many = GenerateRequest("a", 5, n_images=3, height=16, width=16, steps=1)
    alone = GenerateRequest("a", 7, height=16, width=16, steps=1)
    assert Recipe.of(resolved(many)).of_image(7).to_json() == Recipe.of(resolved(alone)).to_json()


def test_a_source_without_a_size_is_made_again_without_one() -> None:
    assert RECIPE.source is not None
    assert GenerateSettings.of_recipe(RECIPE).image_size == (64, 96)
    unsized = replace(RECIPE, source=replace(RECIPE.source, sized=False))
    assert GenerateSettings.of_recipe(unsized).image_size is None


def test_a_picture_that_came_as_bytes_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"pixels")
    named = SourceFiles.of(str(path), 0.5, str(path))
    sent = SourceFiles.of(b"pixels", 0.5, b"pixels")
    assert (sent.image, sent.mask) == ("", "")
    assert sent.image_sha256 == sent.mask_sha256 == named.image_sha256
    recipe = Recipe.from_json(replace(RECIPE, source=sent).to_json())
    settings = GenerateSettings.of_recipe(recipe)
    with pytest.raises(UsageError, match="no file by name; give `image`"):
        settings.request("a dog", 1)
    with pytest.raises(UsageError, match="no file by name; give `mask`"):
        replace(settings, image=str(path)).request("a dog", 1)
    replace(settings, image=str(path), mask=b"pixels").request("a dog", 1)


def test_what_differs_from_the_picture_is_told() -> None:
    assert differences(RECIPE, RECIPE) == []
    changed = replace(
        RECIPE, revision="def", adapters=(("dog.safetensors", 0.5, "99"),), source=None
    )
    revision, adapter = differences(RECIPE, changed)
    assert "revision abc of schnell" in revision and "this machine has def" in revision
    assert adapter.startswith("dog.safetensors is not the file")
    assert differences(RECIPE, replace(changed, model="dev", adapters=())) == []


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: _without(v, "prompt"), "'prompt' is missing"),
        (lambda v: v | {"seed": "1"}, "'seed' is of the wrong type"),
        (lambda v: v | {"steps": True}, "'steps' is of the wrong type"),
        (lambda v: v | {"adapters": [["a", 1]]}, "'adapters' is not a list"),
        (lambda v: v | {"adapters": [["a", "b", "c"]]}, "'scale' is of the wrong type"),
        (lambda v: v | {"source": "photo.png"}, "'source' is not"),
        (lambda v: v | {"source": {"image": "a", "strength": 1, "outpaint": [1]}}, "'outpaint'"),
        (lambda v: v | {"guidance": 10**400}, "'guidance' is too large"),
        (lambda v: v | {"cache": "0.1"}, "'cache' is of the wrong type"),
        (lambda v: [v], "not a JSON object"),
    ],
)
def test_a_recipe_that_others_wrote_is_checked(tmp_path: Path, change: Any, sentence: str) -> None:
    text = json.dumps(change(json.loads(RECIPE.to_json())))
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8), text))
    with pytest.raises(UsageError, match=sentence):
        read_recipe(tmp_path / "a.png")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"seed": 1e999}', "null"])
def test_nonsense_in_a_recipe_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8), text))
    with pytest.raises(UsageError, match="metadata can't be read"):
        read_recipe(tmp_path / "a.png")


def test_a_picture_of_too_many_pixels_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8), RECIPE.to_json()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)  # Pillow refuses more than twice as many
    with pytest.raises(UsageError, match="not a picture that can be read"):
        read_recipe(tmp_path / "a.png")


def test_a_picture_without_a_recipe_is_told_so(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=PngImagePlugin.PngInfo())
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="does not say how it was made"):
        read_recipe(tmp_path / "a.png")
    with pytest.raises(UsageError, match="not a picture"):
        read_recipe(tmp_path / "b.png")
