"""float32 means float32: tf32 is off before MLX loads, or the request is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import mlx.core as mx
import pytest

from fluxmesh.engine import tf32
from fluxmesh.errors import UsageError

PROGRAM = """
import os, sys
from fluxmesh.engine import tf32 as precision
precision.prepare(sys.argv[1])
print(os.environ.get("MLX_ENABLE_TF32"), "mlx.core" in sys.modules)
"""


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "0 False"), ("bfloat16", "None False")]
)
def test_prepare_sets_the_environment_without_loading_mlx(dtype: str, expected: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != tf32.TF32}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dtype],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == expected


def test_float32_on_a_gpu_that_computes_tf32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tf32.TF32, raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    with pytest.raises(UsageError, match="MLX_ENABLE_TF32=0"):
        tf32.prepare("float32")
    tf32.prepare("bfloat16")
    monkeypatch.setenv(tf32.TF32, "0")
    tf32.prepare("float32")


def test_float32_on_a_cpu_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tf32.TF32, raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    tf32.require("float32")
