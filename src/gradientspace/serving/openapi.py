"""The server's own description at `/openapi.json`: what every route takes, and with what it answers."""

from __future__ import annotations

from typing import Any

from gradientspace import __version__
from gradientspace.serving.protocol import ChatBody, CompletionBody

OPENAPI_PATH = "/openapi.json"

_REFERENCE = "#/components/schemas/{model}"
_WHY = {
    "400": "the request is not understood, or asks for more than this server answers with",
    "401": "the API key is missing or wrong",
    "404": "no such model",
    "405": "no such method here",
    "413": "the body is too large",
    "422": "the router is too unsure of the prompt, by the run's own choice",
    "429": "too many requests run or wait: try again soon",
    "500": "our fault",
    "502": "the engine upstream fails",
    "503": "not ready, or busy",
    "504": "no answer in time",
}
_ROUTED = ("400", "401", "404", "413", "422", "500", "502", "504")


def document() -> dict[str, Any]:
    """An OpenAPI 3.1 document of every route."""
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    answer = {"application/json": _object(), "text/event-stream": {"schema": event}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "GradientSpace", "version": __version__},
        "paths": {
            "/health": {"get": _operation("Does the process live?", _object("status"))},
            "/ready": {"get": _operation("Does it take requests?", _object("status"), own={"503": _object("status")})},
            "/metrics": {"get": _operation("For Prometheus.", {"schema": {"type": "string"}}, kind="text/plain")},
            "/v1/models": {"get": _operation("What can answer.", _object("object", "data"))},
            "/v1/models/{name}": {
                "get": {
                    **_operation("One of them.", _object("id", "object"), ("400", "401", "404")),
                    "parameters": [name],
                }
            },
            "/v1/route": {
                "post": {
                    **_operation("Which expert a prompt goes to.", _object("expert", "probability"), _ROUTED),
                    "requestBody": _body({"$ref": "#/components/schemas/RouteBody"}),
                }
            },
            "/v1/chat/completions": {
                "post": {
                    **_operation("Answer a conversation.", {}, (*_ROUTED, "429"), content=answer),
                    "requestBody": _body({"$ref": "#/components/schemas/ChatBody"}),
                }
            },
            "/v1/completions": {
                "post": {
                    **_operation("Go on with a text.", {}, (*_ROUTED, "429"), content=answer),
                    "requestBody": _body({"$ref": "#/components/schemas/CompletionBody"}),
                }
            },
        },
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _operation(
    summary: str,
    found: dict[str, Any],
    errors: tuple[str, ...] = ("401",),
    *,
    kind: str = "application/json",
    content: dict[str, Any] | None = None,
    own: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`found`: what status 200 has; `own`: statuses whose body is not an error's."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        "responses": {
            "200": {"description": "the answer", "content": content or {kind: found}},
            **{status: {"description": _WHY[status], "content": error} for status in errors},
            **{s: {"description": _WHY[s], "content": {kind: body}} for s, body in (own or {}).items()},
        },
    }


def _object(*required: str) -> dict[str, Any]:
    return {"schema": {"type": "object", "required": list(required)}}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _schemas() -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for model in (ChatBody, CompletionBody):
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    prompt = {"type": "object", "required": ["prompt"], "properties": {"prompt": {"type": "string", "minLength": 1}}}
    messages = {"type": "array", "minItems": 1, "items": {"$ref": _REFERENCE.format(model="Message")}}
    talk = {"type": "object", "required": ["messages"], "properties": {"messages": messages}}
    error = {"type": "object", "required": ["message", "type", "param", "code"]}
    return {
        **schemas,
        "RouteBody": {"anyOf": [prompt, talk]},
        "Error": {"type": "object", "required": ["error"], "properties": {"error": error}},
    }
