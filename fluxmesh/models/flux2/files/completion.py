"""What a single file of FLUX.2 needs from elsewhere: text encoder, autoencoder and vocabulary.

Above `single_file.py`, which says what a file is; behind `models/files/family.py`. Imports no mlx.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxmesh.models.files.family import SingleFiles
from fluxmesh.models.files.kinds import FileContents
from fluxmesh.models.flux2 import single_file
from fluxmesh.models.flux2.config import DEV, KLEIN_9B, Flux2Config, Flux2Schedule
from fluxmesh.models.flux2.files.folder import KV_PIPELINE

BASE = re.compile(r"(^|[^a-z])base([^a-z]|$)")  # in a file's name, of a model before distillation
KV = re.compile(r"(^|[^a-z])kv([^a-z]|$)")  # in a file's name, of the one that keeps references


class Flux2Files(SingleFiles):
    """FLUX.2's."""

    name = single_file.NAME
    kinds = single_file.KINDS
    configs: Mapping[str, Any] = {
        "transformer": single_file.flux2_config_of,
        "text_encoder": single_file.text_encoder_config_of,
        "vae": single_file.flux2_autoencoder_config_of,
    }
    shapes_hide = single_file.SHAPES_HIDE
    usual: Mapping[str, str] = {"vae": "flux2-vae"}
    megabytes: Mapping[str, int] = {"text_encoder": 8045, "vae": 168, "tokenizer": 11}
    nouns: Sequence[tuple[str, Mapping[str, str]]] = (
        ("text encoder", {"text_encoder": "Qwen3 or Mistral"}),
        ("tokenizer", {"tokenizer": "the text encoder's"}),
        ("autoencoder", {"vae": ""}),
    )

    def fits(self, part: str, config: Any, transformer: Flux2Config) -> bool:
        if part == "text_encoder":
            return bool(config.width == transformer.context_in_dim)
        return bool(config.token_channels == transformer.in_channels)

    def speaks(self, folder: Path, tokenizer: str, config: Any) -> bool:
        """The embedding has rows to spare, so that the framing tokens decide."""
        from fluxmesh.models.flux2.tokenizer import ChatTokenizer

        return bool(ChatTokenizer.from_folder(folder, config.kind).vocab_size <= config.vocab_size)

    def schedule(self, transformer: Flux2Config) -> Flux2Schedule:
        return Flux2Schedule()

    def index(self, file: Path) -> Mapping[str, Any]:
        """BFL calls its base models so; whatever else has no guidance embedding is distilled."""
        name = file.name.lower()
        is_distilled = BASE.search(name) is None
        return {"is_distilled": is_distilled} | (
            {"_class_name": KV_PIPELINE} if is_distilled and KV.search(name) else {}
        )

    def sources(
        self, parts: Sequence[str], transformer: FileContents, prefix: str
    ) -> list[tuple[str, tuple[str, ...]]]:
        """The folder of the published model with such a transformer; klein 4B's is open to all."""
        _, width = transformer.shapes[f"{prefix}txt_in.weight"]
        names = {KLEIN_9B.context_in_dim: "klein-9B", DEV.context_in_dim: "dev"}
        return [(f"black-forest-labs/FLUX.2-{names.get(width, 'klein-4B')}", tuple(parts))]
