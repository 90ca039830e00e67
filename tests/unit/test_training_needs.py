"""What a training takes, and what is told where it does not fit on Macs of 8 to 36 GB."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from fluxmesh.cluster.snapshot import HostInfo
from fluxmesh.training.compute.parameter_vector import VectorLayout
from fluxmesh.training.needs import NUMBER_BYTES, transformer_bytes, ways
from fluxmesh.training.request import TrainRequest
from fluxmesh_coordinator.console.option_names import in_options
from fluxmesh_coordinator.deploy.what_if import published
from fluxmesh_coordinator.jobs.remedies import sentences
from fluxmesh_coordinator.jobs.training import tasks
from fluxmesh_coordinator.jobs.types import Links
from tests.paths import ROOT
from tests.unit.meshes import FLUX, GB
from tests.unit.simulated_jobs import training_job
from tests.unit.test_remedies import WIRED, a_mac

SIZE = (512, 512)


def asked(**changed: Any) -> TrainRequest:
    return TrainRequest("data", seed=1, model="dev", **changed)


def chosen(hosts: list[HostInfo], model: Any = FLUX, **changed: Any) -> tasks.Choice:
    """Who would train FLUX on pictures of 512x512."""
    request = asked(**changed)
    job = replace(
        training_job(),
        base_bytes=transformer_bytes(request, model),
        size=VectorLayout(model.architecture, request).size,
        ways=ways(request, model, SIZE),
    )
    return tasks.choose(job, hosts, Links())


@pytest.mark.parametrize(("bits", "peak"), [(None, 28.6), (8, 17.5), (4, 11.5)])
def test_what_is_expected_is_what_was_measured_and_a_little_more(
    bits: int | None, peak: float
) -> None:
    """The table of docs/training.md: dev, one picture of 512x512, rank 8, --grad-checkpoint."""
    (first, *_) = ways(asked(bits=bits, grad_checkpoint=True), published("dev"), SIZE)
    assert peak <= first.needed / GB <= 1.06 * peak
    assert (first.bits, first.grad_checkpoint, first.lora_rank, first.resolution) == (None, 0, 0, 0)


def test_each_way_takes_less_than_the_one_before() -> None:
    for request in (asked(), asked(batch_size=4, lora_rank=64), asked(bits=4)):
        needed = [way.needed for way in ways(request, FLUX, (1024, 1024))]
        assert len(needed) > 2 and needed == sorted(needed, reverse=True)
        assert len(set(needed)) == len(needed)
    assert len(ways(asked(bits=4, lora_rank=2), FLUX, (128, 128))) == 1


Q4 = "--quantize --bits 4 --grad-checkpoint"
LEAST = {"bits": 8, "lora_rank": 4, "grad_checkpoint": True}
TEXTS: list[tuple[int, dict[str, Any], str]] = [
    (8, {}, ""),
    (16, {}, f"It fits with {Q4} --lora-rank 4 (10.7 GB)."),
    (16, {"bits": 8}, f"It fits with {Q4} --lora-rank 4 (10.7 GB)."),
    (16, LEAST, "It fits with --quantize --bits 4 (10.7 GB)."),
    (
        32,
        {"grad_checkpoint": True},
        f"It fits with --quantize --bits 8 (17.8 GB). {WIRED.format(27648)}",
    ),
    (
        32,
        {},
        "It fits with --quantize --bits 8 --grad-checkpoint (17.8 GB). "
        + WIRED.format(27648).replace("as it is", "with --grad-checkpoint"),
    ),
]


@pytest.mark.parametrize(("gib", "keys", "text"), TEXTS)
def test_what_helps_on_macs_that_people_have(gib: int, keys: dict[str, Any], text: str) -> None:
    choice = chosen([a_mac(gib)], **keys)
    assert choice.winner is None
    assert "GB on a host for the weights alone, and none may use more than" in choice.reason
    assert "--" not in choice.reason
    assert in_options(sentences(choice.remedies)) == text


def test_a_mac_whose_gpu_may_use_more_trains_as_it_was_asked_to() -> None:
    most = 20 * GB
    choice = chosen([a_mac(64, memory_bytes=most)], grad_checkpoint=True)
    assert in_options(sentences(choice.remedies)).endswith(WIRED.format(27648))
    unasked = in_options(sentences(chosen([a_mac(64, memory_bytes=most)]).remedies))
    assert "it fits with --grad-checkpoint after `sudo sysctl" in unasked
    raised = [a_mac(64, memory_bytes=27648 << 20)]
    assert chosen(raised, grad_checkpoint=True).winner is not None


def test_other_programs_are_named_where_they_hold_what_is_missing() -> None:
    choice = chosen([a_mac(64, free_bytes=20 * GB)], grad_checkpoint=True)
    assert "none may use more than 20.0 GB" in choice.reason
    assert in_options(sentences(choice.remedies)) == (
        "It fits with --quantize --bits 8 (17.8 GB). "
        "It fits as it is once other programs there give memory back."
    )


def test_a_checkpoint_of_4_bits_is_not_quantized_again() -> None:
    choice = chosen([a_mac(8)], replace(FLUX, bits=4), lora_rank=2)
    assert choice.remedies == ()
    for way in ways(asked(), replace(FLUX, bits=4), SIZE):
        assert way.bits is None


def test_what_a_host_must_have_at_least_is_its_weights_and_what_is_trained() -> None:
    request = asked(bits=4)
    least = (
        transformer_bytes(request, FLUX)
        + NUMBER_BYTES * VectorLayout(FLUX.architecture, request).size
    )
    for spare, fits in ((0, True), (-1, False)):
        host = a_mac(16, memory_bytes=least + spare)
        assert (chosen([host], bits=4).winner is not None) == fits


def test_the_figures_of_the_docs_are_those_that_are_told() -> None:
    page = (ROOT / "docs" / "macos.md").read_text(encoding="utf-8")
    (text,) = (part for part in page.split("\n\n") if part.startswith("**Training**"))
    figures = [float(number) for number in re.findall(r"([\d.]+) GB with", text)]
    asked_for = [{}, {"bits": 8}, {"bits": 4, "lora_rank": 4}]
    assert figures == [
        round(ways(asked(grad_checkpoint=True, **keys), FLUX, SIZE)[0].needed / GB, 1)
        for keys in asked_for
    ]
    macs = re.findall(r"\d+", text.partition("Macs of ")[2].partition(" GB")[0])
    for gib, figure in zip(map(int, macs), figures, strict=True):
        assert figure * GB <= a_mac(gib).memory_bytes
