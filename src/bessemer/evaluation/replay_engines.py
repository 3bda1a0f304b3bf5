"""Engines of a replay: each opens a form of a model, answers greedily, and gives logits after a prefix.

`replay.py` compares their answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.cpu_kernels import library
from bessemer.model.storage.tuned_folder import tuned_model

Message = dict[str, str]


class Runtime(Protocol):
    """An engine with a model open. name: for the report. rounds: whether it rounds activations to 8 bits, to multiply codes."""

    name: str
    rounds: bool

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant speaks, by the model's own template and tokenizer; without a
        template, ids of the last message's text."""

    def answer(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Greedy tokens after a prompt, without the end token."""

    @property
    def ends(self) -> Sequence[int]:
        """The tokens that end an answer."""

    def scores(self, prefix: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Logits of tokens after a prefix, up to a constant that is the same for all tokens."""

    def text(self, token: int) -> str:
        """A token as readable text."""


class OurEngine:
    """Our engine, in the type in which the model is stored; of codes with a KV cache in float32, as the others have it, and
    activations of `activation_bits` where kernels multiply them."""

    def __init__(
        self, place: Path, device: str = "cpu", *, is_coded: bool = False, activation_bits: Literal[8, 16] = 8
    ) -> None:
        self.name = "bessemer"
        self.rounds = is_coded and activation_bits == 8 and device == "cpu" and library() is not None
        # one request at a time, as in the other engines
        config = EngineConfig(
            max_num_seqs=1,
            prefix_cache=False,
            kv_cache_dtype="float32" if is_coded else "auto",
            activation_bits=activation_bits,
        )
        self._engine = Engine(place, device=device, config=config)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self._engine.tokenizer
        if tokenizer.chat_template is None:
            return tokenizer.encode(messages[-1]["content"])
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)

    def answer(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        completion = self._engine.generate([list(prompt)], params)[0]
        ended = completion.finish_reason == "stop"
        return completion.token_ids[:-1] if ended else completion.token_ids

    @property
    def ends(self) -> Sequence[int]:
        return self._engine.tokenizer.eos_ids

    def scores(self, prefix: Sequence[int], tokens: Sequence[int]) -> list[float]:
        found = self._engine.score(list(prefix), [[token] for token in tokens])
        return [score.total for score in found]

    def text(self, token: int) -> str:
        return repr(self._engine.tokenizer.decode([token], skip_special=False))


class TransformersEngine:
    """`transformers` in float32: a folder, with an adapter by `peft`, or a GGUF file, which it dequantises."""

    def __init__(self, place: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        # its warnings are meant for programmers
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.name = "transformers"
        self.rounds = False
        self._torch = torch
        tuned = None if place.is_file() else tuned_model(place)
        folder = place if tuned is None else tuned.folder
        source: dict[str, Any] = {"gguf_file": folder.name} if folder.is_file() else {}
        where = str(folder.parent if folder.is_file() else folder)
        self._tokenizer = AutoTokenizer.from_pretrained(where, **source)
        self._model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **source).eval()
        if tuned is not None and tuned.adapter is not None:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, str(tuned.adapter)).eval()
        ends = self._model.generation_config.eos_token_id
        listed = [ends] if isinstance(ends, int) else list(ends or ())
        self.ends = [token for token in dict.fromkeys([*listed, self._tokenizer.eos_token_id]) if token is not None]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        if self._tokenizer.chat_template is None:
            return list(self._tokenizer(messages[-1]["content"])["input_ids"])
        rendered = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def answer(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        tokens: list[int] = []
        given, cache = self._torch.tensor([list(prompt)]), None
        with self._torch.no_grad(), warnings.catch_warnings():
            # later versions rename the argument `past_key_values`, and this one warns of it
            warnings.simplefilter("ignore", FutureWarning)
            for _ in range(max_tokens):
                out = self._model(given, past_key_values=cache, use_cache=True)
                token, cache = int(out.logits[0, -1].argmax()), out.past_key_values
                if token in self.ends:
                    break
                tokens.append(token)
                given = self._torch.tensor([[token]])
        return tokens

    def logits(self, tokens_BT: Any) -> Any:
        """Logits after every token, (B, T, V)."""
        with self._torch.no_grad():
            return self._model(tokens_BT).logits

    def scores(self, prefix: Sequence[int], tokens: Sequence[int]) -> list[float]:
        logits_V = self.logits(self._torch.tensor([list(prefix)]))[0, -1].float()
        return [float(logits_V[token]) for token in tokens]

    def text(self, token: int) -> str:
        return repr(self._tokenizer.decode([token]))


class LlamaCppEngine:
    """llama.cpp by `llama-cpp-python`, its KV cache in float32: a GGUF file, with a LoRA-GGUF beside it or none."""

    def __init__(self, place: Path, adapter: Path | None = None, context: int = 2048, *, is_coded: bool = False) -> None:
        import llama_cpp

        self.name = "llama.cpp"
        self.rounds = is_coded
        self._library = llama_cpp
        self._model = llama_cpp.Llama(
            str(place),
            n_ctx=context,
            n_gpu_layers=0,
            lora_path=None if adapter is None else str(adapter),
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
        self._template = self._model.metadata.get("tokenizer.chat_template")
        self._bos, eos = int(self._model.token_bos()), int(self._model.token_eos())
        eot = int(llama_cpp.llama_vocab_eot(self._model._model.vocab))
        self.ends = [token for token in dict.fromkeys((eos, eot)) if token >= 0]

    def encode(self, messages: Sequence[Message]) -> list[int]:
        if self._template is None:
            return list(self._model.tokenize(messages[-1]["content"].encode(), special=False))
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        special = [self._model._model.token_get_text(token) if token >= 0 else "" for token in (*self.ends[:1], self._bos)]
        formatter = Jinja2ChatFormatter(self._template, eos_token=special[0], bos_token=special[1])
        rendered = formatter(messages=list(messages)).prompt  # type: ignore[arg-type]
        return list(self._model.tokenize(rendered.encode(), add_bos=False, special=True))

    def _logits(self) -> np.ndarray:
        """Logits after what has been read, (V,)."""
        pointer = self._library.llama_get_logits_ith(self._model._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self._model.n_vocab(),)).copy()

    def logits(self, text: Sequence[int], first: int) -> list[np.ndarray]:
        """Logits after the first tokens of a text, and after each of the others, read one by one, (V,) each."""
        self._model.reset()
        self._model.eval(list(text[:first]))
        found = [self._logits()]
        for token in text[first:]:
            self._model.eval([token])
            found.append(self._logits())
        return found

    def answer(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        self._model.reset()
        self._model.eval(list(prompt))
        tokens: list[int] = []
        for _ in range(max_tokens):
            token = int(self._logits().argmax())
            if token in self.ends:
                break
            tokens.append(token)
            self._model.eval([token])
        return tokens

    def scores(self, prefix: Sequence[int], tokens: Sequence[int]) -> list[float]:
        self._model.reset()
        self._model.eval(list(prefix))
        logits_V = self._logits()
        return [float(logits_V[token]) for token in tokens]

    def text(self, token: int) -> str:
        return repr(self._model.detokenize([token], special=True).decode(errors="replace"))
