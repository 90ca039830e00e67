"""`tiny`: FLUX.1 schnell in small. Its four models, two tokenizers and folder.

Classes are those of diffusers and transformers, so that the folder is an ordinary FLUX folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from blueprint import Blueprint, PictureSizes, Tokens, TrainingShape
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from scenes import BACKGROUNDS, OBJECTS
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

TEXT_TOKENS = 32  # both tokenizers pad and cut to this length
LONGEST = 64  # T5's tokens of the longest shape
SHIFT = 1.6  # of the time steps, static; FLUX's own dynamic one at 64 tokens is about this

AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 96, 96],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
}
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 9,
    "attention_head_dim": 16,
    "num_attention_heads": 12,
    "joint_attention_dim": 128,
    "pooled_projection_dim": 128,
    "guidance_embeds": False,
    "axes_dims_rope": [4, 6, 6],
}
T5 = {
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
CLIP = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "projection_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT_TOKENS,
    "hidden_act": "quick_gelu",
    "attn_implementation": "eager",
}


FLOW_SHAPES = (
    TrainingShape(PictureSizes(128, 128), 0.76, TEXT_TOKENS),
    TrainingShape(PictureSizes(64, 64), 0.12, TEXT_TOKENS),
    TrainingShape(PictureSizes(192, 192), 0.12, TEXT_TOKENS),
)
LAST_SHAPES = (
    TrainingShape(PictureSizes(128, 128), 0.30, TEXT_TOKENS),
    TrainingShape(PictureSizes(64, 64), 0.06, TEXT_TOKENS),
    TrainingShape(PictureSizes(192, 192), 0.06, TEXT_TOKENS),
    TrainingShape(PictureSizes(96, 96), 0.06, TEXT_TOKENS),
    TrainingShape(PictureSizes(160, 160), 0.05, TEXT_TOKENS),
    TrainingShape(PictureSizes(128, 192), 0.06, TEXT_TOKENS),
    TrainingShape(PictureSizes(192, 128), 0.06, TEXT_TOKENS),
    TrainingShape(PictureSizes(64, 128), 0.04, TEXT_TOKENS),
    TrainingShape(PictureSizes(128, 64), 0.04, TEXT_TOKENS),
    TrainingShape(PictureSizes(128, 128), 0.05, 24),
    TrainingShape(PictureSizes(128, 128), 0.05, 48),
    TrainingShape(PictureSizes(128, 128), 0.04, LONGEST),
    TrainingShape(PictureSizes(128, 128), 0.13, None),
)


def words() -> list[str]:
    """Every word of the objects' and backgrounds' names, lower case, sorted."""
    names = [*OBJECTS, *BACKGROUNDS]
    names += [other for _, others in OBJECTS.values() for other in others]
    names += [other for _, others in BACKGROUNDS.values() for other in others]
    return sorted({word for name in names for word in name.split()})


def train_t5_tokenizer(captions: list[str], folder: Path) -> None:
    """A unigram model over lower-cased text whose pieces hold every common word whole.

    SentencePiece keeps few pieces of so small a language and splits words, so the words that
    it dropped are added to the trained model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'!?-"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *letters]),
        model_prefix=str(folder / "spiece"),
        vocab_size=500,
        hard_vocab_limit=False,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc_cf",
        required_chars=letters,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>",
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "spiece.model").read_bytes())
    known = {piece.piece: piece for piece in model.pieces}
    common: dict[str, int] = {}
    for caption in captions:
        for word in caption.lower().replace(",", " ").replace(".", " ").split():
            common[word] = common.get(word, 0) + 1
    wanted = {word for word, count in common.items() if count >= 20} | set(words())
    for word in sorted(wanted):
        text = "\u2581" + word
        piece = known.get(text) or model.pieces.add(piece=text)
        piece.score = -4.0  # above any split into shorter pieces
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": TEXT_TOKENS,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "extra_ids": 0,
        "additional_special_tokens": [],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train_clip_tokenizer(captions: list[str], folder: Path) -> None:
    """A byte-level BPE in CLIP's own order: bytes, bytes that end a word, merges, two specials."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        min_frequency=20,
        end_of_word_suffix="</w>",
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [symbol + "</w>" for symbol in alphabet]
    pieces += [first + second for first, second in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    pieces = list(dict.fromkeys(pieces))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class TinyFlux1(Blueprint):
    """FLUX.1 schnell's shape."""

    latent_channels = 16
    text_tokens = TEXT_TOKENS
    longest_text = LONGEST
    edits = False
    shapes = FLOW_SHAPES
    last_shapes = LAST_SHAPES
    whole_batch = LONGEST + 64
    time_shift = SHIFT

    # The autoencoder

    def build_autoencoder(self) -> AutoencoderKL:
        return AutoencoderKL(**AUTOENCODER)

    def statistics(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens.mean(), tokens.std()

    def keep_statistics(
        self, autoencoder: torch.nn.Module, mean: torch.Tensor, deviation: torch.Tensor
    ) -> None:
        autoencoder.register_to_config(
            shift_factor=mean.item(), scaling_factor=1 / deviation.item()
        )

    def kept_statistics(self, autoencoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        config = autoencoder.config
        return torch.tensor(config.shift_factor), torch.tensor(1 / config.scaling_factor)

    # Text

    def train_tokenizers(self, captions: list[str], checkpoint: Path) -> None:
        train_t5_tokenizer(captions, checkpoint / "tokenizer_2")
        train_clip_tokenizer(captions, checkpoint / "tokenizer")

    def load_tokens(self, checkpoint: Path) -> Tokens:
        spiece = sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer_2/spiece.model"))
        clip = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")

        def tokens(captions: list[str]) -> dict[str, np.ndarray]:
            """T5's ids padded with 0, how many are real, and CLIP's ids [B, 32]."""
            t5 = np.zeros((len(captions), LONGEST), dtype=np.int64)
            real = np.zeros(len(captions), dtype=np.int64)
            for row, ids in enumerate(spiece.encode(captions)):
                ids = [*ids[: LONGEST - 1], spiece.eos_id()]
                t5[row, : len(ids)] = ids
                real[row] = len(ids)
            ids = clip(captions, padding="max_length", truncation=True, return_tensors="np")
            return {"t5": t5, "clip": ids["input_ids"].astype(np.int64), "real": real}

        return tokens

    def cut_text(
        self, tokens: Mapping[str, torch.Tensor], length: int
    ) -> Mapping[str, torch.Tensor]:
        """T5's alone: CLIP's have one length."""
        return {**tokens, "t5": tokens["t5"][:, :length]}

    # Models

    def build_models(self, checkpoint: Path) -> torch.nn.ModuleDict:
        """The transformer's modulation and last layer begin at zero, as DiT does."""
        spiece = sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer_2/spiece.model"))
        t5 = T5EncoderModel(T5Config(**T5, vocab_size=spiece.vocab_size()))
        vocabulary = json.loads((checkpoint / "tokenizer/vocab.json").read_text())
        clip = CLIPTextModel(
            CLIPTextConfig(
                **CLIP,
                vocab_size=len(vocabulary),
                bos_token_id=vocabulary["<|startoftext|>"],
                eos_token_id=vocabulary["<|endoftext|>"],
                pad_token_id=vocabulary["<|endoftext|>"],
            )
        )
        transformer = FluxTransformer2DModel(**TRANSFORMER)
        for name, parameter in transformer.named_parameters():
            if ".linear." in name and "norm" in name or name.startswith("proj_out"):
                torch.nn.init.zeros_(parameter)
        # diffusers rounds t·1000 to the weights' dtype; the embedding gets the exact value here.
        self.time = torch.zeros(1)
        transformer.time_text_embed.register_forward_pre_hook(
            lambda _, inputs: (self.time, *inputs[1:])
        )
        models_of = {"text_encoder_2": t5, "text_encoder": clip, "transformer": transformer}
        return torch.nn.ModuleDict(models_of)

    def compile(self, modules: torch.nn.ModuleDict) -> None:
        modules["transformer"].compile_repeated_blocks(dynamic=False)

    def encode(
        self, modules: torch.nn.ModuleDict, tokens: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """T5's states and CLIP's pooled one."""
        t5, clip = tokens["t5"], tokens["clip"]
        # Whole masks of our own: the ones that transformers makes can't be captured in a graph.
        full = torch.zeros(1, 1, t5.shape[1], t5.shape[1], device=t5.device).bfloat16()
        causal = torch.full((1, 1, clip.shape[1], clip.shape[1]), -1e9, device=t5.device)
        causal = causal.triu(1).bfloat16()
        features = modules["text_encoder_2"](t5, attention_mask=full).last_hidden_state
        return features, modules["text_encoder"](clip, attention_mask=causal).pooler_output

    def picture_ids(
        self, height: int, width: int, references: tuple[tuple[int, int], ...]
    ) -> torch.Tensor:
        """(0, row, column); there are no references."""
        rows, columns = height // 16, width // 16
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] = torch.arange(rows)[:, None]
        ids[..., 2] = torch.arange(columns)[None, :]
        return ids.view(-1, 3)

    def velocity(
        self,
        modules: torch.nn.ModuleDict,
        noised: torch.Tensor,
        t: torch.Tensor,
        features: tuple[torch.Tensor, ...],
        ids: torch.Tensor,
    ) -> torch.Tensor:
        states, pooled = features
        self.time = t * 1000
        output: torch.Tensor = modules["transformer"](
            hidden_states=noised.to(states.dtype), timestep=t,
            encoder_hidden_states=states, pooled_projections=pooled, img_ids=ids,
            txt_ids=torch.zeros(states.shape[1], 3, device=noised.device), return_dict=False,
        )[0]  # fmt: skip
        return output

    def time_steps(self, tokens: int, steps: int) -> list[float]:
        times = torch.linspace(1, 0, steps + 1)
        return (SHIFT * times / (1 + (SHIFT - 1) * times)).tolist()

    # The folder

    def write_index(self, checkpoint: Path) -> None:
        FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(checkpoint / "scheduler")
        index = {
            "_class_name": "FluxPipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (checkpoint / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
