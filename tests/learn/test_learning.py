"""It learns: a short training on five pictures, and what it then makes of prompts held out.

`tools/tiny/learn.py` runs the long one, with the score that docs/training.md shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fluxmesh import FluxPipeline
from fluxmesh.engine.stages import to_pixels
from fluxmesh.training.data.dataset import load_dataset
from tests.integration.conftest import Run

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "tiny"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "robot"
ASKED = (0, 10, 21)  # of the held-out prompts: the places shown, not shown, and shown
LATENTS = (16, 16)


@pytest.fixture
def robot(monkeypatch: pytest.MonkeyPatch):
    """The program's module that draws; its neighbours are imported by their bare names."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import robot

    yield robot
    for name in ("robot", "scenes", "sprites"):
        sys.modules.pop(name, None)


def painted(prompts: list[str], *adapters: str) -> np.ndarray:
    flux = FluxPipeline("tiny", dtype="float32", adapters=adapters)
    images = [
        flux.generate_images(text, latent_size=LATENTS, seed=seed, reload_text_encoders=False)
        for seed, text in enumerate(prompts)
    ]
    return np.concatenate([to_pixels(image) for image in images]).astype(int)


@pytest.mark.timeout(600)
def test_a_minute_of_training_teaches_the_embedded_model_a_robot_on_backgrounds_never_shown(
    fluxmesh: Run, tmp_path: Path, robot
) -> None:
    from sprites import draw

    sprites = np.zeros((robot.ROBOT + 1, 128, 128, 4), dtype=np.uint8)
    sprites[robot.ROBOT] = robot.render_robot()
    robot.write_dataset(tmp_path / "five", robot.shown(), sprites)
    done = fluxmesh(
        *("train", "five", "--model", "tiny", "--dtype", "float32", "--seed", 1),
        *("--cache-dir", "cache", "--num-augmentations", 1, "--timesteps", "schnell"),
        *("--iterations", 75, "--grad-accumulate", 3, "--lora-rank", 16),
        *("--learning-rate", 0.003, "--warmup-steps", 2, "--checkpoint-every", 75),
        timeout=600,
    )
    assert done.code == 0, done.err
    pairs = [robot.asked()[number] for number in ASKED]
    prompts = [robot.caption(*pair) for pair in pairs]
    drawn = np.stack([draw(robot.scene(*pair), sprites, 128, 128) for pair in pairs]).astype(int)
    before, after = (
        np.square(pictures - drawn).mean(axis=(1, 2, 3))
        for pictures in (painted(prompts), painted(prompts, str(tmp_path / "mlx_output")))
    )
    assert (after < before / 2).all(), (before, after)


def test_the_pictures_of_the_example_are_those_that_the_program_draws(
    tmp_path: Path, robot
) -> None:
    from sprites import draw

    sprites = np.zeros((robot.ROBOT + 1, 128, 128, 4), dtype=np.uint8)
    sprites[robot.ROBOT] = robot.render_robot()
    examples = load_dataset(str(EXAMPLE))
    assert [x.caption for x in examples] == [robot.caption(*pair) for pair in robot.shown()]
    for example, pair in zip(examples, robot.shown(), strict=True):
        np.testing.assert_array_equal(example.pixels(), draw(robot.scene(*pair), sprites, 128, 128))


@pytest.mark.timeout(900)
def test_a_training_teaches_with_its_defaults(fluxmesh: Run, tmp_path: Path, robot) -> None:
    """A fifth of a default run's length, which takes two fifths off what is wrong with a picture;
    docs/training.md has what the whole one gives."""
    from sprites import draw

    done = fluxmesh(
        *("train", EXAMPLE, "--model", "tiny", "--seed", 1, "--iterations", 120),
        *("--dtype", "float32", "--cache-dir", "cache", "--checkpoint-every", 120),
        timeout=800,
    )
    assert done.code == 0, done.err
    sprites = np.zeros((robot.ROBOT + 1, 128, 128, 4), dtype=np.uint8)
    sprites[robot.ROBOT] = robot.render_robot()
    pairs = [robot.asked()[number] for number in ASKED]
    prompts = [robot.caption(*pair) for pair in pairs]
    drawn = np.stack([draw(robot.scene(*pair), sprites, 128, 128) for pair in pairs]).astype(int)
    before, after = (
        np.square(pictures - drawn).mean(axis=(1, 2, 3))
        for pictures in (painted(prompts), painted(prompts, str(tmp_path / "mlx_output")))
    )
    assert (after < 0.75 * before).all(), (before, after)


@pytest.mark.timeout(900)
def test_a_quantized_model_learns_nearly_as_well(fluxmesh: Run, tmp_path: Path, robot) -> None:
    """Within 5% by the end of a long run (docs/training.md); after this short one, within more."""
    sprites = np.zeros((robot.ROBOT + 1, 128, 128, 4), dtype=np.uint8)
    sprites[robot.ROBOT] = robot.render_robot()
    robot.write_dataset(tmp_path / "five", robot.shown(), sprites)
    losses = {}
    for bits in (None, 8, 4):
        out = tmp_path / f"out-{bits}"
        done = fluxmesh(
            *("train", "five", "--model", "tiny", "--dtype", "float32", "--seed", 3),
            *("--iterations", 40, "--grad-accumulate", 2, "--learning-rate", 2e-3),
            *("--warmup-steps", 5, "--timesteps", "schnell", "--num-augmentations", 1),
            *("--resolution", "64x64", "--validation", 2, "--checkpoint-every", 40),
            *("--output-dir", out, "--cache-dir", "cache"),
            *(("--quantize", "--bits", bits) if bits else ()),
            timeout=300,
        )
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        (losses[bits],) = [line["loss"] for line in lines if line["event"] == "validated"]
    assert losses[None] < 0.15, "it learns: 0.5 before"
    assert losses[8] == pytest.approx(losses[None], rel=0.02)
    assert losses[4] == pytest.approx(losses[None], rel=0.12)
