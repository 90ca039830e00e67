"""The convolutional autoencoder of all FLUX families: its layers, both halves, and tiles.

A family's `autoencoder.py` says what lies between the halves and the latents that its transformer
was trained on. Names are those of black-forest-labs/flux (`src/flux/modules/autoencoder.py`).
Convolutional residual blocks with attention at the coarsest level, from Rombach et al. 2022
(https://arxiv.org/abs/2112.10752).

Shapes are MLX's, channels last: pictures [B, H, W, 3] in [-1, 1], latents [B, h, w, z_channels].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from fluxmesh.kernels.ops import group_norm, offset_sum
from fluxmesh.models.autoencoder.conv_tensors import ConvSizes
from fluxmesh.models.autoencoder.tiling import UNTILED_LATENTS, Tile, tiles

# Queries that the middle attention takes at once: bounds the scores it holds to this many rows.
QUERY_ROWS = 4096

_in_pieces: ContextVar[bool] = ContextVar("in_pieces", default=False)

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)
conv1x1 = partial(nn.Conv2d, kernel_size=1)


@contextmanager
def in_pieces() -> Iterator[None]:
    """Inside, each block is given to the device as soon as it is described.

    For where MLX counts what waits in operations alone: of a large picture a few are gigabytes.
    """
    token = _in_pieces.set(True)
    try:
        yield
    finally:
        _in_pieces.reset(token)


class GroupNorm(nn.Module):
    """PyTorch's group norm: neighbouring channels make a group."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array, silu: bool = False, offset: mx.array | None = None) -> mx.array:
        """x [B, H, W, C] (plus `offset` [C]), normed; with `silu`, what a convolution reads."""
        if offset is None:
            offset = mx.zeros_like(self.bias)
        return group_norm(x, self.weight, self.bias, offset, self.groups, silu)


def without_bias(conv: nn.Conv2d, x: mx.array) -> mx.array:
    """A 3x3 convolution whose bias is left to what comes next: a pass over memory less."""
    return mx.conv2d(x, conv.weight, padding=1)


class ResnetBlock(nn.Module):
    """Twice norm, swish and convolution, added to what came in."""

    def __init__(self, into: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(into, groups)
        self.conv1 = conv3x3(into, out)
        self.norm2 = GroupNorm(out, groups)
        self.conv2 = conv3x3(out, out)
        if into != out:
            self.nin_shortcut = conv1x1(into, out)

    def __call__(self, x: mx.array) -> mx.array:
        h = without_bias(self.conv1, self.norm1(x, silu=True))
        h = without_bias(self.conv2, self.norm2(h, silu=True, offset=self.conv1.bias))
        return offset_sum(self.nin_shortcut(x) if "nin_shortcut" in self else x, h, self.conv2.bias)


class AttnBlock(nn.Module):
    """Attention of one head among all places, its projections written as 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, groups)
        self.q = conv1x1(channels, channels)
        self.k = conv1x1(channels, channels)
        self.v = conv1x1(channels, channels)
        self.proj_out = conv1x1(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        B, h, w, C = x.shape
        normed = self.norm(x)
        q, k, v = (project(normed).reshape(B, 1, h * w, C) for project in (self.q, self.k, self.v))
        attn = mx.concatenate(
            [
                mx.fast.scaled_dot_product_attention(
                    q[:, :, row : row + QUERY_ROWS], k, v, scale=C**-0.5
                )
                for row in range(0, h * w, QUERY_ROWS)
            ],
            axis=2,
        )
        return x + self.proj_out(attn.reshape(B, h, w, C))


class Downsample(nn.Module):
    """Halves both sides. The picture is padded below and to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Upsample(nn.Module):
    """Doubles both sides: each place four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        B, h, w, C = x.shape
        x = mx.broadcast_to(x[:, :, None, :, None, :], (B, h, 2, w, 2, C))
        return self.conv(x.reshape(B, 2 * h, 2 * w, C))


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next (BFL's `down.i`, `up.i`)."""

    def __init__(self, into: int, out: int, blocks: int, groups: int) -> None:
        super().__init__()
        self.block = [ResnetBlock(into if i == 0 else out, out, groups) for i in range(blocks)]

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.block:
            x = block(x)
            if _in_pieces.get():
                mx.async_eval(x)
        if "downsample" in self:
            x = self.downsample(x)
        if "upsample" in self:
            x = self.upsample(x)
        return x


class Middle(nn.Module):
    """The coarsest resolution, where every place sees every other."""

    def __init__(self, config: ConvSizes) -> None:
        super().__init__()
        channels, groups = config.widths[-1], config.norm_groups
        self.block_1 = ResnetBlock(channels, channels, groups)
        if config.mid_attention:
            self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.block_1(x)
        if "attn_1" in self:
            x = self.attn_1(x)
        return self.block_2(x)


class Encoder(nn.Module):
    """Pictures [B, H, W, 3] to means and log-variances [B, h, w, 2 * z_channels]."""

    def __init__(self, config: ConvSizes) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = conv3x3(config.in_channels, widths[0])
        self.down = []
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, config.num_res_blocks, groups)
            if i < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(config)
        self.norm_out = GroupNorm(widths[-1], groups)
        self.conv_out = conv3x3(widths[-1], 2 * config.z_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x), silu=True))


class Decoder(nn.Module):
    """Latents [B, h, w, z_channels] to pictures [B, H, W, 3]; `up.0` is the finest level."""

    def __init__(self, config: ConvSizes) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        coarsest = len(widths) - 1
        self.conv_in = conv3x3(config.z_channels, widths[-1])
        self.mid = Middle(config)
        self.up = []
        for i, width in enumerate(widths):
            level = Level(widths[min(i + 1, coarsest)], width, config.num_res_blocks + 1, groups)
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = GroupNorm(widths[0], groups)
        self.conv_out = conv3x3(widths[0], config.out_ch)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(self.norm_out(x, silu=True))


class ConvAutoencoder(nn.Module):
    """Both halves, and decoding by tiles; what stands between them is the family's."""

    def __init__(self, config: ConvSizes, decoder: ConvSizes | None = None) -> None:
        """`decoder` has the sizes of that half, where they are others."""
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(decoder or config)

    @property
    def dtype(self) -> mx.Dtype:
        """Of weights and activations."""
        return self.decoder.conv_in.weight.dtype

    @property
    def downsampling(self) -> int:
        """Pixels a latent covers along one side."""
        return 2 ** (len(self.decoder.up) - 1)

    @abstractmethod
    def encode(self, x: mx.array) -> mx.array:
        """Pictures [B, H, W, 3] in [-1, 1] to latents [B, h, w, z_channels] as the transformer's.

        The posterior's mean, in the dtype of the weights. H and W are multiples of `downsampling`.
        """

    @abstractmethod
    def restored(self, z: mx.array) -> mx.array:
        """Latents [B, h, w, z_channels] as the decoder reads them, in the dtype of the weights."""

    def decode(self, z: mx.array) -> mx.array:
        """Latents [B, h, w, z_channels] to pictures [B, H, W, 3]: about [-1, 1], not clipped."""
        return self.decoder(self.restored(z))

    def decode_tiled(self, z: mx.array, tile: int = 128, overlap: int = 32) -> mx.array:
        """As `decode`, but a picture of more than `UNTILED_LATENTS` goes tile by tile.

        `tile` is a tile's side and `overlap` what neighbours share at least, in latents; there
        they are blended linearly. Memory then is that of one tile and the picture. Evaluates as it
        goes. Whether it tiles depends on the picture's size alone.
        """
        B, h, w, _ = z.shape
        if h * w <= UNTILED_LATENTS:
            return self.decode(z)
        z = self.restored(z)
        f = self.downsampling
        picture = mx.zeros(
            (B, h * f, w * f, self.decoder.conv_out.weight.shape[0]), dtype=mx.float32
        )
        for row in tiles(h, tile, overlap):
            for column in tiles(w, tile, overlap):
                part = self.decoder(z[:, row.start : row.stop, column.start : column.stop])
                part = part.astype(mx.float32) * self._blend(row, column)
                place = (
                    slice(None),
                    slice(row.start * f, row.stop * f),
                    slice(column.start * f, column.stop * f),
                )
                picture = picture.at[place].add(part)
                mx.eval(picture)
        return picture.astype(self.dtype)

    def _blend(self, row: Tile, column: Tile) -> mx.array:
        """A tile's share in each pixel, float32 [H, W, 1]; the shares of all tiles sum to 1."""
        f = self.downsampling
        return mx.array(row.share(f)[:, None, None] * column.share(f)[None, :, None])
