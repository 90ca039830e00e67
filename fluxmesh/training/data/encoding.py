"""Pictures and captions as the transformer reads them: encoded once, kept on disk.

Every crop and every caption is a unit of work of its own (`pending`), so that the hosts of a mesh
can share them; `features` then only reads. The autoencoder's answer is the posterior's mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from fluxmesh.engine.stages import PipelineStages
from fluxmesh.errors import FluxmeshError
from fluxmesh.models.numpy_bits import from_numpy, to_numpy
from fluxmesh.models.runtime import PromptFeatures
from fluxmesh.request import SourceImage
from fluxmesh.sampling.conditioning import PromptMemory
from fluxmesh.storage import bfloat16
from fluxmesh.training.data.bucketing import Size
from fluxmesh.training.data.dataset import Example
from fluxmesh.training.data.encode_units import Caption, Crop, EncoderIdentity, Unit, Units
from fluxmesh.training.data.feature_cache import Arrays, FeatureCache

__all__ = ["Caption", "Crop", "DatasetEncoder", "Unit"]


class DatasetEncoder:
    """Latents and text features of a data set, by way of the cache."""

    def __init__(
        self,
        pipeline: PipelineStages,
        cache: FeatureCache,
        examples: Sequence[Example],
        sizes: Sequence[Size],
        seed: int,
    ) -> None:
        """`sizes` is the size that each example is trained at, in pixels."""
        self.pipeline = pipeline
        self.cache = cache
        self.units = Units(examples, sizes, seed)
        self._texts = PromptMemory(64)

    # What there is to do

    def key(self, unit: Unit) -> str:
        """The name of a unit's features in the cache: a hash of all that they depend on."""
        pipeline = self.pipeline
        reader = EncoderIdentity(
            pipeline.checkpoint.revision,
            str(pipeline.dtype).rpartition(".")[2],
            pipeline.checkpoint.text_bits or pipeline.checkpoint.bits or pipeline.bits,
            str(mx.default_device().type).rpartition(".")[2],
            pipeline.t5_padding,
        )
        return self.units.key(unit, reader)

    def pending(self, units: Sequence[Unit]) -> list[Unit]:
        """Those of `units` that the cache lacks, each once."""
        return [unit for unit in dict.fromkeys(units) if not self.cache.has(self.key(unit))]

    def store(self, unit: Unit) -> None:
        """Encodes a unit into the cache. Raises `OutputError` for a full disk."""
        self.cache.put(self.key(unit), self.compute(unit))

    def release(self) -> None:
        """Lets the models that encode leave memory."""
        self.pipeline.reload_text_encoders()
        del self.pipeline.ae

    def compute(self, unit: Unit) -> Arrays:
        """A unit's features, computed here; as the cache stores them and a mesh sends them."""
        if isinstance(unit, Caption):
            known = self.pipeline.encode(unit.text)
            return {name: _stored(array) for name, array in known.items()}
        source = self.pipeline.encode_source(SourceImage(self.units.pixels(unit)))
        return {"latents": _stored(source.clean)}

    # What the training reads

    def text(self, caption: str) -> PromptFeatures:
        """A caption's features, [1, T, context_in_dim] and [1, vec_in_dim]."""
        known = self._texts.get(caption, True)
        if known is None:
            arrays = self._read(Caption(caption))
            known = {name: from_numpy(array) for name, (array, _) in arrays.items()}
            self._texts.put(caption, True, known)
        return known

    def latents(self, image: int, crop: int) -> mx.array:
        """A crop's latents, packed float32 [1, L, 4C]."""
        return from_numpy(self._read(Crop(image, crop))["latents"][0])

    def _read(self, unit: Unit) -> Arrays:
        arrays = self.cache.get(self.key(unit))
        if arrays is None:
            raise FluxmeshError(
                f"{self.cache.path(self.key(unit))} is missing or damaged, although it was "
                "written; start again with `resume`."
            )
        return arrays


def _stored(array: mx.array) -> tuple[np.ndarray, str]:
    """An array as the cache takes it, with its dtype's name; evaluates."""
    bits = to_numpy(array if array.dtype == mx.bfloat16 else array.astype(mx.float32))
    return bits, bfloat16.kind(bits)
