"""Weight files that are whole are read; those that are not are refused in one sentence."""

import errno
import json

import numpy as np
import pytest

from fluxmesh.errors import ModelNotFoundError, OutputError, WeightsError
from fluxmesh.storage import durable, safetensors
from tests.checkpoints import write_json, write_safetensors

ARRAY = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"first": ARRAY, "second": -ARRAY})
    return path


def refused(path, *words):
    with pytest.raises(WeightsError) as caught:
        safetensors.read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message
    return message


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_rows_are_those_of_the_file(file):
    entry = safetensors.read_header(file).entries["second"]
    np.testing.assert_array_equal(safetensors.read_tensor(entry), -ARRAY)
    out = np.empty((2, 4), dtype=np.float32)
    safetensors.read_rows_into(out, entry, 3)
    np.testing.assert_array_equal(out, -ARRAY[3:5])


def test_a_large_tensor_is_read_in_pieces_by_several_threads(file, monkeypatch):
    monkeypatch.setattr(safetensors, "PIECE", 12)  # three numbers; a row is four
    entry = safetensors.read_header(file).entries["second"]
    np.testing.assert_array_equal(safetensors.read_tensor(entry), -ARRAY)
    out = np.empty((2, 4), dtype=np.float32)
    safetensors.read_rows_into(out, entry, 3)
    np.testing.assert_array_equal(out, -ARRAY[3:5])
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="ended in the middle of second"):
        safetensors.read_tensor(entry)


def test_a_truncated_file_is_refused_and_names_the_tensor(file):
    file.write_bytes(file.read_bytes()[:-1])
    refused(file, "truncated", "second", "again")


def test_a_file_cut_inside_its_header_is_refused(file):
    file.write_bytes(file.read_bytes()[:40])
    refused(file, "truncated")


def test_a_dtype_that_is_not_known_says_what_to_take_instead(tmp_path):
    header = {"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    with_header(tmp_path / "model.safetensors", header, b"0")
    refused(tmp_path / "model.safetensors", "'F4'", "name a file that stores it in bfloat16")


@pytest.mark.parametrize("content", [b"", b"12", b"<html>Not found</html>" * 3, b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(file, content):
    file.write_bytes(content)
    refused(file, "download", "again")


def test_bytes_after_the_last_tensor_are_refused(file):
    file.write_bytes(file.read_bytes() + b"more")
    refused(file, "4 bytes more")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16]},
        "F32",
        None,
    ],
)
def test_a_header_that_contradicts_itself_is_refused(file, entry):
    with_header(file, {"x": entry}, bytes(16))
    refused(file, "corrupt header")


@pytest.mark.parametrize("header", [b"[]", b"nonsense", b'{"__metadata__"', b"[" * 5000, b"\xff"])
def test_a_header_that_is_no_json_object_is_refused(file, header):
    with_header(file, header)
    refused(file, "corrupt header")


def test_an_unknown_dtype_is_named(file):
    with_header(file, {"x": {"dtype": "Q7", "shape": [1], "data_offsets": [0, 1]}}, b"0")
    refused(file, "Q7")


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(file):
    entry = safetensors.read_header(file).entries["second"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="ended in the middle of second"):
        safetensors.read_tensor(entry)


def test_a_missing_file_is_an_error_of_one_sentence(tmp_path):
    refused(tmp_path / "absent.safetensors", "No such file")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd.safetensors",
        "sub/part.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "..",
        "",
        "weights.bin",
        7,
        None,
    ],
)
def test_an_index_may_not_lead_out_of_its_folder(tmp_path, name):
    write_safetensors(tmp_path / "secret.safetensors", {"x": ARRAY})
    index = tmp_path / "folder" / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"x": name}})
    with pytest.raises(WeightsError, match="weight_map"):
        safetensors.read_index(index)


def test_an_index_whose_file_is_missing_says_which(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"x": "part-1.safetensors"}})
    with pytest.raises(ModelNotFoundError, match=r"part-1\.safetensors.*missing"):
        safetensors.read_index(index)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json"):
        safetensors.read_index(index)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "out.safetensors"
    bits = np.array([0x3F80, 0x4000], dtype=np.uint16)
    arrays = {"x": (ARRAY.T, "F32"), "y": (bits, "BF16"), "z": (np.float32(2.5).reshape(()), "F32")}
    safetensors.write_tensors(path, arrays, {"lora_rank": "8"})
    header = safetensors.read_header(path)
    assert header.metadata == {"lora_rank": "8"}
    np.testing.assert_array_equal(safetensors.read_tensor(header.entries["x"]), ARRAY.T)
    np.testing.assert_array_equal(safetensors.read_tensor(header.entries["y"]), bits)
    assert safetensors.read_tensor(header.entries["z"]) == 2.5


def test_writing_never_replaces_a_file(file):
    before = file.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        safetensors.write_tensors(file, {"x": (ARRAY, "F32")}, {})
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (OSError(errno.EIO, "Input/output error"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_file_that_can_not_be_finished_is_removed(tmp_path, monkeypatch, error, expected):
    def fail(_handle):
        raise error

    monkeypatch.setattr(durable, "sync", fail)
    with pytest.raises(expected) as caught:
        safetensors.write_tensors(tmp_path / "out.safetensors", {"x": (ARRAY, "F32")}, {})
    assert list(tmp_path.iterdir()) == []
    if getattr(error, "errno", None) == errno.ENOSPC:
        assert "disk is full" in str(caught.value)


def test_writing_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        safetensors.write_tensors(tmp_path / "absent" / "x.safetensors", {}, {})
