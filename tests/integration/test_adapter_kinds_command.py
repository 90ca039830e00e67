"""`generate --adapter` with every kind of file: the picture is that of a model changed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxmesh.adapters.find import NAMES
from fluxmesh.request import GenerateRequest
from fluxmesh.storage import bfloat16
from fluxmesh.storage.safetensors import read_header, read_tensor
from fluxmesh.weights import hub
from tests.adapter_files import KINDS, alpha, by_rows, normal, product, write
from tests.alone import painted_alone
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import Run
from tests.integration.test_mesh_commands import MeshMachine, machine

__all__ = ["machine"]  # a fixture

STRENGTH = 0.7
PAINT = ("generate", "a dog", "--seed", 3, "--steps", 2, "--dtype", "float32",
         "--image-size", "32x32")  # fmt: skip
CLIP_FC1 = "encoder.layers.1.mlp.fc1"
T5_WO = "encoder.block.0.layer.1.DenseReluDense.wo"
QKV, LINEAR1, MLP_IN = (
    "double_blocks.0.img_attn.qkv",
    "single_blocks.1.linear1",
    "double_blocks.1.img_mlp.0",
)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def painted(model: Path) -> np.ndarray:
    """The picture of `PAINT` as Python makes it, to which `test_one_host` holds the command's."""
    request = GenerateRequest("a dog", 3, str(model), 1, 32, 32, 2, dtype="float32")
    return painted_alone(request)[0].astype(int)


class TwoModels:
    """A random model, and one that is to be as the first is with an adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("before", "after"):
            make_checkpoint(folder / name, seed=2, layout="bfl", guidance=True)
        self.files = {
            "transformer": "flux1-test.safetensors",
            "text_encoder": "text_encoder/model.safetensors",
            "text_encoder_2": "text_encoder_2/model.safetensors",
        }

    def path(self, name: str) -> Path:
        return self.folder / name / self.files["transformer"]

    def weight(self, component: str, module: str) -> np.ndarray:
        return self._arrays(component)[f"{module}.weight"].astype(np.float64)

    def change(self, component: str, module: str, by: np.ndarray) -> None:
        """Makes one weight of `after` another one."""
        arrays = self._arrays(component)
        key = f"{module}.weight"
        arrays[key] = (arrays[key] + by).astype(np.float32)
        write(self.folder / "after" / self.files[component], arrays)

    def _arrays(self, component: str) -> dict[str, np.ndarray]:
        header = read_header(self.folder / "after" / self.files[component])
        return {key: read_tensor(entry) for key, entry in header.entries.items()}


@pytest.fixture
def models(tmp_path: Path) -> TwoModels:
    return TwoModels(tmp_path)


def kind_with_text(models: TwoModels, kind: str) -> Path:
    """A file of a kind that adapts transformer, CLIP and T5 in kohya's keys."""
    rng = np.random.default_rng(7)
    arrays = {}
    for component, module, key in (
        ("transformer", QKV, "lora_unet_double_blocks_0_img_attn_qkv"),
        ("transformer", LINEAR1, "lora_unet_single_blocks_1_linear1"),
        ("text_encoder", CLIP_FC1, "lora_te1_text_model_encoder_layers_1_mlp_fc1"),
        ("text_encoder_2", T5_WO, "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo"),
    ):
        before = models.weight(component, module)
        stored, after = KINDS[kind](rng, before)
        models.change(component, module, STRENGTH * (after - before))
        arrays |= {f"{key}.{end}": array for end, array in stored.items()}
    return write(models.folder / f"{kind}.safetensors", arrays)


def mflux_lora(models: TwoModels) -> Path:
    """Bare `lora_A`, and one under the names of ComfyUI beside it."""
    rng = np.random.default_rng(8)
    out, into = models.weight("transformer", MLP_IN).shape
    a, b = normal(rng, 4, into), normal(rng, out, 4)
    models.change("transformer", MLP_IN, STRENGTH * product(b, a))
    arrays = {
        "transformer_blocks.1.ff.linear1.lora_A": a,
        "transformer_blocks.1.ff.linear1.lora_B": b,
    }
    return write(models.folder / "mflux.safetensors", arrays)


def peft_folder(models: TwoModels) -> Path:
    """DoRA with rslora, as PEFT saves it."""
    rng = np.random.default_rng(9)
    before = models.weight("transformer", QKV)[64:128]
    a, b, lengths = normal(rng, 4, 64), normal(rng, 64, 4), 1 + normal(rng, 64)
    after = by_rows(before + 6 / 2 * product(b, a), lengths)
    change = np.zeros_like(models.weight("transformer", QKV))
    change[64:128] = STRENGTH * (after - before)
    models.change("transformer", QKV, change)
    key = "base_model.model.transformer_blocks.0.attn.to_k"
    folder = models.folder / "peft"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    write(
        folder / "adapter_model.safetensors",
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b,
         f"{key}.lora_magnitude_vector": lengths},
    )  # fmt: skip
    return folder


MADE = {
    "lora": lambda models: kind_with_text(models, "lora"),
    "lokr": lambda models: kind_with_text(models, "lokr_half"),
    "loha": lambda models: kind_with_text(models, "loha_large"),
    "dora": lambda models: kind_with_text(models, "dora"),
    "mflux": mflux_lora,
    "peft": peft_folder,
}


@pytest.mark.parametrize("made", MADE)
def test_the_picture_is_that_of_a_model_changed_by_hand(
    fluxmesh: Run, models: TwoModels, tmp_path: Path, made: str
) -> None:
    file = MADE[made](models)
    runs = {
        "beside": ("--adapter", f"{file}@{STRENGTH}"),
        "fused": ("--adapter", f"{file}:{STRENGTH}", "--fuse-adapter"),
    }
    for name, options in runs.items():
        done = fluxmesh(
            *PAINT, "--model", models.path("before"), *options, "--output", f"{name}.png"
        )
        assert done.code == 0, done.err
        assert "left out" not in done.err
    by_hand = painted(models.path("after"))
    assert np.abs(painted(models.path("before")) - by_hand).max() > 3
    assert np.abs(pixels(tmp_path / "beside.png") - by_hand).max() <= 1
    assert np.abs(pixels(tmp_path / "fused.png") - by_hand).max() <= 1


@pytest.mark.parametrize("kind", ["lokr_half", "dora"])
def test_text_encoders_are_fused_into_a_folder_too(
    fluxmesh: Run, models: TwoModels, tmp_path: Path, kind: str
) -> None:
    file = kind_with_text(models, kind)
    done = fluxmesh("adapters", "fuse", models.path("before"), f"{file}@{STRENGTH}", "fused")
    assert done.code == 0, done.err
    fused = hub.resolve(str(tmp_path / "fused"))
    for component, module in (("text_encoder", CLIP_FC1), ("text_encoder_2", T5_WO)):
        entries = read_header(fused.components[component].files[0]).entries
        key = next(key for key in entries if key.endswith(f"{module}.weight"))
        expected = models.weight(component, module)
        np.testing.assert_allclose(read_tensor(entries[key]), expected, atol=1e-6)
    done = fluxmesh(*PAINT, "--model", "fused", "--output", "fused.png")
    assert done.code == 0, done.err
    assert np.abs(pixels(tmp_path / "fused.png") - painted(models.path("after"))).max() <= 1


def test_what_is_left_out_is_counted_and_named(
    fluxmesh: Run, models: TwoModels, tmp_path: Path
) -> None:
    file = kind_with_text(models, "lora")
    arrays = {key: read_tensor(entry) for key, entry in read_header(file).entries.items()}
    for end in ("lora_down.weight", "lora_up.weight"):
        arrays[f"lora_te2_text_model_encoder_layers_31_mlp_fc1.{end}"] = np.ones((4, 4), np.float32)
    write(tmp_path / "sdxl-like.safetensors", arrays)
    done = fluxmesh(*PAINT, "--model", models.path("before"), "--adapter", "sdxl-like.safetensors")
    assert done.code == 0
    assert "2 keys of sdxl-like.safetensors left out (lora_te2_text_model" in done.err


def test_a_bad_adapter_is_a_sentence_and_costs_a_warm_mesh_nothing(machine: MeshMachine) -> None:
    """Truncated, of another model, NaN, too strong: exit 1, no host lost, the engine goes on."""
    machine.up(machine.hostfile(2))
    before = [host["engine_pid"] for host in machine.hosts()]
    ask = ("generate", "a red apple", "--model", machine.model, "--image-size", "32x32")
    assert machine(*ask).code == 0
    rng = np.random.default_rng(0)
    a, b = normal(rng, 4, 64), normal(rng, 64, 4)
    keys = ("lora_unet_img_in.lora_down.weight", "lora_unet_img_in.lora_up.weight")
    good = write(machine.folder / "good.safetensors", dict(zip(keys, (a, b), strict=True)))
    nan = np.where(np.arange(64 * 4).reshape(64, 4) == 7, np.nan, b).astype(np.float32)
    write(machine.folder / "nan.safetensors", dict(zip(keys, (a, nan), strict=True)))
    (machine.folder / "cut.safetensors").write_bytes(good.read_bytes()[:-9])
    (machine.folder / "text.safetensors").write_text("dog")
    wan = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": a,
           "diffusion_model.blocks.0.self_attn.q.lora_B.weight": b}  # fmt: skip
    write(machine.folder / "wan.safetensors", wan)
    for adapter, words in (
        ("cut.safetensors", "truncated"),
        ("text.safetensors", "is text that begins 'dog'"),
        ("wan.safetensors", "another model, Wan"),
        ("nan.safetensors", "lora_unet_img_in.lora_up.weight holds NaN or infinity"),
        ("good.safetensors@1e39", "lower the strength"),
        ("no.safetensors", "No adapter file no.safetensors"),
    ):
        done = machine(*ask, "--adapter", adapter)
        assert done.code == (2 if adapter == "no.safetensors" else 1), (adapter, done.err)
        assert words in done.err and "lost" not in done.err, done.err
        assert adapter.partition("@")[0] in done.err and str(machine.folder) not in done.err
        assert len([line for line in done.err.splitlines() if "Error" in line]) == 1, done.err
    assert [host["engine_pid"] for host in machine.hosts()] == before
    done = machine(*ask, "--adapter", "good.safetensors@0.5")
    assert done.code == 0, done.err


@pytest.mark.parametrize("kind", ["lokr_half", "dora"])
def test_hosts_that_share_each_image_make_the_same_of_an_adapter(tmp_path: Path, kind: str) -> None:
    file = kind_with_text(TwoModels(tmp_path), kind)
    # In diffusers' layout, which says that its pictures are small: `up` times a step of that size.
    model = make_checkpoint(tmp_path / "model", seed=2, guidance=True).path
    mesh = MeshMachine(tmp_path, model)
    try:
        mesh.up(mesh.hostfile(2), "--dtype", "float32", "--no-warm")
        for placement in ("data", "tensor", "sequence"):
            done = mesh(*PAINT, "--model", mesh.model, "--adapter", f"{file}@{STRENGTH}",
                        "--placement", placement, "--output", f"{placement}.png")  # fmt: skip
            assert done.code == 0, done.err
    finally:
        mesh("down", "--force")
    one = pixels(tmp_path / "data.png")
    for placement in ("tensor", "sequence"):
        assert np.abs(pixels(tmp_path / f"{placement}.png") - one).max() <= 1


# --- show, list, convert -------------------------------------------------------------------------


def test_show_tells_what_a_file_is_and_how_to_call_it_up(
    fluxmesh: Run, models: TwoModels, tmp_path: Path
) -> None:
    file = kind_with_text(models, "lora")
    arrays = {key: read_tensor(entry) for key, entry in read_header(file).entries.items()}
    metadata = {
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.title": "A dog\x1b[31m",
        "ss_tag_frequency": json.dumps({"10_sks": {"dog": 7, "park": 2}, "5_b": {"dog": 1}}),
        "ss_dataset_dirs": json.dumps({"10_ohwx dog": {"n_repeats": 10}}),
    }
    write(tmp_path / "dog.safetensors", arrays, metadata)
    show = ("adapters", "show", "dog.safetensors", "--model", models.path("before"))
    done = fluxmesh(*show)
    assert done.code == 0, done.err
    for text in (
        *("LoRA of rank 4", "kohya", "F32", "2 linears of transformer"),
        *("1 linear of text_encoder,", "sks dog; ohwx dog", "dog (8), park (2)"),
    ):
        assert text in done.out, done.out
    assert "\x1b" not in done.out
    (shown,) = fluxmesh(*show, "--json").of("shown")
    assert shown["ranks"] == [4] and shown["kinds"] == ["LoRA"] and shown["problem"] == ""
    assert shown["adapts"] == {"transformer": 2, "text_encoder": 1, "text_encoder_2": 1}
    assert shown["tags"][0] == {"tag": "dog", "count": 8}
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    a, b = np.ones((4, 8), np.float32), np.ones((8, 4), np.float32)
    write(tmp_path / "sd.safetensors", {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b})
    other = fluxmesh("adapters", "show", "sd.safetensors")
    assert (
        other.code == 0
        and "Stable Diffusion" in other.out
        and "nothing of a model that is known" in other.out
    )


def test_list_names_what_adapter_takes(
    fluxmesh: Run, models: TwoModels, tmp_path: Path, home: Path
) -> None:
    file = kind_with_text(models, "lokr_half")
    (tmp_path / "mlx_output").mkdir()
    file.rename(tmp_path / "mlx_output" / NAMES[0])
    (tmp_path / "._x.safetensors").write_bytes(b"\0\5\26\7" * 8)  # of an exFAT disk
    snapshot = home / "hub" / "hub" / "models--owner--repo" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    kind_with_text(models, "lora").rename(snapshot / "dog.safetensors")
    done = fluxmesh("adapters", "list")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith(f"mlx_output/{NAMES[0]}: LoKr of rank 3")
    assert lines[1].startswith("owner/repo:dog.safetensors: LoRA of rank 4")
    assert len(lines) == 2  # the models' own files are none
    done = fluxmesh(*PAINT, "--model", models.path("before"), "--adapter", "owner/repo@0.5")
    assert done.code == 0, done.err


@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "bfl", "mlx"])
def test_converting_keeps_the_dtype_and_text_encoders(
    fluxmesh: Run, models: TwoModels, tmp_path: Path, file_format: str
) -> None:
    file = kind_with_text(models, "lora")
    header = read_header(file)
    arrays = {
        key: bfloat16.of_float32(read_tensor(entry)) if entry.shape else alpha(4)
        for key, entry in header.entries.items()
    }
    dtypes = {key: "BF16" for key, entry in header.entries.items() if entry.shape}
    write(tmp_path / "half.safetensors", arrays, dtypes=dtypes)
    done = fluxmesh("adapters", "convert", "half.safetensors", "out.safetensors", "--to",
                    file_format, "--model", models.path("before"))  # fmt: skip
    assert done.code == 0, done.err
    entries = read_header(tmp_path / "out.safetensors").entries
    assert {entry.dtype for entry in entries.values() if entry.shape} == {"BF16"}
    if file_format == "mlx":
        assert "2 linears of text encoders are left out" in done.err
        return
    assert "4 linears" in done.out
    for name in ("half", "out"):
        done = fluxmesh(*PAINT, "--model", models.path("before"), "--adapter",
                        f"{name}.safetensors", "--output", f"{name}.png")  # fmt: skip
        assert done.code == 0, done.err
    assert (pixels(tmp_path / "half.png") == pixels(tmp_path / "out.png")).all()


def test_what_convert_cannot_write_is_named_with_a_way_out(
    fluxmesh: Run, models: TwoModels, tmp_path: Path
) -> None:
    file = kind_with_text(models, "lokr_half")
    done = fluxmesh("adapters", "convert", file, "out.safetensors", "--to", "kohya",
                    "--model", models.path("before"))  # fmt: skip
    assert done.code == 1 and "LoKr" in done.err and "adapters fuse" in done.err
    assert not (tmp_path / "out.safetensors").exists()
