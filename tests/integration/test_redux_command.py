"""References that dev reads with FLUX.1 Redux, from the command line to the file, on one host."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fluxmesh_coordinator.artifacts.recipe import read_recipe
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import Run
from tests.redux_checkpoint import make_redux

SIZE = ("--image-size", "48x64", "--steps", "2", "--seed", "5", "--dtype", "float32")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_dev_reads_references_with_redux_and_paints_them_again_from_its_own_picture(
    fluxmesh: Run, tmp_path: Path
) -> None:
    dev = make_checkpoint(tmp_path / "dev", guidance=True).path
    make_redux(tmp_path / "seeing")
    for name, (height, width) in {"a.png": (70, 101), "b.jpg": (64, 80)}.items():
        rng = np.random.default_rng(width)
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    command = ("generate", "a dog", "--model", dev, *SIZE)
    refused = fluxmesh(*command, "--reference", "a.png")
    assert refused.code == 2 and "takes no reference pictures" in refused.err
    away = fluxmesh(*command, "--reference", "a.png@-1", "--redux", "seeing")
    assert away.code == 2 and "--reference has -1.0; each must be 0 to 10" in away.err
    painted = {}
    for name, options in {
        "none": (),
        "one": ("--reference", "a.png"),
        "both": ("--reference", "a.png@0.7", "--reference", "b.jpg@0.4"),
    }.items():
        done = fluxmesh(*command, *options, "--redux", "seeing", "-o", f"{name}.png")
        assert done.code == 0, done.err
        painted[name] = pixels(tmp_path / f"{name}.png")
        assert painted[name].shape == (48, 64, 3)  # whatever the references' sizes
        assert ("a.png is read at 30x30 pixels; it has 70x101." in done.err) == bool(options)
        said = "--redux has no effect: there is no --reference."
        assert (said in done.err) == (not options)
    names = list(painted)
    for k, name in enumerate(names):
        for other in names[:k]:
            assert np.abs(painted[name] - painted[other]).max() > 2, (name, other)
    recipe = read_recipe(tmp_path / "both.png")
    assert recipe.reference_strengths == (0.7, 0.4) and recipe.redux == "seeing"
    assert recipe.redux_revision.startswith("local-")
    again = fluxmesh("generate", "--from", "both.png", "--low-memory", "-o", "again.png")
    assert again.code == 0, again.err
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "both.png").read_bytes()
    planned = fluxmesh(
        "plan", "--model", dev, "--reference", "a.png", "--redux", "seeing", "--json"
    )
    assert planned.code == 0 and json.loads(planned.out)["options"], planned.err
