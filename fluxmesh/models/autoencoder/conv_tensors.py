"""Tensors of the convolutional autoencoder of all FLUX families, by BFL's names and diffusers'.

The table of `convolutional.py`; a family's `tensor_maps.py` adds what is its own. Imports no mlx.
Source of the names: black-forest-labs/flux `src/flux/modules/autoencoder.py`; diffusers
`AutoencoderKL`.
"""

from __future__ import annotations

import math
from typing import Protocol

from fluxmesh.models.tensor_map import TensorTable


class ConvSizes(Protocol):
    """Sizes of both halves; BFL's `ch * ch_mult[i]` is `widths[i]` here."""

    @property
    def in_channels(self) -> int: ...

    @property
    def out_ch(self) -> int: ...

    @property
    def widths(self) -> tuple[int, ...]: ...  # of each level, finest first

    @property
    def num_res_blocks(self) -> int: ...

    @property
    def z_channels(self) -> int: ...

    @property
    def norm_groups(self) -> int: ...

    @property
    def mid_attention(self) -> bool: ...


def encoder_tensors(table: TensorTable, config: ConvSizes) -> None:
    """Adds every tensor of the encoder, by BFL's name."""
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


def decoder_tensors(table: TensorTable, config: ConvSizes) -> None:
    """Adds every tensor of the decoder, by BFL's name."""
    widths, levels = config.widths, len(config.widths)
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


def finest_width(config: ConvSizes) -> int:
    """Channels of what comes in at a decode's finest level: its largest array."""
    return config.widths[min(1, len(config.widths) - 1)]


def finest_encoded_width(config: ConvSizes) -> int:
    """The same of an encode, whose finest level comes first."""
    return config.widths[0]


def decode_flops(config: ConvSizes, height: int, width: int) -> float:
    """Arithmetic of decoding one image: every convolution at its resolution, and attention.

    `height` and `width` in pixels, `config` of the decoder.
    """
    table = TensorTable()
    decoder_tensors(table, config)
    total, coarsest = 0.0, len(config.widths) - 1
    for name, tensor in table.tensors.items():
        if len(tensor.shape) != 4:
            continue
        level = 0 if name.startswith("decoder.conv_out") else coarsest
        if name.startswith("decoder.up."):
            level = int(name.split(".")[2]) - (".upsample." in name)
        total += 2.0 * math.prod(tensor.shape) * height * width / 4**level
    places = height * width / 4**coarsest
    return total + (4 * places**2 * config.widths[-1] if config.mid_attention else 0)


def _resnet(table: TensorTable, name: str, key: str, into: int, out: int) -> None:
    table.norm(f"{name}.norm1", f"{key}.norm1", into)
    table.conv(f"{name}.conv1", f"{key}.conv1", out, into, 3)
    table.norm(f"{name}.norm2", f"{key}.norm2", out)
    table.conv(f"{name}.conv2", f"{key}.conv2", out, out, 3)
    if into != out:
        table.conv(f"{name}.nin_shortcut", f"{key}.conv_shortcut", out, into, 1)


def _middle(table: TensorTable, half: str, config: ConvSizes) -> None:
    width = config.widths[-1]
    name, key = f"{half}.mid", f"{half}.mid_block"
    _resnet(table, f"{name}.block_1", f"{key}.resnets.0", width, width)
    if config.mid_attention:
        table.norm(f"{name}.attn_1.norm", f"{key}.attentions.0.group_norm", width)
        for mine, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            # BFL's are 1x1 convolutions, diffusers' are linears: same numbers
            table.conv(f"{name}.attn_1.{mine}", f"{key}.attentions.0.{theirs}", width, width, 1)
    _resnet(table, f"{name}.block_2", f"{key}.resnets.1", width, width)
