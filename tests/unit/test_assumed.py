"""Meshes that are not there: what `plan --assume` plans with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.cluster import hostfile as hostfiles
from fluxmesh.cluster.snapshot import MeshView
from fluxmesh.errors import UsageError
from fluxmesh.planning.workload import Workload
from fluxmesh_coordinator.deploy.what_if import assumed_view, load_assumption, published
from fluxmesh_coordinator.runtime.resolved import ResolvedModel
from tests.unit.meshes import ask

FOLDER = Path(__file__).parents[2] / "hostfiles"
LEAST: dict[str, Any] = {"memory": "144GB", "link_rate": 1e9}


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "assume.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def view(hostfile: str, **more: Any) -> MeshView:
    work = Workload.of(ask(model="schnell", height=512, width=512), published("schnell"))
    assumed = {"kind": "x", "warm": True, "flops_per_second": 1e12, "load_rate": 1e9}
    assumed |= {"link_latency": 1e-4, "memory": 144 * 10**9, "link_rate": 1e9, "platform": "metal"}
    assumed |= more
    return assumed_view(hostfiles.load(FOLDER / hostfile), assumed, work, work.weights)


@pytest.mark.parametrize("path", sorted((FOLDER / "assume").glob("*.json")), ids=lambda p: p.stem)
def test_the_examples_are_read(path: Path) -> None:
    assumed = load_assumption(path)
    assert assumed["platform"] == "metal"
    if path.stem.startswith("mac-"):
        share = assumed["memory"] / assumed["machine_memory"]
        assert share == pytest.approx(
            3 / 4 if assumed["machine_memory"] > 2**35 else 2 / 3, abs=1e-3
        )
        return
    assert assumed["memory"] > 10**11
    assert set(assumed["step_seconds"]) == {(512, 512), (1024, 1024)}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("{", "not JSON"),
        ([], "an object"),
        ({"memory": "1GB"}, "link_rate is missing"),
        ({**LEAST, "colour": "red"}, "colour is no key"),
        ({**LEAST, "memory": "much"}, "memory can't be"),
        ({**LEAST, "link_rate": -1}, "link_rate can't be"),
        ({**LEAST, "link_rate": True}, "link_rate can't be"),
        ({**LEAST, "links": "star"}, "links can't be"),
        ({**LEAST, "platform": "rocm"}, "platform can't be"),
        ({**LEAST, "machine_memory": 0}, "machine_memory can't be"),
        ({**LEAST, "step_seconds": {"big": 1}}, "step_seconds can't be"),
        ({**LEAST, "step_seconds": {"512x512": 0}}, "step_seconds can't be"),
    ],
)
def test_a_mistake_names_the_key(tmp_path: Path, data: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_assumption(written(tmp_path, data))


def test_cables_of_a_thunderbolt_ring_reach_neighbours_alone() -> None:
    links = {(link.source, link.target) for link in view("thunderbolt-4.json").links}
    assert links == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2), (3, 0), (0, 3)}
    assert len(view("jaccl-4.json").links) == 12
    assert len(view("thunderbolt-4.json", links="all").links) == 12


def test_agents_of_one_machine_share_it() -> None:
    mesh = view("local-4.json")
    assert {host.device for host in mesh.hosts} == {"localhost"}
    held = sum(host.held_bytes for host in mesh.hosts)
    assert held > 0 and mesh.hosts[0].free_bytes == 144 * 10**9 - held
    assert len({host.device for host in view("jaccl-4.json").hosts}) == 4


def test_hosts_too_small_for_the_model_hold_nothing_yet() -> None:
    assert {host.holds for host in view("jaccl-4.json", memory=8 * 10**9).hosts} == {None}


def test_flux_is_planned_without_its_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("FLUX_DEV", "FLUX_SCHNELL"):
        monkeypatch.delenv(name, raising=False)
    model, sizes = ResolvedModel.known("flux-dev"), ResolvedModel.known("flux-dev").sizes
    assert (model.name, model.full_name, model.is_here) == ("dev", "dev", False)
    assert (sizes.defaults.steps, sizes.defaults.t5_max_length) == (50, 512)
    assert sizes.architecture.tokens(1024, 1024) == 4608
    assert "guidance_in.in_layer.weight" in sizes.architecture.tensors("denoiser")
    assert ResolvedModel.known("tiny").is_here
