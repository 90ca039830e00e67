"""What tensors each model holds, their shapes, and where each lies in either file layout.

fluxmesh's modules carry the names of black-forest-labs/flux (transformer, autoencoder) and of
transformers (T5, CLIP). A diffusers file stores some of BFL's tensors in pieces: the fused query,
key and value apart, `linear1` of a single block as four matrices, and the halves of the last
modulation in the other order. All of that is *data* here: a `ModelTensor` is a tensor of the model,
and its `pieces` are ranges of rows of the tensors in a diffusers file that, stacked, make it. The
weight loader, the checkpoint verifier, the LoRA reader and the tests read the same tables.

Shapes are PyTorch's (convolutions are out, in, height, width). Imports no mlx.
Source of the names: black-forest-labs/flux `src/flux/model.py`, `modules/autoencoder.py`;
diffusers `FluxTransformer2DModel`, `AutoencoderKL`; transformers `T5EncoderModel`, `CLIPTextModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fluxmesh.models.flux1.config import AutoencoderConfig, ClipConfig, FluxConfig, T5Config

TIME_EMBEDDING_DIM = 256  # sines and cosines that a time step becomes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` (exclusive, along axis 0) of the tensor called `key`."""

    key: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the model: its shape, and the rows of a diffusers file that make it."""

    shape: Shape
    pieces: tuple[Rows, ...]


Tensors = dict[str, ModelTensor]


class _Table:
    """Collects targets; every `add` is one linear, norm or convolution."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}

    def tensor(self, name: str, shape: Shape, pieces: list[Rows]) -> None:
        self.tensors[name] = ModelTensor(shape, tuple(pieces))

    def same(self, name: str, key: str, shape: Shape) -> None:
        """One tensor of the file is one of the model."""
        self.tensor(name, shape, [Rows(key, 0, shape[0])])

    def linear(self, name: str, key: str, out: int, into: int, bias: bool = True) -> None:
        self.stacked(name, [(key, out)], into, bias)

    def stacked(
        self, name: str, parts: list[tuple[str, int]], into: int, bias: bool = True
    ) -> None:
        """A linear whose rows are those of several of the file's linears, one below the other."""
        out = sum(rows for _, rows in parts)
        for leaf, shape in (("weight", (out, into)), ("bias", (out,)))[: 2 if bias else 1]:
            self.tensor(
                f"{name}.{leaf}", shape, [Rows(f"{key}.{leaf}", 0, rows) for key, rows in parts]
            )

    def conv(self, name: str, key: str, out: int, into: int, kernel: int) -> None:
        self.same(f"{name}.weight", f"{key}.weight", (out, into, kernel, kernel))
        self.same(f"{name}.bias", f"{key}.bias", (out,))

    def norm(self, name: str, key: str, width: int) -> None:
        self.same(f"{name}.weight", f"{key}.weight", (width,))
        self.same(f"{name}.bias", f"{key}.bias", (width,))


def transformer_tensors(config: FluxConfig) -> Tensors:
    """Every tensor of the transformer, by BFL's name."""
    table = _Table()
    width, mlp = config.hidden_size, config.mlp_hidden_dim
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
            _query_key_norms(table, f"{name}.{stream}_attn.norm", f"{key}.attn", norms, config)
            table.linear(f"{name}.{stream}_attn.proj", f"{key}.attn.{out}", width, width)
            table.linear(f"{name}.{stream}_mlp.0", f"{key}.{ff}.net.0.proj", mlp, width)
            table.linear(f"{name}.{stream}_mlp.2", f"{key}.{ff}.net.2", width, mlp)
    for i in range(config.depth_single_blocks):
        name, key = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        parts = [(f"{key}.attn.{part}", width) for part in ("to_q", "to_k", "to_v")]
        table.stacked(f"{name}.linear1", [*parts, (f"{key}.proj_mlp", mlp)], width)
        table.linear(f"{name}.linear2", f"{key}.proj_out", width, width + mlp)
        _query_key_norms(table, f"{name}.norm", f"{key}.attn", ("norm_q", "norm_k"), config)
        table.linear(f"{name}.modulation.lin", f"{key}.norm.linear", 3 * width, width)
    for leaf, shape in (("weight", (2 * width, width)), ("bias", (2 * width,))):
        # BFL has shift above scale; diffusers has scale above shift
        key = f"norm_out.linear.{leaf}"
        table.tensor(
            f"final_layer.adaLN_modulation.1.{leaf}",
            shape,
            [Rows(key, width, 2 * width), Rows(key, 0, width)],
        )
    table.linear("final_layer.linear", "proj_out", config.out_channels, width)
    return table.tensors


def _query_key_norms(
    table: _Table, name: str, key: str, norms: tuple[str, str], config: FluxConfig
) -> None:
    for mine, theirs in zip(("query_norm", "key_norm"), norms, strict=True):
        table.same(f"{name}.{mine}.scale", f"{key}.{theirs}.weight", (config.head_dim,))


def autoencoder_tensors(config: AutoencoderConfig) -> Tensors:
    """Every tensor of the autoencoder, by BFL's name."""
    table = _Table()
    widths, levels = config.widths, len(config.widths)
    table.conv("encoder.conv_in", "encoder.conv_in", widths[0], config.in_channels, 3)
    into = widths[0]
    for level, width in enumerate(widths):
        name, key = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for block in range(config.num_res_blocks):
            _resnet(table, f"{name}.block.{block}", f"{key}.resnets.{block}", into, width)
            into = width
        if level < levels - 1:
            table.conv(f"{name}.downsample.conv", f"{key}.downsamplers.0.conv", width, width, 3)
    _middle(table, "encoder", config)
    table.norm("encoder.norm_out", "encoder.conv_norm_out", widths[-1])
    table.conv("encoder.conv_out", "encoder.conv_out", 2 * config.z_channels, widths[-1], 3)

    table.conv("decoder.conv_in", "decoder.conv_in", widths[-1], config.z_channels, 3)
    _middle(table, "decoder", config)
    into = widths[-1]
    for level in reversed(range(levels)):  # BFL counts from the finest, diffusers from the coarsest
        name, key = f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for block in range(config.num_res_blocks + 1):
            _resnet(table, f"{name}.block.{block}", f"{key}.resnets.{block}", into, widths[level])
            into = widths[level]
        if level > 0:
            table.conv(f"{name}.upsample.conv", f"{key}.upsamplers.0.conv", into, into, 3)
    table.norm("decoder.norm_out", "decoder.conv_norm_out", widths[0])
    table.conv("decoder.conv_out", "decoder.conv_out", config.out_ch, widths[0], 3)
    return table.tensors


def _resnet(table: _Table, name: str, key: str, into: int, out: int) -> None:
    table.norm(f"{name}.norm1", f"{key}.norm1", into)
    table.conv(f"{name}.conv1", f"{key}.conv1", out, into, 3)
    table.norm(f"{name}.norm2", f"{key}.norm2", out)
    table.conv(f"{name}.conv2", f"{key}.conv2", out, out, 3)
    if into != out:
        table.conv(f"{name}.nin_shortcut", f"{key}.conv_shortcut", out, into, 1)


def _middle(table: _Table, half: str, config: AutoencoderConfig) -> None:
    width = config.widths[-1]
    name, key = f"{half}.mid", f"{half}.mid_block"
    _resnet(table, f"{name}.block_1", f"{key}.resnets.0", width, width)
    if config.mid_attention:
        table.norm(f"{name}.attn_1.norm", f"{key}.attentions.0.group_norm", width)
        for mine, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            # BFL's are 1x1 convolutions, diffusers' are linears: same numbers
            table.conv(f"{name}.attn_1.{mine}", f"{key}.attentions.0.{theirs}", width, width, 1)
    _resnet(table, f"{name}.block_2", f"{key}.resnets.1", width, width)


def t5_tensors(config: T5Config) -> Tensors:
    """Every tensor of the T5 encoder, by transformers' name."""
    table = _Table()
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
    table = _Table()
    width = config.hidden_size
    for name, rows in (
        ("embeddings.token_embedding.weight", config.vocab_size),
        ("embeddings.position_embedding.weight", config.max_position_embeddings),
    ):
        table.same(name, name, (rows, width))
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
    table.norm("final_layer_norm", "final_layer_norm", width)
    return table.tensors


def in_bfl_file(tensors: Tensors) -> Tensors:
    """The same targets, when the file stores them whole and by the model's own names."""
    return {
        name: ModelTensor(target.shape, (Rows(name, 0, target.shape[0]),))
        for name, target in tensors.items()
    }


def to_diffusers(tensors: Tensors) -> dict[str, tuple[Rows, ...]]:
    """The other direction: each tensor of a diffusers file as rows of the model's tensors."""
    found: dict[str, list[tuple[int, Rows]]] = {}
    for name, target in tensors.items():
        offset = 0
        for piece in target.pieces:
            found.setdefault(piece.key, []).append(
                (piece.start, Rows(name, offset, offset + piece.count))
            )
            offset += piece.count
    return {
        key: tuple(rows for _, rows in sorted(parts, key=lambda part: part[0]))
        for key, parts in found.items()
    }


def pieces_between(pieces: tuple[Rows, ...], start: int, stop: int) -> Iterator[Rows]:
    """The parts of the stacked `pieces` that make rows `start` to `stop` of the target."""
    offset = 0
    for piece in pieces:
        low, high = max(start, offset), min(stop, offset + piece.count)
        if low < high:
            yield Rows(piece.key, piece.start + low - offset, piece.start + high - offset)
        offset += piece.count


def same_but_for_ones(shape: Shape, other: Shape) -> bool:
    """Whether two shapes hold the same numbers, a 1x1 convolution being a linear."""
    return _strip(shape) == _strip(other)


def _strip(shape: Shape) -> Shape:
    size = len(shape)
    while size > 1 and shape[size - 1] == 1:
        size -= 1
    return tuple(shape[:size])


COMFY_PREFIX = "model.diffusion_model."  # before BFL's names in single files of some trainers


def spellings(key: str) -> tuple[str, ...]:
    """Names under which a tensor may stand in a file, the usual one first."""
    if key == "shared.weight":
        return (key, "encoder.embed_tokens.weight")
    if key.startswith(("embeddings.", "encoder.layers.", "final_layer_norm.")):
        return (f"text_model.{key}", key)
    return (key, f"{COMFY_PREFIX}{key}")


def modulates(name: str) -> bool:
    """Whether a tensor, or a module, of the transformer only makes modulations."""
    return not {"img_mod", "txt_mod", "modulation", "adaLN_modulation"}.isdisjoint(name.split("."))


def parameter_count(tensors: Mapping[str, ModelTensor]) -> int:
    """Numbers that the model holds."""
    total = 0
    for target in tensors.values():
        size = 1
        for side in target.shape:
            size *= side
        total += size
    return total
