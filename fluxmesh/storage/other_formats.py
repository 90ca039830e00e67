"""Files that are named as weights and are none: told by how they begin, or by their ending.

A pickle, a pointer that git left in a file's place, the page of a login, an archive, a picture.
Below `safetensors.py`, which asks of a file that does not begin as its own format, and
`weights/identify.py`, which asks of any file. Imports no mlx.
"""

from __future__ import annotations

from pathlib import Path

FIRST = 32  # bytes that tell
SAFE = "look for the same model as .safetensors, the one format that can only hold numbers"
PICKLE = (
    "a pickle of PyTorch, which can run any program as it is read; fluxmesh loads .safetensors and "
    f"no other format of weights: {SAFE}"
)
OTHER_FORMAT = f"fluxmesh loads .safetensors and no other format of weights: {SAFE}"
AGAIN = "download the file again"
LFS = "`git lfs pull` beside it fetches the file"
ANNEX = "`git annex get` beside it fetches the file"
NAME_IT = "name the .safetensors file of the model"
PAGES = (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML", b"<?xml")
# (how a file begins, what it is then)
MAGIC = (
    (b"PK\x03\x04", PICKLE),
    *((bytes([0x80, version]), PICKLE) for version in range(2, 6)),
    (b"version https://git-lfs", f"a pointer of Git LFS and not the file; {LFS}"),
    (b"/annex/objects/", f"a pointer of git-annex and not the file; {ANNEX}"),
    (b"bplist00", "a stub that iCloud left in a file's place; download the file in Finder"),
    *((page, f"a web page and not the file, as a login leaves it; {AGAIN}") for page in PAGES),
    (b"\x89HDF", f"an HDF5 file; {OTHER_FORMAT}"),
    (b"\x93NUMPY", f"an array of NumPy; {OTHER_FORMAT}"),
    (b"\x1f\x8b", f"an archive (gzip); unpack it, and {NAME_IT}"),
    (b"7z\xbc\xaf\x27\x1c", f"an archive (7z); unpack it, and {NAME_IT}"),
    (b"Rar!", f"an archive (RAR); unpack it, and {NAME_IT}"),
    (b"\x89PNG", f"a picture (PNG); {NAME_IT}"),
    (b"\xff\xd8\xff", f"a picture (JPEG); {NAME_IT}"),
)
ENDINGS = {
    **dict.fromkeys((".ckpt", ".bin", ".pt", ".pth", ".pkl"), PICKLE),
    **dict.fromkeys((".onnx", ".msgpack", ".h5", ".npz"), f"no .safetensors; {OTHER_FORMAT}"),
    ".gguf": f"called .gguf and begins otherwise; {AGAIN}",
}
SETTINGS = "a model's settings and not its weights; name the folder that it is in"
_BEFORE_PAGES = b"\xef\xbb\xbf \t\r\n"  # UTF-8's mark, and blanks


def what(path: Path, first: bytes) -> str | None:
    """What a file is whose first bytes are these, after "PATH is"; None where nothing tells."""
    if not first:
        return "empty; download it again"
    begin = first.lstrip(_BEFORE_PAGES)
    for magic, form in MAGIC:
        if begin.startswith(magic):
            return form
    ending = path.suffix.lower()
    if ending in ENDINGS:
        return ENDINGS[ending]
    if ending == ".json":
        return SETTINGS
    # A header's length never looks like words: its last bytes are zeros.
    if first.isascii() and all(byte >= 32 or byte in _BEFORE_PAGES for byte in first):
        line = begin.decode().partition("\n")[0].strip()
        return f"text that begins {line!r}, as a refused download leaves it; {AGAIN}"
    return None
