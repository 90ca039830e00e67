"""A model that gives no picture, as a user meets it: one sentence, no file, no host blamed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fluxmesh import events
from fluxmesh.errors import FluxmeshError, NotFiniteError, WeightsError
from fluxmesh.training.request import TrainRequest
from fluxmesh.training.run import DivergedError
from fluxmesh.wire import messages
from tests.checkpoints import make_checkpoint
from tests.datasets import make_dataset
from tests.integration.conftest import Run
from tests.integration.test_mesh import mesh_of, request_of
from tests.numerics.loading import FILES
from tests.overflowing import overflowing

ASKED = ("--image-size", "32x48", "--steps", "2", "--seed", "1")


def truncated(folder: Path, component: str) -> Path:
    """A checkpoint one of whose files has lost its end."""
    made = make_checkpoint(folder)
    path = made.folder / FILES[component]
    path.write_bytes(path.read_bytes()[:-100])
    return made.path


@pytest.mark.parametrize("place", ["step", "T5", "decoder"])
def test_generate_says_once_where_it_overflowed_and_saves_nothing(
    fluxmesh: Run, tmp_path: Path, place: str
) -> None:
    overflowing(tmp_path / "model", place)
    before = sorted(os.listdir(tmp_path))
    asked = ("generate", "a dog", "--model", "model", *ASKED, "--dtype", "float32")
    done = fluxmesh(*asked)
    assert done.code == 1, done.err
    (error,) = (line for line in done.err.splitlines() if line.startswith("Error: "))
    assert "NaN or infinity came out of" in error
    assert done.err.count("NaN") == 1 and "lost" not in done.err and "Saved" not in done.out
    assert sorted(os.listdir(tmp_path)) == before
    told = fluxmesh(*asked, "--json")
    assert told.code == 1 and told.of("error")[0]["exit_code"] == 1
    assert not told.of("hostlost") and not told.of("hostunfit") and not told.of("saved")
    assert sorted(os.listdir(tmp_path)) == before


def test_interactive_says_it_and_goes_on(fluxmesh: Run, tmp_path: Path) -> None:
    overflowing(tmp_path / "model", "step")
    make_checkpoint(tmp_path / "sound")
    done = fluxmesh(
        *("interactive", "--model", "model", *ASKED),
        stdin="a dog\n/model sound\na dog\n/quit\n",
    )
    assert done.code == 0, done.err
    assert done.err.count("NaN or infinity came out of step 1 of 2") == 1, done.err
    assert "lost" not in done.err
    assert [name for name in os.listdir(tmp_path) if name.endswith(".png")] == ["out.png"]


@pytest.mark.parametrize("component", FILES)
def test_a_damaged_file_is_the_sentence_alone_with_the_users_own_path(
    fluxmesh: Run, tmp_path: Path, component: str
) -> None:
    truncated(tmp_path / "my model", component)
    done = fluxmesh("generate", "a dog", "--model", "my model", *ASKED)
    assert done.code == 1, done.err
    (error,) = (line for line in done.err.splitlines() if "truncated" in line)
    assert error.startswith(f"Error: my model/{FILES[component]} is truncated"), done.err
    assert "lost" not in done.err and "takes no part" not in done.err


def test_on_a_mesh_no_host_is_lost_in_any_placement(tmp_path: Path) -> None:
    models = tmp_path / "models"
    broken = overflowing(models / "step", "step")
    bad_file = truncated(models / "damaged", "transformer")
    with mesh_of(tmp_path, 2, models) as mesh:
        heard: list[events.Event] = []
        for placement in ("data", "sequence", "tensor"):
            with pytest.raises(NotFiniteError, match="step 1 of 3 with"):
                for event in mesh.generate(request_of(broken, n_images=2), placement):
                    heard.append(event)
        assert not any(isinstance(event, events.HostLost | events.HostUnfit) for event in heard)
        assert not any(isinstance(event, events.Picture | events.Step) for event in heard)
        heard.clear()
        with pytest.raises(WeightsError, match=r"^\S+( and \S+)?: .*is truncated"):
            for event in mesh.generate(request_of(bad_file, n_images=2), "data"):
                heard.append(event)
        assert not any(isinstance(event, events.HostLost) for event in heard)
        statuses = [s for s in mesh.status().values() if isinstance(s, messages.Status)]
        assert len(statuses) == 2


@pytest.mark.parametrize(
    ("place", "kind", "sentence"),
    [
        ("step", DivergedError, r"not finite \(NaN or infinity\) in update 1, by iteration"),
        ("T5", NotFiniteError, "T5, for this prompt"),
        ("encoder", NotFiniteError, "the autoencoder, which read the picture"),
    ],
)
def test_a_training_on_a_mesh_blames_no_host_either(
    tmp_path: Path, place: str, kind: type[FluxmeshError], sentence: str
) -> None:
    model = overflowing(tmp_path / "model", place)
    make_dataset(tmp_path / "data")
    request = TrainRequest(
        dataset=str(tmp_path / "data"),
        model=str(model),
        dtype="float32",
        iterations=4,
        grad_accumulate=2,
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        seed=1,
    )
    heard: list[object] = []
    with mesh_of(tmp_path, 2, model) as mesh, pytest.raises(kind, match=sentence) as caught:
        heard.extend(mesh.train(request, heard.append))
    assert type(caught.value) is kind
    assert not any(isinstance(event, events.HostLost | events.HostUnfit) for event in heard)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_training_with_a_damaged_file_on_a_mesh_is_told_by_host(tmp_path: Path) -> None:
    model = truncated(tmp_path / "model", "transformer")
    make_dataset(tmp_path / "data")
    request = TrainRequest(
        dataset=str(tmp_path / "data"),
        model=str(model),
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        seed=1,
    )
    heard: list[object] = []
    with (
        mesh_of(tmp_path, 2, model) as mesh,
        pytest.raises(WeightsError, match=r"^\S+( and \S+)?: .*is truncated"),
    ):
        heard.extend(mesh.train(request, heard.append))
    assert not any(isinstance(event, events.HostLost) for event in heard)
