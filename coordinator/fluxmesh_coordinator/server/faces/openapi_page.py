"""The description of `/api` for people: one page of HTML, and the routes that show it.

It loads nothing but a style sheet of this server. What it says is `openapi.py`'s.
"""

from __future__ import annotations

import html
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fluxmesh_coordinator.server.faces.openapi import Schema, document

STYLE = (
    ":root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;"
    "margin:2rem auto;padding:0 1rem}h2{font-size:1rem;margin-top:2rem}code,pre{font:14px/1.5 "
    "ui-monospace,monospace}pre{overflow-x:auto;padding:.75rem;border:1px solid #8886;"
    "border-radius:.5rem}"
)


def page() -> str:
    """The description for people."""
    described = document()
    parts = []
    for path, methods in described["paths"].items():
        for method, about in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(about['summary'])}</p>")
            body = about.get("requestBody")
            if body:
                schema = body["content"]["application/json"]["schema"]
                parts.append(_example("Takes", schema))
            for code, answer in about["responses"].items():
                if code == "default":
                    continue
                parts.append(f"<p>{code}: {html.escape(answer['description'])}</p>")
                content = answer.get("content", {}).get("application/json")
                if content:
                    parts.append(_example("Gives", content["schema"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>fluxmesh API</title>'
        '<link rel="stylesheet" href="/api/openapi.css"></head><body><h1>fluxmesh API</h1>'
        f"<p>{html.escape(described['info']['description'])} The same for programs: "
        '<a href="/api/openapi.json">openapi.json</a>.</p>' + "".join(parts) + "</body></html>"
    )


def _example(what: str, schema: Schema) -> str:
    text = json.dumps(_shape(schema), indent=1, ensure_ascii=False)
    return f"<p>{what}</p><pre>{html.escape(text)}</pre>"


def _shape(schema: Schema) -> Any:
    """A schema as JSON that looks like what it describes."""
    kind = schema.get("type")
    if kind == "object":
        return {name: _shape(part) for name, part in schema["properties"].items()}
    if kind == "array":
        return [_shape(schema["items"])]
    words = " or ".join(kind) if isinstance(kind, list) else str(kind)
    limits = [str(schema[key]) for key in ("minimum", "maximum") if key in schema]
    said = [words, *([" to ".join(limits)] if limits else []), schema.get("description", "")]
    if "enum" in schema:
        said.append(" | ".join(map(str, schema["enum"])))
    return ", ".join(filter(None, said))


def routes() -> list[Route]:
    """This face's."""

    async def described(_request: Request) -> Response:
        return JSONResponse(document())

    async def shown(_request: Request) -> Response:
        return Response(page(), media_type="text/html")

    async def style(_request: Request) -> Response:
        return Response(STYLE, media_type="text/css")

    return [
        Route("/api", shown, methods=["GET"]),
        Route("/api/openapi.json", described, methods=["GET"]),
        Route("/api/openapi.css", style, methods=["GET"]),
    ]
