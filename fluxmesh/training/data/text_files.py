"""Text of the user's files: captions and lists of them, in the encodings that editors write."""

from __future__ import annotations

from pathlib import Path

from fluxmesh.training.data.remarks import Remarks

UTF32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")  # byte order marks
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def decode(data: bytes) -> str:
    """UTF-8, with a byte order mark or without one, or UTF-16 and UTF-32 with one.

    Raises `ValueError` for all else: which of the many older encodings a file has can't be known.
    """
    if data.startswith(UTF32):
        return data.decode("utf-32")
    if data.startswith(UTF16):
        return data.decode("utf-16")
    text = data.decode("utf-8-sig")
    if "\0" in text:  # UTF-16 without a mark, which is UTF-8 too
        raise ValueError("a NUL in a text")
    return text


def read_text(file: Path, name: str, remarks: Remarks) -> str | None:
    """A file's text; None, and a remark that calls it `name`, where it can't be read."""
    try:
        return decode(file.read_bytes())
    except ValueError:
        remarks.undecodable.append(name)
    except OSError as error:
        remarks.problems.append(f"{name} can't be read ({error.strerror})")
    return None
