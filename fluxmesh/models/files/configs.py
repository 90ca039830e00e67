"""What families' readers of config files have in common. Imports no mlx."""

from __future__ import annotations

from pathlib import Path

from fluxmesh.storage.safetensors import read_json

LEAST = "least"  # in a field's metadata: how small its whole numbers may be; 1 if not said


class UnsupportedConfigError(ValueError):
    """A config is of a model that the family's code doesn't compute; the text says what it has."""


def declared_length(tokenizer: Path, longest: int) -> int | None:
    """Tokens that a vocabulary's folder says a prompt has at most; None for none, and above
    `longest`, which means nothing: language models read far more than a family's prompts have."""
    path = tokenizer / "tokenizer_config.json"
    declared = read_json(path).get("model_max_length") if path.is_file() else None
    return declared if isinstance(declared, int) and 0 < declared <= longest else None
