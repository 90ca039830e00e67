"""The rows of a language model's embedding that a prompt needs, read where they lie in the file.

A prompt has 512 tokens at most and the table 131 072 or 151 936 rows (1.25 GiB of Mistral's): the
rows are looked up, the table never loaded. Stands below `text_encoder.py`, which takes what this
gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from fluxmesh.errors import WeightsError
from fluxmesh.models.flux2.config import TextEncoderConfig
from fluxmesh.models.flux2.tensor_maps import EMBEDDING, spellings
from fluxmesh.storage.safetensors import (
    FLOATS,
    Entry,
    numpy_dtype,
    read_each_into,
    read_headers,
)


class EmbeddingRows:
    """Token ids to rows of the embedding, each read from the file when it is asked for."""

    def __init__(self, files: Sequence[Path], config: TextEncoderConfig) -> None:
        """`files` are those of the text encoder. Reads headers alone.

        Raises `WeightsError` where the table is missing, or of another shape or kind.
        """
        entries = read_headers(files).entries
        names = [name for name in spellings(EMBEDDING) if name in entries]
        if not names:
            raise WeightsError(
                f"{files[0]} lacks {spellings(EMBEDDING)[0]}, which the text encoder needs; the "
                "file is incomplete or of another model."
            )
        self.entry: Entry = entries[names[0]]
        expected = (config.vocab_size, config.hidden_size)
        if self.entry.shape != expected or self.entry.dtype not in FLOATS:
            raise WeightsError(
                f"{self.entry.path}: {self.entry.key} has shape {self.entry.shape} and dtype "
                f"{self.entry.dtype} where the config asks for floats of shape {expected}; the "
                "file belongs to another model, or is damaged."
            )

    def __call__(self, ids: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """Rows of `ids` [L], one at least: [1, L, hidden_size]. No row is read twice.

        Raises `WeightsError` where the file can't be read, or has no such row.
        """
        different, places = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        rows, width = self.entry.shape
        if different[0] < 0 or different[-1] >= rows:
            raise WeightsError(
                f"{self.entry.path}: {self.entry.key} has {rows} rows and the tokenizer gives the "
                f"tokens {different[0]} to {different[-1]}; one belongs to another model."
            )
        out = np.empty((len(different), width), dtype=numpy_dtype(self.entry))
        read_each_into((out[i : i + 1], self.entry, int(row)) for i, row in enumerate(different))
        embeddings = mx.array(out[places])
        if self.entry.dtype == "BF16":  # NumPy has no such numbers: these are their bits
            embeddings = embeddings.view(mx.bfloat16)
        return embeddings[None].astype(dtype)
