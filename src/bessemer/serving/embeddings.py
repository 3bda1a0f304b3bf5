"""`/v1/embeddings`: the mean of the last hidden states of a text, of length 1."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import Response
from pydantic import BeforeValidator, Field
from torch import Tensor

from bessemer.serving import limits
from bessemer.serving.bodies import ApiError, Body, Name
from bessemer.serving.protocol import prompts_of


class EmbeddingsRequest(Body):
    """The body of `/v1/embeddings`. dimensions: that of the model, where it is said."""

    model: Name
    input: Annotated[list[str] | list[list[int]], BeforeValidator(prompts_of)] = Field(max_length=limits.EMBEDDED.most)
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


def embeddings_reply(asked: EmbeddingsRequest, vectors_ND: Tensor, prompts: Sequence[Sequence[int]]) -> Response:
    """The response. prompts: the tokens of each text. Raises ApiError for another dimension than the model's."""
    width = vectors_ND.shape[1]
    if asked.dimensions not in (None, width):
        raise ApiError(
            f"'dimensions' must be {width}, the width of this model, got {asked.dimensions}",
            parameter="dimensions",
            code="invalid_value",
        )
    tokens = sum(map(len, prompts))
    # a vector at a time: to write millions of numbers at once keeps other threads from running
    data = ",".join(
        json.dumps({"object": "embedding", "index": index, "embedding": _in_form(vector_D, asked.encoding_format)})
        for index, vector_D in enumerate(vectors_ND)
    )
    rest = json.dumps({"model": asked.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return Response(f'{{"object": "list", "data": [{data}], {rest[1:]}', media_type="application/json")


def _in_form(vector_D: Tensor, form: str) -> list[float] | str:
    """Numbers, or the bytes of little-endian float32 in base64, for which OpenAI's clients ask."""
    if form == "float":
        numbers: list[float] = vector_D.tolist()
        return numbers
    return base64.b64encode(vector_D.numpy().astype("<f4").tobytes()).decode()
