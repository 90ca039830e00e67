"""The house: which folder imports which, and whether every arrow runs downward.

    python -m tools.house

A package's folders stand in one order, `ROOMS`, highest first. A module imports from its own room
and from rooms below it; a room's inner folders (`training/data`, `models/flux1`) belong to it. What
stands in no folder is a room of its own, "·". `tests/unit/test_imports.py` holds this.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "fluxmesh": ROOT / "fluxmesh",
    "fluxmesh_agent": ROOT / "agent" / "fluxmesh_agent",
    "fluxmesh_coordinator": ROOT / "coordinator" / "fluxmesh_coordinator",
}
# Highest first. The library's words (errors, request, events) stand below everything of it.
ROOMS = {
    "fluxmesh_coordinator": (
        *(
            "cli",
            "server",
            "commands",
            "console",
            "artifacts",
            "runtime",
            "deploy",
            "agents",
            "jobs",
        ),
        "·",
    ),
    "fluxmesh_agent": ("·", "parcels"),
    "fluxmesh": (
        *("training", "engine", "planning", "sampling", "adapters", "weights", "models"),
        *("kernels", "wire", "cluster", "machine", "storage", "images", "·"),
    ),
}
# Entrances, which name what they open: the package's face, and `python -m`.
DOORS = {"fluxmesh", "fluxmesh_agent.__main__", "fluxmesh_coordinator.__main__"}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of a package."""
    folder = FOLDERS[package]
    for path in sorted(folder.rglob("*.py")):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        yield ".".join(part for part in parts if part != "__init__"), path


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Every module that a file imports, also inside of functions; names of a module too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def room(module: str) -> tuple[str, str]:
    """The package of a module, and its room there."""
    package, *parts = module.split(".")
    if not parts or (len(parts) == 1 and not (FOLDERS[package] / parts[0]).is_dir()):
        return package, "·"
    return package, parts[0]


@dataclass(frozen=True)
class Tree:
    """Every module, and those of the tree that it imports."""

    imports: dict[str, set[str]]

    @classmethod
    def read(cls) -> Tree:
        """Of this checkout."""
        paths = {name: path for package in FOLDERS for name, path in modules(package)}
        known = set(paths)
        return cls({name: imported(path) & known - {name} for name, path in paths.items()})

    def arrows(self) -> dict[tuple[tuple[str, str], tuple[str, str]], int]:
        """How many imports run from one room to another."""
        counts: dict[tuple[tuple[str, str], tuple[str, str]], int] = {}
        for name, others in self.imports.items():
            for other in others:
                if room(name) != room(other):
                    pair = room(name), room(other)
                    counts[pair] = counts.get(pair, 0) + 1
        return counts

    def upward(self) -> list[str]:
        """Imports of a room by a room that stands below it."""
        return [
            f"{name} imports {other}"
            for name, others in self.imports.items()
            for other in sorted(others)
            if name not in DOORS and self._is_upward(room(name), room(other))
        ]

    def _is_upward(self, start: tuple[str, str], end: tuple[str, str]) -> bool:
        order = ROOMS[start[0]]
        if start[0] != end[0] or start[1] not in order or end[1] not in order:
            return False
        return order.index(end[1]) < order.index(start[1])

    def circles(self) -> list[list[str]]:
        """Modules that import one another, by whatever way; a package's face is left out."""
        names = list(self.imports)
        faces = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
        loops: list[list[str]] = []
        way: list[str] = []
        done: set[str] = set()

        def walk(name: str) -> None:
            if name in way:
                loops.append([*way[way.index(name) :], name])
            if name in done or name in way:
                return
            way.append(name)
            for other in sorted(self.imports[name] - faces):
                walk(other)
            way.pop()
            done.add(name)

        for name in sorted(set(self.imports) - faces):
            walk(name)
        return loops

    def unknown(self) -> list[str]:
        """Rooms that `ROOMS` does not name."""
        rooms = {room(name) for name in self.imports}
        return sorted(f"{package}/{name}" for package, name in rooms if name not in ROOMS[package])

    def crowded(self, limit: int) -> list[str]:
        """Folders that hold more than `limit` modules."""
        counts: dict[str, int] = {}
        for name in self.imports:
            folder = name.rpartition(".")[0]
            counts[folder] = counts.get(folder, 0) + 1
        return sorted(f"{folder}: {count}" for folder, count in counts.items() if count > limit)


def main() -> None:
    tree = Tree.read()
    arrows = tree.arrows()
    for package, rooms in ROOMS.items():
        print(package)
        for name in rooms:
            size = sum(room(module) == (package, name) for module in tree.imports)
            to = [
                f"{end[1] if end[0] == package else '.'.join(end).removesuffix('.·')} {count}"
                for (start, end), count in sorted(arrows.items(), key=lambda pair: -pair[1])
                if start == (package, name)
            ]
            print(f"  {name:10} {size:3} modules  ->  {', '.join(to) or 'nothing'}")
    print(f"{len(tree.circles())} circles, {len(tree.upward())} upward imports")


if __name__ == "__main__":
    main()
