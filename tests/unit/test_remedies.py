"""What does not fit on Macs of 8 to 64 GB is refused with what helps, as the planner finds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fluxmesh.cluster.snapshot import MeshView
from fluxmesh.planning.plan import Plan, plan
from fluxmesh.planning.remedies import Remedy
from fluxmesh.planning.workload import Workload
from fluxmesh_coordinator.cli.plan import plan as plan_command
from fluxmesh_coordinator.console.option_names import in_options
from fluxmesh_coordinator.deploy.what_if import published
from fluxmesh_coordinator.jobs import remedies
from tests.unit.meshes import FLUX, ask, full, mac

GIB = 1 << 30
HOSTFILES = Path(__file__).parents[2] / "hostfiles"
REASON = "No placement can be done: host 0 needs 28.1 GB and may use 11.5 GB."


def a_mac(gib: int, rank: int = 0, **keys: Any) -> Any:
    """A Mac of so many GiB, of which macOS lets the GPU use two thirds, or three quarters."""
    most = int(gib * GIB * (3 / 4 if gib > 32 else 2 / 3))
    known = {"memory_bytes": most, "free_bytes": gib * GIB, "machine_bytes": gib * GIB}
    return mac(rank, **{**known, "platform": "metal", "holds": None, **keys})


def planned(gib: int, model: str, **keys: Any) -> Plan:
    request = ask(**{"model": model, "height": 1024, "width": 1024, **keys})
    return plan(request, MeshView((a_mac(gib),)), published(model))


def advice(helps: Sequence[Remedy]) -> str:
    """As the command line says it."""
    return in_options(remedies.sentences(helps))


Q8, Q4, LOW = {"bits": 8}, {"bits": 4}, {"low_memory": True}
BITS8, BITS4 = "It fits with --quantize --bits 8", "It fits with --quantize --bits 4"
WIRED = (
    "On a Mac that nobody sits at, it fits as it is after "
    "`sudo sysctl iogpu.wired_limit_mb={}`, until that restarts."
)
TEXTS: list[tuple[int, dict[str, Any], str]] = [
    (8, {}, f"{BITS4} --low-memory (5.6 GB)."),
    (8, Q8, f"{BITS4} --low-memory (5.6 GB)."),
    (8, Q4, "It fits with --low-memory (5.6 GB)."),
    (8, LOW, f"{BITS4} (5.6 GB)."),
    (8, Q4 | LOW, ""),
    (16, {}, f"{BITS8} --low-memory (9.9 GB)."),
    (16, Q8, "It fits with --low-memory (9.9 GB)."),
    (16, LOW, f"{BITS8} (9.9 GB)."),
    (16, Q8 | LOW, ""),
    (16, Q4, ""),
    (32, {}, f"{BITS8} (17.0 GB). {WIRED.format(27136)}"),
    (32, LOW, ""),
    (32, Q8, ""),
    (36, {}, ""),
    (64, {}, ""),
]


@pytest.mark.parametrize("model", ["schnell", "dev"])
@pytest.mark.parametrize(("gib", "keys", "text"), TEXTS)
def test_what_helps_on_macs_that_people_have(
    gib: int, keys: dict[str, Any], text: str, model: str
) -> None:
    choice = planned(gib, model, **keys)
    assert (choice.winner is None) == bool(text)
    assert advice(choice.remedies) == text


@pytest.mark.parametrize("gib", [8, 16, 32, 36, 64])
@pytest.mark.parametrize("model", ["schnell", "dev"])
@pytest.mark.parametrize("side", [512, 1024, 1536, 2048])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_whoever_does_as_told_gets_a_picture(gib: int, model: str, side: int, dtype: str) -> None:
    keys: dict[str, Any] = {"height": side, "width": side, "dtype": dtype}
    for remedy in planned(gib, model, **keys).remedies:
        more: dict[str, Any] = {}
        if remedy.bits:
            more["bits"] = remedy.bits
        if remedy.low_memory:
            more["low_memory"] = True
        if remedy.side:
            more |= {"height": remedy.side, "width": remedy.side}
        if not remedy.wired_mib:
            won = planned(gib, model, **{**keys, **more}).winner
            assert won is not None and won.memory[0].needed == remedy.needed
            continue
        request = ask(model=model, **keys)
        raised = a_mac(gib, memory_bytes=remedy.wired_mib << 20)
        assert plan(request, MeshView((raised,)), published(model)).winner is not None
        assert remedy.wired_mib << 20 <= (gib - 4) * GIB, "macOS itself needs some"


def test_the_table_of_the_docs_is_what_the_planner_says() -> None:
    page = (HOSTFILES.parent / "docs" / "macos.md").read_text(encoding="utf-8")
    table = page.partition("| options | needs |")[2].partition("\n\n")[0]
    first, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    sizes = [int(cell.split()[0]) for cell in first if cell]
    assert sizes == [8, 16, 24, 32, 36] and len(rows) == 6
    for _, options, needs, *fits, _ in rows:
        keys: dict[str, Any] = {"low_memory": "--low-memory" in options}
        keys["bits"] = next((int(bits) for bits in "48" if f"--bits {bits}" in options), None)
        for dtype in ("bfloat16", "float16") if "float16" in options else ("bfloat16",):
            for gib, told_to_fit in zip(sizes, fits, strict=True):
                choice = planned(gib, "dev", dtype=dtype, **keys)
                assert (choice.winner is not None) == (told_to_fit == "fits"), (options, gib)
                most = max(need.needed for need in choice.options[0].memory)
                assert f"{most / 1e9:.1f}" == needs, options


def test_what_no_option_makes_fit_is_told_without_advice() -> None:
    choice = planned(4, "dev")
    assert choice.winner is None and choice.remedies == () and advice(choice.remedies) == ""


def test_other_programs_are_named_where_they_hold_what_is_missing() -> None:
    view = MeshView((a_mac(64, free_bytes=20 * GIB),))
    choice = plan(ask(), view, FLUX)
    assert advice(choice.remedies) == (
        "It fits with --quantize --bits 8 (17.0 GB). "
        "It fits as it is once other programs there give memory back."
    )


def test_a_checkpoint_of_4_bits_is_not_quantized_again() -> None:
    choice = plan(ask(height=1024, width=1024), MeshView((a_mac(8),)), replace(FLUX, bits=4))
    assert advice(choice.remedies) == "It fits with --low-memory (5.6 GB)."


def test_what_was_asked_for_at_once_is_done_one_by_one_before_anything_is_lost() -> None:
    batch = planned(36, "dev", n_images=4, decoding_batch_size=4)
    assert advice(batch.remedies).startswith(
        "It fits with neither --preload-models nor --decoding-batch-size (28.1 GB)."
    )
    assert advice(planned(36, "dev", preload=True).remedies).startswith(
        "It fits with neither --preload-models nor --decoding-batch-size (28.1 GB)."
    )


def test_a_smaller_picture_is_the_last_thing_to_ask_for() -> None:
    assert advice(planned(8, "dev", height=1536, width=1536).remedies) == (
        f"{BITS4} --low-memory --image-size 1024x1024 (5.6 GB)."
    )


def test_a_placement_that_was_asked_for_is_kept() -> None:
    view = full(a_mac(16), a_mac(16, 1))
    choice = plan(ask(), view, FLUX, placement="sequence")
    assert choice.winner is None
    assert advice(choice.remedies) == f"{BITS8} --low-memory (9.7 GB)."
    nowhere = plan(ask(), MeshView((a_mac(16),)), FLUX, placement="tensor")
    assert nowhere.remedies == (), "what is missing is a second host, not memory"


def test_a_mac_needs_more_for_a_decode_than_a_gpu_with_memory_of_its_own() -> None:
    work = Workload.of(ask(low_memory=True), FLUX)
    decodes = [work.memory("data", 1, 1, kind).decode for kind in ("metal", "cuda", "cpu")]
    largest = 1024 * 1024 * 256 * 2
    assert decodes[0] - decodes[1] == pytest.approx(3.7 * largest, abs=1)
    # What waits on a CPU, and a convolution that is float32 and holds its input nine times.
    assert decodes[2] - work.autoencoder_bytes == int((4 + 10.5) * 2 * largest)
    mixed = full(a_mac(16), mac(1, holds=None, platform="cuda"))
    (metal, cuda) = plan(ask(), mixed, FLUX, placement="sequence").options[-1].memory or (0, 0)
    assert metal.needed - cuda.needed == pytest.approx(3.7 * largest, abs=1), "each its own"


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_ends_with_what_helps(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("FLUX_DEV", "FLUX_SCHNELL"):
        monkeypatch.delenv(name, raising=False)
    files = ["--hostfile", str(HOSTFILES / "local-1.json")]
    files += ["--assume", str(HOSTFILES / "assume" / "mac-16gb.json")]
    asked = ["-m", "dev", "--image-size", "1024x1024", *files]
    done = CliRunner().invoke(plan_command, [*asked, *(["--json"] if as_json else [])])
    assert done.exit_code == 4
    if as_json:
        said = json.loads(done.output)
        assert said["reason"] == REASON
        assert said["remedies"] == f"{BITS8} --low-memory (9.9 GB)."
    else:
        assert done.output.splitlines()[-2:] == [REASON, f"{BITS8} --low-memory (9.9 GB)."]
