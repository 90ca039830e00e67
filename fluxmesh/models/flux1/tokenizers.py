"""Prompts to token ids: byte-level BPE for CLIP, unigram pieces for T5. Imports no mlx.

First in `stages.py`. Both give what transformers 5 gives for the same files (which, unlike its
earlier versions, neither unescapes HTML nor repairs Unicode for CLIP). A vocabulary lies in files
of its own, or whole in a `tokenizer.json` (`tokenizer_json.py`); the former go first.

Sources: byte-level BPE, Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners", section 2.2, and openai/CLIP `clip/simple_tokenizer.py`; unigram pieces, Kudo 2018
(https://arxiv.org/abs/1804.10959), by Google's sentencepiece.
"""

from __future__ import annotations

import heapq
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import regex
import sentencepiece

from fluxmesh.errors import WeightsError
from fluxmesh.models.flux1 import tokenizer_json
from fluxmesh.models.flux1.files.vocabularies import CLIP_FILES, T5_FILES
from fluxmesh.models.flux1.tokenizer_json import UnigramTable
from fluxmesh.request import PromptCut, cut_of
from fluxmesh.storage.safetensors import read_json

START = "<|startoftext|>"
END = "<|endoftext|>"
END_OF_WORD = "</w>"

# What CLIP calls a word: an English ending, letters, one digit, or a run of other signs.
CLIP_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
)
# Byte-level BPE cuts each of them once more, by GPT-2's rule. It changes the two markers only,
# where a prompt spells one in capitals (spelled exactly, a marker never comes this far).
GPT2_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+")
WHITESPACE = regex.compile(r"\s+")


class ClipTokenizer:
    """CLIP's tokenizer: a start token, the prompt, an end token, and padding after it."""

    def __init__(
        self,
        vocab: Path | str,
        merges: Path | str | None,
        max_length: int = 77,
        pad_token: str = END,
    ) -> None:
        """Reads `vocab.json` and `merges.txt`; `max_length` counts the two markers.

        Without `merges`, `vocab` is a `tokenizer.json`, which holds both. Raises `WeightsError`
        where a file is not what it should be.
        """
        self.max_length = max_length
        if merges is None:
            self.vocab, self.ranks = tokenizer_json.read_clip(Path(vocab))
        else:
            self.vocab, self.ranks = _read_vocab(Path(vocab)), _read_merges(Path(merges))
        missing = [token for token in (START, END, pad_token) if token not in self.vocab]
        if missing:
            raise WeightsError(
                f"{vocab} lacks the token {missing[0]}; it is not CLIP's vocabulary."
            )
        if merges is not None:
            _check_merges(Path(merges), self.vocab, self.ranks)
        self.start_id = self.vocab[START]
        self.end_id = self.vocab[END]
        self.pad_id = self.vocab[pad_token]
        self.vocab_size = max(self.vocab.values()) + 1
        self._markers = _splitter({START, END, pad_token})

    @classmethod
    def from_folder(cls, folder: Path, limit: int = 4096) -> Self:
        """Reads `tokenizer/` of a diffusers folder, or any folder with CLIP's files.

        Length and pad token are those of `tokenizer_config.json`, else those of OpenAI's CLIP;
        the length is `limit` at most (how many positions the model has).
        """
        config = _read_config(folder)
        length, pad_token = config.get("model_max_length"), config.get("pad_token")
        if isinstance(pad_token, dict):  # written by older versions of transformers
            pad_token = pad_token.get("content")
        vocab, *merges = files_in(folder, CLIP_FILES) or CLIP_FILES[0]
        return cls(
            folder / vocab,
            folder / merges[0] if merges else None,
            max_length=min(length if isinstance(length, int) and 2 < length <= 4096 else 77, limit),
            pad_token=pad_token if pad_token and isinstance(pad_token, str) else END,
        )

    def encode(self, text: str, pad: bool = True) -> list[int]:
        """At most `max_length` ids, exactly as many with `pad`; the end token is always there."""
        ids = [self.start_id, *self._ids(text)[: self.max_length - 2], self.end_id]
        return _padded(ids, self.max_length, self.pad_id) if pad else ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._markers.split(text)):
            if i % 2:  # a marker spelled out in the prompt means itself
                ids.append(self.vocab[part])
            else:
                for word in _clip_words(part):
                    ids += self._pieces(word)
        return ids

    def _pieces(self, word: str) -> list[int]:
        """Merges neighbouring pieces of a word, the merge learned first coming first.

        The pieces form a linked list and the merges that are possible wait in a heap, so that a
        "word" of thousands of letters, as in Chinese, takes n log n steps.
        """
        pieces = [BYTE_LETTERS[byte] for byte in word.encode("utf-8")]
        pieces[-1] += END_OF_WORD
        pieces = [piece if piece in self.vocab else END for piece in pieces]  # END says unknown too
        after = [*range(1, len(pieces)), -1]
        before = [*range(-1, len(pieces) - 1)]
        heap: list[tuple[int, int, str, str]] = []

        def offer(left: int) -> None:
            pair = (pieces[left], pieces[after[left]])
            rank = self.ranks.get(pair)
            if rank is not None:
                heapq.heappush(heap, (rank, left, *pair))

        for left in range(len(pieces) - 1):
            offer(left)
        while heap:
            _, left, first, second = heapq.heappop(heap)
            right = after[left]
            if pieces[left] != first or right == -1 or pieces[right] != second:
                continue  # a merge since then has taken one of the two
            pieces[left], pieces[right] = first + second, ""
            after[left] = after[right]
            if after[left] != -1:
                before[after[left]] = left
                offer(left)
            if before[left] != -1:
                offer(before[left])
        return [self.vocab.get(piece, self.end_id) for piece in pieces if piece]


class T5Tokenizer:
    """T5's tokenizer: the prompt, an end token, and padding after it.

    Two differences to transformers 5 are known, where it is here as in the sentencepiece that T5
    was trained with: after a letter that the normalizer replaces ("²") a combining accent stays;
    and what only the normalizer makes a special token of, such as "＜/s＞" in full width, is text.
    """

    def __init__(self, model: Path | str, max_length: int, extra_ids: int = 0) -> None:
        """Reads `spiece.model` or a `tokenizer.json`; `max_length` counts the end token.

        `extra_ids` (of `tokenizer_config.json`) is how many sentinels, `<extra_id_0>` and so on,
        the vocabulary has after its pieces, counting backwards; a `tokenizer.json` says so itself.
        Raises `WeightsError` where the file is not T5's vocabulary.
        """
        self.max_length = max_length
        if Path(model).suffix == ".json":
            table = tokenizer_json.read_t5(Path(model))
        else:
            table = _read_sentencepiece(Path(model), extra_ids)
        self._encode, self._special_ids = table.encode, table.special_ids
        self.pad_id, self.end_id, self.vocab_size = table.pad_id, table.end_id, table.vocab_size
        self._specials = _splitter(self._special_ids)

    @classmethod
    def from_folder(cls, folder: Path, max_length: int) -> Self:
        """Reads `tokenizer_2/` of a diffusers folder, or any folder with T5's vocabulary."""
        declared = _read_config(folder).get("extra_ids")
        extra_ids = declared if isinstance(declared, int) and 0 <= declared <= 4096 else 0
        (model,) = files_in(folder, T5_FILES) or T5_FILES[0]
        return cls(folder / model, max_length, extra_ids)

    def encode(self, text: str, pad: bool = True) -> list[int]:
        """At most `max_length` ids, exactly as many with `pad`; the end token is always there."""
        ids = [*self._ids(text)[: self.max_length - 1], self.end_id]
        return _padded(ids, self.max_length, self.pad_id) if pad else ids

    def cut(self, text: str) -> PromptCut | None:
        """What `encode` leaves out of a prompt; None where nothing."""
        return cut_of(text, lambda part: len(self._ids(part)) + 1, self.max_length)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._specials.split(text)):
            if i % 2:
                ids.append(self._special_ids[part])
            else:
                # The one space that transformers knows and sentencepiece's normalizer does not.
                ids += self._encode(part.replace("\x85", " "))
        return ids


def _clip_words(text: str) -> list[str]:
    """Composed, lowered, one kind of space, cut into words."""
    text = WHITESPACE.sub(" ", unicodedata.normalize("NFC", text))
    # Letter by letter: str.lower() of a whole word would know the final form of Greek sigma.
    text = "".join(letter.lower() for letter in text)
    return [piece for word in CLIP_WORD.findall(text) for piece in GPT2_WORD.findall(word)]


def _byte_letters() -> list[str]:
    """A printable letter for each byte: Latin-1's own where it has one, else one from U+0100 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(spare)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()


def _splitter(specials: Iterable[str]) -> regex.Pattern[str]:
    """Splits a text so that special tokens stand at the odd places."""
    longest_first = sorted(specials, key=len, reverse=True)
    return regex.compile("(" + "|".join(regex.escape(token) for token in longest_first) + ")")


def _padded(ids: list[int], length: int, pad_id: int) -> list[int]:
    return ids + [pad_id] * (length - len(ids))


def files_in(folder: Path, choices: Iterable[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The names of the first choice all of whose files the folder holds."""
    for names in choices:
        if all((folder / name).is_file() for name in names):
            return names
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def _read_vocab(path: Path) -> dict[str, int]:
    vocab = read_json(path)
    if not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise WeightsError(f"{path} is not a vocabulary; it must map tokens to ids.")
    return vocab


def _read_sentencepiece(path: Path, extra_ids: int) -> UnigramTable:
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a sentencepiece model; download it again.") from error
    pad_id, end_id = max(model.pad_id(), 0), model.eos_id()
    special_ids = {model.id_to_piece(i): i for i in (pad_id, end_id, model.unk_id()) if i >= 0}
    vocab_size: int = model.vocab_size() + extra_ids
    special_ids |= {f"<extra_id_{i}>": vocab_size - 1 - i for i in range(extra_ids)}
    return UnigramTable(model.encode, special_ids, pad_id, end_id, vocab_size)


def _check_merges(path: Path, vocab: Mapping[str, int], ranks: Iterable[tuple[str, str]]) -> None:
    """Raises `WeightsError` for merges that are cut off, or another vocabulary's.

    Byte-level BPE merges each of its pieces of several letters from two, and no others; markers
    such as `<|endoftext|>` are added beside. Fewer merges would split words otherwise than the
    encoder has learned, and paint another picture without a word.
    """
    made = {first + second for first, second in ranks}
    pieces = {piece for piece in vocab if len(piece.removesuffix("</w>")) > 1}
    lacking = sorted(piece for piece in pieces - made if not piece.startswith("<"))
    if lacking or not made <= set(vocab):
        other = lacking[0] if lacking else min(made - set(vocab))
        raise WeightsError(
            f"{path} does not fit the vocabulary beside it: {other!r} is in one of them alone; "
            "download both again."
        )


def _read_merges(path: Path) -> dict[tuple[str, str], int]:
    """Rank of each pair of pieces: the line's number, since merges are listed as learned."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} can't be read as text; download it again.") from error
    pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    ranks: dict[tuple[str, str], int] = {}
    for pair in pairs:
        if len(pair) != 2:
            raise WeightsError(f"{path} has the line {' '.join(pair)!r}; a merge is two pieces.")
        ranks[pair[0], pair[1]] = len(ranks)
    return ranks
