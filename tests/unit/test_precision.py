"""float32 means float32: tf32 is off before MLX loads, or the request is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from fluxmesh.engine import tf32 as precision
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.errors import UsageError

PREPARE = """
import os, sys
from fluxmesh.engine import tf32 as precision
precision.prepare(sys.argv[1])
print(os.environ.get("MLX_ENABLE_TF32"), "mlx.core" in sys.modules)
"""
IMPORT = """
import os, sys
if sys.argv[1] == "after mlx": import mlx.core
import fluxmesh
print(os.environ.get("MLX_ENABLE_TF32"), "mlx.core" in sys.modules)
"""


def printed_by(program: str, argument: str, tf32: str | None) -> str:
    """What a Python prints that is started with this MLX_ENABLE_TF32."""
    environment = {key: value for key, value in os.environ.items() if key != precision.TF32}
    done = subprocess.run(
        [sys.executable, "-c", program, argument],
        env=environment | ({} if tf32 is None else {precision.TF32: tf32}),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("dtype", "tf32", "expected"),
    [
        ("float32", None, "0 False"),
        ("float32", "1", "0 False"),
        ("bfloat16", None, "0 False"),
        ("bfloat16", "1", "1 False"),
    ],
)
def test_prepare_sets_the_environment_without_loading_mlx(
    dtype: str, tf32: str | None, expected: str
) -> None:
    assert printed_by(PREPARE, dtype, tf32) == expected


@pytest.mark.parametrize(
    ("when", "tf32", "expected"),
    [
        ("before mlx", None, "0 False"),
        ("before mlx", "1", "1 False"),  # who sets it keeps it
        ("after mlx", None, "None True"),  # too late: MLX has read it
    ],
)
def test_importing_fluxmesh_turns_tf32_off_for_an_mlx_that_is_loaded_later(
    when: str, tf32: str | None, expected: str
) -> None:
    assert printed_by(IMPORT, when, tf32) == expected


def compute_on(
    monkeypatch: pytest.MonkeyPatch, kind: mx.DeviceType, metal: bool, architecture: str = ""
) -> None:
    """MLX says that this is what it computes on."""
    monkeypatch.delenv(precision.TF32, raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(kind))
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})


GPUS_WITH_TF32 = [(False, "sm_90"), (True, "applegpu_g17s"), (True, "applegpu_g18d"), (True, "new")]


@pytest.mark.parametrize(("metal", "architecture"), GPUS_WITH_TF32)
def test_float32_on_a_gpu_that_computes_tf32_is_refused(
    monkeypatch: pytest.MonkeyPatch, metal: bool, architecture: str
) -> None:
    compute_on(monkeypatch, mx.gpu, metal, architecture)
    with pytest.raises(UsageError, match="MLX_ENABLE_TF32=0"):
        precision.prepare("float32")
    with pytest.raises(UsageError, match="MLX_ENABLE_TF32=0"):
        FluxPipeline("tiny", dtype="float32")
    precision.prepare("bfloat16")
    monkeypatch.setenv(precision.TF32, "1")
    with pytest.raises(UsageError, match="MLX_ENABLE_TF32=0"):
        precision.prepare("float32")
    monkeypatch.setenv(precision.TF32, "0")
    precision.prepare("float32")


@pytest.mark.parametrize("architecture", ["applegpu_g13g", "applegpu_g14d", "applegpu_g16s"])
def test_the_gpus_of_m1_to_m4_have_no_tf32_and_need_nothing(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    compute_on(monkeypatch, mx.gpu, True, architecture)
    precision.require("float32")
    FluxPipeline("tiny", dtype="float32")


def test_float32_on_a_cpu_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_on(monkeypatch, mx.cpu, False)
    precision.require("float32")
