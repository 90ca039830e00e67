"""What tensors each model holds, their shapes, and where each lies in either file layout.

fluxmesh's modules carry the names of black-forest-labs/flux (transformer, autoencoder) and of
transformers (T5, CLIP). A diffusers file stores some of BFL's tensors in pieces: the fused query,
key and value apart, `linear1` of a single block as four matrices, and the halves of the last
modulation in the other order. All of that is *data* here: a `ModelTensor` is a tensor of the model,
and its `pieces` are ranges of rows of the tensors in a diffusers file that, stacked, make it. The
weight loader, the checkpoint verifier, the LoRA reader and the tests read the same tables.

Shapes are PyTorch's (convolutions are out, in, height, width). Imports no mlx.
Source of the names: black-forest-labs/flux `src/flux/model.py`, `modules/autoencoder.py`,
`modules/image_embedders.py`; diffusers `FluxTransformer2DModel`, `AutoencoderKL`; transformers
`T5EncoderModel`, `CLIPTextModel`, `SiglipVisionModel`.
"""

from __future__ import annotations

from fluxmesh.models.autoencoder.conv_tensors import decoder_tensors, encoder_tensors
from fluxmesh.models.flux1.config import (
    AutoencoderConfig,
    ClipConfig,
    FluxConfig,
    ReduxConfig,
    SiglipConfig,
    T5Config,
)
from fluxmesh.models.tensor_map import (
    COMFY_PREFIX,
    ModelTensor,
    Rows,
    Shape,
    Tensors,
    TensorTable,
    in_bfl_file,
    parameter_count,
    pieces_between,
    same_but_for_ones,
    to_diffusers,
)

__all__ = [
    "COMFY_PREFIX",
    "Rows",
    "Shape",
    "ModelTensor",
    "Tensors",
    "autoencoder_tensors",
    "clip_tensors",
    "in_bfl_file",
    "modulates",
    "parameter_count",
    "pieces_between",
    "redux_tensors",
    "same_but_for_ones",
    "siglip_tensors",
    "spellings",
    "t5_tensors",
    "to_diffusers",
    "transformer_tensors",
]

TIME_EMBEDDING_DIM = 256  # sines and cosines that a time step becomes


def transformer_tensors(config: FluxConfig) -> Tensors:
    """Every tensor of the transformer, by BFL's name."""
    table = TensorTable()
    width, mlp, head = config.hidden_size, config.mlp_hidden_dim, config.head_dim
    table.linear("img_in", "x_embedder", width, config.in_channels)
    table.linear("txt_in", "context_embedder", width, config.context_in_dim)
    embedders = [
        ("time_in", "timestep_embedder", TIME_EMBEDDING_DIM),
        ("vector_in", "text_embedder", config.vec_in_dim),
    ]
    if config.guidance_embed:
        embedders.append(("guidance_in", "guidance_embedder", TIME_EMBEDDING_DIM))
    for name, key, into in embedders:
        table.linear(f"{name}.in_layer", f"time_text_embed.{key}.linear_1", width, into)
        table.linear(f"{name}.out_layer", f"time_text_embed.{key}.linear_2", width, width)
    for i in range(config.depth):
        name, key = f"double_blocks.{i}", f"transformer_blocks.{i}"
        streams = (
            # stream, modulation, q k v, their norms, output, MLP
            ("img", "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
            (
                "txt",
                "norm1_context",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                ("norm_added_q", "norm_added_k"),
                "to_add_out",
                "ff_context",
            ),
        )
        for stream, mod, qkv, norms, out, ff in streams:
            table.linear(f"{name}.{stream}_mod.lin", f"{key}.{mod}.linear", 6 * width, width)
            table.stacked(
                f"{name}.{stream}_attn.qkv", [(f"{key}.attn.{part}", width) for part in qkv], width
            )
            table.query_key_norms(f"{name}.{stream}_attn.norm", f"{key}.attn", norms, head)
            table.linear(f"{name}.{stream}_attn.proj", f"{key}.attn.{out}", width, width)
            table.linear(f"{name}.{stream}_mlp.0", f"{key}.{ff}.net.0.proj", mlp, width)
            table.linear(f"{name}.{stream}_mlp.2", f"{key}.{ff}.net.2", width, mlp)
    for i in range(config.depth_single_blocks):
        name, key = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        parts = [(f"{key}.attn.{part}", width) for part in ("to_q", "to_k", "to_v")]
        table.stacked(f"{name}.linear1", [*parts, (f"{key}.proj_mlp", mlp)], width)
        table.linear(f"{name}.linear2", f"{key}.proj_out", width, width + mlp)
        table.query_key_norms(f"{name}.norm", f"{key}.attn", ("norm_q", "norm_k"), head)
        table.linear(f"{name}.modulation.lin", f"{key}.norm.linear", 3 * width, width)
    # BFL has shift above scale; diffusers has scale above shift
    table.swapped("final_layer.adaLN_modulation.1", "norm_out.linear", width, width)
    table.linear("final_layer.linear", "proj_out", config.out_channels, width)
    return table.tensors


def autoencoder_tensors(config: AutoencoderConfig) -> Tensors:
    """Every tensor of the autoencoder, by BFL's name."""
    table = TensorTable()
    encoder_tensors(table, config)
    decoder_tensors(table, config)
    return table.tensors


def t5_tensors(config: T5Config) -> Tensors:
    """Every tensor of the T5 encoder, by transformers' name."""
    table = TensorTable()
    width, inner = config.d_model, config.num_heads * config.d_kv

    def add(name: str, *shape: int) -> None:
        table.same(name, name, shape)

    add("shared.weight", config.vocab_size, width)
    add(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        config.relative_attention_num_buckets,
        config.num_heads,
    )
    for i in range(config.num_layers):
        block = f"encoder.block.{i}"
        for part in "qkv":
            add(f"{block}.layer.0.SelfAttention.{part}.weight", inner, width)
        add(f"{block}.layer.0.SelfAttention.o.weight", width, inner)
        add(f"{block}.layer.0.layer_norm.weight", width)
        add(f"{block}.layer.1.DenseReluDense.wi_0.weight", config.d_ff, width)
        add(f"{block}.layer.1.DenseReluDense.wi_1.weight", config.d_ff, width)
        add(f"{block}.layer.1.DenseReluDense.wo.weight", width, config.d_ff)
        add(f"{block}.layer.1.layer_norm.weight", width)
    add("encoder.final_layer_norm.weight", width)
    return table.tensors


def clip_tensors(config: ClipConfig) -> Tensors:
    """Every tensor of the CLIP text encoder, by transformers 5's name (no `text_model.`)."""
    table = TensorTable()
    width = config.hidden_size
    for name, rows in (
        ("embeddings.token_embedding.weight", config.vocab_size),
        ("embeddings.position_embedding.weight", config.max_position_embeddings),
    ):
        table.same(name, name, (rows, width))
    _clip_layers(table, config)
    table.norm("final_layer_norm", "final_layer_norm", width)
    return table.tensors


def _clip_layers(table: TensorTable, config: ClipConfig | SiglipConfig) -> None:
    """Those of CLIP, and of SigLIP, which names them alike."""
    width = config.hidden_size
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"{layer}.self_attn.{part}"
            table.linear(name, name, width, width)
        table.norm(f"{layer}.layer_norm1", f"{layer}.layer_norm1", width)
        table.norm(f"{layer}.layer_norm2", f"{layer}.layer_norm2", width)
        fc1, fc2 = f"{layer}.mlp.fc1", f"{layer}.mlp.fc2"
        table.linear(fc1, fc1, config.intermediate_size, width)
        table.linear(fc2, fc2, width, config.intermediate_size)


def siglip_tensors(config: SiglipConfig) -> Tensors:
    """Every tensor of SigLIP's picture encoder that is held, by transformers 5's name (no
    `vision_model.`): its pooling head is left out."""
    table = TensorTable()
    width, patch = config.hidden_size, "embeddings.patch_embedding"
    table.conv(patch, patch, width, 3, config.patch_size)
    position = "embeddings.position_embedding.weight"
    table.same(position, position, (config.rows**2, width))
    _clip_layers(table, config)
    table.norm("post_layernorm", "post_layernorm", width)
    return table.tensors


def redux_tensors(config: ReduxConfig) -> Tensors:
    """Every tensor of Redux's embedder, by BFL's name."""
    table = TensorTable()
    inner = 3 * config.txt_in_features
    table.linear("redux_up", "redux_up", inner, config.redux_dim)
    table.linear("redux_down", "redux_down", config.txt_in_features, inner)
    return table.tensors


def spellings(key: str) -> tuple[str, ...]:
    """Names under which a tensor may stand in a file, the usual one first."""
    if key == "shared.weight":
        return (key, "encoder.embed_tokens.weight", "token_embd.weight")
    if key.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
        return (f"text_model.{key}", key)
    if key.startswith("encoder.block.") or key == "encoder.final_layer_norm.weight":
        return (key, _in_llama_cpp(key))
    return (key, f"{COMFY_PREFIX}{key}")


_LLAMA_CPP = (  # how it names the parts of a T5 encoder, in GGUF files
    ("encoder.block.", "enc.blk."),
    ("encoder.final_layer_norm", "enc.output_norm"),
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("layer.0.SelfAttention.", "attn_"),
    ("layer.0.layer_norm", "attn_norm"),
    ("layer.1.layer_norm", "ffn_norm"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"),
)


def _in_llama_cpp(key: str) -> str:
    """llama.cpp's name of a tensor of the T5 encoder (gguf-py, `tensor_mapping.py`)."""
    for part, short in _LLAMA_CPP:
        key = key.replace(part, short)
    return key


def modulates(name: str) -> bool:
    """Whether a tensor, or a module, of the transformer only makes modulations."""
    return not {"img_mod", "txt_mod", "modulation", "adaLN_modulation"}.isdisjoint(name.split("."))
