"""Requests that are well formed, and whose fields, names, forms and pictures nobody should send.

Kinds of attack as in `hostile_wire.py`: each has something wrong, and is to be refused with 4xx.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

from tests.hostile import FIELDS, PICTURES, ZEROS, chunk, png, zeros
from tests.hostile_wire import POSTS, WIRE_KINDS, WireAttack, request

TRAVERSALS = (
    "../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "....//....//etc/passwd", "/etc/passwd",
    "%2e%2e/%2e%2e/serve.key", "..%c0%af..%c0%afetc%c0%afpasswd", "~/.ssh/id_rsa",
    "file:///etc/passwd",
    "\\\\host\\share", "C:\\boot.ini", "tiny\x00.png", "http://evil.example/a.safetensors", "con",
    ".",
)  # fmt: skip
UNICODE = (
    "\u202edrac\u202c", "\ufeff", "e\u0301" * 500, "\U0001f9d1\u200d\U0001f9d1" * 40, "\x00",
    "\x1b[2J",
    "\u2028\u2029", "ﷺ" * 99, "\x7f\x80\x9f", "١٢٣", "²", "½", "\ud800", "ſcript",
    "\u0000\ufffe\uffff",
)  # fmt: skip
NUMBERS = (
    "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1" + "0" * 400, "-" + "9" * 5000, "0x10",
    "1_000", "1e-400", '"1e999"', '"NaN"', '"inf"', '"١٢"', '"9' + "9" * 4400 + '"', "[1]",
    '{"a": 1}',
    "2.5e300", "-0.0000001", '"+-1"', "99999999999999999999", "true", '" "',
)  # fmt: skip
NUMERIC = (
    "n", "n_images", "seed", "steps", "width", "height", "guidance", "guidance_scale", "cfg",
    "strength", "output_compression", "partial_images", "batch_size", "n_iter", "cfg_scale",
    "denoising_strength",
)  # fmt: skip


def as_json(fields: Any) -> bytes:
    return json.dumps(fields).encode("utf-8", "surrogatepass")


def part(about: str, data: bytes, *lines: str) -> bytes:
    text = "\r\n".join(("--b", f"Content-Disposition: form-data; {about}", *lines, "", ""))
    return text.encode("utf-8", "surrogatepass") + data + b"\r\n"


def jpeg(width: int, height: int) -> bytes:
    """One that says that it is so large."""
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda" + bytes(20)


def bitmap(width: int, height: int) -> bytes:
    about = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 1, 1, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 9, 0, 0, 54) + about + bytes(9)


def animated(width: int, height: int) -> bytes:
    """A GIF of that size with very many frames."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF0, 0, 0) + bytes(6) + frame * 5000


PROFILE = chunk(b"iCCP", b"a\0\0" + ZEROS)
BOMBS = (
    *PICTURES[:4], *PICTURES[5:], png(2**31 - 1, 2**31 - 1, b""), png(65_000, 65_000, b"", PROFILE),
    jpeg(65_535, 65_535), jpeg(0, 0), bitmap(60_000, 60_000), bitmap(2**31 - 1, -(2**31)),
    animated(65_535, 65_535), b"", b"\x00" * 5000,
    b"RIFF\x24\x00\x00\x00WEBPVP8L\x18\x00\x00\x00/" + b"\xff" * 24,
    b"\x00\x00\x00\x1cftypavif" + b"\xff" * 3000, b"\x00\x00\x00\x18ftypheic" + b"\x00" * 3000,
)  # fmt: skip


def numbers(dice: Random) -> WireAttack:
    """Infinities and numbers that nothing holds, in every field that is one."""
    name = dice.choice(NUMERIC)
    path = dice.choice(("/v1/images/generations", "/sdapi/v1/txt2img", "/api/jobs", "/api/plan"))
    # With a prompt that is refused anyway: some of the numbers are right in some fields.
    text = f'{{"prompt": " ", "stream": true, "{name}": {dice.choice(NUMBERS)}}}'
    return WireAttack("numbers", (request(path, text.encode()),))


def unicode(dice: Random) -> WireAttack:
    """Letters of every kind in every field."""
    names = dice.sample(FIELDS, 4)
    fields: dict[str, Any] = {name: dice.choice(UNICODE) for name in names}
    if dice.random() < 0.3:
        fields |= {dice.choice(UNICODE): 1, "adapters": [{"name": dice.choice(UNICODE)}]}
    prompt = dice.choice(UNICODE)
    body = as_json({**fields, "prompt": prompt * (40_000 // len(prompt)), "steps": 0})
    path = dice.choice((*POSTS[:1], *POSTS[2:]))
    extra = (
        f"Idempotency-Key: {dice.choice(UNICODE)}",
        f"X-Fluxmesh-Client: {dice.choice(UNICODE)}",
    )
    return WireAttack("unicode", (request(path, body, *dice.choice(((), extra))),))


def names(dice: Random) -> WireAttack:
    """Names of files elsewhere, wherever something has a name."""
    name = dice.choice(TRAVERSALS)
    adapter = {"adapters": [{"name": name, "strength": 1}], "loras": [name]}
    lora = f"a <lora:{name.replace(':', '')}:1> dog"
    by_field = (
        ("/api/jobs", {"prompt": "a dog", **adapter}),
        ("/api/jobs", {"prompt": "a dog", "model": name}),
        ("/api/jobs", {"prompt": "a dog", "id": name}),
        ("/api/plan", {"prompt": "a dog", "model": name}),
        ("/v1/images/generations", {"prompt": "a dog", **adapter}),
        ("/sdapi/v1/txt2img", {"prompt": lora}),
        ("/sdapi/v1/txt2img", {"prompt": "x", "override_settings": {"sd_model_checkpoint": name}}),
        ("/sdapi/v1/options", {"sd_model_checkpoint": name}),
        ("/sdapi/v1/img2img", {"prompt": "x", "init_images": [name]}),
        ("/api/jobs", {"prompt": "x", "image": name, "mask": name}),
    )
    if dice.random() < 0.5:
        path, fields = dice.choice(by_field)
        return WireAttack("names", (request(path, as_json(fields)),))
    name = name.replace("\x00", "%00").replace(" ", "%20")
    path, method = dice.choice(
        (
            (f"/api/pictures/{name}", "GET"), (f"/api/pictures/{name}", "DELETE"),
            (f"/api/pictures/{name}/thumbnail", "GET"), (f"/api/jobs/{name}/events", "GET"),
            (f"/api/jobs/{name}", "DELETE"), (f"/v1/models/{name}x", "GET"), (f"/x/{name}", "GET"),
        )
    )  # fmt: skip
    return WireAttack("names", (request(path, b"", method=method),))


def json_bombs(dice: Random) -> WireAttack:
    """JSON that is deep, wide, long, or something else."""
    body = dice.choice(
        (
            b"[" * 200_000, b'{"a":' * 100_000, b"[" * 50_000 + b"]" * 50_000,
            b'{"prompt": [' + b"0," * 500_000 + b"0]}", b'{"' + b"k" * 2_000_000 + b'": 1}',
            b'{"prompt": ' + b"9" * 1_000_000 + b"}",
            b'{"prompt": "' + b"\\u0000" * 100_000 + b'"}',
            b"{" + b",".join(b'"%d": {}' % k for k in range(100_000)) + b"}",
            b'{"prompt": "x", "steps": 0, "prompt": null}', b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{",
            b"null", b"7",
            b'"prompt"', b'{"prompt": "\xc3\x28"}', b"{'prompt': 'x'}", b'{"prompt": "x",}',
            b"{}" * 9,
            b'{"__proto__": {"prompt": "x"}, "constructor": 1}',
            b'{"prompt": "\\ud800", "steps": 0}',
        )
    )  # fmt: skip
    kind = dice.choice(("application/json", "application/json; charset=utf-7", ""))
    return WireAttack("json bombs", (request(dice.choice(POSTS), body, kind=kind),))


PACKED = zeros(100, zlib.MAX_WBITS + 16)


def encodings(dice: Random) -> WireAttack:
    """Bodies of another kind than they say, and of kinds that nobody reads."""
    fields = as_json({"prompt": "a dog", "steps": 1})
    body = dice.choice((PACKED, zlib.compress(fields), fields.decode().encode("utf-16")))
    coding = dice.choice(("gzip", "deflate", "br", "gzip, gzip"))
    kind = dice.choice(
        ("application/json", "text/plain", "application/x-www-form-urlencoded", "a/b; q=\x80")
    )
    return WireAttack(
        "encodings", (request(dice.choice(POSTS), body, f"Content-Encoding: {coding}", kind=kind),)
    )


def form_bombs(dice: Random) -> WireAttack:
    """Forms of too many, too large, or broken parts."""
    file = 'name="image"; filename="{}"'
    parts = dice.choice(
        (
            [part(f'name="f{k}"', b"x") for k in range(20_000)],
            [part(file.format("a.png"), PICTURES[4])] * 40,
            [part('name="prompt"', b"x" * (3 << 20))],
            [part('name="prompt"', b"x", "X-Long: " + "a" * 200_000)],
            [part('name="prompt"', b"x", *(f"X-{k}: a" for k in range(5000)))],
            [part(file.format(dice.choice(TRAVERSALS)), dice.choice(PICTURES[:4]))],
            [part("name=\"image\"; filename*=UTF-8''..%2f..%2fa", dice.choice(PICTURES[:4]))],
            [part('name="image"', base64.b64encode(PICTURES[0]),
            "Content-Transfer-Encoding: base64")],
            [part('name="a', b"x")], [part("", b"x")], [part('name="' + "n" * 100_000 + '"', b"x")],
            [part('name="image"; filename="a"', b"x", "Content-Type: multipart/mixed; boundary=c")],
            [part('name="prompt"', b"\xff\xfe\x00")], [b"--b\r\n"] * 10_000, [b"--b" * 100_000],
        )
    )  # fmt: skip
    end = dice.choice((b"--b--\r\n", b"", b"--b", b"--b--" * 1000))
    kind = dice.choice(
        (
            "boundary=b",
            "boundary=b",
            "boundary=b",
            "boundary=",
            "boundary=" + "b" * 5000,
            "",
            "boundary=\x80",
        )
    )
    path = dice.choice(("/v1/images/edits", "/api/jobs", "/sdapi/v1/img2img"))
    body = b"".join(parts) + end
    return WireAttack("form bombs", (request(path, body, kind=f"multipart/form-data; {kind}"),))


def picture_bombs(dice: Random) -> WireAttack:
    """Pictures that unpack to gigabytes, or to nothing."""
    data = dice.choice(BOMBS)
    text = base64.b64encode(data).decode()
    field = dice.choice(("image", "mask", "control", "references", "init_images"))
    if dice.random() < 0.3:
        parts = part('name="prompt"', b"a dog") + part('name="image"; filename="a.png"', data)
        form = "multipart/form-data; boundary=b"
        return WireAttack(
            "picture bombs", (request("/v1/images/edits", parts + b"--b--\r\n", kind=form),)
        )
    fields = {"prompt": "a dog", "steps": 1, "image": text, field: [text] * dice.choice((1, 2, 20))}
    path = "/sdapi/v1/img2img" if field == "init_images" else "/api/jobs"
    return WireAttack("picture bombs", (request(path, as_json(fields)),))


KINDS: tuple[Callable[[Random], WireAttack], ...] = (
    *WIRE_KINDS, numbers, unicode, names, json_bombs, encodings, form_bombs, picture_bombs,
)  # fmt: skip
