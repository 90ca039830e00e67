"""The models of a checkpoint as attributes that load when first used and leave with `del`.

`Models` finds the checkpoint, checks its files and knows how each part loads (dtype, bits,
adapters); `PipelineStages` (`stages.py`) is built on it and only computes. The text encoder and the
transformer are the two large ones: in bfloat16 FLUX.1's take 9.5 and 23.8 GB, so that it matters
which is resident when.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

import mlx.core as mx

from fluxmesh.adapters import lora
from fluxmesh.adapters.find import find_adapter
from fluxmesh.adapters.reading import adapted
from fluxmesh.adapters.targets import targets_of
from fluxmesh.engine import tf32
from fluxmesh.errors import UsageError
from fluxmesh.events import Loading
from fluxmesh.models.base import Part
from fluxmesh.models.partition import Shard
from fluxmesh.models.registry import runtime_of
from fluxmesh.models.runtime import Runtime
from fluxmesh.request import BITS, DTYPES, AdapterRef
from fluxmesh.sampling.takes import with_reader
from fluxmesh.weights import hub, loading
from fluxmesh.weights.checkpoint import Checkpoint

M = TypeVar("M")
MODELS = {"flow": "denoiser", "ae": "autoencoder"}  # their components


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
        text_bits: int | None = None,
        adapters: Iterable[AdapterRef | str | tuple[str, float]] = (),
        fuse_adapters: bool = False,
        download: bool = True,
        on_loading: Callable[[Loading], None] | None = None,
    ) -> None:
        """Options as in `FluxPipeline`. Reads headers only.

        Raises `ModelNotFoundError`, `WeightsError`, `AdapterError` or `UsageError`.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}.")
        for option, number in (("bits", bits), ("text_bits", text_bits)):
            if number is not None and number not in BITS:
                raise UsageError(f"{option} is {number}; choose 3, 4, 5, 6 or 8.")
        tf32.require(dtype)
        self.name = name
        self.downloads = download
        self.dtype: mx.Dtype = getattr(mx, dtype)
        # A text encoder's numbers and the autoencoder's go far beyond float16, and they run once a
        # prompt or picture: float16 is for the steps.
        self.dtype_beside = mx.bfloat16 if self.dtype == mx.float16 else self.dtype
        self.bits = bits
        self.text_bits = text_bits  # of text encoders that come from now on; None is as `bits`
        self.adapters = AdapterRef.all_of(adapters)
        self.fuse_adapters = fuse_adapters
        self.on_loading = on_loading
        self.shard = Shard()  # what `flow` loads: set it while there is none
        self.low_memory = False  # whether `flow` is loaded without its modulation
        self.t5_padding = True  # whether prompts are padded to the checkpoint's own length
        self.by_layers = False  # whether text encoders are read one layer at a time, and none stays
        self.checkpoint = hub.resolve(name, download=download, progress=self._tell_download)
        self.stamps = self.checkpoint.stamps  # before anything is read of the files
        loading.verify(self.checkpoint)
        self._opened: lora.Opened = ()
        self._bytes: dict[str, int] = {}  # of the files of each component, as it loads
        if self.adapters:
            targets = targets_of(self.checkpoint.architecture)
            fetch = functools.partial(find_adapter, download=download, progress=self._tell_download)
            pairs = [(fetch(adapter.path), adapter.scale) for adapter in self.adapters]
            self._opened = lora.open_adapters(pairs, targets)
        # What the model is with its adapters: one that widens the input brings a condition.
        files = [file for file, _ in self._opened]
        self.architecture = adapted(self.checkpoint.architecture, files)
        self.runtime: Runtime = runtime_of(self.architecture)
        self.reader: Checkpoint | None = None  # of references, where the model reads none by itself
        self._alone = self.architecture  # what the model is without it
        self._reader_name: str | None = None

    def read_references_with(self, name: str) -> None:
        """Has references read by the models that `name` means, "" being the family's own, where
        the model reads none by itself; those that are there of another name leave.

        So do those whose files are others by now. Reads headers alone. Raises as
        `takes.with_reader`, and `WeightsError` for broken files.
        """
        reading = with_reader(
            self._alone, self.name, name, download=self.downloads, progress=self._tell_download
        )
        if name == self._reader_name and reading.reader == self.reader:
            return
        if reading.reader is not None:
            loading.verify(reading.reader)
        del self.vision
        self.reader, self.architecture = reading.reader, reading.architecture
        self.runtime, self._reader_name = runtime_of(self.architecture), name

    def __getattr__(self, name: str) -> Any:
        """A text encoder, by its family's name (`Runtime.text_models`), when it is first read."""
        runtime = self.__dict__.get("runtime")
        if runtime is None or name not in runtime.text_models:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._same_files():
            model = loading.load_text_encoder(
                self.checkpoint,
                name,
                self.dtype_beside,
                self.bits,
                self._tell("text encoders", name),
                self.text_bits,
            )
            folder = self.checkpoint.architecture.folder(name)
            model = self._adapted(model, folder, self.dtype_beside)
        self.__dict__[name] = model
        return model

    def __delattr__(self, name: str) -> None:
        """Lets a text encoder leave memory; not an error when it is not there."""
        if name not in self.runtime.text_models:
            super().__delattr__(name)
        elif self.__dict__.pop(name, None) is not None:
            mx.clear_cache()

    def text_model(self, name: str) -> Any:
        """A text encoder, loaded if need be; with `by_layers` one that never is as a whole."""
        layers = self.checkpoint.architecture.text_layers(name)
        if not (self.by_layers and layers) or self.is_loaded(name):
            return getattr(self, name)
        tell = self._tell("text encoders", name)
        bits = (self.bits, tell, self.text_bits)
        return loading.text_layers(self.checkpoint, name, self.dtype_beside, *bits)

    @property
    def reads_by_layers(self) -> bool:
        """Whether no text encoder has to be in memory as a whole."""
        model = self.checkpoint.architecture
        return self.by_layers and all(map(model.text_layers, self.runtime.text_models))

    def text_files(self, name: str) -> tuple[Path, ...]:
        """The files of a text encoder, for rows that are looked up where they lie."""
        return self.checkpoint.components[self.checkpoint.architecture.folder(name)].files

    @Lazy
    def flow(self) -> Any:
        """The transformer, with the adapters applied."""
        return self._transformer("blocks" if self.low_memory else "all")

    @Lazy
    def modulation(self) -> Any:
        """As much of the transformer as `modulations` needs: a quarter, for `low_memory`."""
        return self._transformer("modulation")

    @Lazy
    def ae(self) -> Any:
        """The autoencoder: latents to pictures and back."""
        with self._same_files():
            return loading.load_autoencoder(
                self.checkpoint, self.dtype_beside, self._tell("autoencoder", "ae")
            )

    @Lazy
    def vision(self) -> dict[str, Any]:
        """What reads references for the model, by component: none where it does so by itself."""
        if self.reader is None:
            return {}
        return loading.load_vision(
            self.reader, self.dtype_beside, self._tell("picture reader", "vision")
        )

    @Lazy
    def tokenizers(self) -> Any:
        """The family's tokenizers (`Runtime.load_tokenizers`)."""
        with self._same_files():
            return loading.load_tokenizers(self.checkpoint)

    def ensure_models_are_loaded(self) -> None:
        """Loads all models now, instead of when each is first used."""
        for name in (*self.runtime.text_models, "flow", "ae"):
            getattr(self, name)

    def reload_text_encoders(self) -> None:
        """Lets them leave memory, and what reads references with them; they load again when an
        unseen prompt needs them."""
        for name in self.runtime.text_models:
            delattr(self, name)
        del self.vision

    def is_loaded(self, name: str) -> bool:
        """Whether `flow`, `ae`, `vision` or a text encoder is in memory."""
        return name in self.__dict__

    def file_bytes(self, *names: str) -> int:
        """Bytes that loading `flow`, `ae`, `vision` or text encoders reads, all together."""
        for name in names:
            if name == "vision" and self.reader is not None:
                self._bytes[name] = sum(
                    loading.bytes_to_load(self.reader, part.name)
                    for part in self.reader.architecture.of_role("vision")
                )
            elif name not in self._bytes:
                component = MODELS.get(name, name)
                self._bytes[name] = loading.bytes_to_load(self.checkpoint, component)
        return sum(self._bytes[name] for name in names)

    @property
    def adapter_notes(self) -> list[str]:
        """Sentences: what of the adapters is left out."""
        return [note for file, _ in self._opened for note in file.notes]

    def _adapted(self, model: Any, folder: str, dtype: mx.Dtype, **part: Any) -> Any:
        """A model with what the adapters have for it; `part` as of `lora.apply_to`."""
        if self._opened:
            weight_of = functools.partial(loading.whole_weight, self.checkpoint, folder)
            how = (self._opened, dtype, self.fuse_adapters)
            lora.apply_to(model, folder, *how, weight_of=weight_of, **part)
        return model

    def _transformer(self, part: Part) -> Any:
        tell = self._tell("transformer", "flow", goes_on=part == "blocks")
        how = (self.dtype, self.bits, tell, self.shard, part)
        with self._same_files():
            flow = loading.load_transformer(self.checkpoint, *how)
            if self.architecture != self.checkpoint.architecture:
                flow.take_inputs(self.architecture.transformer)
            return self._adapted(
                flow,
                self.checkpoint.architecture.folder("denoiser"),
                self.dtype,
                wanted=functools.partial(self.runtime.is_part, part),
                shard_cuts=self.checkpoint.architecture.partition.cuts(self.shard),
            )

    @contextmanager
    def _same_files(self) -> Iterator[None]:
        """What is read meanwhile belongs to what was read before. Raises `WeightsError`."""
        self.checkpoint.check_files()
        yield
        self.checkpoint.check_files()

    def _tell_download(self, done: int, total: int) -> None:
        if self.on_loading is not None:
            self.on_loading(Loading("download", done, total))

    def _tell(
        self, component: str, name: str, *, goes_on: bool = False
    ) -> Callable[[int, int], None] | None:
        """A listener for the bytes of model `name`, as the loaders want it.

        All text encoders are one `component`; `goes_on`: an earlier part of this one was loaded
        before.
        """
        listen = self.on_loading
        if listen is None:
            return None
        texts = self.runtime.text_models
        models = texts if name in texts else (name,)
        done_before = self.file_bytes(*models[: models.index(name)])
        total = self.file_bytes(*models)

        def tell(done: int, all_of_it: int) -> None:
            earlier = max(0, self.file_bytes(name) - all_of_it) if goes_on else 0
            listen(Loading(component, done_before + earlier + done, total))

        return tell
