"""The seam of families: who outside of `models/flux1/` still knows what FLUX.1 is made of.

`LEFT` is the list of them, each with a reason; it only shrinks. Who leaves it must be taken off.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from fluxmesh.models.registry import ALIASES, FAMILIES, PUBLISHED, spellings
from tools.house import FOLDERS, imported, modules

SHAPE = "a transformer of double and single blocks, whose names both families share"
WORDS = "what people call files and folders, to tell them from one another"

LEFT = {
    "fluxmesh.storage.numbers.float8": "NumPy's own word for what `take` does",
    **dict.fromkeys(
        (
            *("fluxmesh.adapters.describe", "fluxmesh.adapters.foreign", "fluxmesh.adapters.keys"),
            *("fluxmesh.adapters.peft", "fluxmesh.weights.foreign_files"),
            *("fluxmesh.weights.single_files", "fluxmesh.training.compute.parameter_vector"),
            *("fluxmesh_coordinator.cli.train", "fluxmesh_coordinator.commands.generate"),
        ),
        WORDS,
    ),
    **dict.fromkeys(
        (
            *("fluxmesh.models.double_stream", "fluxmesh.models.slicing", "fluxmesh.models.spread"),
            *("fluxmesh.models.transformer_shape", "fluxmesh.weights.reader"),
        ),
        SHAPE,
    ),
}
# An option of requests and recipes and a field that is written down, which keep their names; and
# words that only sound so.
KEPT = {
    *("t5_padding", "no_t5_padding", "--no-t5-padding", "t5_max_length"),
    *("clip_norm", "--clip-norm"),
}
# A part of FLUX.1 as a word of a name or a text.
PART = re.compile(
    r"(?i:(?<![a-z0-9])(t5|clip)(?![a-z0-9]))|double_blocks|single_blocks|(img|txt)_(attn|mod|mlp)"
    r"|(encoder|tokenizer)_2"
)
ARRAYS = ("mx", "np", "values")  # whose `clip` is another


def _docstrings(tree: ast.AST) -> set[int]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = (node.body for node in ast.walk(tree) if isinstance(node, kinds))
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def _words(tree: ast.AST) -> Iterator[str]:
    """Names and texts of a module, without comments and docstrings."""
    skipped = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id in ARRAYS):
                yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.keyword):
            yield node.arg or ""
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            yield node.value


def _knows_flux1(path: Path) -> list[str]:
    """What of FLUX.1 a module imports or names."""
    others = sorted(name for name in imported(path) if name.startswith("fluxmesh.models.flux1"))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {word[:60] for word in _words(tree) if PART.search(word)} - KEPT
    return [*others, *sorted(named)]


def test_nothing_else_knows_what_flux1_is_made_of() -> None:
    inside = ("fluxmesh.models.flux1", "fluxmesh.models.flux2", "fluxmesh.models.registry")
    knowing = {}
    for package in FOLDERS:
        for name, path in modules(package):
            known = [] if name.startswith(inside) else _knows_flux1(path)
            if known:
                knowing[name] = known
    assert {name: words for name, words in knowing.items() if name not in LEFT} == {}
    assert LEFT.keys() - knowing.keys() == set()  # who knows it no more leaves the list


def test_families_know_nothing_of_each_other() -> None:
    for name, path in modules("fluxmesh"):
        for mine, other in (("flux1", "flux2"), ("flux2", "flux1")):
            if name.startswith(f"fluxmesh.models.{mine}"):
                assert not [i for i in imported(path) if i.startswith(f"fluxmesh.models.{other}")]
    aliases = [alias for family in FAMILIES for alias in family.published]
    assert len(set(aliases)) == len(aliases)
    assert sum(len(spellings(alias, model)) for alias, model in PUBLISHED.items()) == len(ALIASES)
