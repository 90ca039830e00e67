"""Two agents of which one has room for the denoiser and the other for the text encoder alone."""

from __future__ import annotations

import json
from pathlib import Path

from fluxmesh.kernels.ops import device
from fluxmesh.planning.workload import ModelSizes, Workload
from fluxmesh.request import GenerateRequest
from fluxmesh.weights import hub
from tests.flux2_checkpoint import make_flux2
from tests.integration.test_mesh_commands import MeshMachine, machine

__all__ = ["machine"]

LEAST = 1_000_000  # bytes that a hostfile may allow


def test_rank_1_reads_the_prompt_for_rank_0_and_the_picture_is_that_of_one_host(
    machine: MeshMachine, tmp_path: Path
) -> None:
    machine.model = make_flux2(tmp_path / "klein", text_length=None)
    sizes = ModelSizes.of(hub.resolve(str(machine.model)))
    work = Workload.of(sizes.fill(GenerateRequest("", 0)), sizes)
    whole = max(work.memory("data", 1, 1, device()))
    text = work.text_bytes + work.text_working_bytes
    assert text < LEAST < max(work.memory("sequence", 2, 1, device())) < whole
    path = machine.hostfile(2)
    hosts = json.loads(path.read_text())
    for host, memory in zip(hosts, (whole + 1000, LEAST), strict=True):
        host["memory"] = memory
    path.write_text(json.dumps(hosts))
    asked = ("generate", "a dog", "--model", machine.model, "--seed", 5)
    alone = machine(*asked, "--text-bits", 4, "-o", "alone.png")
    assert alone.code == 0, alone.err

    before = machine.up(path, "--text-bits", 4).of("up")[0]["hosts"]
    done = machine("generate", "a dog", "--seed", 5, "-o", "mesh.png")
    assert done.code == 0, done.err
    assert (tmp_path / "mesh.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
    after = machine.hosts()
    painter, reader = (
        {
            name: now["counters"][name] - then["counters"][name]
            for name in ("encodes", "images", "decodes")
        }
        for then, now in zip(before, after, strict=True)
    )
    assert painter == {"encodes": 0, "images": 1, "decodes": 1}
    assert reader == {"encodes": 1, "images": 0, "decodes": 0}
    assert after[1]["holds"] is None and after[1]["text"]["nbytes"] > 0

    plan = machine("plan", "a fox", "--json").of("plan")[0]
    winner = plan["options"][plan["winner"]]
    assert (winner["ranks"], winner["text"]["rank"], winner["text"]["way"]) == ([0], 1, "stays")
    assert winner["text"]["figure"] == "measured"
    memory = {host["rank"]: host for host in winner["usage"]}
    assert memory[1]["text"] and not memory[1]["denoise"] and not memory[0]["text"]
