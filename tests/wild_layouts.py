"""The embedded checkpoint in the layouts that people have, each rewritten from its own folder.

Same numbers, other names and files, so that each must paint the same picture. Nothing is fetched;
what a test needs it writes into its own folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from fluxmesh.models.flux1.family import FLUX1
from fluxmesh.models.flux1.files.mflux_names import LEFT_OUT, in_mflux_folder
from fluxmesh.models.numpy_bits import to_numpy
from fluxmesh.storage import bfloat16
from fluxmesh.storage.safetensors import read_header, read_tensor, write_tensors
from fluxmesh.weights.checkpoint import from_folder
from fluxmesh.weights.hub import tiny_folder
from fluxmesh.weights.reader import ComponentReader, table_of

Stored = dict[str, tuple[np.ndarray, str]]  # arrays with the file's name for their dtype

CLIP_L = "text_encoders.clip_l.transformer.text_model."
T5XXL = "text_encoders.t5xxl.transformer."


def original(folder: Path) -> Path:
    """A copy of the embedded checkpoint's folder."""
    return Path(shutil.copytree(tiny_folder(), folder))


def bfl_arrays(component: str) -> Stored:
    """A component by the model's own names, which are BFL's, in the dtype that it is stored in."""
    reader = ComponentReader(from_folder(tiny_folder(), "tiny"), component)
    stored = ((name, reader.rows(name)) for name in reader.targets)
    return {name: (rows.values, rows.dtype) for name, rows in stored}


def transformers_arrays(component: str) -> Stored:
    """A text encoder as its file has it."""
    entries = read_header(tiny_folder() / component / "model.safetensors").entries
    return {key: (read_tensor(entry), entry.dtype) for key, entry in entries.items()}


def behind(prefix: str, arrays: Stored) -> Stored:
    """The same under longer names."""
    return {prefix + name: array for name, array in arrays.items()}


def write(path: Path, arrays: Stored, metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, arrays, metadata or {"format": "pt"})
    return path


def side_by_side(folder: Path, suffix: str = ".safetensors") -> Path:
    """BFL's and ComfyUI's files in one folder; the transformer's path."""
    write(folder / f"ae{suffix}", bfl_arrays("vae"))
    write(folder / f"clip_l{suffix}", transformers_arrays("text_encoder"))
    write(folder / f"t5xxl_fp16{suffix}", transformers_arrays("text_encoder_2"))
    return write(folder / f"flux1-tiny{suffix}", bfl_arrays("transformer"))


def comfy_folders(
    models: Path, transformers: str = "diffusion_models", encoders: str = "text_encoders"
) -> Path:
    """ComfyUI's `models`, by either name of its folders; the transformer's path."""
    write(models / "vae" / "FLUX1" / "ae.safetensors", bfl_arrays("vae"))
    write(models / encoders / "clip_l.safetensors", transformers_arrays("text_encoder"))
    write(models / encoders / "t5" / "t5xxl.safetensors", transformers_arrays("text_encoder_2"))
    arrays = behind("model.diffusion_model.", bfl_arrays("transformer"))
    return write(models / transformers / "flux" / "flux1-tiny.safetensors", arrays)


def all_in_one(path: Path) -> Path:
    """One file with all four models under ComfyUI's names."""
    clip = transformers_arrays("text_encoder")
    bare = {name.removeprefix("text_model."): array for name, array in clip.items()}
    arrays = behind("model.diffusion_model.", bfl_arrays("transformer"))
    arrays |= behind(CLIP_L, bare)
    arrays |= {"text_encoders.clip_l.logit_scale": (np.ones((), np.float32), "F32")}
    arrays |= behind(T5XXL, transformers_arrays("text_encoder_2"))
    return write(path, arrays | behind("vae.", bfl_arrays("vae")))


def variant(folder: Path, name: str = "fp16", shards: int = 1) -> Path:
    """A folder whose weights are a variant, the transformer's in shards with an index."""
    original(folder)
    for component in FLUX1.folder.components:
        (file,) = (folder / component).glob("*.safetensors")
        if component == "transformer" and shards > 1:
            split(file, name, shards)
        else:
            file.rename(file.with_name(f"{file.stem}.{name}.safetensors"))
    return folder


def split(file: Path, variant_name: str, shards: int, late: bool = False) -> None:
    """Splits a file as diffusers does: `late` is how its earlier versions named a variant."""
    entries = read_header(file).entries
    arrays = {key: (read_tensor(entry), entry.dtype) for key, entry in entries.items()}
    weight_map = {}
    for i in range(shards):
        number = f"-{i + 1:05}-of-{shards:05}"
        middle = f"{number}.{variant_name}" if late else f".{variant_name}{number}"
        shard = file.with_name(f"{file.stem}{middle}.safetensors")
        part = dict(list(arrays.items())[i::shards])
        write(shard, part)
        weight_map |= dict.fromkeys(part, shard.name)
    file.unlink()
    index = file.with_name(f"{file.stem}.safetensors.index.{variant_name}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_tokenizer_json(folder: Path) -> Path:
    """A folder whose tokenizers are as transformers 5 writes them: `tokenizer.json` alone."""
    original(folder)
    clip, t5 = folder / "tokenizer", folder / "tokenizer_2"
    clip_tokenizer_json(clip).save(str(clip / "tokenizer.json"))
    t5_tokenizer_json(t5 / "spiece.model").save(str(t5 / "tokenizer.json"))
    for file in (clip / "vocab.json", clip / "merges.txt", t5 / "spiece.model"):
        file.unlink()
    return folder


def clip_tokenizer_json(folder: Path) -> Tokenizer:
    """CLIP's rules with the vocabulary of a folder, as a library's object."""
    model = models.BPE.from_file(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token="<|endoftext|>",
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def t5_tokenizer_json(spiece: Path, sentinels: int = 0) -> Tokenizer:
    """T5's rules with the pieces of a sentencepiece model, as a library's object."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    tokenizer = Tokenizer(models.Unigram(vocab, pieces.unk_id(), False))
    charsmap = field(field(spiece.read_bytes(), 3), 2)
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always"),
        ]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    names = [f"<extra_id_{i}>" for i in reversed(range(sentinels))]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def field(message: bytes, number: int) -> bytes:
    """The last value of a protobuf message's field that holds bytes; b"" where it is not there."""
    value, offset = b"", 0

    def varint() -> int:
        nonlocal offset
        out = shift = 0
        while True:
            byte = message[offset]
            offset += 1
            out |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return out

    while offset < len(message):
        key = varint()
        length = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if length == 0:
            varint()
            continue
        length = varint() if length is None else length
        if key >> 3 == number:
            value = message[offset : offset + length]
        offset += length
    return value


def mflux(folder: Path, bits: int | None = None) -> Path:
    """As `mflux-save` writes it: numbered files, its own names, channels last, no config.

    With `bits`, every matrix that divides into groups of 64 is quantized, embeddings too. The bias
    of the last modulation, which mflux loses, is kept where nothing is quantized, for the picture
    to be the same.
    """
    tiny = from_folder(tiny_folder(), "tiny")
    for component in FLUX1.folder.components:
        (file,) = (tiny_folder() / component).glob("*.safetensors")
        entries = read_header(file).entries
        renamed = in_mflux_folder(component, table_of(tiny, component))
        names = {
            old.key: new.key
            for name, target in table_of(tiny, component).items()
            for old, new in zip(target.pieces, renamed[name].pieces, strict=True)
        }
        arrays: Stored = {}
        for key, entry in entries.items():
            bare = key.removeprefix("text_model.")
            name = names.get(bare, bare)
            values = read_tensor(entry)
            if values.ndim == 4:
                values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
            if bits and key in LEFT_OUT:
                continue
            name = f"text_model.{name}" if component == "text_encoder" else name
            if bits and values.ndim == 2 and values.shape[1] % 64 == 0:
                arrays |= quantized(name.removesuffix(".weight"), values, bits)
            else:
                arrays[name] = (values, entry.dtype)
        metadata = {"quantization_level": str(bits), "mflux_version": "0.18.0"}
        halves = list(arrays.items())
        middle = len(halves) // 2
        weight_map: dict[str, str] = {}
        for number, part in enumerate((halves[:middle], halves[middle:])):
            write(folder / component / f"{number}.safetensors", dict(part), metadata)
            weight_map |= dict.fromkeys(dict(part), f"{number}.safetensors")
        index = folder / component / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    for tokenizer in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny_folder() / tokenizer, folder / tokenizer)
    return folder


def quantized(module: str, bits_of_bfloat16: np.ndarray, bits: int) -> Stored:
    """A matrix as MLX quantizes it: `weight`, `scales` and `biases`."""
    matrix = mx.array(bfloat16.to_float32(bits_of_bfloat16)).astype(mx.bfloat16)
    packed = mx.quantize(matrix, group_size=64, bits=bits)
    leaves = zip(("weight", "scales", "biases"), packed, ("U32", "BF16", "BF16"), strict=True)
    return {f"{module}.{leaf}": (to_numpy(array), dtype) for leaf, array, dtype in leaves}


Layout = Callable[[Path], Path]
# Each writes a layout into a new folder and gives what a user would name.
LAYOUTS: dict[str, Layout] = {
    "tokenizer.json alone": with_tokenizer_json,
    "a variant": variant,
    "a variant in shards": lambda folder: variant(folder, "bf16", 3),
    "files side by side": side_by_side,
    "files called .sft": lambda folder: side_by_side(folder, ".sft"),
    "the folder of files": lambda folder: side_by_side(folder).parent,
    "ComfyUI's folders": comfy_folders,
    "ComfyUI's older folders": lambda folder: comfy_folders(folder, "unet", "clip"),
    "ComfyUI's models": lambda folder: comfy_folders(folder).parents[2],
    "ComfyUI itself": lambda folder: comfy_folders(folder / "models").parents[3],
    "saved by mflux": mflux,
    "all in one file": lambda folder: all_in_one(folder / "flux1-tiny-all.safetensors"),
}
