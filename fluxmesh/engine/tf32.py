"""Makes `--dtype float32` mean float32: MLX's tf32 mode must be off before MLX starts.

On a GPU, MLX multiplies float32 matrices in tf32 (10 bits of mantissa) unless `MLX_ENABLE_TF32=0`
stood in the environment when it was loaded. Call `prepare` before anything imports mlx; it
imports none itself. The pipeline calls `require` when it is made.
"""

from __future__ import annotations

import os
import sys

from fluxmesh.errors import UsageError

TF32 = "MLX_ENABLE_TF32"


def prepare(dtype: str) -> None:
    """Sets the environment for `dtype`, before MLX loads.

    Raises `UsageError` where MLX is loaded already, runs on a GPU and computes in tf32.
    """
    if dtype == "float32" and "mlx.core" not in sys.modules:
        os.environ[TF32] = "0"
    require(dtype)


def require(dtype: str) -> None:
    """Raises `UsageError` where float32 is asked for and this process would compute in tf32."""
    if dtype != "float32" or os.environ.get(TF32) == "0":
        return
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return
    raise UsageError(
        "float32 was asked for, but MLX is loaded already and computes float32 as tf32; "
        f"set {TF32}=0 in the environment before Python starts."
    )
