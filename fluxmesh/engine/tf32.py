"""Makes `--dtype float32` mean float32: MLX's tf32 mode must be off before MLX starts.

A CUDA GPU, and the GPU of an M5 and later, multiply float32 matrices in tf32 (10 bits of mantissa)
unless `MLX_ENABLE_TF32=0` stood in the environment when MLX was loaded. `import fluxmesh` asks for
that by `prefer_float32`, and whoever is asked for float32 insists on it by `prepare`: both before
anything imports mlx; this module imports none itself. The pipeline calls `require` when it is made.
"""

from __future__ import annotations

import os
import re
import sys

from fluxmesh.errors import UsageError

TF32 = "MLX_ENABLE_TF32"
FIRST_WITH_TF32 = 17  # generation of Apple's GPUs that has matrix units: the M5's


def prefer_float32() -> None:
    """Turns tf32 off for an MLX that is loaded later, unless the user has said what he wants."""
    if "mlx.core" not in sys.modules:
        os.environ.setdefault(TF32, "0")


def prepare(dtype: str) -> None:
    """Sets the environment for `dtype`, before MLX loads.

    Raises `UsageError` where MLX is loaded already, runs on a GPU and computes in tf32.
    """
    if dtype == "float32" and "mlx.core" not in sys.modules:
        os.environ[TF32] = "0"
    require(dtype)


def require(dtype: str) -> None:
    """Raises `UsageError` where float32 is asked for and this process would compute in tf32."""
    if dtype != "float32" or os.environ.get(TF32) == "0" or not _may_use_tf32():
        return
    raise UsageError(
        "float32 was asked for, but MLX is loaded already and computes float32 as tf32; "
        f"set {TF32}=0 in the environment before Python starts."
    )


def _may_use_tf32() -> bool:
    """Whether the device that MLX computes on has tf32.

    On Metal these are GPUs of a generation that MLX takes for one with matrix units
    (`is_nax_available` in mlx/backend/metal/device.cpp); one that does not tell its generation may.
    """
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return False
    if not mx.metal.is_available():
        return True
    known = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return known is None or int(known[1]) >= FIRST_WITH_TF32
