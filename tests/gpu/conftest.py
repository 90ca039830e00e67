"""float32 means float32: MLX reads this when it is loaded, before any test module."""

import os

os.environ["MLX_ENABLE_TF32"] = "0"
