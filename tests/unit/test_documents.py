"""What documents say is in the tree: pictures are their text, drawn; files and targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fluxmesh.models.registry import ALIASES, BY_PREFERENCE, PUBLISHED, spelled
from fluxmesh.wire import protocol
from tests.paths import ROOT
from tools import sequence
from tools.house import FOLDERS

DOCUMENTS = ("CONTRIBUTING.md", "docs/architecture.md")
FOLDERS_OF_CODE = (*FOLDERS.values(), *(ROOT / name for name in ("tests", "tools", "docs")))


def test_the_picture_of_a_request_is_what_its_text_draws():
    drawn = sequence.draw(sequence.SOURCE.read_text(encoding="utf-8"))
    assert sequence.PICTURE.read_text(encoding="utf-8") == drawn, "python -m tools.sequence"


def test_the_picture_names_messages_that_there_are():
    _, rows = sequence.parse(sequence.SOURCE.read_text(encoding="utf-8"))
    names = {
        name
        for row in rows
        if row.to
        for name in re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", row.text)
    }
    assert len(names) > 10
    assert names <= set(protocol.TYPES)


@pytest.mark.parametrize(
    "text",
    ["process a: A / x\na > b: Hello", "process a: A / x\nhello", "process a: A / x\nb: works"],
)
def test_a_line_that_is_none_is_named(text: str):
    with pytest.raises(ValueError, match="no line of a sequence"):
        sequence.parse(text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_files_and_folders_that_there_are(document: str):
    words = re.findall(r"`([^`\s]+)`", (ROOT / document).read_text(encoding="utf-8"))
    paths = [word for word in words if re.fullmatch(r"\.?[\w/{},.-]+(\.(py|sh|md)|/)", word)]
    paths = [path for word in paths for path in _unfolded(word)]
    assert len(paths) > 15
    assert not [path for path in paths if not _exists(path)]


@pytest.mark.parametrize(
    "document",
    (*DOCUMENTS, "README.md", *("docs/macos.md", "docs/training.md", "docs/everyday.md")),
)
def test_a_document_links_to_files_and_targets_that_there_are(document: str):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    assert not [link for link in links if not ((ROOT / document).parent / link).exists()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^|EXTRA=cpu |python3\.12 )make ([a-z]+)", text, re.M)) <= targets


def test_the_readme_s_table_of_models_is_the_registry_s():
    """Their order too: the one before the other is taken where none is named."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"^\| model \| to fetch .*?\n\n", text, re.M | re.S)
    assert rows is not None
    order = []
    for row in rows[0].strip().splitlines()[2:]:
        names, size, steps, licence = (cell.strip() for cell in row.strip("|").split("|"))
        for name in re.findall(r"`([^`]+)`", names):
            alias = ALIASES[spelled(name)]
            model = PUBLISHED[alias]
            order += [] if alias in order else [alias]
            assert size == f"{model.gigabytes:.0f} GB", name
            assert steps == str(model.architecture.defaults.steps), name
            assert licence == model.licence.name + (", gated" if model.is_gated else ""), name
    assert order == list(BY_PREFERENCE)


def _unfolded(path: str) -> list[str]:
    """`tests/{unit,ssh}/` is two folders."""
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", path)
    return [f"{match[1]}{name}{match[3]}" for name in match[2].split(",")] if match else [path]


def _exists(path: str) -> bool:
    """From the root, or, as a table of one package says it, from that package or a folder of it."""
    if (ROOT / path).exists():
        return True
    wanted = Path(path).parts
    return any(
        path_there.parts[-len(wanted) :] == wanted
        for folder in FOLDERS_OF_CODE
        for path_there in folder.rglob(wanted[-1])
    )
