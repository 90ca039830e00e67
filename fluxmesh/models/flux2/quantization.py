"""Which of FLUX.2's tensors are quantized, and in groups of how many columns. Imports no mlx."""

from __future__ import annotations

GROUP_SIZES = (64, 32)  # columns that share a scale; the largest that divides a row is taken


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
    if len(shape) != 2 or not name.endswith(".weight") or not name.startswith(blocks):
        return None
    return next((size for size in GROUP_SIZES if shape[1] % size == 0), None)
