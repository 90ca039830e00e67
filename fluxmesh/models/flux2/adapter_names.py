"""What adapters of FLUX.2 call the transformer's modules. Imports no mlx.

Data for `adapters/targets.py`, on the tables of `tensor_maps.py`, whose names (BFL's and
diffusers') need no line here. Nobody adapts the language model that reads the prompt.
"""

from __future__ import annotations

from fluxmesh.models.flux2.config import Flux2Config
from fluxmesh.models.flux2.tensor_maps import transformer_tensors
from fluxmesh.models.tensor_map import ComponentNames

SPELLINGS = (
    ("_mlp.", "_mlp.layers."),
    ("adaLN_modulation.", "adaLN_modulation.layers."),
    (".to_out.0", ".to_out"),  # mflux
    ("transformer_blocks.", "sformer_blocks."),  # a tool that cut `transformer.` off twice
)
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "model."),
    *("transformer.", "lora_unet_", "lora_transformer_", "lycoris_"),
)
GUIDANCE = (
    *("guidance_in.in_layer", "guidance_in.out_layer"),
    *(f"time_guidance_embed.guidance_embedder.linear_{k}" for k in (1, 2)),
)
# What keys of its adapters hold, and those of no other model.
MARKS = r"double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj|ff[._]linear_in"


def components(transformer: Flux2Config) -> tuple[ComponentNames, ...]:
    """What adapters of a FLUX.2 of these sizes may change."""
    return (
        ComponentNames(
            "transformer",
            transformer_tensors(transformer),
            PREFIXES,
            SPELLINGS,
            absent=frozenset() if transformer.guidance_embed else frozenset(GUIDANCE),
        ),
    )
