"""Which model stands in where none is named: the best that is here, and fits these hosts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluxmesh.adapters.changes import LowRank
from fluxmesh.cluster import hostfile as hostfiles
from fluxmesh.cluster.snapshot import ModelVariant
from fluxmesh.machine import memory
from fluxmesh.models.registry import TOOLS_BY_PREFERENCE, published
from fluxmesh.request import AdapterRef, GenerateRequest
from fluxmesh.weights import hub
from fluxmesh_coordinator.runtime import default_model as standing_in
from fluxmesh_coordinator.runtime.default_model import (
    as_measured,
    default_model,
    default_to_train,
    expected_view,
    view_of_mesh,
)
from tests.flux1_adapters import write_adapter
from tests.mac import mac
from tests.unit.meshes import full
from tests.unit.meshes import mac as mac_host

GIB = 1 << 30
TINY = hub.resolve("tiny")
ASKED = GenerateRequest(prompt="", seed=0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which models are on this machine, and how much memory its models may take."""

    def say(names: Sequence[str], gib: float) -> None:
        known = {
            name: SimpleNamespace(
                name=name, architecture=published(name), bits=None, text_bits=None
            )
            for name in names
        }
        tools = [known.pop(name) for name in TOOLS_BY_PREFERENCE if name in known]
        models = list(known.values())
        monkeypatch.setattr(hub, "preferred_here", lambda: iter([*models, TINY]))
        monkeypatch.setattr(hub, "tools_here", lambda: iter(tools))
        monkeypatch.setattr(memory, "accelerator_bytes", lambda: int(gib * GIB))
        monkeypatch.setattr(standing_in, "is_mac", lambda: True)

    return say


@pytest.mark.parametrize(
    ("gib", "bits", "expected"),
    [
        (128, None, "klein-9b"),
        (14, None, "klein-4b"),  # klein 9B is 17 GiB in bfloat16
        (14, 8, "klein-9b"),
        (5, None, "tiny"),
        (7, 4, "klein-4b"),
    ],
)
def test_the_best_that_fits_is_taken(here: Any, gib: float, bits: int, expected: str) -> None:
    here(["klein-9b", "klein-4b"], gib)
    model = default_model(GenerateRequest(prompt="", seed=0, bits=bits))
    assert model.name == expected
    before = {"klein-9b": (), "klein-4b": ("klein-9b",), "tiny": ("klein-9b", "klein-4b")}
    assert model.too_large == before[expected]


def test_several_hosts_hold_what_one_does_not(here: Any) -> None:
    """Of other machines what no hostfile tells is taken to suffice."""
    here(["flux2-dev"], 24)

    def chosen(*hosts: str) -> str:
        return default_model(ASKED, expected_view(hostfiles.parse(f"[{', '.join(hosts)}]"))).name

    def host(number: int, memory: str = "") -> str:
        ips = f'"ssh": "mac{number}", "ips": ["10.0.0.{number}"]'
        return f"{{{ips}{memory and f', {memory}'}}}"

    capped = '"memory": "40GB"'
    assert chosen(host(1), host(2)) == "flux2-dev"
    assert chosen(*(host(n, capped) for n in (1, 2, 3, 4))) == "flux2-dev"
    assert chosen(host(1, capped)) == "tiny"


def test_a_request_with_references_takes_a_model_that_takes_them(
    here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(["schnell", "dev", "kontext"], 128)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    editing = GenerateRequest(prompt="", seed=0, references=(picture,))
    assert default_model(editing).name == "kontext"
    assert default_model(ASKED).name == "schnell"
    here(["kontext", "klein-base-4b"], 128)
    several = GenerateRequest(prompt="", seed=0, references=(picture, picture))
    assert default_model(editing).name == "kontext"  # which reads no second one
    assert default_model(several).name == "klein-base-4b"
    here(["schnell"], 128)
    assert default_model(editing).name == "tiny"  # which then says that it takes none
    small = SimpleNamespace(
        name="tiny-klein", architecture=published("klein"), bits=None, text_bits=None
    )
    monkeypatch.setattr(hub, "preferred_here", lambda: iter([TINY, small]))
    names = ("tiny", "tiny-klein")
    monkeypatch.setattr(standing_in, "embedded_names", lambda: names)
    assert (default_model(ASKED).name, default_model(editing).name) == names
    # What neither takes is said of the one that takes the rest.
    assert default_model(replace(editing, negative="cars", cfg=2.0)).name == "tiny-klein"
    assert default_model(replace(ASKED, negative="cars", cfg=2.0)).name == "tiny"


EDGES = np.zeros((64, 64, 3), dtype=np.uint8)
FOLLOWING = GenerateRequest(prompt="", seed=0, control=EDGES)


def test_a_request_with_a_control_map_takes_a_model_that_follows_one(here: Any) -> None:
    here(["schnell", "dev", "depth", "canny", "fill"], 128)
    model = default_model(FOLLOWING)
    assert model.name == "canny"
    said = (
        "canny is the best model that is here for a control map (a map made for depth takes that); "
    )
    assert model.sentence.startswith(said)
    assert default_model(ASKED).name == "schnell"
    here(["schnell", "depth"], 128)
    assert default_model(FOLLOWING).name == "depth"
    edges = replace(FOLLOWING, control_is_found=True)
    assert default_model(edges).name == "tiny"  # which says that none here follows edges
    here(["depth", "canny"], 128)
    assert (default_model(edges).name, default_model(edges).alike) == ("canny", ())
    here(["depth", "canny"], 5)  # neither fits, and no other can: the plan says what lacks
    assert default_model(FOLLOWING).name == "canny"
    here(["schnell", "fill"], 128)
    assert default_model(FOLLOWING).name == "tiny"  # which then says who follows one


def test_a_request_that_paints_into_a_picture_takes_the_model_made_for_it(here: Any) -> None:
    here(["klein-4b", "canny", "fill"], 128)
    model = default_model(ASKED, paints_into=True)
    assert (model.name, model.given) == ("fill", ("a mask",))
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    editing = GenerateRequest(prompt="", seed=0, references=(picture,))
    assert default_model(editing, paints_into=True).name == "klein-4b"
    here(["klein-4b", "canny", "fill"], 16)
    model = default_model(ASKED, paints_into=True)  # any model can, by the sampler
    assert (model.name, model.too_large) == ("klein-4b", ("fill",))
    here(["klein-4b", "canny"], 128)
    assert default_model(ASKED, paints_into=True).name == "klein-4b"


def test_a_control_lora_s_base_follows_a_map(here: Any, tmp_path: Path) -> None:
    here(["schnell", "klein-4b", "dev", "canny"], 128)
    transformer = published("dev").transformer
    low = LowRank(np.ones((1, 128), np.float32), np.ones((3072, 1), np.float32))
    strength = LowRank(np.ones((1, 256), np.float32), np.ones((3072, 1), np.float32))
    made = {"img_in": low, "guidance_in.in_layer": strength}
    write_adapter(tmp_path / "edges", made, transformer)
    adapters = (AdapterRef(str(tmp_path / "edges")),)
    with_map = replace(FOLLOWING, adapters=adapters)
    chosen = default_model(with_map)
    assert (chosen.name, chosen.given) == ("dev", ("a control map",))
    here(["schnell", "canny"], 128)
    assert default_model(with_map).name == "schnell"
    here(["klein-4b", "canny"], 128)
    assert default_model(with_map).name == "canny"  # which takes it as an adapter of its own
    here(["schnell", "klein-4b"], 128)
    assert default_model(with_map).name == "schnell"  # without what it has no place for


def test_hosts_that_were_asked_say_what_fits(here: Any) -> None:
    """A mesh of other machines, whatever this one could do."""
    here(["klein-9b", "klein-4b"], 5)
    assert default_model(ASKED).name == "tiny"
    big, small = (
        as_measured(full(*(mac_host(r, holds=None, memory_bytes=m, free_bytes=m) for r in (0, 1))))
        for m in (100 * GIB, 14 * GIB)
    )
    assert default_model(ASKED, big).name == "klein-9b"
    assert default_model(ASKED, small).name in ("klein-4b", "klein-9b")
    record = SimpleNamespace(hostfile=hostfiles.parse('[{"ssh": "mac1", "ips": ["10.0.0.1"]}]'))
    silent: Any = SimpleNamespace(view=replace(full(), hosts=()), record=record)
    assert default_model(ASKED, view_of_mesh(silent)).name == "klein-9b"


def test_a_request_with_an_adapter_takes_a_model_that_it_was_made_for(
    here: Any, tmp_path: Path
) -> None:
    here(["klein-4b", "dev"], 128)

    def chosen(path: str) -> str:
        adapters = (AdapterRef(path, 1.0),)
        return default_model(GenerateRequest(prompt="", seed=0, adapters=adapters)).name

    for name in ("dev", "tiny"):
        model = TINY.architecture if name == "tiny" else published(name)
        width = model.shape.hidden_size
        low = LowRank(np.ones((1, width), np.float32), np.ones((6 * width, 1), np.float32))
        adapted = {"double_blocks.0.img_mod.lin": low}  # FLUX.2 has none in its blocks
        write_adapter(tmp_path / name, adapted, model.transformer)
        assert chosen(str(tmp_path / name)) == name
    (tmp_path / "broken").write_bytes(b"no adapter")
    assert chosen(str(tmp_path / "broken")) == "klein-4b"  # what is wrong with it is said later
    assert chosen("somebody/not-here") == "klein-4b"


def test_where_no_other_model_is_here_the_machine_is_not_asked(
    here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here([], 16)
    monkeypatch.setattr(memory, "accelerator_bytes", lambda: pytest.fail("a tool was started"))
    assert default_model(ASKED).name == "tiny"


def test_up_takes_what_fits_with_the_text_encoders_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    up = importlib.import_module("fluxmesh_coordinator.cli.up")
    monkeypatch.setattr(standing_in, "default_model", lambda request, view_of: request)
    asked = up._default(None, None, ModelVariant("", bits=8, text_bits=4))
    assert (asked.bits, asked.text_bits) == (8, 4)


def test_what_stands_in_is_told_with_how_to_get_others(here: Any) -> None:
    here([], 16)
    said = default_model(ASKED).sentence
    assert "`fluxmesh models pull klein-4b` (16 GB, Apache-2.0, no account needed)" in said
    here(["klein-9b", "klein-4b"], 14)
    said = default_model(ASKED).sentence
    assert said.startswith("klein-4b is the best model that is here and fits (klein-9b would not);")
    assert "`fluxmesh models list`" in said and "`model`" in said
    here(["klein-9b"], 5)
    assert "would not fit (klein-9b); `bits`" in default_model(ASKED).sentence


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (("klein-9b", "schnell", "dev"), "dev"),
        (("klein-9b", "klein-4b", "klein-base-4b"), "klein-base-4b"),
        (("flux2-dev", "klein-9b", "kontext", "dev", "klein-base-4b"), "klein-base-4b"),
        (("flux2-dev", "kontext", "krea-dev"), "krea-dev"),
        (("klein-9b", "klein-4b"), "klein-9b"),
        ((), "tiny"),
    ],
)
def test_a_training_takes_a_model_that_was_not_distilled_where_there_is_one(
    here: Any, models: tuple[str, ...], expected: str
) -> None:
    here(models, 5)  # what a training needs is its own question
    assert default_to_train() == expected


def test_an_embedded_model_is_trained_only_where_there_is_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whichever of them was distilled."""
    small, klein = (
        SimpleNamespace(name=name, architecture=published("klein-9b"))
        for name in ("tiny-klein", "klein-9b")
    )
    monkeypatch.setattr(standing_in, "embedded_names", lambda: ("tiny", "tiny-klein"))
    monkeypatch.setattr(hub, "preferred_here", lambda: iter([klein, TINY, small]))
    assert default_to_train() == "klein-9b"
    monkeypatch.setattr(hub, "preferred_here", lambda: iter([TINY, small]))
    assert default_to_train() == "tiny"


@pytest.mark.parametrize(
    ("total", "limit", "expected"),
    [(16, "0\n", 16 * 2 / 3), (64, "0\n", 48.0), (64, "57344\n", 56.0), (64, "", 48.0)],
)
def test_a_mac_gives_its_gpu_a_part_of_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, limit: str, expected: float
) -> None:
    monkeypatch.setattr(memory, "total_bytes", lambda: total * GIB)
    mac(tmp_path / "mac", monkeypatch).tool("sysctl", limit)
    assert memory.accelerator_bytes() == int(expected * GIB)


def test_a_graphics_card_has_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    report = "GPU 00000000:65:01.0\n    FB Memory Usage\n        Total      : 81559 MiB\n"
    tool.write_text(f"#!/bin/sh\n[ \"$*\" = '-q -d MEMORY' ] && cat <<END\n{report * 2}END\n")
    tool.chmod(0o755)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert memory.accelerator_bytes() == 81559 << 20
    tool.write_text("#!/bin/sh\nexit 9\n")  # no driver
    assert memory.accelerator_bytes() == memory.total_bytes()
