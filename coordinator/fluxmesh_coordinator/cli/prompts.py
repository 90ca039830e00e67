"""Where prompts come from: the command line, a file, or stdin, one prompt a line."""

from __future__ import annotations

import sys

from fluxmesh.errors import UsageError

STDIN = "-"


def read_prompts(prompt: str | None, prompt_file: str | None, fallback: str | None) -> list[str]:
    """The prompts of a call, at least one; `fallback` is that of a picture given by `--from`.

    Raises `UsageError` where none is named, two places are, or a file isn't UTF-8.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("PROMPT and --prompt-file were both given; give one of them.")
    if prompt_file is not None:
        return _lines(prompt_file)
    if prompt == STDIN:
        return _lines(STDIN)
    if prompt is None:
        prompt = fallback
    if prompt is None:
        raise UsageError(
            "There is no prompt: give PROMPT, - for stdin, --prompt-file or --from IMAGE."
        )
    return [prompt]


def _lines(path: str) -> list[str]:
    """The lines of a UTF-8 file (`-`: stdin) that hold something, without the space around."""
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
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{name} holds no prompt; write one a line.")
    return prompts
