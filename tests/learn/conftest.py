"""The command line, as the integration tests run it."""

from __future__ import annotations

from tests.integration.conftest import fluxmesh, home

__all__ = ["fluxmesh", "home"]
