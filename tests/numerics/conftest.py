"""What computes with MLX in the tests' own process."""

from __future__ import annotations

from tests.integration.conftest import checkpoint

__all__ = ["checkpoint"]
