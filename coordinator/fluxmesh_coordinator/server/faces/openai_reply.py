"""How a client of OpenAI's Images wants its pictures back. Below `openai.py`."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from fluxmesh.errors import UsageError
from fluxmesh_coordinator.server.faces.bodies import Body
from fluxmesh_coordinator.server.queue.served_job import ServedJob

FORMATS = {"png": "PNG", "jpeg": "JPEG", "jpg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class ReplyFormat:
    """How the pictures are to come back."""

    kind: str  # "image_generation" or "image_edit": how the events' types begin
    as_url: bool
    format: str  # of `FORMATS`
    compression: int  # 0 to 100: the quality of JPEG and WebP
    quality: str
    partials: int

    @classmethod
    def of(cls, body: Body, kind: str) -> ReplyFormat:
        """Raises `UsageError`."""
        response = body.text("response_format") or "b64_json"
        if response not in ("url", "b64_json"):
            raise UsageError.about("response_format", "is unknown", "choose url or b64_json")
        format = (body.text("output_format") or "png").lower()
        if format not in FORMATS:
            raise UsageError.about("output_format", "is unknown", "choose png, jpeg or webp")
        compression = body.whole("output_compression")
        compression = 100 if compression is None else compression
        if not 0 <= compression <= 100:
            raise UsageError.about("output_compression", "is no share", "it must be 0 to 100")
        partials = body.whole("partial_images") or 0
        if not 0 <= partials <= 3:
            raise UsageError.about("partial_images", f"is {partials}", "it must be 0 to 3")
        as_url = response == "url"
        return cls(
            kind=kind,
            as_url=as_url,
            format="png" if as_url else "jpeg" if format == "jpg" else format,
            compression=compression,
            quality=body.text("quality") or "auto",
            partials=partials if body.flag("stream") else 0,
        )

    def is_due(self, sent: int, preview: dict[str, Any], job: ServedJob) -> bool:
        """Whether a preview is one of those that were asked for: they are spread over the steps."""
        step: int = preview["step"]
        return sent < self.partials and step * (self.partials + 1) >= job.steps * (sent + 1)

    def about(self, job: ServedJob) -> dict[str, Any]:
        """What every reply and event says beside its picture."""
        return {
            "size": f"{job.width}x{job.height}",
            "quality": self.quality,
            "background": "opaque",
            "output_format": self.format,
        }

    def encoded(self, data: bytes) -> str:
        """A finished picture's PNG in base64, in the format that was asked for."""
        if self.format != "png":
            with Image.open(io.BytesIO(data)) as picture:
                data = self._written(picture.convert("RGB"))
        return base64.b64encode(data).decode()

    def enlarged(self, text: str, job: ServedJob) -> str:
        """A preview, which is small, as large as the picture will be; both in base64."""
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            size = (job.width, job.height)
            whole = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        return base64.b64encode(self._written(whole)).decode()

    def _written(self, picture: Image.Image) -> bytes:
        out = io.BytesIO()
        options = {} if self.format == "png" else {"quality": max(1, self.compression)}
        picture.save(out, FORMATS[self.format], **options)
        return out.getvalue()
