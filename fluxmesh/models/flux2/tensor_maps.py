"""What tensors each of FLUX.2's models holds, their shapes, and where each lies in a file.

fluxmesh's modules carry the names of black-forest-labs/flux2 (transformer, autoencoder) and of
transformers (text encoders). A diffusers file stores the fused query, key and value of a double
block apart, and the halves of the last modulation in the other order. The transformer has no bias.

Shapes are PyTorch's (convolutions are out, in, height, width). Imports no mlx.
Source of the names: black-forest-labs/flux2 `src/flux2/model.py`, `autoencoder.py`; diffusers
`Flux2Transformer2DModel`, `AutoencoderKLFlux2`; transformers `Qwen3ForCausalLM`,
`Mistral3ForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Container

from fluxmesh.models.autoencoder.conv_tensors import decoder_tensors, encoder_tensors
from fluxmesh.models.flux2.config import Flux2AutoencoderConfig, Flux2Config, TextEncoderConfig
from fluxmesh.models.tensor_map import COMFY_PREFIX, Tensors, TensorTable

TIME_EMBEDDING_DIM = 256  # sines and cosines that a time step becomes

# Of the language model, what only looks rows up: `embedding.py` reads them from the file.
EMBEDDING = "embed_tokens.weight"

# In a single file, what only a transformer of FLUX.2 has.
MARK = "single_stream_modulation.lin.weight"


def is_flux2_transformer(keys: Container[str]) -> bool:
    """Whether a single file with these tensors is a transformer of FLUX.2, in BFL's names."""
    return MARK in keys or f"{COMFY_PREFIX}{MARK}" in keys


def transformer_tensors(config: Flux2Config) -> Tensors:
    """Every tensor of the transformer, by BFL's name."""
    table = TensorTable()
    width, mlp, head = config.hidden_size, config.mlp_hidden_dim, config.head_dim

    def linear(name: str, key: str, out: int, into: int) -> None:
        table.linear(name, key, out, into, bias=False)

    linear("img_in", "x_embedder", width, config.in_channels)
    linear("txt_in", "context_embedder", width, config.context_in_dim)
    embedders = [("time_in", "timestep_embedder")]
    if config.guidance_embed:
        embedders.append(("guidance_in", "guidance_embedder"))
    for name, key in embedders:
        key = f"time_guidance_embed.{key}"
        linear(f"{name}.in_layer", f"{key}.linear_1", width, TIME_EMBEDDING_DIM)
        linear(f"{name}.out_layer", f"{key}.linear_2", width, width)
    for name, count in (
        ("double_stream_modulation_img", 6),
        ("double_stream_modulation_txt", 6),
        ("single_stream_modulation", 3),
    ):
        linear(f"{name}.lin", f"{name}.linear", count * width, width)
    for i in range(config.depth):
        name, key = f"double_blocks.{i}", f"transformer_blocks.{i}"
        streams = (
            # stream, q k v, their norms, output, MLP
            ("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
            (
                "txt",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
                "to_add_out",
                "ff_context",
            ),
        )
        for stream, qkv, norms, out, ff in streams:
            parts = [(f"{key}.attn.{part}", width) for part in qkv]
            table.stacked(f"{name}.{stream}_attn.qkv", parts, width, bias=False)
            table.query_key_norms(f"{name}.{stream}_attn.norm", f"{key}.attn", norms, head)
            linear(f"{name}.{stream}_attn.proj", f"{key}.attn.{out}", width, width)
            linear(f"{name}.{stream}_mlp.0", f"{key}.{ff}.linear_in", 2 * mlp, width)
            linear(f"{name}.{stream}_mlp.2", f"{key}.{ff}.linear_out", width, mlp)
    for i in range(config.depth_single_blocks):
        name, key = f"single_blocks.{i}", f"single_transformer_blocks.{i}.attn"
        linear(f"{name}.linear1", f"{key}.to_qkv_mlp_proj", 3 * width + 2 * mlp, width)
        linear(f"{name}.linear2", f"{key}.to_out", width, width + mlp)
        table.query_key_norms(f"{name}.norm", key, ("norm_q", "norm_k"), head)
    # BFL has shift above scale; diffusers has scale above shift
    table.swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width, width, bias=False)
    linear("final_layer.linear", "proj_out", config.out_channels, width)
    return table.tensors


def autoencoder_tensors(config: Flux2AutoencoderConfig) -> Tensors:
    """Every tensor of the autoencoder, by BFL's name, but the batch norm's count of batches."""
    table = TensorTable()
    moments = 2 * config.z_channels
    encoder_tensors(table, config)
    table.conv("encoder.quant_conv", "quant_conv", moments, moments, 1)
    decoder_tensors(table, config.decoder)
    table.conv(
        "decoder.post_quant_conv", "post_quant_conv", config.z_channels, config.z_channels, 1
    )
    for name in ("bn.running_mean", "bn.running_var"):
        table.same(name, name, (config.token_channels,))
    return table.tensors


def text_encoder_tensors(config: TextEncoderConfig) -> Tensors:
    """Every tensor of the layers that are run, by transformers' name without what is before it.

    Not the embedding: its rows are looked up where they lie (`embedding.py`).
    """
    table = TensorTable()
    width, hd = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * hd, config.num_key_value_heads * hd

    def add(name: str, *shape: int) -> None:
        table.same(f"{name}.weight", f"{name}.weight", shape)

    for i in range(config.layers):
        layer = f"layers.{i}"
        add(f"{layer}.input_layernorm", width)
        add(f"{layer}.self_attn.q_proj", queries, width)
        add(f"{layer}.self_attn.k_proj", keys, width)
        add(f"{layer}.self_attn.v_proj", keys, width)
        add(f"{layer}.self_attn.o_proj", width, queries)
        if config.qk_norm:
            add(f"{layer}.self_attn.q_norm", hd)
            add(f"{layer}.self_attn.k_norm", hd)
        add(f"{layer}.post_attention_layernorm", width)
        add(f"{layer}.mlp.gate_proj", config.intermediate_size, width)
        add(f"{layer}.mlp.up_proj", config.intermediate_size, width)
        add(f"{layer}.mlp.down_proj", width, config.intermediate_size)
    return table.tensors


def embedding(config: TextEncoderConfig) -> Tensors:
    """The language model's embedding, as the files hold it."""
    table = TensorTable()
    table.same(EMBEDDING, EMBEDDING, (config.vocab_size, config.hidden_size))
    return table.tensors


def spellings(key: str) -> tuple[str, ...]:
    """Names under which a tensor may stand in a file, the usual one first.

    Language models alone, and beside a vision tower: as transformers saves and as it names them.
    """
    if key.startswith(("layers.", "embed_tokens.")):
        before = ("model.", "language_model.model.", "model.language_model.", "")
        return tuple(f"{prefix}{key}" for prefix in before)
    return (key, f"{COMFY_PREFIX}{key}")


def modulates(name: str) -> bool:
    """Whether a tensor, or a module, of the transformer only makes modulations."""
    shared = ("double_stream_modulation_", "single_stream_modulation.")
    return name.startswith(shared) or "adaLN_modulation" in name.split(".")
