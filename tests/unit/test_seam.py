"""The seam of families: who outside of their folders still knows what one is made of.

`LEFT` is the list of them, each with a reason; it only shrinks. Who leaves it must be taken off.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fluxmesh.errors import UsageError, WeightsError
from fluxmesh.models.registry import ALIASES, FAMILIES, PUBLISHED, spellings
from fluxmesh.training.compute.parameter_vector import select
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.reader import table_of
from tests.third_family.architecture import LetterSizes, PainterSizes, PatchworkArchitecture
from tools.house import FOLDERS, imported, modules

LEFT = {
    "fluxmesh.adapters.describe": "a tool's spelling (OMI's) begins with names of text encoders",
    "fluxmesh.adapters.foreign": "marks of models that are none of ours, by how they differ",
    "fluxmesh.weights.foreign_files": "files of models that are none of ours, by how they differ",
    "fluxmesh.weights.single_files": "a folder of ComfyUI's is called clip, whatever lies in it",
    "fluxmesh.models.double_stream": "the blocks that both families are made of",
    "fluxmesh.models.transformer_shape": "those blocks in numbers, for planner and trainer",
}
# An option of requests and recipes and a field that is written down, which keep their names, also
# in sentences; and words that only sound so.
KEPT = {
    *("t5_padding", "no_t5_padding", "--no-t5-padding", "t5_max_length"),
    *("clip_norm", "--clip-norm"),
}
KEPT_WORD = re.compile("|".join(rf"(?<!\w){word}(?!\w)" for word in KEPT))
# A part of a family, or the family itself, as a word of a name or a text.
PART = re.compile(
    r"(?i:(?<![a-z0-9])(t5|clip)(?![a-z0-9]))|double_blocks|single_blocks|(img|txt)_(attn|mod|mlp)"
    r"|(encoder|tokenizer)_2|(?i:flux[._-]?2|klein|qwen|mistral)"
)
FAMILY_FOLDERS = ("fluxmesh.models.flux1", "fluxmesh.models.flux2")
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


def _known(path: Path) -> list[str]:
    """What of a family a module imports or names."""
    others = sorted(name for name in imported(path) if name.startswith(FAMILY_FOLDERS))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {KEPT_WORD.sub("", word) for word in _words(tree)}
    named = {word[:60] for word in words if PART.search(word)}
    return [*others, *sorted(named)]


def test_nothing_else_knows_what_a_family_is_made_of() -> None:
    inside = (*FAMILY_FOLDERS, "fluxmesh.models.registry")
    knowing = {}
    for package in FOLDERS:
        for name, path in modules(package):
            known = [] if name.startswith(inside) else _known(path)
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


def test_blocks_to_train_are_counted_by_the_names_that_a_family_gives_them() -> None:
    model = PatchworkArchitecture()
    last = ["stairs.1.look", "stairs.1.narrow", "stairs.1.widen"]
    assert select(model, 1, ("*",)) == last
    with pytest.raises(UsageError, match=r"name some, such as 'stairs\.1\."):
        select(model, -1, ("double_blocks.*",))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, ""),
        ({"transformer": PainterSizes(width_of_letters=8)}, "must read what the letters give"),
        ({"letters": LetterSizes(0)}, "says width is 0"),
    ],
)
def test_a_checkpoint_is_damaged_by_the_rules_of_its_own_family(
    changed: dict[str, Any], told: str
) -> None:
    """Also of one whose transformer has no heads and no rotary axes."""
    model = replace(PatchworkArchitecture(), **changed)
    checkpoint = Checkpoint("patchwork", "", "diffusers", {}, {}, model)
    with pytest.raises(WeightsError, match=told) if told else nullcontext():
        assert table_of(checkpoint, "painter").keys() == model.tensors_in("painter").keys()
