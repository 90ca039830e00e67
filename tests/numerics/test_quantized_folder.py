"""fluxmesh's own quantized folder: equal to quantizing on the way, written whole or not."""

from __future__ import annotations

import json

import pytest

from fluxmesh.errors import OutputError, UsageError, WeightsError
from fluxmesh.weights import hub, loading
from fluxmesh.weights.quantize import quantize_checkpoint
from tests.checkpoints import make_checkpoint
from tests.numerics.loading import (
    LOADERS,
    assert_same,
    parameters,
    resolved,
)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_a_quantized_folder_loads_as_what_quantizing_on_the_way_gives(tmp_path, layout, bits):
    source = resolved(make_checkpoint(tmp_path / "source", layout=layout, guidance=True))
    folder = tmp_path / "quantized"
    quantize_checkpoint(source, folder, bits)
    quantized = hub.resolve(str(folder))
    loading.verify(quantized)
    assert (quantized.kind, quantized.bits) == ("quantized", bits)
    assert quantized.defaults == source.defaults
    assert quantized.architecture == source.architecture
    for component, load in LOADERS.items():
        options = {} if component == "vae" else {"bits": bits}
        assert_same(parameters(load(quantized)), parameters(load(source, **options)))
    clip, t5 = loading.load_tokenizers(quantized)
    assert t5.encode("a red dog") == loading.load_tokenizers(source)[1].encode("a red dog")
    assert clip.encode("a red dog") == loading.load_tokenizers(source)[0].encode("a red dog")


def test_a_quantized_folder_is_smaller(tmp_path):
    made = make_checkpoint(tmp_path / "source", dtype="bfloat16")
    source = resolved(made)
    quantize_checkpoint(source, tmp_path / "q", 4)
    quantized = hub.resolve(str(tmp_path / "q"))
    sizes = [c.components["transformer"].nbytes for c in (source, quantized)]
    assert sizes[1] < 0.5 * sizes[0]


def test_a_large_component_is_written_in_several_files(tmp_path, monkeypatch):
    from fluxmesh.weights import quantize

    source = resolved(make_checkpoint(tmp_path / "source"))
    monkeypatch.setattr(quantize, "SHARD_BYTES", 100_000)
    quantize_checkpoint(source, tmp_path / "q", 8)
    quantized = hub.resolve(str(tmp_path / "q"))
    assert len(quantized.components["transformer"].files) > 2
    assert_same(
        parameters(loading.load_transformer(quantized)),
        parameters(loading.load_transformer(source, bits=8)),
    )


def test_quantizing_never_overwrites(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        quantize_checkpoint(source, tmp_path / "there", 4)
    assert list((tmp_path / "there").iterdir()) == []


def test_quantizing_into_a_missing_folder_says_so(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    with pytest.raises(OutputError, match="does not exist"):
        quantize_checkpoint(source, tmp_path / "absent" / "q", 4)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_quantization_leaves_nothing(tmp_path, monkeypatch, error):
    from fluxmesh.weights import quantize

    source = resolved(make_checkpoint(tmp_path / "source"))
    calls = []

    def failing(path, value):
        calls.append(path)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(quantize, "write_json", failing)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        quantize_checkpoint(source, tmp_path / "q", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("bits", [2, 7, 16])
def test_only_the_offered_bits_are_taken(tmp_path, bits):
    source = resolved(make_checkpoint(tmp_path / "source"))
    with pytest.raises(UsageError, match=str(bits)):
        quantize_checkpoint(source, tmp_path / "q", bits)


def test_a_quantized_folder_stays_at_its_bits(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    quantize_checkpoint(source, tmp_path / "q", 4)
    quantized = hub.resolve(str(tmp_path / "q"))
    with pytest.raises(UsageError, match="4 bits"):
        loading.load_transformer(quantized, bits=8)
    with pytest.raises(UsageError, match="4 bits"):
        quantize_checkpoint(quantized, tmp_path / "q8", 8)


def test_a_damaged_quantized_folder_is_refused(tmp_path):
    source = resolved(make_checkpoint(tmp_path / "source"))
    quantize_checkpoint(source, tmp_path / "q", 4)
    manifest = tmp_path / "q" / "fluxmesh.json"
    content = json.loads(manifest.read_text())
    content["quantization"]["bits"] = 8  # the files hold 4
    manifest.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="shape"):
        loading.verify(hub.resolve(str(tmp_path / "q")))
    content["format"] = 2
    manifest.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="format 2"):
        hub.resolve(str(tmp_path / "q"))
