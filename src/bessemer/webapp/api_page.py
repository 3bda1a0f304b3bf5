"""The page that describes the API: every route with its fields, and a command to try it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: A body to try each route with.
_EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
    "/v1/completions": {"prompt": "The furnace", "max_tokens": 32},
    "/v1/embeddings": {"input": ["iron", "steel"]},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 64},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hello"}]},
    "/tokenize": {"prompt": "The furnace"},
    "/detokenize": {"tokens": [72, 105]},
    "/v1/load_lora_adapter": {"lora_name": "mine", "lora_path": "mine"},
    "/v1/unload_lora_adapter": {"lora_name": "mine"},
}


def operations_by_tag(document: Mapping[str, Any], model: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The operations of a description, for the template. model: a name that is served."""
    tags: dict[str, list[dict[str, Any]]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            tags.setdefault(operation["tags"][0], []).append(_shown(document, path, method, operation, model))
    return list(tags.items())


def _shown(document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any], model: str) -> dict[str, Any]:
    schema: Mapping[str, Any] = {}
    if "requestBody" in operation:
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][name]
    fields = schema.get("properties", {})
    command = f"curl {'-X DELETE ' if method == 'delete' else ''}ADDRESS{path}"
    if path in _EXAMPLES:
        body = ({"model": model} if "model" in fields else {}) | _EXAMPLES[path]
        command += f" -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    return {
        "id": operation["operationId"],
        "method": method.upper(),
        "path": path,
        "summary": operation["summary"],
        "fields": fields,
        "required": schema.get("required", []),
        "example": command,
    }
