"""FLUX.2 out of its files: a folder, a quantized one, BFL's single file; what is read of each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fluxmesh.adapters.fuse import fuse_checkpoint
from fluxmesh.engine.pipeline import FluxPipeline
from fluxmesh.errors import (
    IncompleteModelError,
    ModelNotFoundError,
    NotFetchedError,
    WeightsError,
)
from fluxmesh.events import Loading
from fluxmesh.models.flux2.architecture import Flux2Architecture
from fluxmesh.models.flux2.files.folder import Flux2Folder
from fluxmesh.models.flux2.tensor_maps import EMBEDDING
from fluxmesh.models.partition import Shard
from fluxmesh.models.registry import PUBLISHED
from fluxmesh.request import SourceImage
from fluxmesh.storage.safetensors import read_header, read_headers, read_tensor
from fluxmesh.training.data.dataset import Example
from fluxmesh.training.notes import named, notes_of
from fluxmesh.training.plan import prepare
from fluxmesh.training.request import TrainRequest
from fluxmesh.weights import hub, loading
from fluxmesh.weights.checkpoint import Checkpoint
from fluxmesh.weights.quantize import quantize_checkpoint
from fluxmesh.weights.reader import ComponentReader
from tests.adapter_files import normal, write
from tests.checkpoints import make_checkpoint, write_safetensors
from tests.flux2_checkpoint import (
    AUTOENCODER,
    WEIGHTS,
    Kind,
    architecture_of,
    make_comfy_set,
    make_flux2,
    make_single_file,
)
from tests.numerics.loading import assert_same, parameters, rewrite
from tests.shards import copied_shard

SIZE = (4, 6)  # latents
KINDS: tuple[Kind, ...] = ("klein", "base", "dev")


def paint(
    model: Path,
    steps: int = 2,
    *,
    source: SourceImage | None = None,
    cache: float = 0.0,
    **options: Any,
) -> np.ndarray:
    flux = FluxPipeline(str(model), dtype="float32", **options)
    image = flux.generate_images("a cat", 1, steps, 4.0, SIZE, seed=3, source=source, cache=cache)
    return np.array(image)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Kind, Path]:
    """A checkpoint of each kind, which no test changes."""
    return {
        kind: make_flux2(tmp_path_factory.mktemp(kind) / "made", kind, text_length=None)
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def exact(folders: Mapping[Kind, Path]) -> Mapping[Kind, np.ndarray]:
    """What each paints."""
    return {kind: paint(folder) for kind, folder in folders.items()}


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    return make_flux2(tmp_path / "klein", text_length=None)


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_as_what_it_is(
    kind: Kind, folders: Mapping[Kind, Path], exact: Mapping[Kind, np.ndarray]
) -> None:
    checkpoint = hub.resolve(str(folders[kind]))
    loading.verify(checkpoint)
    model = checkpoint.architecture
    assert isinstance(model, Flux2Architecture)
    assert model.identity == architecture_of(kind).identity
    assert (model.is_distilled, model.takes_negative) == (kind == "klein", kind == "base")
    assert checkpoint.defaults.guidance == (1.0 if kind == "klein" else 4.0)
    assert exact[kind].shape == (1, 32, 48, 3) and np.ptp(exact[kind]) > 0.2


@pytest.mark.parametrize("kind", ["base", "dev"])
def test_low_memory_changes_no_pixel(
    kind: Kind, folders: Mapping[Kind, Path], exact: Mapping[Kind, np.ndarray]
) -> None:
    assert paint(folders[kind], low_memory=True).tobytes() == exact[kind].tobytes()


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_a_quantized_folder_is_what_quantizing_on_the_way_gives(
    kind: Kind, folders: Mapping[Kind, Path], exact: Mapping[Kind, np.ndarray], tmp_path: Path
) -> None:
    source, smaller = hub.resolve(str(folders[kind])), tmp_path / "smaller"
    quantize_checkpoint(source, smaller, 4)
    quantized = hub.resolve(str(smaller))
    loading.verify(quantized)
    assert (quantized.kind, quantized.bits) == ("quantized", 4)
    assert quantized.architecture == source.architecture
    for load in (loading.load_transformer, load_text):
        assert_same(parameters(load(quantized)), parameters(load(source, bits=4)))
    # the table whose rows are looked up comes along, whole and plain
    entries = read_headers(quantized.components["text_encoder"].files).entries
    assert (entries[EMBEDDING].shape, entries[EMBEDDING].dtype) == ((320, 32), "BF16")
    error = np.abs(paint(smaller) - exact[kind])
    assert 0.005 < error.mean() < 0.2


def load_text(checkpoint: Checkpoint, **options: Any) -> Any:
    return loading.load_text_encoder(checkpoint, "text_encoder", **options)


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_shard_holds_its_part_and_what_all_hold(hosts: int, folders: Mapping[Kind, Path]) -> None:
    checkpoint = hub.resolve(str(folders["dev"]))
    model = checkpoint.architecture
    whole = model.nbytes(("modulator", "denoiser"), "float32", None)
    split = model.split_bytes("float32", None)
    assert split > 0.7 * whole
    for rank in range(hosts):
        flow = loading.load_transformer(checkpoint, mx.float32, shard=Shard(rank, hosts))
        held = sum(array.nbytes for array in parameters(flow).values())
        assert held == whole - split + split // hosts
        part = copied_shard(loading.load_transformer(checkpoint, mx.float32), Shard(rank, hosts))
        assert_same(parameters(flow), parameters(part))


def test_the_embedding_is_never_loaded_and_yet_must_be_there(klein: Path) -> None:
    checkpoint = hub.resolve(str(klein))
    encoder = loading.load_text_encoder(checkpoint, "text_encoder", mx.float32)
    assert not any("embed" in name for name in parameters(encoder))
    reader = ComponentReader(checkpoint, "text_encoder")
    whole = sum(map(reader.stored_bytes, reader.targets))
    assert loading.bytes_to_load(checkpoint, "text_encoder") == whole - 320 * 32 * 4
    rewrite(
        klein / "text_encoder" / "model.safetensors",
        lambda arrays: arrays.pop("model." + EMBEDDING),
    )
    with pytest.raises(WeightsError, match=r"lacks embed_tokens.weight"):
        loading.verify(hub.resolve(str(klein)))


def test_bytes_that_are_told_end_at_all_that_is_read(klein: Path) -> None:
    heard: list[Loading] = []
    flux = FluxPipeline(str(klein), dtype="float32", on_loading=heard.append)
    flux.ensure_models_are_loaded()
    last = {event.component: event for event in heard}
    assert set(last) == {"text encoders", "transformer", "autoencoder"}
    for event in last.values():
        assert 0.9 < event.done_bytes / event.total_bytes <= 1, event  # of whole files, headers too


def test_a_base_model_is_asked_twice_and_its_guidance_counts(
    folders: Mapping[Kind, Path], exact: Mapping[Kind, np.ndarray]
) -> None:
    base = FluxPipeline(str(folders["base"]), dtype="float32")
    assert set(base.encode("a cat")) == {"prompt", "negative"}
    other = np.array(base.generate_images("a cat", 1, 2, 1.0, SIZE, seed=3))
    assert np.abs(other - exact["base"]).max() > 0.01
    assert set(FluxPipeline(str(folders["klein"])).runtime.feature_axes) == {"prompt"}


def test_a_picture_and_a_mask_are_painted_over(
    folders: Mapping[Kind, Path], exact: Mapping[Kind, np.ndarray]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    mask = np.zeros((32, 48), np.uint8)
    mask[:, :16] = 255
    image = paint(folders["klein"], source=SourceImage(pixels, 0.5, mask))[0]
    outside = np.round(image[:, 16:] * 255).astype(np.uint8)
    assert np.array_equal(outside, pixels[:, 16:])
    painted = image[:, :16]
    assert np.abs(painted - pixels[:, :16] / 255).max() > 0.1
    assert np.abs(painted - exact["klein"][0][:, :16]).max() > 0.02


def test_a_cache_reuses_steps_of_both_calls(folders: Mapping[Kind, Path]) -> None:
    pictures = [paint(folders["base"], 4, cache=cache) for cache in (0.0, 0.9)]
    assert np.abs(pictures[1] - pictures[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("klein", "flux-2-klein-4b"),
        ("base", "flux-2-klein-base-4b"),
        ("dev", "flux2-dev"),
    ],
)
def test_bfl_s_single_file_beside_the_folder_s_parts_paints_the_same(
    kind: Kind, name: str, exact: Mapping[Kind, np.ndarray], tmp_path: Path
) -> None:
    folder = make_flux2(tmp_path / "made", kind, text_length=None)
    file = make_single_file(folder, folder / f"{name}.safetensors")
    for other in ("transformer/diffusion_pytorch_model.safetensors", "model_index.json"):
        (folder / other).unlink()
    checkpoint = hub.resolve(str(file))
    assert checkpoint.components["transformer"].layout == "bfl"
    assert checkpoint.architecture.identity == architecture_of(kind).identity
    assert paint(file).tobytes() == exact[kind].tobytes()


@pytest.mark.parametrize("kind", ["klein", "dev"])
def test_comfyui_s_set_paints_what_its_folder_paints(
    kind: Kind,
    folders: Mapping[Kind, Path],
    exact: Mapping[Kind, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its text encoder in one file, its autoencoder in another; the vocabulary as `pull FILE`
    leaves it in the Hub's cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "cache" / "models--black-forest-labs--FLUX.2-klein-4B"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0123456")
    snapshot = repo / "snapshots" / "0123456"
    file = make_comfy_set(folders[kind], tmp_path / "models", snapshot, kind)
    checkpoint = hub.resolve(str(file))
    assert {part.layout for part in checkpoint.components.values()} == {"bfl"}
    assert checkpoint.architecture.identity == architecture_of(kind).identity
    assert paint(file).tobytes() == exact[kind].tobytes()
    assert hub.resolve(str(tmp_path / "models")).content == checkpoint.content


def test_an_autoencoder_with_the_small_decoder_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a transformer's file, or named by AE; a decoder alone is called what it is."""
    small = replace(AUTOENCODER, decoder_widths=(4, 4, 8, 8))
    folder = make_flux2(tmp_path / "made", autoencoder=small, text_length=None)
    expected = paint(folder)
    file = make_single_file(folder, folder / "flux-2-klein-4b.safetensors")
    vae = make_single_file(folder, folder / "full_encoder_small_decoder.safetensors", "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for other in ("transformer/diffusion_pytorch_model.safetensors", "model_index.json"):
        (folder / other).unlink()
    assert paint(file).tobytes() == expected.tobytes()
    monkeypatch.setenv("AE", str(vae.rename(tmp_path / "elsewhere.safetensors")))
    assert paint(file).tobytes() == expected.tobytes()
    arrays = {
        key: read_tensor(entry)
        for key, entry in read_header(tmp_path / "elsewhere.safetensors").entries.items()
    }
    half = {key: value for key, value in arrays.items() if not key.startswith("encoder.")}
    write_safetensors(tmp_path / "small_decoder.safetensors", half)
    with pytest.raises(ModelNotFoundError, match=r"a decoder alone; take .*full_encoder_small"):
        hub.resolve(str(tmp_path / "small_decoder.safetensors"))


def test_an_autoencoder_of_flux1_that_ae_names_is_not_flux2_s(
    klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AE is set once and for all in many a shell."""
    file = make_single_file(klein, klein / "flux-2-klein-4b.safetensors")
    other = make_checkpoint(tmp_path / "flux1", layout="bfl").folder / "ae.safetensors"
    monkeypatch.setenv("AE", str(other))
    checkpoint = hub.resolve(str(file))
    assert checkpoint.components["vae"].files == (klein / "vae" / WEIGHTS["vae"],)


def test_a_single_file_alone_says_what_it_lacks_and_who_has_it(
    klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    file = make_single_file(klein, tmp_path / "flux-2-klein-4b.safetensors")
    with pytest.raises(NotFetchedError, match=r"No text encoder .* and autoencoder for") as caught:
        hub.resolve(str(file))
    assert "fluxmesh models pull" in str(caught.value)
    assert [repo for repo, _ in caught.value.sources] == ["black-forest-labs/FLUX.2-klein-4B"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("tokenizer/tokenizer.json", "tokenizer/tokenizer.json (or vocab.json and merges.txt)"),
        ("text_encoder/config.json", "text_encoder/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "the weights in vae/"),
    ],
)
def test_what_a_folder_lacks_is_named(klein: Path, missing: str, said: str) -> None:
    (klein / missing).unlink()
    with pytest.raises(IncompleteModelError) as caught:
        hub.resolve(str(klein))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("config", "values", "said"),
    [
        ("text_encoder", {"model_type": "gemma"}, "gemma is no text encoder of FLUX.2"),
        ("text_encoder", {"num_hidden_layers": 20}, "20 layers, not 27"),
        ("vae", {"use_quant_conv": False}, "quant convolutions"),
    ],
)
def test_why_a_config_is_not_one_of_flux2_is_told(
    klein: Path, config: str, values: dict[str, object], said: str
) -> None:
    edit(klein / config / "config.json", **values)
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(str(klein))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "values", "said"),
    [
        ("text_encoder", {"rms_norm_eps": 0.0}, "rms_norm_eps must be above 0"),
        ("text_encoder", {"hidden_size": 2**30}, "hidden_size"),
        ("text_encoder", {"rope_theta": "big"}, "rope_theta"),
        ("transformer", {"joint_attention_dim": 64}, "must take what the text encoder gives"),
        ("transformer", {"in_channels": 32}, "paints in 8"),
        ("transformer", {"axes_dims_rope": [4, 4, 4, 6]}, "rotary axes"),
        ("vae", {"norm_num_groups": 3}, "norm groups"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(
    klein: Path, config: str, values: dict[str, object], said: str
) -> None:
    edit(klein / config / "config.json", **values)
    with pytest.raises(WeightsError) as caught:
        loading.verify(hub.resolve(str(klein)))
    assert said in str(caught.value)


def test_a_vocabulary_of_another_model_is_refused(klein: Path) -> None:
    path = klein / "text_encoder" / "config.json"
    edit(path, vocab_size=200)
    rewrite(
        klein / "text_encoder" / "model.safetensors",
        lambda arrays: arrays.update({f"model.{EMBEDDING}": arrays[f"model.{EMBEDDING}"][:200]}),
    )
    with pytest.raises(WeightsError, match="has 262 tokens and its model 200"):
        _ = FluxPipeline(str(klein)).tokenizers


@pytest.mark.parametrize("kind", KINDS)
def test_float16_steps_paint_nearly_what_float32_does(
    folders: Mapping[Kind, Path], kind: Kind
) -> None:
    exact = paint(folders[kind])
    half = FluxPipeline(str(folders[kind]), dtype="float16")
    image = np.array(half.generate_images("a cat", 1, 2, 4.0, SIZE, seed=3))
    assert 0 < np.abs(image - exact).max() < 0.05


@pytest.mark.parametrize(("kind", "layout"), [("klein", "diffusers"), ("dev", "bfl")])
def test_a_fused_folder_paints_what_fusing_on_the_way_does(
    folders: Mapping[Kind, Path],
    exact: Mapping[Kind, np.ndarray],
    tmp_path: Path,
    kind: Kind,
    layout: str,
) -> None:
    """LoRA in diffusers' names, one of them with swapped halves, and LoKr on a fused matrix."""
    rng = np.random.default_rng(0)
    arrays = {}
    for module, out, into in (
        ("transformer.transformer_blocks.0.attn.to_k", 64, 64),
        ("transformer.norm_out.linear", 128, 64),
        ("transformer.single_transformer_blocks.2.attn.to_qkv_mlp_proj", 576, 64),
    ):
        arrays[f"{module}.lora_A.weight"] = normal(rng, 4, into, size=0.4)
        arrays[f"{module}.lora_B.weight"] = normal(rng, out, 4, size=0.4)
    name = "diffusion_model.double_blocks.1.txt_attn.qkv"
    arrays |= {f"{name}.lokr_w1": normal(rng, 4, 4), f"{name}.lokr_w2": normal(rng, 48, 16)}
    adapter = write(tmp_path / "a.safetensors", arrays)
    source = folders[kind]
    if layout == "bfl":
        shutil.copytree(source, tmp_path / "source")
        names: dict[Kind, str] = {"klein": "flux-2-klein-4b", "dev": "flux2-dev"}
        file = tmp_path / "source" / f"{names[kind]}.safetensors"
        source = make_single_file(tmp_path / "source", file)
        for other in ("transformer/diffusion_pytorch_model.safetensors", "model_index.json"):
            (tmp_path / "source" / other).unlink()
    made = tmp_path / "fused"
    assert fuse_checkpoint(hub.resolve(str(source)), made, [(adapter, 0.7)]) == []
    fused = hub.resolve(str(made))
    loading.verify(fused)
    assert fused.architecture.identity == architecture_of(kind).identity
    assert json.loads((made / "transformer" / "config.json").read_text())["rope_theta"] == 2000
    on_the_way = paint(folders[kind], adapters=[(str(adapter), 0.7)], fuse_adapters=True)
    assert np.abs(paint(made) - on_the_way).max() < 1e-4
    assert np.abs(on_the_way - exact[kind]).max() > 0.05


def test_a_text_encoder_that_stood_alone_is_saved_under_transformers_names() -> None:
    form = Flux2Folder()
    for kind, before in (("klein", "model."), ("dev", "language_model.model.")):
        model = architecture_of(kind)
        assert form.saved_name(model, "layers.0.mlp.up_proj.weight").startswith(f"{before}layers.")
        assert form.saved_name(model, "proj_out.weight") == "proj_out.weight"
        saved = form.class_of(model, "text_encoder")["architectures"][0]
        assert saved.startswith("Qwen3" if kind == "klein" else "Mistral3")


def test_what_is_told_before_a_training(folders: Mapping[Kind, Path]) -> None:
    """That klein is distilled, and which model people train instead."""

    def notes(kind: Kind, **changed: Any) -> list[str]:
        base = hub.resolve(str(folders[kind]))
        request = TrainRequest("dataset", 1, model=kind, **changed)
        examples = [Example("a.png", caption, "", (32, 32), b"") for caption in ("a", "b" * 600)]
        return [note.text for note in notes_of(prepare(request, examples, base), base)]

    distilled, cut = notes("klein")
    assert distilled.startswith("klein was distilled to 4 steps") and "its base model" in distilled
    assert "reads 512 tokens of a caption" in cut and "a.png (from" in cut
    assert len(notes("base")) == len(notes("dev", guidance=3.0)) == 1
    assert "takes none" in notes("klein", guidance=3.0)[1]
    tiny = hub.resolve("tiny-klein")
    plan = prepare(
        TrainRequest("dataset", 1, model=tiny.name), [Example("", "a", "", (32, 32), b"")], tiny
    )
    assert not list(notes_of(plan, tiny)), "there is no base model of it to be named"


def test_the_base_model_of_a_published_one_is_named() -> None:
    for alias, known in PUBLISHED.items():
        base = known.architecture.undistilled
        assert (base is not None) == ("klein" in alias and "base" not in alias), alias
        if base is not None:
            size = "9b" if "9b" in alias else "4b"
            assert named(base) == f"klein-base-{size}"


def test_an_adapter_changes_the_picture(
    folders: Mapping[Kind, Path], exact: Mapping[Kind, np.ndarray], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    module = "diffusion_model.single_blocks.0.linear2"
    path = tmp_path / "lora.safetensors"
    write_safetensors(
        path,
        {
            f"{module}.lora_A.weight": rng.standard_normal((4, 256)).astype(np.float32),
            f"{module}.lora_B.weight": rng.standard_normal((64, 4)).astype(np.float32),
        },
    )
    beside = paint(folders["klein"], adapters=[str(path)])
    fused = paint(folders["klein"], adapters=[str(path)], fuse_adapters=True)
    assert np.abs(beside - exact["klein"]).max() > 0.01
    assert np.abs(beside - fused).max() < 1e-3


@pytest.mark.parametrize(("declared", "length"), [(48, 48), (None, 512), (131_072, 512)])
def test_a_vocabulary_may_declare_shorter_prompts(
    tmp_path: Path, declared: int | None, length: int
) -> None:
    """As a small model's does; that of Qwen3 declares what the language model reads."""
    folder = make_flux2(tmp_path / "made", text_length=None)
    if declared is not None:
        config = folder / "tokenizer" / "tokenizer_config.json"
        config.write_text(json.dumps({"model_max_length": declared}), encoding="utf-8")
    checkpoint = hub.resolve(str(folder))
    assert checkpoint.architecture.text_length == length
    tokens = loading.load_tokenizers(checkpoint).encode("a cat")
    assert len(tokens.ids) + tokens.padding == length
