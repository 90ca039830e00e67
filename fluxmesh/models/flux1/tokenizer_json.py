"""`tokenizer.json`, the only tokenizer file that today's transformers writes, as the older files.

Below `tokenizers.py`. CLIP's holds what `vocab.json` and `merges.txt` hold; T5's the pieces, their
scores and the table of characters of `spiece.model`. Out of the latter a sentencepiece model is put
together again, so that a vocabulary gives the same ids whichever file it came in. A T5 file whose
rules are not T5's own is left to Hugging Face's `tokenizers`, which reads any. Imports no mlx.

Sources: https://huggingface.co/docs/tokenizers (the file); google/sentencepiece
`src/sentencepiece_model.proto` (the numbers of the fields); protobuf's wire format.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer

from fluxmesh.errors import WeightsError
from fluxmesh.storage.safetensors import read_json

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of a sentencepiece's piece
SPACE = "\u2581"  # what stands for a space in a piece

Merges = dict[tuple[str, str], int]  # rank of each pair of pieces, the one learned first being 0


@dataclass(frozen=True)
class UnigramTable:
    """T5's vocabulary: what makes ids of a text, and the tokens that mean themselves."""

    encode: Callable[[str], list[int]]  # no end token
    special_ids: Mapping[str, int]  # pad, end, unknown and sentinels
    pad_id: int
    end_id: int
    vocab_size: int


def read_clip(path: Path) -> tuple[dict[str, int], Merges]:
    """CLIP's vocabulary and merges. Raises `WeightsError` where the file holds none."""
    values = read_json(path)
    model = values.get("model")
    try:
        assert isinstance(model, dict) and model["type"] == "BPE"
        vocab = {str(token): _id(number) for token, number in model["vocab"].items()}
        vocab |= _added(values)
        merges: Merges = {}
        for merge in model["merges"]:
            first, second = merge.split(" ") if isinstance(merge, str) else merge
            merges[str(first), str(second)] = len(merges)
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{path} is not CLIP's tokenizer (vocabulary and merges of byte-level BPE); download "
            "it again."
        ) from error
    return vocab, merges


def read_t5(path: Path) -> UnigramTable:
    """T5's vocabulary. Raises `WeightsError` where the file holds none."""
    values = read_json(path)
    model = values.get("model")
    try:
        assert isinstance(model, dict) and model["type"] == "Unigram"
        pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
        added = _added(values)
        pad_id, end_id = added.get("<pad>", 0), added["</s>"]
        if _is_t5s_own(values):
            proto = _sentencepiece_model(pieces, model["unk_id"], added, _charsmap(values) or b"")
            encode = _by_sentencepiece(proto)
        else:
            encode = _by_library(path)
    except (
        *(AssertionError, KeyError, TypeError, ValueError, AttributeError),
        *(RuntimeError, OSError, OverflowError),
    ) as error:
        raise WeightsError(
            f"{path} is not T5's tokenizer (a unigram vocabulary); download it again."
        ) from error
    vocab_size = max([len(pieces) - 1, *added.values()]) + 1
    return UnigramTable(encode, added, pad_id, end_id, vocab_size)


def _added(values: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that stand beside the vocabulary, or mean themselves in a text."""
    return {str(token["content"]): _id(token["id"]) for token in values.get("added_tokens") or []}


def _id(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError("an id is a whole number")
    return number


def _steps(part: Any, inner: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if not part:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _is_t5s_own(values: Mapping[str, Any]) -> bool:
    """Whether the rules are those of T5's sentencepiece model.

    Its table of characters; blanks trimmed and folded; words that begin with a mark for the space
    before them.
    """
    for step in _steps(values.get("normalizer"), "normalizers"):
        folds = step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}
        if not folds and step["type"] not in ("Precompiled", "Strip"):
            return False
    marks = 0
    for step in _steps(values.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            is_first = step.get("prepend_scheme", "always") == "always"
            if not is_first or step.get("add_prefix_space") is False:
                return False
            marks += step["replacement"] == SPACE
        elif step["type"] != "WhitespaceSplit":
            return False
    return marks == 1 and not values["model"].get("byte_fallback")


def _charsmap(values: Mapping[str, Any]) -> bytes | None:
    for step in _steps(values.get("normalizer"), "normalizers"):
        if step["type"] == "Precompiled":
            return base64.b64decode(step["precompiled_charsmap"] or "", validate=True)
    return None


def _by_sentencepiece(proto: bytes) -> Callable[[str], list[int]]:
    model = sentencepiece.SentencePieceProcessor(model_proto=proto)

    def encode(text: str) -> list[int]:
        return list(model.encode(text))

    return encode


def _by_library(path: Path) -> Callable[[str], list[int]]:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more exact
        raise ValueError("no tokenizer") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def _sentencepiece_model(
    pieces: list[tuple[str, float]], unknown: int, added: Mapping[str, int], charsmap: bytes
) -> bytes:
    """A sentencepiece model file (protobuf) of these pieces, in order."""
    out = b""
    for number, (piece, score) in enumerate(pieces):
        kind = UNKNOWN if number == unknown else CONTROL if piece in added else NORMAL
        out += _bytes_field(
            1,
            _bytes_field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind),
        )
    trainer = _number(3, 1) + _number(40, unknown)  # unigram; the unknown piece
    return out + _bytes_field(2, trainer) + _bytes_field(3, _bytes_field(2, charsmap))


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
