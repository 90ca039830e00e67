"""The four models of a checkpoint as attributes that load when first used and leave with `del`.

`Models` finds the checkpoint, checks its files and knows how each part loads (dtype, bits,
adapters); `FluxPipeline` (`pipeline.py`) is built on it and only computes. T5 and the transformer
are the two large ones: in bfloat16 FLUX's take 9.5 and 23.8 GB, so that it matters which is
resident when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, Self, TypeVar, overload

import mlx.core as mx

from fluxmesh.adapters import lora
from fluxmesh.engine import tf32
from fluxmesh.errors import UsageError
from fluxmesh.events import Loading
from fluxmesh.models.flux1.autoencoder import AutoEncoder
from fluxmesh.models.flux1.clip import ClipTextModel
from fluxmesh.models.flux1.t5 import T5Encoder
from fluxmesh.models.flux1.tokenizers import ClipTokenizer, T5Tokenizer
from fluxmesh.models.flux1.transformer import Flux, Part
from fluxmesh.models.partition import Shard
from fluxmesh.request import BITS, DTYPES, AdapterRef
from fluxmesh.weights import hub, loading

M = TypeVar("M")
FOLDERS = {"flow": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "ae": "vae"}


class Lazy(Generic[M]):
    """An attribute that is made when it is first read, and leaves memory with `del`."""

    def __init__(self, make: Callable[[Any], M]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, models: None, owner: type) -> Self: ...

    @overload
    def __get__(self, models: object, owner: type) -> M: ...

    def __get__(self, models: object | None, owner: type) -> M | Self:
        if models is None:
            return self
        if self.name not in models.__dict__:
            models.__dict__[self.name] = self.make(models)
        model: M = models.__dict__[self.name]
        return model

    def __set__(self, models: object, model: M) -> None:
        models.__dict__[self.name] = model

    def __delete__(self, models: object) -> None:
        # Not an error when it is not there: it may never have been needed.
        if models.__dict__.pop(self.name, None) is not None:
            mx.clear_cache()


class Models:
    """A checkpoint by name, its models loaded as they are used."""

    def __init__(
        self,
        name: str,
        *,
        dtype: str = "bfloat16",
        bits: int | None = None,
        adapters: Iterable[AdapterRef | str] = (),
        fuse_adapters: bool = False,
        download: bool = True,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        """Options as in `FluxPipeline`. Reads headers only; raises what a wrong one deserves."""
        if dtype not in DTYPES:
            raise UsageError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
        if bits is not None and bits not in BITS:
            raise UsageError(f"bits is {bits}; choose 3, 4, 5, 6 or 8.")
        tf32.require(dtype)
        self.name = name
        self.dtype: mx.Dtype = getattr(mx, dtype)
        # T5's tokens and the autoencoder's go far beyond float16, and run once a prompt or picture:
        # float16 is for the steps.
        self.dtype_beside = mx.bfloat16 if self.dtype == mx.float16 else self.dtype
        self.bits = bits
        self.adapters = tuple(
            AdapterRef(adapter) if isinstance(adapter, str) else adapter for adapter in adapters
        )
        self.fuse_adapters = fuse_adapters
        self.on_loading = on_loading
        self.shard = Shard()  # what `flow` loads: set it while there is none
        self.low_memory = False  # whether `flow` is loaded without its modulation
        self.checkpoint = hub.resolve(name, download=download, progress=self._tell_download)
        loading.verify(self.checkpoint)
        if self.adapters:
            lora.check_adapters(self._adapter_pairs(), self.checkpoint.transformer)

    @Lazy
    def t5(self) -> T5Encoder:
        """The T5 encoder: a prompt's features, one vector a token."""
        tell = self._tell("text encoders", "t5", before="clip")
        return loading.load_t5(self.checkpoint, self.dtype_beside, self.bits, tell)

    @Lazy
    def clip(self) -> ClipTextModel:
        """The CLIP text encoder: a prompt's pooled vector."""
        tell = self._tell("text encoders", "clip", after="t5")
        return loading.load_clip(self.checkpoint, self.dtype_beside, self.bits, tell)

    @Lazy
    def flow(self) -> Flux:
        """The transformer, with the adapters applied."""
        return self._transformer("blocks" if self.low_memory else "all")

    @Lazy
    def modulation(self) -> Flux:
        """As much of the transformer as `modulations` needs: a quarter, for `low_memory`."""
        return self._transformer("modulation")

    @Lazy
    def ae(self) -> AutoEncoder:
        """The autoencoder: latents to pictures and back."""
        return loading.load_autoencoder(
            self.checkpoint, self.dtype_beside, self._tell("autoencoder", "ae")
        )

    @Lazy
    def tokenizers(self) -> tuple[ClipTokenizer, T5Tokenizer]:
        """(CLIP's tokenizer, T5's tokenizer)."""
        return loading.load_tokenizers(self.checkpoint)

    def ensure_models_are_loaded(self) -> None:
        """Loads all four models now, instead of when each is first used."""
        for name in FOLDERS:
            getattr(self, name)

    def reload_text_encoders(self) -> None:
        """Lets T5 and CLIP leave memory; they load again when an unseen prompt needs them."""
        del self.t5
        del self.clip

    def is_loaded(self, name: str) -> bool:
        """Whether `t5`, `clip`, `flow` or `ae` is in memory."""
        return name in self.__dict__

    def file_bytes(self, *names: str) -> int:
        """Bytes of the files of `t5`, `clip`, `flow` or `ae` together."""
        return sum(self.checkpoint.components[FOLDERS[name]].nbytes for name in names)

    def _transformer(self, part: Part) -> Flux:
        tell = self._tell("transformer", "flow", goes_on=part == "blocks")
        how = (self.dtype, self.bits, tell, self.shard, part)
        flow = loading.load_transformer(self.checkpoint, *how)
        if self.adapters:
            lora.apply_adapters(flow, self._adapter_pairs(), self.fuse_adapters, part)
        return flow

    def _adapter_pairs(self) -> list[tuple[str, float]]:
        return [(adapter.path, adapter.scale) for adapter in self.adapters]

    def _tell_download(self, done: int, total: int) -> None:
        if self.on_loading is not None:
            self.on_loading(Loading("download", done, total))

    def _tell(
        self, component: str, name: str, *, before: str = "", after: str = "", goes_on: bool = False
    ) -> Callable[[int, int], None] | None:
        """A listener for the bytes of model `name`, as the loaders want it.

        `before` and `after` name the model that loads earlier or later as part of `component`;
        `goes_on`: an earlier part of this one was loaded before.
        """
        listen = self.on_loading
        if listen is None:
            return None
        done_before = self.file_bytes(before) if before else 0
        total = done_before + self.file_bytes(name) + (self.file_bytes(after) if after else 0)

        def tell(done: int, all_of_it: int) -> None:
            earlier = max(0, self.file_bytes(name) - all_of_it) if goes_on else 0
            listen(Loading(component, done_before + earlier + done, total))

        return tell
