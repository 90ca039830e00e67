"""What a single file of FLUX.1 needs from elsewhere: the text encoders, the autoencoder, two
vocabularies. Imports no mlx.

Above `single_file.py`, which says what a file is; behind `models/files/family.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxmesh.models.files.family import SingleFiles
from fluxmesh.models.files.kinds import FileContents
from fluxmesh.models.flux1 import single_file
from fluxmesh.models.flux1.config import FluxConfig, ScheduleConfig
from fluxmesh.models.flux1.files.folder import KONTEXT_PIPELINE

SCHNELL = "black-forest-labs/FLUX.1-schnell"
T5_PADDING = 128  # T5 has this many rows at most beyond its vocabulary
VOCABULARIES = {
    "openai/clip-vit-large-patch14": "tokenizer",
    "google/t5-v1_1-xxl": "tokenizer_2",
}


class Flux1Files(SingleFiles):
    """FLUX.1's, alone or as ComfyUI's set."""

    name = single_file.NAME
    kinds = single_file.KINDS
    configs: Mapping[str, Any] = {
        "transformer": single_file.flux_config_of,
        "text_encoder_2": single_file.t5_config_of,
        "text_encoder": single_file.clip_config_of,
        "vae": single_file.autoencoder_config_of,
    }
    shapes_hide = single_file.SHAPES_HIDE
    usual: Mapping[str, str] = {"vae": "ae", "text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
    megabytes: Mapping[str, int] = {"text_encoder": 246, "text_encoder_2": 9525, "vae": 168}
    nouns: Sequence[tuple[str, Mapping[str, str]]] = (
        ("text encoder", {"text_encoder_2": "T5", "text_encoder": "CLIP"}),
        ("tokenizer", {"tokenizer": "CLIP's", "tokenizer_2": "T5's"}),
        ("autoencoder", {"vae": ""}),
    )

    def fits(self, part: str, config: Any, transformer: FluxConfig) -> bool:
        if part == "text_encoder_2":
            return bool(config.d_model == transformer.context_in_dim)
        if part == "text_encoder":
            return bool(config.hidden_size == transformer.vec_in_dim)
        return bool(4 * config.z_channels == transformer.out_channels)

    def speaks(self, folder: Path, tokenizer: str, config: Any) -> bool:
        """It has as many tokens as the encoder has rows, but for those that pad T5's."""
        from fluxmesh.models.flux1.tokenizers import ClipTokenizer, T5Tokenizer

        rows: int = config.vocab_size
        if tokenizer == "tokenizer":
            return bool(ClipTokenizer.from_folder(folder).vocab_size == rows)
        return 0 <= rows - T5Tokenizer.from_folder(folder, T5_PADDING).vocab_size <= T5_PADDING

    def schedule(self, transformer: FluxConfig) -> ScheduleConfig:
        """Guided models shift by length."""
        return ScheduleConfig(use_dynamic_shifting=transformer.guidance_embed)

    def index(self, file: Path) -> Mapping[str, Any]:
        """BFL calls Kontext so; its shapes are dev's."""
        is_kontext = "kontext" in file.name.lower()
        return {"_class_name": KONTEXT_PIPELINE} if is_kontext else {}

    def sources(
        self, parts: Sequence[str], transformer: FileContents, prefix: str
    ) -> list[tuple[str, tuple[str, ...]]]:
        """Vocabularies alone are open to everyone."""
        if set(parts) <= set(VOCABULARIES.values()):
            return [(repo, (part,)) for repo, part in VOCABULARIES.items() if part in parts]
        return [(SCHNELL, tuple(parts))]

    @property
    def vocabularies(self) -> Mapping[str, str]:
        return VOCABULARIES
