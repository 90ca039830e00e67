"""tiny-klein against diffusers' pipeline, float32: how `tools/tiny` trains it, and what it paints.

What training computes must be what the pipeline computes later: a prompt's features, the time
steps, where references stand; on random weights. Then the checkpoint as it ships: fluxmesh paints
and edits what `Flux2KleinPipeline` does.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from safetensors.torch import load_file

from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.weights.embedded.checkpoints import folder_of
from tests.parity import flux2
from tests.parity.oracles import BOUND, relative_error
from tests.paths import ROOT

TOOLS = ROOT / "tools" / "tiny"
NAMES = ("blueprint", "scenes", "edits", "sprites", "data", "capture", "schedule", "autoencoder",
         "flow", "tiny_flux1", "tiny_klein")  # fmt: skip
PROMPT = "Put the dog from the second picture to the right of the apple."


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, Any]]:
    """Modules of `tools/tiny`, which import each other by bare names."""
    sys.path.insert(0, str(TOOLS))
    try:
        yield {name: importlib.import_module(name) for name in NAMES}
    finally:
        sys.path.remove(str(TOOLS))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def made(programs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The blueprint, a folder with a vocabulary, and its models with weights that all matter."""
    klein, folder = programs["tiny_klein"].TinyKlein(), tmp_path_factory.mktemp("klein")
    rng = np.random.default_rng(0)
    captions = [programs["edits"].sample(rng, 2).prompt for _ in range(1000)]
    klein.train_tokenizers(captions, folder)
    torch.manual_seed(0)
    modules = klein.build_models(folder).requires_grad_(False)
    for parameter in modules["transformer"].parameters():
        if not parameter.any():  # zero where training begins
            parameter.normal_(std=0.05)
    return klein, folder, modules


def test_features_are_those_of_the_pipeline(made: tuple[Any, ...]) -> None:
    """Padding included, and layers that training leaves out."""
    klein, folder, modules = made
    tokens = klein.load_tokens(folder)([PROMPT])
    ids = klein.cut_text({"qwen": torch.from_numpy(tokens["qwen"])}, klein.text_tokens)
    (features,) = klein.encode(modules, ids)
    expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        modules["text_encoder"], _tokenizer(folder), PROMPT, max_sequence_length=klein.text_tokens
    )
    assert tokens["real"][0] < klein.text_tokens
    assert relative_error(features.numpy(), expected) < BOUND
    states = features.chunk(3, dim=-1)
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


def test_words_of_captions_are_one_token_each(made: tuple[Any, ...]) -> None:
    _, folder, _ = made
    tokens = _tokenizer(folder).tokenize(f"user\n{PROMPT}")
    assert [token.lstrip("Ġ") for token in tokens] == ["user", "Ċ", *PROMPT[:-1].split(), "."]


def test_references_stand_where_the_pipeline_has_them(made: tuple[Any, ...]) -> None:
    klein, _, _ = made
    sizes = ((128, 64), (64, 96))
    latents = [torch.zeros(1, 64, height // 16, width // 16) for height, width in sizes]
    expected = torch.cat(
        [
            Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 64, 8, 12)),
            Flux2KleinPipeline._prepare_image_ids(latents),
        ],
        dim=1,
    )[0]
    assert torch.equal(klein.picture_ids(128, 192, sizes), expected.float())


def test_the_noise_level_reaches_the_transformer(made: tuple[Any, ...]) -> None:
    """As diffusers has it in float32, where nothing is rounded on the way."""
    klein, _, modules = made
    generator = torch.Generator().manual_seed(1)
    ids = klein.picture_ids(64, 64, ((64, 64),))
    noised, text = (torch.randn(1, n, d, generator=generator) for n, d in ((32, 64), (8, 288)))
    time_proj = modules["transformer"].time_guidance_embed.time_proj
    hooks = dict(time_proj._forward_pre_hooks)
    outputs = []
    for t in (0.95, 0.7):
        here = klein.velocity(modules, noised, torch.tensor([t]), (text,), ids)
        time_proj._forward_pre_hooks.clear()
        there = klein.velocity(modules, noised, torch.tensor([t]), (text,), ids)
        time_proj._forward_pre_hooks.update(hooks)
        assert relative_error(here.numpy(), there) < BOUND
        outputs.append(here)
    assert not torch.equal(*outputs)


@pytest.mark.parametrize(("tokens", "steps"), [(64, 4), (144, 8)])
def test_time_steps_are_the_scheduler_s(made: tuple[Any, ...], tokens: int, steps: int) -> None:
    klein, folder, _ = made
    klein.write_index(folder)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    mu = compute_empirical_mu(tokens, steps)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    assert klein.time_steps(tokens, steps) == scheduler.sigmas.tolist()


@pytest.mark.parametrize("model", ["tiny", "tiny-klein"])
def test_training_begins_at_a_checkpoint_s_own_weights(
    programs: dict[str, Any], tmp_path: Path, model: str
) -> None:
    """`begin` and `export` give back the folder that they began at, number by number."""
    shipped = folder_of(model)
    shutil.copytree(shipped, tmp_path / "checkpoint")
    blueprint = programs["blueprint"].load_blueprint(model)
    args = argparse.Namespace(work=tmp_path, device="cpu", seed=0, blueprint=blueprint)
    programs["flow"].begin(args)
    programs["flow"].export(args)
    for path in sorted(shipped.rglob("*.safetensors")):
        before = load_file(path)
        after = load_file(tmp_path / "checkpoint" / path.relative_to(shipped))
        assert before.keys() == after.keys(), path
        assert all(torch.equal(before[name], after[name]) for name in before), path
    (tmp_path / "flow.pt").write_bytes(b"trained since")
    programs["flow"].begin(args)  # of the same command, which goes on
    assert (tmp_path / "flow.pt").read_bytes() == b"trained since"


def test_what_no_word_places_is_in_the_middle(programs: dict[str, Any]) -> None:
    """So that there is one answer to paint in four steps."""
    scenes, rng = programs["scenes"], np.random.default_rng(0)
    phrases = [phrase for _, _, of_place in scenes.PLACES for phrase in of_place]
    unplaced = [
        scene.things[0]
        for scene, caption in (scenes.sample(rng) for _ in range(2000))
        if len(scene.things) == 1 and not any(p in caption.lower() for p in phrases)
    ]
    assert len(unplaced) > 100
    middle = scenes.place_thing(0, 0.5, 0.5, 0.5, 128, 128)
    assert all(abs(thing.x - middle.x) < 0.1 and abs(thing.y - middle.y) < 0.1
               for thing in unplaced)  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_checkpoint_paints_what_diffusers_paints_from_it(count: int) -> None:
    pictures = [flux2.picture(96, 64, seed) for seed in range(count)]
    flux = FluxPipeline("tiny-klein", dtype="float32")
    latents = [*flux.generate_latents(PROMPT, 1, 4, 1.0, (12, 8), seed=3, references=pictures)]
    mx.eval(latents[-1])
    ours = to_pixels(flux.decode(latents[-1], (12, 8)))[0]
    oracle = Flux2KleinPipeline.from_pretrained(folder_of("tiny-klein"), dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    noise = np.array(flux.noise(3, (12, 8))).transpose(0, 2, 1).reshape(1, -1, 6, 4)
    images = {"image": [Image.fromarray(pixels) for pixels in pictures]} if count else {}
    theirs = oracle(
        prompt=PROMPT, latents=torch.from_numpy(noise.copy()), num_inference_steps=4,
        guidance_scale=1.0, height=96, width=64, max_sequence_length=48, output_type="np", **images,
    ).images[0]  # fmt: skip
    pixels = np.round(theirs * 255).astype(int)
    assert pixels.std() > 5
    assert np.abs(ours.astype(int) - pixels).max() <= 1


def _tokenizer(folder: Path) -> Any:
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
