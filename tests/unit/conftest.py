"""What tests of one part have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.serving import Serving


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    """A server that paints grey."""
    from tests.serving import Serving

    return Serving(tmp_path)
