"""Which of FLUX.2's tensors are quantized, and in groups of how many columns. Imports no mlx."""

from __future__ import annotations

from fluxmesh.models.tensor_map import column_group


def group_size(component: str, name: str, shape: tuple[int, ...]) -> int | None:
    """Columns that share a scale when tensor `name` is quantized; None where it is kept whole.

    The matrices of all blocks and of the text encoder's layers are quantized; embeddings, norms,
    the shared modulations (2 to 4% of the transformer), the layers that meet latents, prompt and
    time, and the autoencoder are not.
    """
    blocks = {
        "transformer": ("double_blocks.", "single_blocks."),
        "text_encoder": ("layers.",),
        "vae": (),
    }[component]
    return column_group(name, shape, blocks)
