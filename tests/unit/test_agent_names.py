"""Names over the wire lead inside of the roots, or nowhere; adapters are what their hash says."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.errors import AdapterError, ModelNotFoundError, UsageError
from fluxmesh.request import AdapterRef
from fluxmesh.weights import hub
from fluxmesh_agent.adapter_store import AdapterStore
from fluxmesh_agent.model_paths import Roots


@pytest.fixture
def roots(tmp_path: Path) -> Roots:
    for name in ("models/mine", "models/owner/flux", "more/other", "outside"):
        (tmp_path / name).mkdir(parents=True)
    return Roots(tmp_path / "adapters", tmp_path / "models", [tmp_path / "more"])


@pytest.mark.parametrize("name", ["tiny", "flux-schnell", "dev", "owner/repo"])
def test_aliases_and_hub_ids_stay_what_they_are(roots: Roots, name: str) -> None:
    assert roots.model(name) == name


def test_a_path_inside_of_a_root_is_found(roots: Roots, tmp_path: Path) -> None:
    for path in (tmp_path / "models/mine", tmp_path / "more/other", hub.tiny_folder()):
        assert roots.model(str(path)) == str(path)
    assert roots.model("mine") == str(tmp_path / "models/mine")
    assert roots.model("owner/flux") == str(tmp_path / "models/owner/flux")


@pytest.mark.parametrize(
    "name",
    ["{}/outside", "{}/models/../outside", "../outside", "/etc", "/", "~", "{}/models/link", "no"],
)
def test_a_path_outside_of_the_roots_is_no_model(roots: Roots, tmp_path: Path, name: str) -> None:
    (tmp_path / "models" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelNotFoundError, match="where its agent may read") as caught:
        roots.model(name.format(tmp_path))
    assert f"({tmp_path}/models, " in str(caught.value)  # the user sees which folders these are


def test_a_path_of_another_machine_is_what_was_pushed_from_there(
    roots: Roots, tmp_path: Path
) -> None:
    assert roots.model("/Users/anna/models/mine") == str(tmp_path / "models/mine")
    assert roots.model("/Users/anna/models/mine/") == str(tmp_path / "models/mine")
    for name, suffix in (("flux1-dev", ".safetensors"), ("dev", ".safetensors"), ("q4", ".gguf")):
        file = tmp_path / "models" / name / f"{name}{suffix}"
        file.parent.mkdir()
        file.touch()
        (file.parent / "ae.safetensors").touch()
        path = name if name == "dev" else f"/Users/anna/{name}{suffix}"
        assert roots.model(path) == str(file)
    here = tmp_path / "more" / "mine"  # what is at the path itself comes first
    here.mkdir()
    assert roots.model(str(here)) == str(here)
    (tmp_path / "models" / "away").symlink_to(tmp_path / "outside")
    with pytest.raises(ModelNotFoundError):
        roots.model("/Users/anna/away")


def test_a_host_with_all_of_its_disk_as_root_reads_any_model(tmp_path: Path) -> None:
    assert Roots(tmp_path, None, [Path("/")]).model(str(tmp_path)) == str(tmp_path)


def put(adapters: AdapterStore, data: bytes, piece: int = 1000, name: str = "") -> str:
    sha = name or hashlib.sha256(data).hexdigest()
    for start in range(0, len(data), piece):
        part = np.frombuffer(data[start : start + piece], np.uint8)
        adapters.put(sha, start, len(data), part)
    return sha


def test_an_adapter_comes_in_pieces_and_is_found_by_its_hash(tmp_path: Path) -> None:
    adapters = AdapterStore(tmp_path / "adapters")
    data = bytes(range(256)) * 20
    sha = hashlib.sha256(data).hexdigest()
    assert not adapters.has(sha)
    assert put(adapters, data) == sha
    assert adapters.has(sha)
    path = tmp_path / "adapters" / f"{sha}.safetensors"
    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    located = Roots(tmp_path / "adapters").locate(
        ModelVariant("tiny", adapters=(AdapterRef(sha, 0.5),))
    )
    assert located.adapters == (AdapterRef(str(path), 0.5),)
    assert put(adapters, data) == sha  # twice is harmless


def test_an_adapter_with_another_hash_is_refused_and_can_come_again(tmp_path: Path) -> None:
    adapters = AdapterStore(tmp_path)
    data = b"x" * 2500
    sha = hashlib.sha256(data).hexdigest()
    with pytest.raises(UsageError, match="another hash"):
        put(adapters, b"y" * 2500, name=sha)
    assert not adapters.has(sha)
    put(adapters, data)
    assert adapters.has(sha)


def test_adapters_that_nobody_asked_for_lately_make_room(tmp_path: Path) -> None:
    adapters = AdapterStore(tmp_path, kept_bytes=2500)
    old, used, new = (put(adapters, bytes([i]) * 1000) for i in range(3) if not age(tmp_path))
    assert [adapters.has(sha) for sha in (old, used, new)] == [False, True, True]
    age(tmp_path)
    assert adapters.has(used)
    put(adapters, b"x" * 1000)
    assert [adapters.has(sha) for sha in (used, new)] == [True, False]


def age(folder: Path) -> None:
    """All that is there was used an hour earlier."""
    for path in folder.glob("*.safetensors"):
        used = path.stat().st_mtime - 3600
        os.utime(path, (used, used))


def test_a_piece_out_of_turn_is_refused(tmp_path: Path) -> None:
    adapters = AdapterStore(tmp_path)
    sha = "0" * 64
    adapters.put(sha, 0, 30, np.zeros(10, np.uint8))
    with pytest.raises(UsageError, match="begin anew"):
        adapters.put(sha, 20, 30, np.zeros(10, np.uint8))
    with pytest.raises(UsageError, match="at most"):
        adapters.put(sha, 10, 30, np.zeros(21, np.uint8))
    with pytest.raises(UsageError, match="at most"):
        adapters.put(sha, 0, 1 << 50, np.zeros(10, np.uint8))


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "a/" * 32])
def test_an_adapters_name_is_a_hash_and_nothing_else(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="64 hexadecimal"):
        AdapterStore(tmp_path).has(name)
    with pytest.raises(AdapterError, match="not sent"):
        Roots(tmp_path).locate(ModelVariant("tiny", adapters=(AdapterRef(name),)))
