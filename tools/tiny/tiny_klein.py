"""`tiny-klein`: FLUX.2 klein in small, which also edits pictures. Its models and its folder.

Classes are those of diffusers and transformers, so that the folder is an ordinary one of FLUX.2
klein: `Flux2KleinPipeline.from_pretrained` loads and runs it.

The pipeline reads what the language model holds after 9, 18 and 27 of its layers. So many are far
more than captions of thirty words need: of each nine, the first `TRAINED` work, and the last
matrices of the others stay zero, so that they pass on what they get. Training doesn't run those.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blueprint import Blueprint, PictureSizes, Tokens, TrainingShape
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

CHECKPOINTS = Path(__file__).resolve().parents[2] / "fluxmesh" / "tiny"
STATES = (9, 18, 27)  # what the pipeline reads of the language model
TRAINED = 2  # layers before each state that do something
LAYERS = 28  # transformers ends with a norm after the last layer: state 27 must not be that
REFERENCE_STEP = 10  # on the first axis, from one picture to the next

AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [32, 64, 96, 96],
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": 128,
}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 9,
    "attention_head_dim": 16,
    "num_attention_heads": 12,
    "joint_attention_dim": 288,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [4, 4, 4, 4],
    "rope_theta": 2000,
    "guidance_embeds": False,
}
QWEN3: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

# Qwen's: how text is cut into words, its special tokens, and the frame of a prompt.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD = "<|endoftext|>"
TEMPLATE = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)

TEXT_TOKENS = 48  # frame of 12 included
PICTURE = (128, 128)


def _shape(
    share: float, height: int, width: int, *references: tuple[int, int], text: int = TEXT_TOKENS
) -> TrainingShape:
    return TrainingShape(PictureSizes(height, width, references), share, text)


FLOW_SHAPES = (
    _shape(0.5, *PICTURE),
    _shape(0.3, *PICTURE, PICTURE),
    _shape(0.2, *PICTURE, PICTURE, PICTURE),
)
OTHER_SIZES = ((64, 64), (96, 96), (160, 160), (192, 192), (128, 192), (192, 128), (64, 128),
               (128, 64))  # fmt: skip
EDITED_SIZES = ((64, 64), (96, 96), (192, 192), (128, 192), (192, 128))
LAST_SHAPES = (
    _shape(0.16, *PICTURE),
    _shape(0.14, *PICTURE, PICTURE),
    _shape(0.10, *PICTURE, PICTURE, PICTURE),
    # The 512 tokens that diffusers pads to unless it is asked not to.
    _shape(0.05, *PICTURE, text=512),
    _shape(0.05, *PICTURE, PICTURE, text=512),
    *(_shape(0.03, *size) for size in OTHER_SIZES),
    *(_shape(0.03, *size, size) for size in EDITED_SIZES),
    _shape(0.03, 64, 64, (64, 64), (64, 64)),
    # References of other sizes than what is painted.
    _shape(0.03, *PICTURE, PICTURE, (64, 64)),
    _shape(0.03, *PICTURE, (96, 96), PICTURE),
    _shape(0.02, *PICTURE, (192, 192)),
)


class TinyKlein(Blueprint):
    """FLUX.2 klein's shape."""

    latent_channels = AUTOENCODER["latent_channels"]
    text_tokens = TEXT_TOKENS
    longest_text = 512
    edits = True
    plans = {"autoencoder": (4_300, 5e-4)}  # it begins at trained weights
    time_shift = 2.5
    shapes = FLOW_SHAPES
    last_shapes = LAST_SHAPES
    whole_batch = TEXT_TOKENS + 3 * 64
    reference_noise = 0.1  # pictures that people give were decoded before

    # The autoencoder

    def build_autoencoder(self) -> AutoencoderKLFlux2:
        """Begins as that of `tiny`, which has the same layers; what FLUX.2 adds is the identity."""
        autoencoder = AutoencoderKLFlux2(**AUTOENCODER)
        begun = AutoencoderKL.from_pretrained(CHECKPOINTS / "checkpoint" / "vae")
        autoencoder.load_state_dict(begun.state_dict(), strict=False)
        with torch.no_grad():
            for convolution in (autoencoder.quant_conv, autoencoder.post_quant_conv):
                channels = len(convolution.weight)
                convolution.weight.copy_(torch.eye(channels)[:, :, None, None])
                convolution.bias.zero_()
        return autoencoder

    def statistics(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each channel, rounded as the checkpoint keeps mean and variance."""
        mean, variance = tokens.mean(dim=(0, 1)), tokens.var(dim=(0, 1))
        return mean.bfloat16().float(), (variance.bfloat16().float() + self._eps).sqrt()

    def keep_statistics(
        self, autoencoder: torch.nn.Module, mean: torch.Tensor, deviation: torch.Tensor
    ) -> None:
        autoencoder.bn.running_mean.copy_(mean)
        autoencoder.bn.running_var.copy_(deviation**2 - self._eps)

    def kept_statistics(self, autoencoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance = (autoencoder.bn.running_mean, autoencoder.bn.running_var)
        return mean.float().clone(), (variance.float() + self._eps).sqrt()

    @property
    def _eps(self) -> float:
        return 1e-4  # of AutoencoderKLFlux2, and of FLUX.2

    # Text

    def train_tokenizers(self, captions: list[str], checkpoint: Path) -> None:
        """Byte-level BPE that holds the words of captions whole, in Qwen's form."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=6000,
            min_frequency=max(2, len(captions) // 5000),  # words without a meaning come seldom
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        frame = ["user\n", "assistant\n", "\n\n"] * len(captions)
        tokenizer.train_from_iterator([*captions, *frame], trainer)
        model = json.loads(tokenizer.to_str())["model"]
        merges = [tuple(merge) for merge in model["merges"]]
        qwen = Qwen2Tokenizer(
            vocab=model["vocab"], merges=merges, pad_token=PAD, model_max_length=TEXT_TOKENS
        )
        qwen.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        qwen.add_tokens(["<think>", "</think>"])  # in Qwen3 added tokens, but not "special"
        qwen.chat_template = TEMPLATE
        qwen.save_pretrained(checkpoint / "tokenizer")

    def load_tokens(self, checkpoint: Path) -> Tokens:
        qwen = Qwen2Tokenizer.from_pretrained(checkpoint / "tokenizer")
        # The template's frame, as the pipeline asks for it, made once.
        framed = qwen.apply_chat_template(
            [{"role": "user", "content": PAD}],
            tokenize=False, add_generation_prompt=True, enable_thinking=False,
        )  # fmt: skip
        before, after = framed.split(PAD)

        def tokens(captions: list[str]) -> dict[str, np.ndarray]:
            ids = qwen([f"{before}{caption}{after}" for caption in captions])["input_ids"]
            rows = np.full((len(captions), self.longest_text), qwen.pad_token_id, dtype=np.int64)
            for row, part in zip(rows, ids, strict=True):
                row[: len(part)] = part[: self.text_tokens]
            return {"qwen": rows, "real": np.array([min(len(i), self.text_tokens) for i in ids])}

        return tokens

    # Models

    def build_models(self, checkpoint: Path) -> torch.nn.ModuleDict:
        qwen = Qwen2Tokenizer.from_pretrained(checkpoint / "tokenizer")
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                **QWEN3,
                vocab_size=len(qwen),
                pad_token_id=qwen.pad_token_id,
                max_position_embeddings=512,
                bos_token_id=None,
                eos_token_id=qwen.convert_tokens_to_ids("<|im_end|>"),
            )  # fmt: skip
        )
        working = set(self._working())
        with torch.no_grad():
            for number, layer in enumerate(encoder.model.layers, start=1):
                if number not in working:
                    layer.self_attn.o_proj.weight.zero_()
                    layer.mlp.down_proj.weight.zero_()
                    layer.requires_grad_(False)
            encoder.model.norm.requires_grad_(False)  # behind all that is read
            embedding = encoder.model.embed_tokens.weight
            torch.nn.init.normal_(embedding, std=1.0)
        transformer = Flux2Transformer2DModel(**TRANSFORMER)
        # Modulation and last layer at zero, as DiT begins.
        zero = ("double_stream_modulation", "single_stream_modulation", "norm_out", "proj_out")
        for name, parameter in transformer.named_parameters():
            if name.startswith(zero):
                torch.nn.init.zeros_(parameter)
        # diffusers rounds t·1000 to the weights' dtype; the embedding gets the exact value here.
        self.time = torch.zeros(1)
        transformer.time_guidance_embed.time_proj.register_forward_pre_hook(
            lambda _, inputs: (self.time,)
        )
        return torch.nn.ModuleDict({"text_encoder": encoder, "transformer": transformer})

    def compile(self, modules: torch.nn.ModuleDict) -> None:
        modules["transformer"].compile_repeated_blocks(dynamic=False)
        for number in self._working():
            modules["text_encoder"].model.layers[number - 1].compile(dynamic=False)

    @staticmethod
    def _working() -> Iterator[int]:
        """Numbers of the layers that do something, from 1."""
        before = 0
        for state in STATES:
            yield from range(before + 1, before + 1 + TRAINED)
            before = state

    def encode(
        self, modules: torch.nn.ModuleDict, tokens: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The three states side by side [B, L, 288], padding included, as the pipeline has them."""
        language = modules["text_encoder"].model
        ids = tokens["qwen"]
        length = ids.shape[1]
        x = language.embed_tokens(ids)
        # A mask of our own: the one that transformers makes can't be captured in a graph.
        real = ids != language.config.pad_token_id
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        mask = torch.zeros((), dtype=x.dtype, device=ids.device).where(
            causal & real[:, None, None, :], torch.finfo(x.dtype).min
        )
        places = self._rotation(length, x)
        states = {}
        for number in self._working():
            x = language.layers[number - 1](x, attention_mask=mask, position_embeddings=places)
            states[next(state for state in STATES if state >= number)] = x
        return (torch.cat([states[state] for state in STATES], dim=-1),)

    @staticmethod
    def _rotation(length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, length, head_dim]: transformers' own, of frequencies in float32.

        A model that is turned to bfloat16 rounds its frequencies too; one that is loaded so
        doesn't.
        """
        half = torch.arange(0, QWEN3["head_dim"], 2, device=like.device).float()
        frequencies = QWEN3["rope_parameters"]["rope_theta"] ** (-half / QWEN3["head_dim"])
        angles = torch.arange(length, device=like.device).float()[:, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)[None]
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def picture_ids(
        self, height: int, width: int, references: tuple[tuple[int, int], ...]
    ) -> torch.Tensor:
        parts = []
        for picture, size in enumerate(((height, width), *references)):
            rows, columns = (side // 16 for side in size)
            ids = torch.zeros(rows, columns, 4)
            ids[..., 0] = REFERENCE_STEP * picture
            ids[..., 1] = torch.arange(rows)[:, None]
            ids[..., 2] = torch.arange(columns)[None, :]
            parts.append(ids.view(-1, 4))
        return torch.cat(parts)

    def velocity(
        self,
        modules: torch.nn.ModuleDict,
        noised: torch.Tensor,
        t: torch.Tensor,
        features: tuple[torch.Tensor, ...],
        ids: torch.Tensor,
    ) -> torch.Tensor:
        transformer = modules["transformer"]
        self.time = t * 1000
        (text,) = features
        text_ids = torch.zeros(text.shape[1], 4, device=text.device)
        text_ids[:, 3] = torch.arange(text.shape[1], device=text.device)
        output: torch.Tensor = transformer(
            hidden_states=noised.to(text.dtype), timestep=t, encoder_hidden_states=text,
            img_ids=ids, txt_ids=text_ids, return_dict=False,
        )[0]  # fmt: skip
        return output

    def time_steps(self, tokens: int, steps: int) -> list[float]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps)
        )
        return [float(sigma) for sigma in scheduler.sigmas]

    def write_index(self, checkpoint: Path) -> None:
        FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(checkpoint / "scheduler")
        index = {
            "_class_name": "Flux2KleinPipeline",
            "is_distilled": True,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen3ForCausalLM"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux2Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        }
        (checkpoint / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
