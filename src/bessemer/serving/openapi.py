"""The OpenAPI document of the API: bodies from the classes that validate them, responses as schemas written here.

FastAPI's own document has neither: routes take the raw request, since bodies are limited, parsed and refused by `read_body`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from bessemer.serving.anthropic.protocol import CountRequest, MessagesRequest
from bessemer.serving.infill import InfillRequest
from bessemer.serving.ollama.protocol import ChatBody, EmbedBody, GenerateBody, ShowBody
from bessemer.serving.ollama.replies import Lines
from bessemer.serving.openai.api import EmbeddingsRequest
from bessemer.serving.openai.protocol import ChatRequest, CompletionRequest
from bessemer.serving.openai.vllm_routes import DetokenizeRequest, LoadAdapter, TokenizeRequest, UnloadAdapter
from bessemer.serving.openai.weight_routes import BeginUpdate, CommitUpdate
from bessemer.serving.responses.protocol import CompactRequest, ResponsesRequest
from bessemer.serving.retrieval.protocol import AddFile, AddFiles, ChangeFile, ChangeStore, CreateStore, SearchRequest
from bessemer.serving.retrieval.rerank import RerankRequest, ScoreRequest
from bessemer.serving.runtime.bodies import Body
from bessemer.serving.runtime.streams import Reply

_TEXT: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_ANY: dict[str, Any] = {}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    """An object with at least these properties."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_FINISH = {"enum": ["stop", "length", "tool_calls", "content_filter", None]}
_MODEL = _object(
    id=_TEXT,
    object=_one_of("model"),
    created=_COUNT,
    owned_by=_TEXT,
    max_model_len={"type": ["integer", "null"]},
    input_modalities={"type": ["array", "null"], "items": _one_of("text", "image")},
    image_size={"type": ["object", "null"]},
)
_HEALTH = _object(status=_TEXT, model=_TEXT)

#: The body of an error.
ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]}))
OLLAMA_ERROR = _object(error=_TEXT)
ANTHROPIC_ERROR = _object(type=_one_of("error"), error=_object(type=_TEXT, message=_TEXT))


@dataclass(frozen=True)
class Operation:
    """A route.

    answer: JSON schema of the response with status 200; None: a text. body: of the request. streams: whether `stream: true`
    gives a stream. path: parameters in the path. tag: the API that it belongs to. error: schema of an error; None:
    OpenAI's. unsupported: why some models answer with status 501; None: all models can.
    """

    summary: str
    answer: Mapping[str, Any] | None
    body: type[Body] | None = None
    streams: bool = False
    path: Sequence[str] = ()
    tag: str = "OpenAI"
    error: Mapping[str, Any] | None = None
    stream_type: str = Reply.media_type
    unsupported: str | None = None

    def described(self, operation_id: str, schemas: dict[str, Any]) -> dict[str, Any]:
        """The operation's entry. Adds the schemas of its body to `schemas`."""
        content: dict[str, Any] = (
            {"text/plain": {"schema": _TEXT}} if self.answer is None else {"application/json": {"schema": dict(self.answer)}}
        )
        if self.streams:
            content[self.stream_type] = {"schema": _ANY}
        error = {"application/json": {"schema": dict(self.error or ERROR)}}
        described: dict[str, Any] = {
            "operationId": operation_id,
            "summary": self.summary,
            "tags": [self.tag],
            "responses": {
                "200": {"description": "Done", "content": content},
                "503": {
                    "description": "Busy, or about to stop",
                    "content": error,
                    "headers": {"Retry-After": {"schema": _COUNT, "description": "Seconds to wait"}},
                },
                "default": {"description": "Refused, with the reason", "content": error},
            },
        }
        if self.unsupported:
            described["responses"]["501"] = {"description": self.unsupported, "content": error}
        if self.path:
            text = {"type": "string", "minLength": 1}
            described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": text} for name in self.path]
        if self.body is not None:
            schema = self.body.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[self.body.__name__] = schema
            reference = {"$ref": f"#/components/schemas/{self.body.__name__}"}
            described["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
        return described


_YES: dict[str, Any] = {"type": "boolean"}
_OLLAMA: dict[str, Any] = {"tag": "Ollama", "error": OLLAMA_ERROR}
_COUNTS = _object(in_progress=_COUNT, completed=_COUNT, failed=_COUNT, cancelled=_COUNT, total=_COUNT)
_UPLOAD = _object(id=_TEXT, object=_one_of("file"), bytes=_COUNT, created_at=_COUNT, filename=_TEXT, purpose=_TEXT)
_STORE = _object(id=_TEXT, object=_one_of("vector_store"), name=_TEXT, status=_TEXT, file_counts=_COUNTS, usage_bytes=_COUNT)
_STORE_FILE = _object(id=_TEXT, object=_one_of("vector_store.file"), vector_store_id=_TEXT, status=_TEXT, usage_bytes=_COUNT)
_BATCH = _object(id=_TEXT, object=_one_of("vector_store.files_batch"), status=_TEXT, file_counts=_COUNTS)
_DELETED = _object(id=_TEXT, deleted=_YES)
_RERANKED = _object(
    id=_TEXT,
    model=_TEXT,
    results=_list(_object(index=_COUNT, relevance_score={"type": "number"})),
    usage=_object(total_tokens=_COUNT),
)
_SCORED = _object(id=_TEXT, object=_one_of("list"), model=_TEXT, data=_list(_object(index=_COUNT, score={"type": "number"})))
_DOCUMENTS: dict[str, Any] = {"tag": "Documents"}
_IN_STORE: dict[str, Any] = {"path": ["store_id"], "tag": "Documents"}
_OF_STORE: dict[str, Any] = {"path": ["store_id", "file_id"], "tag": "Documents"}
#: (path, method) → route.
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("/v1/chat/completions", "post"): Operation(
        "Answer a conversation.",
        _object(
            id=_TEXT,
            object=_one_of("chat.completion"),
            created=_COUNT,
            model=_TEXT,
            choices=_list(
                _object(index=_COUNT, message=_object(role=_one_of("assistant"), content=_ANY), finish_reason=_FINISH)
            ),
            usage=_USAGE,
        ),
        ChatRequest,
        streams=True,
    ),
    ("/v1/completions", "post"): Operation(
        "Go on with texts.",
        _object(
            id=_TEXT,
            object=_one_of("text_completion"),
            created=_COUNT,
            model=_TEXT,
            choices=_list(_object(index=_COUNT, text=_TEXT, finish_reason=_FINISH)),
            usage=_USAGE,
        ),
        CompletionRequest,
        streams=True,
    ),
    ("/v1/embeddings", "post"): Operation(
        "A vector of each text.",
        _object(
            object=_one_of("list"),
            data=_list(_object(object=_one_of("embedding"), index=_COUNT, embedding=_ANY)),
            model=_TEXT,
            usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
        ),
        EmbeddingsRequest,
    ),
    ("/v1/models", "get"): Operation("What is served.", _object(object=_one_of("list"), data=_list(_MODEL))),
    ("/v1/models/{name}", "get"): Operation("One model.", _MODEL, path=["name"]),
    ("/v1/responses", "post"): Operation(
        "Answer a conversation of items, and store it.",
        _object(id=_TEXT, object=_one_of("response"), status=_TEXT, model=_TEXT, output=_list({"type": "object"})),
        ResponsesRequest,
        streams=True,
    ),
    ("/v1/responses/compact", "post"): Operation(
        "A summary in place of a conversation.",
        _object(id=_TEXT, object=_one_of("response.compaction"), output=_list({"type": "object"}), created_at=_COUNT),
        CompactRequest,
    ),
    ("/v1/responses/{identity}", "get"): Operation(
        "A stored response.", _object(id=_TEXT, object=_one_of("response")), path=["identity"]
    ),
    ("/v1/responses/{identity}", "delete"): Operation(
        "Forget a stored response.", _object(id=_TEXT, deleted={"type": "boolean"}), path=["identity"]
    ),
    ("/v1/responses/{identity}/input_items", "get"): Operation(
        "What a stored response answered.", _object(object=_one_of("list"), data=_list({"type": "object"})), path=["identity"]
    ),
    ("/.well-known/agent-card.json", "get"): Operation(
        "What this server can do, for other agents.",
        _object(name=_TEXT, description=_TEXT, url=_TEXT, version=_TEXT, capabilities={"type": "object"}, skills=_list(_ANY)),
        tag="A2A",
    ),
    ("/a2a", "post"): Operation(
        "A call of the Agent2Agent protocol.", _object(jsonrpc=_one_of("2.0"), id=_ANY), tag="A2A", streams=True
    ),
    ("/v1/messages", "post"): Operation(
        "Answer a conversation.",
        _object(
            id=_TEXT,
            type=_one_of("message"),
            role=_one_of("assistant"),
            model=_TEXT,
            content=_list(_object(type=_TEXT)),
            stop_reason={"type": ["string", "null"]},
            usage=_object(input_tokens=_COUNT, output_tokens=_COUNT),
        ),
        MessagesRequest,
        streams=True,
        tag="Anthropic",
        error=ANTHROPIC_ERROR,
    ),
    ("/v1/messages/count_tokens", "post"): Operation(
        "The tokens of a conversation.",
        _object(input_tokens=_COUNT),
        CountRequest,
        tag="Anthropic",
        error=ANTHROPIC_ERROR,
    ),
    ("/api/chat", "post"): Operation(
        "Answer a conversation.",
        _object(model=_TEXT, created_at=_TEXT, message=_object(role=_one_of("assistant"), content=_TEXT), done=_YES),
        ChatBody,
        streams=True,
        stream_type=Lines.media_type,
        **_OLLAMA,
    ),
    ("/infill", "post"): Operation(
        "Fill in the text at a cursor.",
        _object(content=_TEXT, stop=_YES, tokens_evaluated=_COUNT, tokens_predicted=_COUNT),
        InfillRequest,
        streams=True,
        tag="llama.cpp",
        unsupported="The model's tokenizer has no tokens for filling in the middle",
    ),
    ("/api/generate", "post"): Operation(
        "Answer a prompt, or go on with a text.",
        _object(model=_TEXT, created_at=_TEXT, response=_TEXT, done=_YES),
        GenerateBody,
        streams=True,
        stream_type=Lines.media_type,
        **_OLLAMA,
    ),
    ("/api/embed", "post"): Operation(
        "A vector of each text.", _object(model=_TEXT, embeddings=_list(_list(_ANY))), EmbedBody, **_OLLAMA
    ),
    ("/api/embeddings", "post"): Operation("A vector of a text.", _object(embedding=_list(_ANY)), EmbedBody, **_OLLAMA),
    ("/api/show", "post"): Operation(
        "One model.", _object(details=_ANY, model_info=_ANY, capabilities=_list(_TEXT)), ShowBody, **_OLLAMA
    ),
    ("/api/tags", "get"): Operation("What is served.", _object(models=_list(_object(name=_TEXT, model=_TEXT))), **_OLLAMA),
    ("/api/ps", "get"): Operation("What is loaded.", _object(models=_list(_object(name=_TEXT))), **_OLLAMA),
    ("/api/version", "get"): Operation("Of the package.", _object(version=_TEXT), **_OLLAMA),
    ("/tokenize", "post"): Operation(
        "A text's or a conversation's tokens.",
        _object(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)),
        TokenizeRequest,
        tag="Tokens",
    ),
    ("/detokenize", "post"): Operation("The text of tokens.", _object(prompt=_TEXT), DetokenizeRequest, tag="Tokens"),
    ("/v1/files", "post"): Operation("Upload a file, as a form with `file` and `purpose`.", _UPLOAD, **_DOCUMENTS),
    ("/v1/files", "get"): Operation("Uploaded files.", _object(object=_one_of("list"), data=_list(_UPLOAD)), **_DOCUMENTS),
    ("/v1/files/{file_id}", "get"): Operation("An uploaded file.", _UPLOAD, path=["file_id"], **_DOCUMENTS),
    ("/v1/files/{file_id}", "delete"): Operation(
        "Delete a file, and take it out of vector stores.", _DELETED, path=["file_id"], **_DOCUMENTS
    ),
    ("/v1/files/{file_id}/content", "get"): Operation("What was uploaded, as bytes.", None, path=["file_id"], **_DOCUMENTS),
    ("/v1/vector_stores", "post"): Operation("Make a vector store, and index files in it.", _STORE, CreateStore, **_DOCUMENTS),
    ("/v1/vector_stores", "get"): Operation(
        "The server's indexes, and vector stores of this key.",
        _object(object=_one_of("list"), data=_list(_STORE)),
        **_DOCUMENTS,
    ),
    ("/v1/vector_stores/{store_id}", "get"): Operation("A vector store.", _STORE, **_IN_STORE),
    ("/v1/vector_stores/{store_id}", "post"): Operation("Rename a vector store.", _STORE, ChangeStore, **_IN_STORE),
    ("/v1/vector_stores/{store_id}", "delete"): Operation("Delete a vector store.", _DELETED, **_IN_STORE),
    ("/v1/vector_stores/{store_id}/search", "post"): Operation(
        "Find passages.",
        _object(
            object=_TEXT, data=_list(_object(file_id=_TEXT, filename=_TEXT, score={"type": "number"}, content=_list(_ANY)))
        ),
        SearchRequest,
        **_IN_STORE,
    ),
    ("/v1/vector_stores/{store_id}/files", "post"): Operation(
        "Index a file in a vector store.", _STORE_FILE, AddFile, **_IN_STORE
    ),
    ("/v1/vector_stores/{store_id}/files", "get"): Operation(
        "The files of a vector store.", _object(object=_one_of("list"), data=_list(_STORE_FILE)), **_IN_STORE
    ),
    ("/v1/vector_stores/{store_id}/files/{file_id}", "get"): Operation("A file of a vector store.", _STORE_FILE, **_OF_STORE),
    ("/v1/vector_stores/{store_id}/files/{file_id}", "post"): Operation(
        "Change a file's attributes.", _STORE_FILE, ChangeFile, **_OF_STORE
    ),
    ("/v1/vector_stores/{store_id}/files/{file_id}", "delete"): Operation(
        "Take a file out of a vector store.", _DELETED, **_OF_STORE
    ),
    ("/v1/vector_stores/{store_id}/files/{file_id}/content", "get"): Operation(
        "The passages of a file, with their places.",
        _object(file_id=_TEXT, filename=_TEXT, data=_list(_object(type=_one_of("text"), text=_TEXT, start=_COUNT, end=_COUNT))),
        **_OF_STORE,
    ),
    ("/v1/vector_stores/{store_id}/files/{file_id}/page", "get"): Operation(
        "A page of a document as a picture.", None, **_OF_STORE
    ),
    ("/v1/vector_stores/{store_id}/file_batches", "post"): Operation(
        "Index several files in a vector store.", _BATCH, AddFiles, **_IN_STORE
    ),
    ("/v1/vector_stores/{store_id}/file_batches/{batch_id}", "get"): Operation(
        "How far a batch is.", _BATCH, path=["store_id", "batch_id"], **_DOCUMENTS
    ),
    ("/v1/vector_stores/{store_id}/file_batches/{batch_id}/files", "get"): Operation(
        "The files of a batch.",
        _object(object=_one_of("list"), data=_list(_STORE_FILE)),
        path=["store_id", "batch_id"],
        **_DOCUMENTS,
    ),
    **{
        (path, "post"): Operation("How well texts answer a query, the best first.", _RERANKED, RerankRequest, **_DOCUMENTS)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    },
    **{
        (path, "post"): Operation("How well texts fit each other.", _SCORED, ScoreRequest, **_DOCUMENTS)
        for path in ("/v1/score", "/score")
    },
    ("/v1/load_lora_adapter", "post"): Operation("Load an adapter, by an admin.", None, LoadAdapter, tag="Server"),
    ("/v1/unload_lora_adapter", "post"): Operation("Unload an adapter, by an admin.", None, UnloadAdapter, tag="Server"),
    ("/v1/weights", "get"): Operation(
        "The version of the weights, for a trainer.", _object(weight_version=_COUNT, adapters=_list(_TEXT)), tag="Server"
    ),
    ("/v1/weights/begin", "post"): Operation(
        "Begin to replace the weights or an adapter.", _object(update=_TEXT), BeginUpdate, tag="Server"
    ),
    ("/v1/weights/piece", "post"): Operation("Send a piece of an update, as bytes.", _object(bytes=_COUNT), tag="Server"),
    ("/v1/weights/commit", "post"): Operation(
        "Take an update that has come whole.", _object(weight_version=_COUNT), CommitUpdate, tag="Server"
    ),
    ("/sleep", "post"): Operation(
        "Free the KV cache's memory, as vLLM has it.", _object(is_sleeping={"type": "boolean"}), tag="Server"
    ),
    ("/wake_up", "post"): Operation("Have it again.", _object(is_sleeping={"type": "boolean"}), tag="Server"),
    ("/is_sleeping", "get"): Operation("Whether it is free.", _object(is_sleeping={"type": "boolean"}), tag="Server"),
    ("/health", "get"): Operation("Whether requests can be answered.", _HEALTH, tag="Server", error=_HEALTH),
    ("/ready", "get"): Operation("Whether new requests should come here.", _HEALTH, tag="Server", error=_HEALTH),
    ("/version", "get"): Operation("Of the package.", _object(version=_TEXT), tag="Server"),
    ("/metrics", "get"): Operation("Counts and times for Prometheus.", None, tag="Server"),
    ("/openapi.json", "get"): Operation("This description.", _object(openapi=_TEXT, paths=_ANY), tag="Server"),
}


def description(more: Mapping[tuple[str, str], Operation] | None = None) -> dict[str, Any]:
    """The document, in OpenAPI 3.1. more: routes of the server's pages."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for (path, method), operation in {**OPERATIONS, **(more or {})}.items():
        name = f"{method}{path.replace('/', '_').replace('{', '').replace('}', '')}"
        paths.setdefault(path, {})[method] = operation.described(name, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Bessemer",
            "version": version("bessemer"),
            "description": "A model behind OpenAI's, Anthropic's and Ollama's APIs. Where keys are asked for, send one as "
            "`Authorization: Bearer KEY` or `x-api-key: KEY`.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        # none where no keys are asked for
        "security": [{}, {"bearer": []}, {"key": []}],
    }
