"""A third family, out of a test's folder: planned, loaded and painted with, by its row alone.

`tests/third_family/` is all that stands for it; every command, agent and engine here has its row.
Whatever else it took would be a defect of the seam.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults.mesh import LIMIT, Up, environment, up
from tests.third_family.checkpoint import make_patchwork
from tests.third_family.row import third_path

PROMPT, SEED, IMAGES = "two dogs", 5, 4
STEPS = 3  # of its own

pytestmark = pytest.mark.timeout(2 * LIMIT)  # a test here runs several commands

# Programs for a Python that knows it, to which the model is told: what one machine makes of it by
# way of `FluxPipeline`; what a mesh does, of which `Up`'s fields are told too.
ALONE = f"""
import sys
import numpy as np
from fluxmesh.request import GenerateRequest
from tests.alone import painted_alone
request = GenerateRequest({PROMPT!r}, {SEED}, n_images={IMAGES}, model=sys.argv[1], dtype="float32")
np.save(sys.stdout.buffer, painted_alone(request))
"""
ON_A_MESH = f"""
import json, os, sys
from pathlib import Path
import numpy as np
from fluxmesh.request import GenerateRequest
from tests.faults.mesh import Up, paint
model, folder, ports = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
mesh = Up(folder, ports, dict(os.environ), model)
request = GenerateRequest({PROMPT!r}, {SEED}, n_images={IMAGES}, model=model, dtype="float32")
with mesh.connect() as held:
    outcome = paint(held, request, "data")
    steps = [mesh.status(held, rank).counters.steps for rank in range(len(ports))]
if outcome.error is not None:
    raise outcome.error
print(steps, file=sys.stderr)
np.save(sys.stdout.buffer, np.stack([outcome.pictures[k] for k in range({IMAGES})]))
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Up:
    """Somebody whose fluxmesh knows Patchwork, and has a checkpoint of it; no mesh is up."""
    folder = tmp_path_factory.mktemp("third")
    model = make_patchwork(folder / "patchwork")
    return Up(folder, [], environment(folder) | {"PYTHONPATH": third_path()}, str(model))


@pytest.fixture(scope="module")
def two_hosts(user: Up) -> Iterator[Up]:
    path = third_path()
    # Slow: neither host can have done it all before the other began.
    with up(user.folder / "mesh", 2, user.model, delays="step=0.2", PYTHONPATH=path) as mesh:
        yield mesh


def python(user: Up, program: str, *arguments: object) -> tuple[np.ndarray, str]:
    """What a program makes, uint8 [images, H, W, 3], and what it says."""
    command = [sys.executable, "-c", program, user.model, *map(str, arguments)]
    done = subprocess.run(command, env=user.env, capture_output=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return np.load(io.BytesIO(done.stdout)), done.stderr.decode()


@pytest.fixture(scope="module")
def alone(user: Up) -> np.ndarray:
    """Its pictures on one machine."""
    return python(user, ALONE)[0]


def generate(mesh: Up, folder: Path, *options: object) -> list[dict[str, Any]]:
    """What the command tells of `IMAGES` pictures, which it writes to `folder`."""
    folder.mkdir()
    asked = ("--model", mesh.model, "--dtype", "float32", "--seed", SEED, "-n", IMAGES)
    done = mesh.fluxmesh(
        *("generate", PROMPT, *asked, "--save-raw", "--json", "-o", folder, *options)
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def written(folder: Path) -> np.ndarray:
    """All pictures of a folder by their numbers, uint8 [images, H, W, 3]."""
    paths = sorted(folder.glob("*.png"), key=lambda path: int(path.name.split(".")[1]))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_it_is_listed_and_planned_by_its_alias_and_by_its_folder(user: Up) -> None:
    listed = user.fluxmesh("models", "list", "--json").stdout
    (row,) = [line for line in map(json.loads, listed.splitlines()) if line["name"] == "patchwork"]
    assert row["family"] == "Patchwork"
    assert "32x32, 3 steps with patchwork" in user.fluxmesh("plan", "-m", "patchwork").stdout
    assert "32x32, 3 steps with" in user.fluxmesh("plan", "-m", user.model).stdout
    (user.folder / "other").mkdir()
    (user.folder / "other" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    refused = user.fluxmesh("plan", "-m", user.folder / "other", check=False)
    assert "fluxmesh runs FLUX.1, FLUX.2 and Patchwork only" in " ".join(refused.stderr.split())


def test_one_host_paints_what_python_paints(user: Up, alone: np.ndarray, tmp_path: Path) -> None:
    generate(user, tmp_path / "out")
    assert np.array_equal(written(tmp_path / "out"), alone)
    assert len({picture.tobytes() for picture in alone}) == IMAGES


def test_it_is_quantized_on_the_way_and_saved(user: Up, tmp_path: Path) -> None:
    small = replace(user, model=str(tmp_path / "small"))
    user.fluxmesh("models", "quantize", user.model, small.model, "--bits", 4)
    saved = ("--dtype", "bfloat16")  # as it is saved
    generate(small, tmp_path / "saved", *saved)
    generate(user, tmp_path / "on the way", "--quantize", "--bits", 4, *saved)
    generate(user, tmp_path / "plain", *saved)
    assert np.array_equal(written(tmp_path / "saved"), written(tmp_path / "on the way"))
    assert not np.array_equal(written(tmp_path / "saved"), written(tmp_path / "plain"))


def test_it_begins_from_a_picture_in_little_memory(user: Up, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    begins = ("--image", tmp_path / "in.png", "--strength", 0.5)
    generate(user, tmp_path / "out", *begins)
    generate(user, tmp_path / "low", *begins, "--low-memory")
    assert np.array_equal(written(tmp_path / "out"), written(tmp_path / "low"))


def test_two_hosts_share_its_pictures(two_hosts: Up, alone: np.ndarray) -> None:
    ports = json.dumps(two_hosts.ports)
    pictures, said = python(two_hosts, ON_A_MESH, two_hosts.folder, ports)
    assert np.array_equal(pictures, alone)
    steps = json.loads(said.splitlines()[-1])
    assert sum(steps) == STEPS * IMAGES and all(steps)


def test_a_command_paints_on_two_hosts(two_hosts: Up, alone: np.ndarray, tmp_path: Path) -> None:
    generate(two_hosts, tmp_path / "out", "--placement", "data")
    assert np.array_equal(written(tmp_path / "out"), alone)
