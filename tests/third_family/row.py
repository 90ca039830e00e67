"""The one row that a third family has in the registry, written there as the registry loads."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType

from tests.paths import python_path

REGISTRY = "fluxmesh.models.registry"
ROWS = "FAMILIES: tuple[Family, ...] = (FLUX1, FLUX2)\n"
IMPORTED = "from tests.third_family.family import PATCHWORK\n"
INSTALLED = Path(__file__).parent / "installed"


def with_row(source: str) -> str:
    """The registry's text with a third row."""
    assert source.count(ROWS) == 1, f"the registry's rows are no longer {ROWS}"
    return source.replace(ROWS, IMPORTED + ROWS.replace("FLUX2)", "FLUX2, PATCHWORK)"))


class RowLoader(importlib.machinery.SourceFileLoader):
    """Reads the registry."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(with_row(Path(path).read_text(encoding="utf-8")).encode(), path)


class RowFinder(importlib.abc.MetaPathFinder):
    """Finds the registry before anybody else does."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.origin is not None
        spec.loader = RowLoader(name, spec.origin)
        return spec


def install() -> None:
    """From here on, in this Python."""
    sys.meta_path.insert(0, RowFinder())


def third_path() -> str:
    """A PYTHONPATH with which every Python has the row."""
    return f"{INSTALLED}:{python_path()}"
