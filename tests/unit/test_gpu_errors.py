"""What Metal says when macOS ends work of the GPU, and what a user reads."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest

from fluxmesh.engine.gpu_errors import RELAX, explain, gpu_end, relax
from fluxmesh.training import local_executor
from fluxmesh.training.events import TrainEvent
from fluxmesh.training.request import TrainRequest
from fluxmesh_coordinator.agents import mesh_file
from fluxmesh_coordinator.commands.train import conduct
from fluxmesh_coordinator.console.train_report import TrainJsonReporter
from tests.watchdog import TEXT

METAL = "[METAL] Command buffer execution failed: "


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (TEXT, "took longer than the 5 s"),
        (
            f"{METAL}Impacting Interactivity "
            "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
            "the display had to wait",
        ),
        (
            f"{METAL}Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang).",
            "did not move",
        ),
        (
            f"{METAL}Innocent Victim (00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim).",
            "another program",
        ),
        (
            f"{METAL}Ignored (for causing prior/excessive GPU errors) "
            "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
            "too many errors",
        ),
    ],
)
def test_each_end_of_a_gpus_work_has_its_reason_and_what_helps(said: str, reason: str) -> None:
    end = gpu_end(RuntimeError(said))
    assert end is not None and reason in end.reason
    text = explain(end, "training", in_ring=False, relaxed=False)
    assert text.startswith("macOS ended the GPU's work while training, because ")
    assert "close other apps" in text and text.count(".") == 1
    assert (f"{RELAX}=1" in text) == end.can_relax
    assert RELAX not in explain(end, "training", in_ring=False, relaxed=True)


def test_only_a_timeout_in_a_ring_may_be_a_late_peers_fault() -> None:
    timeout = gpu_end(RuntimeError(TEXT))
    display = gpu_end(RuntimeError(f"{METAL}Impacting Interactivity (0000000e)"))
    assert timeout is not None and display is not None
    assert (timeout.is_late, display.is_late) == (True, False)
    assert "another host" in explain(timeout, "denoising", in_ring=True, relaxed=True)
    assert "another host" not in explain(timeout, "denoising", in_ring=False, relaxed=True)
    assert "another host" not in explain(display, "denoising", in_ring=True, relaxed=True)


@pytest.mark.parametrize(
    "said",
    [
        f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
        "[ring] Receiving from socket 7 failed with errno 54",
        "",
    ],
)
def test_other_exceptions_are_left_as_they_are(said: str) -> None:
    assert gpu_end(RuntimeError(said)) is None


@pytest.mark.parametrize(
    ("system", "given", "relaxed"),
    [("darwin", None, "1"), ("darwin", "0", "0"), ("linux", None, None)],
)
def test_a_mac_gives_work_of_this_process_longer_unless_its_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, system: str, given: str | None, relaxed: str | None
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv(RELAX, given or "")
    if given is None:
        monkeypatch.delenv(RELAX)
    relax()
    assert os.environ.get(RELAX) == relaxed


def test_a_training_without_a_mesh_computes_in_this_process_and_asks_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: list[str | None] = []

    def trained(*_: object) -> Generator[TrainEvent, None, None]:
        settings.append(os.environ.get(RELAX))
        yield from ()

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv(RELAX, "")  # so that it is as before afterwards
    monkeypatch.delenv(RELAX)
    monkeypatch.setattr(mesh_file, "load", lambda: None)
    monkeypatch.setattr(local_executor, "train", trained)
    conduct(TrainRequest("data", seed=1), TrainJsonReporter())
    assert settings == ["1"]
