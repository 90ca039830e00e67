"""What a checkpoint that is pushed may be called, and how much of it there may be."""

from __future__ import annotations

import dataclasses

import pytest

from fluxmesh.errors import UsageError
from fluxmesh.wire.messages import ModelParcel, ParcelFile, ReceiveModel
from fluxmesh.wire.messages.parcel import MAX_FILE_BYTES, MAX_FILES
from fluxmesh.wire.protocol import ProtocolError, decode, encode

WEIGHTS = ParcelFile("transformer/model.safetensors", 10, "a" * 64)
PARCEL = ModelParcel("somebody/flux", "c" * 40, "0" * 16, (WEIGHTS,))


def order(parcel: ModelParcel) -> ReceiveModel:
    return ReceiveModel("somebody/flux", parcel, b"t" * 32, ("10.0.0.1",))


def with_file(**fields: object) -> ModelParcel:
    file = dataclasses.replace(WEIGHTS, **fields)  # type: ignore[arg-type]
    return dataclasses.replace(PARCEL, files=(file,))


def test_a_parcel_arrives_as_it_was_sent() -> None:
    frames = [bytes(frame) for frame in encode(order(PARCEL), 3)]
    assert decode(frames) == (3, order(PARCEL))
    PARCEL.check()


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "/", "/etc/passwd.json", "../up.json", "a/../../up.json", "a//b.json"),
        *("./a.json", "a/./b.json", ".hidden.json", "a/.ssh/b.json", "a\\b.json", "C:\\a.json"),
        *("a.json\n", "a\0.json", "~/a.json", "-rf.json", "a/b/c/d/e.json", "x" * 129 + ".json"),
        *("aux:stream.json", "é.json", "a/ b.json", "$(id).json", "*.json"),
    ],
)
def test_a_name_that_leads_elsewhere_is_no_message(path: str) -> None:
    with pytest.raises(ProtocolError):
        encode(order(with_file(path=path)))
    frame = bytes(encode(order(PARCEL))[0])
    with pytest.raises(ProtocolError):  # nor one that another program has made
        decode([_repacked(frame, path)])


def _repacked(frame: bytes, path: str) -> bytes:
    import msgpack

    header = msgpack.unpackb(frame)
    header["fields"]["parcel"]["files"][0]["path"] = path
    packed: bytes = msgpack.packb(header)
    return packed


@pytest.mark.parametrize("name", ["", "..", "../flux", "/flux", "a/../b", "a/b/c", ".flux", "a/"])
def test_a_checkpoint_is_named_below_a_folder_of_models(name: str) -> None:
    with pytest.raises(ProtocolError):
        encode(order(dataclasses.replace(PARCEL, name=name)))


@pytest.mark.parametrize("blob", ["../x", "a/b", ".x", "x" * 129, "a b", "\0"])
def test_a_blob_is_named_in_the_folder_of_blobs(blob: str) -> None:
    with pytest.raises(ProtocolError):
        encode(order(with_file(blob=blob)))


@pytest.mark.parametrize("commit", ["../main", "main", "ABCDEF0", "a" * 65, "abc"])
def test_a_commit_is_a_hash(commit: str) -> None:
    with pytest.raises(ProtocolError):
        encode(order(dataclasses.replace(PARCEL, commit=commit)))


def test_there_is_an_end_to_sizes_and_numbers() -> None:
    with pytest.raises(ProtocolError):
        encode(order(with_file(nbytes=MAX_FILE_BYTES + 1)))
    with pytest.raises(ProtocolError):
        encode(order(with_file(nbytes=-1)))
    many = tuple(ParcelFile(f"f{i}.json", 1) for i in range(MAX_FILES + 1))
    with pytest.raises(ProtocolError):
        encode(order(dataclasses.replace(PARCEL, files=many)))
    assert encode(order(dataclasses.replace(PARCEL, files=many[:-1])))  # fits into one header


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ((), "0 files"),
        ((ParcelFile("run.py", 1),), "no part of a checkpoint"),
        ((ParcelFile("model.bin", 1),), "no part of a checkpoint"),
        ((ParcelFile("a.json", 1), ParcelFile("a.json", 1)), "two files"),
        ((ParcelFile("a.json", 1), ParcelFile("A.JSON".lower(), 1)), "two files"),
        ((ParcelFile("Vae/a.json", 1), ParcelFile("vae/A.json", 1)), "two files"),
        ((ParcelFile("a.json", 1), ParcelFile("A.json/b.json", 1)), "a file and a folder"),
        ((ParcelFile("a.json", 1, "f00"), ParcelFile("b.json", 2, "F00")), "its own size"),
        (tuple(ParcelFile(f"{i}.json", MAX_FILE_BYTES) for i in range(3)), "can't be sent"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(
    files: tuple[ParcelFile, ...], problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        dataclasses.replace(PARCEL, files=files).check()


@pytest.mark.parametrize("name", ["flux", "a--b/flux", "a/b--c", "a/..b"])
def test_a_snapshot_belongs_to_a_repository(name: str) -> None:
    with pytest.raises(UsageError, match="no repository"):
        dataclasses.replace(PARCEL, name=name).check()
    dataclasses.replace(PARCEL, name=name, commit="").check()  # a folder may be called so
