"""Parity means float32: MLX reads its tf32 switch when it loads, so it is set before any import."""

import os

os.environ["MLX_ENABLE_TF32"] = "0"
