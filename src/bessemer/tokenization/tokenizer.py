"""A trained tokenizer: text to ids and back, the same ids that `transformers` gives on its folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from bessemer.core.errors import ArtefactError, RequestError
from bessemer.core.hashing import hash_file
from bessemer.core.store import read_json
from bessemer.tokenization.byte_names import token_from_name
from bessemer.tokenization.chat import CHATML, Segment, chatml_segments, check_encodable, runs
from bessemer.tokenization.fast import BulkEncoder, bulk_encoder
from bessemer.tokenization.folder import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from bessemer.tokenization.special import TURN_ENDS


class Tokenizer:
    """Byte-level BPE read from a Hugging Face folder. Made by `load_tokenizer`.

    Control tokens typed in a text are encoded as text, never as the control token: ids equal those of `AutoTokenizer`
    on the same folder with `split_special_tokens=True`. Only the chat template writes control tokens.
    """

    def __init__(self, folder: Path, tokenizer: tokenizers.Tokenizer, bos_id: int, chat_template: str | None) -> None:
        self.folder = folder
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._special = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._control_ids = {content: id for id, content in self._special.items()}
        self._token_bytes = _bytes_by_id(tokenizer)
        self._token_lengths = np.array([len(token) for token in self._token_bytes], np.int64)
        self.bos_id = bos_id
        turn_ends = (tokenizer.token_to_id(token) for token in TURN_ENDS)
        self.eos_ids: tuple[int, ...] = (bos_id, *(id for id in turn_ends if id is not None))

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return len(self._token_bytes)

    @cached_property
    def hash(self) -> str:
        """Hash of `tokenizer.json`: what token shards and models are checked against."""
        return hash_file(self.folder / TOKENIZER_FILE)

    @cached_property
    def bulk(self) -> BulkEncoder:
        """The encoder for many texts, chosen by a check at its first use."""
        return bulk_encoder(self.folder / TOKENIZER_FILE)

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Ids of a text. Raises RequestError when it has a lone surrogate, which has no UTF-8."""
        check_encodable(text)
        return self._tokenizer.encode(text, add_special_tokens=add_bos).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of a text without a begin token, and where each stands: int64 (tokens, 2), the characters [start, end).

        A token that holds a part of a character spans the whole of it, so neighbours may share one; else the spans
        touch and cover the text. Raises RequestError when the text has a lone surrogate.
        """
        check_encodable(text)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids, spans_of_lengths(text, self._token_lengths[ids])

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts without begin tokens, in one uint32 array, and int64 offsets (one more than texts).

        Raises RequestError when one has a lone surrogate.
        """
        try:
            return self.bulk.encode_flat(texts)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                check_encodable(text)
            raise

    def encode_batch(self, texts: Sequence[str], add_bos: bool = True) -> list[np.ndarray]:
        """Ids of many texts, a uint32 array each. Raises RequestError when one has a lone surrogate."""
        ids, offsets = self.encode_flat(texts)
        begin = np.array([self.bos_id] if add_bos else [], np.uint32)
        return [np.concatenate([begin, ids[start:end]]) for start, end in pairwise(offsets)]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. Control tokens are left out, or shown as they are written."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = True) -> bytes:
        """The bytes that ids stand for. Raises RequestError for an id outside the vocabulary."""
        return b"".join(self.token_bytes(id) for id in ids if not (skip_special and id in self._special))

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token. Raises RequestError for an id outside the vocabulary."""
        if not 0 <= id < self.vocab_size:
            raise RequestError(f"token id {id} is outside the vocabulary of {self.vocab_size:,} tokens")
        return self._token_bytes[id]

    def is_special(self, id: int) -> bool:
        """Whether an id is a control token."""
        return id in self._special

    def render_chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> list[Segment]:
        """A conversation in segments, the template's own marked. Raises RequestError for a malformed message."""
        if self._chat_template != CHATML:
            raise RequestError(f"{self.folder}: this tokenizer has no ChatML template; chat needs a model trained with one")
        return chatml_segments(messages, add_generation_prompt)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation; with `add_generation_prompt`, up to where the assistant speaks next."""
        return self.encode_chat(messages, add_generation_prompt)[0]

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and which of them the assistant says: its contents and the `<|im_end|>` that close them.

        A token that holds the end of the template's text and the beginning of the content (two line breaks in one)
        counts as the template's. Raises RequestError for a malformed message or a lone surrogate.
        """
        ids: list[int] = []
        assistant_mask: list[bool] = []
        for run in runs(self.render_chat(messages, add_generation_prompt)):
            run_ids = [self._control_ids[run.text]] if run.is_control else self.encode(run.text, add_bos=False)
            ids += run_ids
            if run.assistant_from is None:
                assistant_mask += [False] * len(run_ids)
            else:
                lengths = self._token_lengths[run_ids]
                assistant_mask += (np.cumsum(lengths) - lengths >= run.assistant_from).tolist()
        return ids, assistant_mask


def spans_of_lengths(text: str, lengths: np.ndarray) -> np.ndarray:
    """The characters [start, end), int64 (tokens, 2), of tokens of these lengths in bytes that make up the text's UTF-8."""
    first_bytes = np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80
    assert lengths.sum() == len(first_bytes), "the tokens' bytes are not the text's"
    character_of_byte = np.cumsum(first_bytes) - 1
    ends = np.cumsum(lengths)
    return np.stack([character_of_byte[ends - lengths], character_of_byte[ends - 1] + 1], axis=1).reshape(-1, 2)


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Read a tokenizer from its folder, or from a model's. Raises ArtefactError when it is missing, damaged or of a
    kind that this version does not read."""
    folder = Path(folder)
    path = folder / TOKENIZER_FILE
    config = read_json(folder / TOKENIZER_CONFIG_FILE, "tokenizer configuration")
    if not path.exists():
        raise ArtefactError(f"{path}: no such file; a tokenizer's folder holds it beside {TOKENIZER_CONFIG_FILE}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises the bare class
        raise ArtefactError(f"{path}: this tokenizer is damaged or of an unknown kind ({error})") from None
    tokenizer.encode_special_tokens = True
    bos = _content(config.get("bos_token") or config.get("eos_token"))
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    if bos_id is None:
        raise ArtefactError(f"{folder / TOKENIZER_CONFIG_FILE}: names no begin token that is in the vocabulary")
    return Tokenizer(folder, tokenizer, bos_id, config.get("chat_template"))


def _content(token: Any) -> str | None:
    """A special token in `tokenizer_config.json` is a string, or an object that holds it."""
    return token.get("content") if isinstance(token, Mapping) else token


def _bytes_by_id(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    try:
        for name, id in vocabulary.items():
            table[id] = added[id].encode() if id in added else token_from_name(name)
    except KeyError:
        raise ArtefactError(f"the token {name!r} is not written in bytes: only byte-level BPE tokenizers are read") from None
    return table
