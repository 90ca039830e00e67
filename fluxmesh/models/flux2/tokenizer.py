"""Prompts to the token ids that FLUX.2's text encoders read: framed as a chat, cut and padded.

Both language models have byte-level BPE, whose rules (normalization, the pattern that cuts words,
merges, added tokens) lie in the checkpoint's `tokenizer.json`. Hugging Face's `tokenizers` reads
that file, as the reference does; of Qwen's, `vocab.json` and `merges.txt` serve as well. Imports
no mlx.

The frames are what the chat templates of both models make of a prompt in diffusers'
`Flux2KleinPipeline` and `Flux2Pipeline`: the template's own text, no thinking. Special tokens that
a prompt spells out mean themselves, there as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from fluxmesh.errors import ModelNotFoundError, WeightsError
from fluxmesh.request import PromptCut, cut_of
from fluxmesh.storage.safetensors import read_json

MAX_LENGTH = 512  # tokens that a prompt is padded and cut to, frame included

# Of black-forest-labs/flux2 `src/flux2/system_messages.py`, the newline inside included.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)


class PromptTokens(NamedTuple):
    """A framed prompt, and how much padding makes it as long as all are."""

    ids: list[int]
    padding: int  # tokens
    pad_id: int
    is_padded_before: bool


@dataclass(frozen=True)
class Frame:
    """What stands around a prompt, and where padding goes."""

    before: str
    after: str
    pad_token: str
    is_padded_before: bool
    removed: tuple[str, ...] = ()  # from prompts, where they would mean something else


FRAMES = {
    "qwen3": Frame(
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        pad_token="<|endoftext|>",
        is_padded_before=False,
    ),
    "mistral3": Frame(
        before=f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]",
        after="[/INST]",
        pad_token="<pad>",
        is_padded_before=True,
        removed=("[IMG]",),
    ),
}

# Qwen's own, for a folder that has no tokenizer.json: single digits, an ending, letters, a run of
# other signs, line ends, spaces.
QWEN_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class ChatTokenizer:
    """A prompt, framed, as token ids."""

    def __init__(self, model: Tokenizer, frame: Frame, max_length: int = MAX_LENGTH) -> None:
        """Raises `WeightsError` where the vocabulary lacks what the frame needs."""
        model.no_padding()
        model.no_truncation()
        self.model, self.frame, self.max_length = model, frame, max_length
        pad_id = model.token_to_id(frame.pad_token)
        if pad_id is None:
            raise WeightsError(
                f"The tokenizer lacks the token {frame.pad_token}; it is not that of this text "
                "encoder."
            )
        self.pad_id: int = pad_id
        self.vocab_size: int = max(model.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_folder(cls, folder: Path, kind: str, max_length: int = MAX_LENGTH) -> Self:
        """Reads `tokenizer/` of a diffusers folder.

        `kind` is the text encoder's `model_type`. Raises `ModelNotFoundError` where files are
        missing, `WeightsError` where they are broken.
        """
        whole = folder / "tokenizer.json"
        if whole.is_file():
            try:
                model = Tokenizer.from_file(str(whole))
            except Exception as error:  # the library raises nothing more exact
                raise WeightsError(f"{whole} is no tokenizer; download it again.") from error
        elif kind == "qwen3" and (folder / "vocab.json").is_file():
            model = _from_vocabulary(folder)
        else:
            raise ModelNotFoundError(
                f"{whole} is missing; complete the checkpoint with `fluxmesh models pull`."
            )
        return cls(model, FRAMES[kind], max_length)

    def encode(self, prompt: str) -> PromptTokens:
        """The framed prompt, cut where it is longer than `max_length`: the frame's end too."""
        ids = self._ids(f"{self._plain(prompt)}{self.frame.after}")[: self.max_length]
        padding = self.max_length - len(ids)
        return PromptTokens(ids, padding, self.pad_id, self.frame.is_padded_before)

    def cut(self, prompt: str) -> PromptCut | None:
        """What `encode` leaves out of a prompt, the frame's end not counted; None where nothing."""
        return cut_of(prompt, lambda part: len(self._ids(self._plain(part))), self.max_length)

    def _plain(self, prompt: str) -> str:
        for text in self.frame.removed:
            prompt = prompt.replace(text, "")
        return prompt

    def _ids(self, text: str) -> list[int]:
        """Behind the frame's beginning."""
        ids: list[int] = self.model.encode(
            f"{self.frame.before}{text}", add_special_tokens=False
        ).ids
        return ids


def _from_vocabulary(folder: Path) -> Tokenizer:
    """Qwen's tokenizer out of `vocab.json`, `merges.txt` and `tokenizer_config.json`."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing more exact
        raise WeightsError(
            f"{folder} holds no vocabulary and merges of BPE; download them again."
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    config = folder / "tokenizer_config.json"
    declared: dict[str, Any] = read_json(config).get("added_tokens_decoder") or {}
    for number, token in sorted(declared.items(), key=lambda entry: int(entry[0])):
        tokenizer.add_tokens([AddedToken(token["content"], normalized=False, special=True)])
        if tokenizer.token_to_id(token["content"]) != int(number):
            raise WeightsError(
                f"{config} gives {token['content']} the id {number}, which does not follow the "
                "vocabulary; download the tokenizer again."
            )
    return tokenizer
