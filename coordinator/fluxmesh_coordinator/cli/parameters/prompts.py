"""Where prompts come from: the command line, a file, or stdin, one prompt a line.

In a file and on stdin a line that begins with # is a comment; a prompt that begins so is written
with \\#.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fluxmesh.errors import UsageError

STDIN = "-"
COMMENT = "#"
ESCAPED = "\\#"  # a prompt's own # at the beginning of a line


def only_prompt(words: Sequence[str], command: str) -> str | None:
    """The one prompt of a command line. Raises `UsageError` for several words without quotes."""
    if len(words) > 1:
        sentence = " ".join(words).replace('"', "'")
        raise UsageError(
            f"PROMPT is one argument, and {len(words)} were given: put it in quotes, as in "
            f'fluxmesh {command} "{sentence}".'
        )
    return words[0] if words else None


def read_prompts(
    prompt: str | None, prompt_file: str | None, fallback: str | None, *, allow_empty: bool = False
) -> list[str]:
    """The prompts of a call, at least one; `fallback` is that of a picture given by `--from`.

    Raises `UsageError` where none is named, two places are, a file isn't UTF-8, or the prompt is
    empty and not `allow_empty`.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("PROMPT and --prompt-file were both given; give one of them.")
    if prompt_file is not None:
        return _lines(prompt_file)
    if prompt == STDIN:
        return _lines(STDIN)
    if prompt is not None and not prompt.strip() and not allow_empty:
        raise UsageError(
            "The prompt is empty: say what to paint, or give --allow-empty-prompt to paint "
            "without one."
        )
    if prompt is None:
        prompt = fallback
    if prompt is None:
        raise UsageError(
            "There is no prompt: give PROMPT, - for stdin, --prompt-file or --from IMAGE."
        )
    return [prompt]


def _lines(path: str) -> list[str]:
    """The prompts in a UTF-8 file (`-`: stdin), without the space around; comments are skipped."""
    name = "stdin" if path == STDIN else f"--prompt-file {path}"
    try:
        if path == STDIN:
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"{name} can't be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text (byte {error.start}).") from error
    written = [line.strip() for line in lines]
    prompts = [
        line.removeprefix("\\") if line.startswith(ESCAPED) else line
        for line in written
        if line and not line.startswith(COMMENT)
    ]
    if not prompts:
        raise UsageError(f"{name} holds no prompt; write one a line.")
    return prompts
