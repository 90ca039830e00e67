"""What the command line says of its own names: whole summaries, and what a misspelt one meant."""

from __future__ import annotations

import json

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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["generate", "--stepz", "4"],
            "There is no option --stepz; did you mean --steps? "
            "`fluxmesh generate --help` tells what there is.",
        ),
        (
            ["status", "--xyzzy"],
            "There is no option --xyzzy; `fluxmesh status --help` tells what there is.",
        ),
        (
            ["generate", "a dog", "--n-images", "many"],
            "Invalid value for '-n' / '--n-images': 'many' is not a valid integer; "
            "`fluxmesh generate --help` tells what there is.",
        ),
        (["train"], "Missing argument 'DATASET'; `fluxmesh train --help` tells what there is."),
        (
            ["stauts"],
            "There is no command 'stauts'; did you mean status? `fluxmesh --help` tells what there "
            "is.",
        ),
        (
            ["models", "show"],
            "Missing argument 'MODEL'; `fluxmesh models show --help` tells what there is.",
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_command_line_is_told_in_one_sentence_with_the_way_to_the_help(
    words: list[str], sentence: str, as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*words, *(["--json"] if as_json else [])])
    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.err == f"Error: {sentence}\n"
    told = [json.loads(line) for line in shown.out.splitlines()]
    error = {"event": "error", "message": sentence, "exit_code": 2}
    assert told == ([error] if as_json else [])


def test_a_choice_that_is_missing_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    """click writes one choice a line."""
    with pytest.raises(SystemExit):
        main(["adapters", "convert", "a.safetensors", "b.safetensors"])
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "kohya" in shown


def test_the_nearest_name_is_near() -> None:
    assert nearest("SCHNEL", ["dev", "schnell"]) == "schnell"
    assert nearest("dog", ["dev", "schnell"]) is None
    assert did_you_mean("dog", [], ".") == "."
