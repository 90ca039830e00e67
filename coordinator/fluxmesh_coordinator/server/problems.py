"""What goes wrong with a request, as its client reads it: a status, a sentence, a code.

Every face of the server has a form of its own for it; the library's errors come in by `problem_of`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from fluxmesh.errors import (
    AdapterError,
    CancelledError,
    DoesNotFitError,
    FluxmeshError,
    HostUnreachableError,
    ModelNotFoundError,
    OutputError,
    UsageError,
)
from fluxmesh_coordinator.server.picture_folder import NoSuchPictureError
from fluxmesh_coordinator.server.queue.fair_queue import QueueFullError

# What the faces call a setting of the library.
NAMES = {
    "/v1/": {
        "n_images": "n",
        "image_size": "size",
        "width": "size",
        "height": "size",
        "reference": "image",
        "references": "image",
        "adapter": "loras",
        "adapters": "loras",
        "negative": "negative_prompt",
        "id": "Idempotency-Key",
    },
    "/sdapi/": {
        "n_images": "batch_size",
        "guidance": "cfg_scale",
        "strength": "denoising_strength",
        "image": "init_images",
        "image_size": "width",
        "reference": "init_images",
        "references": "init_images",
        "adapter": "prompt",  # where its clients name them
        "adapters": "prompt",
        "model": "sd_model_checkpoint",
    },
    "/api/": {
        "image_size": "width",
        "adapter": "adapters",
        "reference": "references",
        "redux": "references",
        "negative": "negative_prompt",
    },
}

KINDS: tuple[tuple[type[FluxmeshError], int, str], ...] = (  # the first that fits
    (QueueFullError, 429, "queue_full"),
    (NoSuchPictureError, 404, "no_such_picture"),
    (CancelledError, 499, "cancelled"),
    (DoesNotFitError, 507, "does_not_fit"),
    (HostUnreachableError, 503, "no_host"),
    (AdapterError, 400, "adapter"),
    (ModelNotFoundError, 404, "model_not_found"),
    (OutputError, 507, "not_saved"),  # before what it may be beside: no client names our folders
    (UsageError, 400, "invalid_value"),
    (FluxmeshError, 500, "failed"),
)


class ProblemError(FluxmeshError):
    """A request that is answered with an error."""

    def __init__(
        self, status: int, message: str, code: str, *, setting: str = "", retry_after: int = 0
    ) -> None:
        super().__init__(message, setting=setting)
        self.status, self.code = status, code
        self.retry_after = retry_after  # seconds; 0: nothing is said of it


def problem_of(error: FluxmeshError) -> ProblemError:
    """An error of the library, for a client."""
    if isinstance(error, ProblemError):
        return error
    status, code = next((status, code) for kind, status, code in KINDS if isinstance(error, kind))
    retry_after = error.retry_after if isinstance(error, QueueFullError) else 0
    return ProblemError(status, str(error), code, setting=error.setting, retry_after=retry_after)


def body_of(problem: ProblemError, path: str) -> dict[str, Any]:
    """The JSON of an error, in the form of the face that `path` belongs to."""
    names = next((names for start, names in NAMES.items() if path.startswith(start)), {})
    message = re.sub(r"`(\w+)`", lambda match: f"`{names.get(match[1], match[1])}`", str(problem))
    if path.startswith("/sdapi/"):
        return {"error": problem.code, "detail": message, "errors": message, "body": ""}
    setting = names.get(problem.setting, problem.setting) or None
    if path.startswith("/v1/"):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            problem.status, "invalid_request_error" if problem.status < 500 else "server_error"
        )
        about = {"message": message, "type": kind, "param": setting, "code": problem.code}
        return {"error": about}
    return {"error": {"message": message, "setting": setting, "code": problem.code}}


def answer(problem: ProblemError, path: str) -> Response:
    """The response."""
    headers: Mapping[str, str] = {}
    if problem.retry_after:
        headers = {"Retry-After": str(problem.retry_after)}
    elif problem.status == 401:
        # At "Basic" a browser asks for a password by itself, over the page's own question.
        kind = 'Basic charset="UTF-8", ' if path.startswith("/sdapi/") else "Bearer "
        headers = {"WWW-Authenticate": f'{kind}realm="fluxmesh"'}
    return Response(
        json.dumps(body_of(problem, path)),
        status_code=problem.status,
        headers=dict(headers),
        media_type="application/json",
    )
