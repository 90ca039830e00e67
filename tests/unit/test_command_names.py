"""What the command line says of its own names: whole summaries, and what a misspelt one meant."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from fluxmesh.spelling import did_you_mean, nearest
from fluxmesh_coordinator.cli import cli, main


def groups(group: click.Group, *path: str) -> list[tuple[str, ...]]:
    """Every group, by the words that lead to it."""
    paths = [path]
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            paths += groups(command, *path, name)
    return paths


def test_no_summary_is_cut() -> None:
    every = groups(cli)
    assert ("models",) in every and ("adapters",) in every
    for path in every:
        shown = CliRunner().invoke(cli, [*path, "--help"], terminal_width=80).output
        commands = shown.partition("Commands:\n")[2].splitlines()
        assert commands, path
        assert not [line for line in commands if line.endswith("...")]


@pytest.mark.parametrize("words", [[], ["models"], ["adapters"]])
def test_a_group_without_a_command_shows_its_help_and_no_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.startswith("Usage:") and shown.count("Usage:") == 1
    assert "Commands:" in shown and "Error" not in shown


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["generat", "a cat"], "'generat'; did you mean generate?"),
        (["stauts"], "'stauts'; did you mean status?"),
        (["models", "lst"], "'lst'; did you mean list?"),
        (["adapters", "Convert"], "'Convert'; did you mean convert?"),
        (["xyzzy"], "There is no command 'xyzzy'."),
    ],
)
def test_a_misspelt_command_is_told_with_the_one_that_was_meant(words: list[str], end: str) -> None:
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 2
    assert done.output.rstrip().endswith(end)


def test_the_nearest_name_is_near() -> None:
    assert nearest("SCHNEL", ["dev", "schnell"]) == "schnell"
    assert nearest("dog", ["dev", "schnell"]) is None
    assert did_you_mean("dog", [], ".") == "."
