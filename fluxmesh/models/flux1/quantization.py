"""Which of FLUX.1's tensors are quantized, and in groups of how many columns. Imports no mlx."""

from __future__ import annotations

from fluxmesh.models.tensor_map import column_group


def group_size(component: str, name: str, shape: tuple[int, ...]) -> int | None:
    """Columns that share a scale when tensor `name` is quantized; None where it is kept whole.

    The matrices of all blocks are quantized; embeddings, norms, the layers that meet latents,
    prompt and time, the autoencoder and what sees pictures are not: together a few percent of the
    bytes, and the places where rounding shows most.
    """
    blocks = {
        "transformer": ("double_blocks.", "single_blocks."),
        "text_encoder": ("encoder.layers.",),
        "text_encoder_2": ("encoder.block.",),
        "vae": (),
        "image_encoder": (),
        "image_embedder": (),
    }[component]
    return None if "relative_attention_bias" in name else column_group(name, shape, blocks)
