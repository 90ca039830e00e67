"""The library names settings by fields, the command line by options; programs read lines."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fluxmesh.errors import UsageError
from fluxmesh.request import GenerateRequest
from fluxmesh_coordinator.cli import cli
from fluxmesh_coordinator.console import option_names
from fluxmesh_coordinator.console.json_lines import emit
from tools.house import FOLDERS

# Where a user's own words are read or answered: command lines, what reports for them, a server.
SAYS_OPTIONS = {"cli", "console", "server"}
# Options that are handed to another program, or belong to another program's advice; and a page's
# style, whose variables are written so.
# Keys of a hostfile and of PEFT's settings, and a command: no settings of ours.
WORDS = {"ips", "models", "rdma", "up", "bias", "modules_to_save"}
OTHERS = {"agent_here.py", "launch.py", "macos.py", "macos_checks.py", "training_html.py"}


def strings(path: Path) -> Iterator[str]:
    """Every text of a module but for docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lone = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in lone:
            yield node.value


def library() -> Iterator[Path]:
    """Modules that don't know who asks."""
    for folder in FOLDERS.values():
        for path in sorted(folder.rglob("*.py")):
            if not SAYS_OPTIONS & {*path.parts, path.stem}:
                yield path


def options(command: click.Command, context: click.Context) -> Iterator[str]:
    """Of a command and those within it."""
    for parameter in command.params:
        yield from parameter.opts
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            within = command.get_command(context, name)
            assert within is not None
            yield from options(within, context)


def test_a_sentence_of_the_library_names_no_option() -> None:
    names_an_option = [
        f"{path.name}: {text}"
        for path in library()
        if path.name not in OTHERS
        for text in strings(path)
        if re.search(r"(?:^|\s)--[a-z]", text)
    ]
    assert names_an_option == []


def test_every_setting_that_a_sentence_names_becomes_an_option_that_there_is() -> None:
    known = set(options(cli, click.Context(cli)))
    assert len(known) > 60
    names = option_names.SAME | set(option_names.OPTIONS)
    assert {name for name in names if option_names.in_options(f"`{name}`") not in known} == set()


def test_every_setting_in_backticks_is_known_here() -> None:
    """What is no setting in a sentence is a command, of several words, or has a dot."""
    named = {
        word
        for path in library()
        for text in strings(path)
        for word in re.findall(r"`(\w+)`", text)
    }
    assert len(named) > 30
    assert named - WORDS <= option_names.SAME | set(option_names.OPTIONS)


def test_a_sentence_says_options_for_settings_and_leaves_the_rest() -> None:
    said = option_names.in_options(
        "`preload` and `low_memory` exclude each other; see `fluxmesh logs` and `nothing`."
    )
    assert said == (
        "--preload-models and --low-memory exclude each other; see `fluxmesh logs` and `nothing`."
    )


def test_an_error_about_a_setting_says_which_also_in_other_words() -> None:
    with pytest.raises(UsageError) as caught:
        GenerateRequest("a dog", seed=1, n_images=0)
    assert str(caught.value) == "`n_images` is 0; it must be 1 to 4096."
    said = caught.value.saying("No.")
    assert (type(said), str(said)) == (UsageError, "No.")
    assert caught.value.setting == said.setting == "n_images"
    with pytest.raises(UsageError, match="`preload` and `low_memory` exclude") as several:
        GenerateRequest("a dog", seed=1, preload=True, low_memory=True)
    assert several.value.setting == ""
    assert UsageError("There is no prompt.").setting == ""


def test_an_error_that_begins_with_a_setting_has_it_in_its_field() -> None:
    """Readers ask the field, and no sentence."""
    silent = []
    for path in (path for folder in FOLDERS.values() for path in sorted(folder.rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_error = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error")
            if not is_error or not node.args:
                continue
            named = re.match(r"f?['\"]`(\{.+?\}|\w+)`(?! and `)", ast.unparse(node.args[0]))
            if named and "setting" not in {keyword.arg for keyword in node.keywords}:
                silent.append(f"{path.name}:{node.lineno} {named[1]}")
    assert silent == []


def test_a_line_for_programs_has_options_in_sentences_and_leaves_what_users_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    emit("error", message="`n_images` is 0.", prompt="the `seed`", options=[{"problem": "`bits`"}])
    line = capsys.readouterr().out
    assert line.startswith('{"event": "error", ') and line.count("\n") == 1
    assert json.loads(line) == {
        "event": "error",
        "message": "--n-images is 0.",
        "prompt": "the `seed`",
        "options": [{"problem": "--bits"}],
    }


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", ["Bär.png", "no text \udcff.png"])
def test_a_line_for_programs_is_readable_whatever_stdout_can_write(
    monkeypatch: pytest.MonkeyPatch, encoding: str, name: str
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    emit("saved", path=name)
    assert json.loads(written.getvalue()) == {"event": "saved", "path": name}
    is_plain = encoding == "utf-8" and "B" in name
    assert ("Bär".encode() in written.getvalue()) == is_plain
