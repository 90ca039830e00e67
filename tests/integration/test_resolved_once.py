"""What a prompt costs before anything is painted: each file and the mesh are looked at once.

The command line runs in this process, with real agents, so that what it reads can be counted.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxmesh.events import Picture
from fluxmesh.request import AdapterRef, GenerateRequest
from fluxmesh.storage.homes import Home
from fluxmesh.storage.keys import Keys, store_keys
from fluxmesh.weights import hub
from fluxmesh.wire import messages
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.cli import main
from fluxmesh_coordinator.runtime.host_link import HostLink
from tests.datasets import picture
from tests.integration.agents import agent
from tests.integration.test_mesh import mesh_of, record_of
from tests.integration.test_one_host import adapter

PROMPTS = ("a red dog", "two cats")


@dataclasses.dataclass
class Looks:
    """What was looked at, and how often."""

    mesh: int = 0  # reads of mesh.json
    saves: int = 0  # writes of it
    models: Counter[str] = dataclasses.field(default_factory=Counter)  # resolutions by name
    files: Counter[str] = dataclasses.field(default_factory=Counter)  # hashes by file name
    noises: list[int] = dataclasses.field(default_factory=list)  # in each `Paint` from the start


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """Counts, from now on, in this process."""
    seen = Looks()
    read, write, resolve = mesh_file.read_private, mesh_file.write_private, hub.resolve
    digest, send = hashlib.file_digest, HostLink.send

    def count_read(path: Path) -> str:
        seen.mesh += path.name == "mesh.json"
        return read(path)

    def count_write(path: Path, text: str) -> None:
        seen.saves += path.name == "mesh.json"
        write(path, text)

    def count_resolve(name: str, **options: Any) -> Any:
        checkpoint = resolve(name, **options)
        seen.models[checkpoint.name] += 1  # a name that leads nowhere here is no resolution
        return checkpoint

    def count_digest(file: Any, kind: Any) -> Any:
        seen.files[Path(file.name).name] += 1
        return digest(file, kind)

    def count_send(link: HostLink, message: messages.Changing) -> None:
        if isinstance(message, messages.Paint) and message.first == 0:
            arrays = [getattr(message, field.name) for field in dataclasses.fields(message)]
            same = [
                array
                for array in arrays
                if isinstance(array, np.ndarray) and np.array_equal(array, message.noise)
            ]
            seen.noises.append(len(same))
        send(link, message)

    monkeypatch.setattr(mesh_file, "read_private", count_read)
    monkeypatch.setattr(mesh_file, "write_private", count_write)
    monkeypatch.setattr(hub, "resolve", count_resolve)
    monkeypatch.setattr(hashlib, "file_digest", count_digest)
    monkeypatch.setattr(HostLink, "send", count_send)
    return seen


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter, a picture and prompts; nothing is up."""
    home = tmp_path / "home"
    monkeypatch.setenv("FLUXMESH_HOME", str(home))
    monkeypatch.setenv("FLUXMESH_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Path(adapter(tmp_path, 1)).rename(tmp_path / "dog.safetensors")
    picture(4, (64, 48)).save(tmp_path / "source.png")
    Image.fromarray(np.eye(64, 48, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    (tmp_path / "prompts.txt").write_text("".join(f"{text}\n" for text in PROMPTS))
    return tmp_path


@contextmanager
def mesh_up(place: Path, hosts: int, root: Path) -> Iterator[None]:
    """Agents on loopback, written down as `fluxmesh up` would; none: no mesh is up."""
    home = Home.default()
    with ExitStack() as stack:
        if hosts:
            user = Keys.new()
            store_keys(home.folder, "client", user)
            agents = [
                stack.enter_context(agent(place / f"agent-{rank}", "--root", str(root), user=user))
                for rank in range(hosts)
            ]
            mesh_file.save(record_of(agents))
        yield


@pytest.mark.parametrize("hosts", [0, 2])
def test_a_call_looks_at_mesh_model_and_files_once(
    place: Path, checkpoint: Path, looks: Looks, hosts: int
) -> None:
    with mesh_up(place, hosts, checkpoint), pytest.raises(SystemExit) as end:
        saved = looks.saves
        main(
            ["generate", "--prompt-file", "prompts.txt", "--model", str(checkpoint), "--seed", "3"]
            + ["--image", "source.png", "--mask", "mask.png", "--adapter", "dog.safetensors:0.5"]
            + ["--steps", "2", "--output", str(place), "--json"]
        )
    print(looks)
    assert not end.value.code
    # What jobs measure is added to what is there then: each such write reads once more.
    assert looks.mesh - (looks.saves - saved) == 1
    assert looks.models == {str(checkpoint): 1}
    assert looks.files == {"dog.safetensors": 1, "source.png": 1, "mask.png": 1}
    assert looks.noises == [1] * len(PROMPTS)


def test_a_python_program_has_its_request_resolved_once(
    place: Path, checkpoint: Path, looks: Looks
) -> None:
    request = GenerateRequest(
        "a red dog",
        3,
        model=str(checkpoint),
        steps=2,
        adapters=(AdapterRef("dog.safetensors", 0.5),),
    )
    with mesh_of(place, 1, checkpoint) as mesh:
        events = list(mesh.generate(request))
    (picture,) = [event for event in events if isinstance(event, Picture)]
    defaults = hub.resolve(str(checkpoint)).defaults
    assert picture.pixels.shape == (defaults.height, defaults.width, 3)
    assert looks.models == {str(checkpoint): 2}, "one is this test's"
    assert looks.files == {"dog.safetensors": 1}
    assert (looks.mesh, looks.noises) == (0, [1])
