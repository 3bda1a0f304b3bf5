"""OpenAI's `/v1/files` and `/v1/vector_stores`, and the page of a document with a passage marked.

A store's file has its content as passages, each with its place, so that a citation can be shown where it stands. A file and a
store are of the key that made them; the server's own indexes are everybody's to search, within their groups.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bessemer.core.errors import BessemerError
from bessemer.serving.config import STORES
from bessemer.serving.retrieval.annotations import page_of, search_result
from bessemer.serving.retrieval.client_store import ClientStore, StoreFile
from bessemer.serving.retrieval.indexes import without_overlaps
from bessemer.serving.retrieval.protocol import AddFile, AddFiles, ChangeFile, ChangeStore, CreateStore, SearchRequest
from bessemer.serving.retrieval.stores import Store, VectorStores
from bessemer.serving.retrieval.uploads import page_image, read_form
from bessemer.serving.runtime.bodies import ApiError, read_body
from bessemer.serving.runtime.clients import Client, caller_of

#: Header by which OpenAI's clients know how long to wait before they look again, in milliseconds.
_POLL = {"openai-poll-after-ms": "100"}
#: Entries of a page of a list: the default, and the most.
_PAGE, _LONGEST_PAGE = 20, 100


@dataclass(frozen=True)
class _Batch:
    """Files that one request added to a store."""

    id: str
    store: str
    files: Sequence[str] = field(default_factory=list)


class FilesApi:
    """The routes."""

    def __init__(self, stores: VectorStores) -> None:
        self._stores = stores
        self._batches: dict[str, _Batch] = {}

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1")
        stores, files = "/vector_stores/{store_id}", "/vector_stores/{store_id}/files/{file_id}"
        batch = "/vector_stores/{store_id}/file_batches/{batch_id}"
        for method, path, endpoint in (
            ("POST", "/files", self.upload),
            ("GET", "/files", self.uploads),
            ("GET", "/files/{file_id}", self.retrieve_upload),
            ("DELETE", "/files/{file_id}", self.delete_upload),
            ("GET", "/files/{file_id}/content", self.download),
            ("POST", "/vector_stores", self.create),
            ("GET", "/vector_stores", self.stores),
            ("GET", stores, self.retrieve),
            ("POST", stores, self.change),
            ("DELETE", stores, self.delete),
            ("POST", f"{stores}/search", self.search),
            ("POST", f"{stores}/files", self.add_file),
            ("GET", f"{stores}/files", self.files),
            ("GET", files, self.retrieve_file),
            ("POST", files, self.change_file),
            ("DELETE", files, self.remove_file),
            ("GET", f"{files}/content", self.content),
            ("GET", f"{files}/page", self.page),
            ("POST", f"{stores}/file_batches", self.add_files),
            ("GET", batch, self.retrieve_batch),
            ("GET", f"{batch}/files", self.batch_files),
        ):
            router.add_api_route(path, endpoint, methods=[method], response_model=None)
        return router

    # -- files

    async def upload(self, request: Request) -> dict[str, Any]:
        uploads = self._stores.uploads
        body = await request.body()
        parts = await asyncio.to_thread(read_form, request.headers.get("content-type", ""), body)
        if "file" not in parts:
            raise ApiError("missing required parameter: 'file'", parameter="file", code="missing_required_parameter")
        if unknown := next((name for name in parts if name not in ("file", "purpose")), None):
            raise ApiError(f"'{unknown}' is not supported by this server", parameter=unknown, code="unsupported_parameter")
        purpose = parts["purpose"].content.decode("utf-8", "replace") if "purpose" in parts else "user_data"
        given = parts["file"]
        owner = caller_of(request).client.id
        upload = await asyncio.to_thread(uploads.add, owner, given.filename, given.content, purpose[:64])
        return upload.body

    async def uploads(self, request: Request) -> dict[str, Any]:
        files = self._stores.uploads.of(caller_of(request).client.id)
        purpose = request.query_params.get("purpose")
        return _page([file.body for file in files if purpose in (None, file.purpose)], request)

    async def retrieve_upload(self, file_id: str, request: Request) -> dict[str, Any]:
        return self._stores.uploads.find(file_id, caller_of(request).client.id).body

    async def delete_upload(self, file_id: str, request: Request) -> dict[str, Any]:
        upload = self._stores.uploads.find(file_id, caller_of(request).client.id)
        self._stores.delete_upload(upload)
        return {"id": file_id, "object": "file", "deleted": True}

    async def download(self, file_id: str, request: Request) -> Response:
        uploads = self._stores.uploads
        path = uploads.path(uploads.find(file_id, caller_of(request).client.id))
        content = await asyncio.to_thread(path.read_bytes)
        # a browser saves it: shown from here, it would be a page of this server
        return Response(content, media_type="application/octet-stream", headers={"Content-Disposition": "attachment"})

    # -- stores

    async def create(self, request: Request) -> dict[str, Any]:
        body = await read_body(CreateStore, request)
        client = caller_of(request).client
        uploads = [self._stores.uploads.find(id, client.id) for id in body.file_ids]
        store = self._stores.create(client, body.name, body.metadata)
        if uploads:
            store.add([(upload, {}) for upload in uploads])
        return _store_body(store, store.files())

    async def stores(self, request: Request) -> dict[str, Any]:
        client = caller_of(request).client
        bodies = [_store_body(store, await _files(store, client)) for store in self._stores.of(client)]
        return _page(bodies, request)

    async def retrieve(self, store_id: str, request: Request) -> dict[str, Any]:
        client = caller_of(request).client
        store = self._stores.find(store_id, client)
        return _store_body(store, await _files(store, client))

    async def change(self, store_id: str, request: Request) -> dict[str, Any]:
        body = await read_body(ChangeStore, request)
        store = self._stores.find_own(store_id, caller_of(request).client)
        store.name = store.name if body.name is None else body.name
        store.metadata = store.metadata if body.metadata is None else body.metadata
        store.save()
        return _store_body(store, store.files())

    async def delete(self, store_id: str, request: Request) -> dict[str, Any]:
        await self._stores.delete(self._stores.find_own(store_id, caller_of(request).client))
        return {"id": store_id, "object": "vector_store.deleted", "deleted": True}

    async def search(self, store_id: str, request: Request) -> dict[str, Any]:
        body = await read_body(SearchRequest, request)
        client = caller_of(request).client
        store, wanted = self._stores.find(store_id, client), body.wanted(store_id)
        attributes = {file.id: file.attributes for file in store.files(client.principal.groups)} if not store.is_served else {}
        try:
            found = [await asyncio.to_thread(self._stores.search, [store], one, wanted, client) for one in body.queries]
        except BessemerError as error:
            raise ApiError(str(error), parameter="query", code="invalid_value") from None
        # the best of each query first
        hits = {hit.passage.id: hit for of_rank in _by_rank(found) for hit in of_rank}
        shown = [search_result(hit, dict(attributes.get(hit.file, {}))) for hit in list(hits.values())[: wanted.count]]
        return {
            "object": "vector_store.search_results.page",
            "search_query": body.queries,
            "data": shown,
            "has_more": False,
            "next_page": None,
        }

    # -- files of a store

    async def add_file(self, store_id: str, request: Request) -> dict[str, Any]:
        body = await read_body(AddFile, request)
        client = caller_of(request).client
        store = self._stores.find_own(store_id, client)
        (file,) = store.add([(self._stores.uploads.find(body.file_id, client.id), body.attributes)])
        return _file_body(file, store)

    async def files(self, store_id: str, request: Request) -> dict[str, Any]:
        client = caller_of(request).client
        store = self._stores.find(store_id, client)
        status = request.query_params.get("filter")
        files = [file for file in await _files(store, client) if status in (None, file.status)]
        return _page([_file_body(file, store) for file in files], request)

    async def retrieve_file(self, store_id: str, file_id: str, request: Request) -> Response:
        client = caller_of(request).client
        store = self._stores.find(store_id, client)
        file = _found(await _files(store, client), file_id)
        return JSONResponse(_file_body(file, store), headers=_POLL if file.status == "in_progress" else None)

    async def change_file(self, store_id: str, file_id: str, request: Request) -> dict[str, Any]:
        body = await read_body(ChangeFile, request)
        store = self._stores.find_own(store_id, caller_of(request).client)
        file = _found(store.files(), file_id)
        file.attributes = body.attributes
        store.save()
        return _file_body(file, store)

    async def remove_file(self, store_id: str, file_id: str, request: Request) -> dict[str, Any]:
        store = self._stores.find_own(store_id, caller_of(request).client)
        _found(store.files(), file_id)
        store.remove(file_id)
        return {"id": file_id, "object": "vector_store.file.deleted", "deleted": True}

    async def content(self, store_id: str, file_id: str, request: Request) -> dict[str, Any]:
        """The passages of a file, each without what it shares with the one before."""
        client = caller_of(request).client
        store = self._stores.find(store_id, client)
        file = _found(await _files(store, client), file_id)
        passages = await asyncio.to_thread(store.passages, file_id, client.principal.groups)
        shown = zip(passages, without_overlaps(passages), strict=True)
        return {
            "object": "vector_store.file_content.page",
            "file_id": file_id,
            "filename": file.filename,
            "attributes": dict(file.attributes),
            "data": [
                {
                    "type": "text",
                    "text": text,
                    "headings": passage.headings,
                    "start": passage.end - len(text.encode()),
                    "end": passage.end,
                    **page_of(passage),
                }
                for passage, text in shown
            ],
            "has_more": False,
            "next_page": None,
        }

    async def page(self, store_id: str, file_id: str, request: Request) -> Response:
        """A page of a document as a picture. Query: `number`, from 1, and `box`, a passage to be marked."""
        client = caller_of(request).client
        store = self._stores.find(store_id, client)
        number, box = _page_number(request), _box(request)
        path = await asyncio.to_thread(store.path, file_id, client.principal.groups)
        draw = await asyncio.to_thread(page_image)
        if path is None or draw is None:
            reason = "this server draws no pages" if draw is None else f"the file '{file_id}' is not here"
            raise ApiError(reason, status=404, code="not_available")
        try:
            picture = await asyncio.to_thread(draw, path, number, box)
        except BessemerError as error:
            reason = str(error).replace(str(path), "the file")
            raise ApiError(reason, status=404, parameter="number", code="not_available") from None
        return Response(picture, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    # -- batches

    async def add_files(self, store_id: str, request: Request) -> dict[str, Any]:
        body = await read_body(AddFiles, request)
        client = caller_of(request).client
        store = self._stores.find_own(store_id, client)
        store.add([(self._stores.uploads.find(id, client.id), attributes) for id, attributes in body.given.items()])
        batch = _Batch(f"vsfb_{uuid.uuid4().hex}", store_id, list(body.given))
        self._batches[batch.id] = batch
        if len(self._batches) > STORES.most:
            # only polling asks for a batch
            del self._batches[next(iter(self._batches))]
        return _batch_body(batch, store)

    async def retrieve_batch(self, store_id: str, batch_id: str, request: Request) -> Response:
        batch, store = self._batch(store_id, batch_id, caller_of(request).client)
        body = _batch_body(batch, store)
        return JSONResponse(body, headers=_POLL if body["status"] == "in_progress" else None)

    async def batch_files(self, store_id: str, batch_id: str, request: Request) -> dict[str, Any]:
        batch, store = self._batch(store_id, batch_id, caller_of(request).client)
        return _page([_file_body(file, store) for file in store.files() if file.id in batch.files], request)

    def _batch(self, store_id: str, batch_id: str, client: Client) -> tuple[_Batch, ClientStore]:
        store = self._stores.find_own(store_id, client)
        batch = self._batches.get(batch_id)
        if batch is None or batch.store != store_id:
            raise ApiError(f"there is no batch '{batch_id}'", status=404, code="batch_not_found")
        return batch, store


async def _files(store: Store, client: Client) -> Sequence[StoreFile]:
    """The files that a caller may see. Those of an index are looked through in a thread."""
    groups = client.principal.groups
    return await asyncio.to_thread(store.files, groups) if store.is_served else store.files(groups)


def _found(files: Sequence[StoreFile], id: str) -> StoreFile:
    """Raises ApiError (404)."""
    file = next((file for file in files if file.id == id), None)
    if file is None:
        raise ApiError(f"there is no file '{id}' in this vector store", status=404, parameter="file_id", code="file_not_found")
    return file


def _by_rank(found: Sequence[Sequence[Any]]) -> list[list[Any]]:
    longest = max(map(len, found), default=0)
    return [[hits[rank] for hits in found if rank < len(hits)] for rank in range(longest)]


def _counts(files: Sequence[StoreFile]) -> dict[str, int]:
    kinds = ("in_progress", "completed", "failed", "cancelled")
    return {**{kind: sum(file.status == kind for file in files) for kind in kinds}, "total": len(files)}


def _store_body(store: Store, files: Sequence[StoreFile]) -> dict[str, Any]:
    counts = _counts(files)
    return {
        "id": store.id,
        "object": "vector_store",
        "created_at": store.created,
        "last_active_at": store.created,
        "name": store.name,
        "status": "in_progress" if counts["in_progress"] else "completed",
        "usage_bytes": sum(file.size for file in files),
        "file_counts": counts,
        "metadata": dict(store.metadata),
        "is_served": store.is_served,
    }


def _file_body(file: StoreFile, store: Store) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "vector_store.file",
        "created_at": file.created,
        "vector_store_id": store.id,
        "filename": file.filename,
        "status": file.status,
        "usage_bytes": file.size,
        "last_error": {"code": "invalid_file", "message": file.error} if file.status == "failed" else None,
        "attributes": dict(file.attributes),
        "chunking_strategy": {"type": "other"},
    }


def _batch_body(batch: _Batch, store: ClientStore) -> dict[str, Any]:
    files = [file for file in store.files() if file.id in batch.files]
    counts = _counts(files)
    return {
        "id": batch.id,
        "object": "vector_store.files_batch",
        "created_at": min((file.created for file in files), default=store.created),
        "vector_store_id": store.id,
        "status": "in_progress" if counts["in_progress"] else "completed",
        "file_counts": counts,
    }


def _page(entries: Sequence[Mapping[str, Any]], request: Request) -> dict[str, Any]:
    """A page of a list, the newest first: query `limit`, `order`, `after` and `before`."""
    query = request.query_params
    limit = query.get("limit", str(_PAGE))
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:6]) <= _LONGEST_PAGE):
        raise ApiError(f"limit: a number from 1 to {_LONGEST_PAGE}", parameter="limit", code="invalid_value")
    # entries made in one second stay in their order
    ordered = list(entries) if query.get("order") == "asc" else list(reversed(entries))
    ids = [entry["id"] for entry in ordered]
    start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
    end = ids.index(query["before"]) if query.get("before") in ids else len(ids)
    shown = ordered[start:end][: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": start + len(shown) < end,
    }


def _page_number(request: Request) -> int:
    number = request.query_params.get("number", "1")
    if not (number.isascii() and number.isdigit() and len(number) < 6 and int(number)):
        raise ApiError("number: the number of a page, from 1", parameter="number", code="invalid_value")
    return int(number)


def _box(request: Request) -> tuple[float, float, float, float] | None:
    """The box of the query, `left,top,right,bottom` in points; None where none is given."""
    given = request.query_params.get("box")
    if not given:
        return None
    try:
        left, top, right, bottom = (float(part) for part in given.split(","))
    except ValueError:
        left = top = right = bottom = math.nan
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ApiError("box: four numbers, left,top,right,bottom", parameter="box", code="invalid_value")
    return left, top, right, bottom
