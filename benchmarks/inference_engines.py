"""The engines of `inference.py`, one in each process: Bessemer, llama.cpp at its lowest level, and `transformers`.

A measurement is named by what is done and how often: `decode_8` (as many streams, greedily), `top_p_8` (the same, sampled),
`prompt_512` (a prompt of as many tokens, until its first token).
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inference_files import SIZES, Size, silent

#: llama.cpp's default sampling, on both sides.
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
#: Tokens that each stream writes in a trial of the peer's settings.
TRIAL = 16
#: Tokens of a prompt for which flash attention alone is tried when it is longer: one run may take minutes.
LONG = 1024
#: The largest logical batch of the peer: the prompts of 32 streams, or one of 4,096.
BATCH = 4096


def kind_of(what: str) -> tuple[str, int]:
    """`prompt_512` as `prompt` and 512."""
    kind, _, count = what.rpartition("_")
    return kind, int(count)


class Ours:
    """Bessemer's engine."""

    def __init__(self, path: Path, threads: int, streams: int = 32) -> None:
        from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
        from bessemer.model.cpu_kernels import library, unavailable

        kernels = library()
        arithmetic = f"kernels: {kernels.bessemer_arithmetic().decode()}" if kernels else f"no kernels: {unavailable()}"
        config = EngineConfig(threads=threads, max_num_seqs=streams, prefix_cache=False, kv_memory=1.0)
        self.engine, self.params = Engine(path, config=config), SamplingParams
        self.about = f"{arithmetic}, {threads} threads, {self.engine.describe()}"

    def tune(self, prompts: list[list[int]], what: str) -> dict[str, Any]:
        """Warm up. There is nothing to choose."""
        self.run(prompts, 1 if what.startswith("prompt") else TRIAL, what)
        return {}

    def run(self, prompts: list[list[int]], count: int, what: str = "decode_1") -> list[list[float]]:
        """Generate; when each token of each prompt came, in seconds."""
        sampled = what.startswith("top_p")
        params = self.params(**(SAMPLING if sampled else {"temperature": 0}), max_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        answers = [self.engine.prepare(prompt, params) for prompt in prompts]
        for answer in answers:
            self.engine.begin(answer)
        times: list[list[float]] = [[] for _ in prompts]
        while not all(answer.done for answer in answers):
            self.engine.step()
            now = time.perf_counter() - start
            for came, answer in zip(times, answers, strict=True):
                came += [now] * sum(len(chunk.token_ids) for chunk in answer.drain())
        return times

    def nats(self, window: list[int]) -> float:
        """Negative log-likelihood of a window's tokens after the first."""
        (found,) = self.engine.generate([window], self.params(max_tokens=1, prompt_logprobs=0))
        return -sum(one.log_probs.token for one in found.prompt_log_probs or [] if one.log_probs)


class PeerSettings(NamedTuple):
    """Those of llama.cpp's context that change its speed; the defaults are its own, but for the number of threads."""

    threads: int = 2
    flash_attention: bool = True
    physical_batch: int = 512
    unified_cache: bool = False


#: What else is tried of each setting, by kind of measurement.
ALTERNATIVES: dict[str, dict[str, tuple[Any, ...]]] = {
    "stream": {"threads": (1,), "flash_attention": (False,)},
    "streams": {"threads": (1,), "flash_attention": (False,), "unified_cache": (True,)},
    "prompt": {"flash_attention": (False,), "physical_batch": (128, 256), "threads": (1,)},
    "long": {"flash_attention": (False,)},
}


class Peer:
    """llama.cpp at its lowest level."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self.library, self.threads, self.about = llama_cpp, threads, llama_cpp.llama_print_system_info().decode().strip()
        llama_cpp.llama_log_set(silent(), None)
        settings = llama_cpp.llama_model_default_params()
        settings.use_extra_bufts = True  # weights are repacked for this processor: llama.cpp's default
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), settings)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        fields = (self.batch.token, self.batch.pos, self.batch.n_seq_id, self.batch.logits)
        self.tokens, self.positions, counts, self.wanted = (np.ctypeslib.as_array(each, shape=(BATCH,)) for each in fields)
        counts[:] = 1
        self.context: Any = None
        self.made_for: tuple[int, int, PeerSettings] | None = None
        self.settings = PeerSettings(threads)
        self.samplers: list[Any] = []

    def tune(self, prompts: list[list[int]], what: str) -> dict[str, Any]:
        """Take the fastest settings, one after the other; what was tried, at which rate."""
        kind, _ = kind_of(what)
        tried: list[dict[str, Any]] = []

        def rate(settings: PeerSettings) -> float:
            self.settings = settings
            count = 1 if kind == "prompt" else TRIAL
            found = [rates(self.run(prompts, count, what), what)["rate"]]
            # once more where it takes no time
            if len(prompts) <= 8 and sum(map(len, prompts)) / found[0] < 3:
                found.append(rates(self.run(prompts, count, what), what)["rate"])
            tried.append(settings._asdict() | {"rate": max(found)})
            return max(found)

        chosen = PeerSettings(self.threads)
        fastest = rate(chosen)
        if kind == "prompt":
            alternatives = ALTERNATIVES["prompt" if len(prompts[0]) <= LONG else "long"]
        else:
            alternatives = ALTERNATIVES["stream" if len(prompts) == 1 else "streams"]
        for name, values in alternatives.items():
            for value in values:
                other = chosen._replace(**{name: value})
                if other != chosen and (found := rate(other)) > fastest:
                    chosen, fastest = other, found
        self.settings = chosen
        self.run(prompts, 1, what)  # the context is made anew for what was chosen
        return {"settings": chosen._asdict(), "tried": tried}

    def run(self, prompts: list[list[int]], count: int, what: str = "decode_1") -> list[list[float]]:
        """As `Ours.run`."""
        sampled = what.startswith("top_p")
        lengths = [len(prompt) for prompt in prompts]
        self._empty_context(len(prompts), max(512, -(-(max(lengths) + count) // 256) * 256))
        if sampled:
            self._make_samplers(len(prompts))
        start = time.perf_counter()
        tokens = list(itertools.chain.from_iterable(prompts))
        positions = [place for length in lengths for place in range(length)]
        sequences = [sequence for sequence, length in enumerate(lengths) for _ in range(length)]
        ends = list(itertools.accumulate(lengths))
        last = [False] * len(tokens)
        for end in ends:
            last[end - 1] = True
        self._decode(tokens, positions, sequences, last)
        chosen = self._choose([end - 1 for end in ends], sampled)
        times = [[time.perf_counter() - start] for _ in prompts]
        rows = range(len(prompts))
        for place in range(count - 1):
            self._decode(chosen, [length + place for length in lengths], rows, [True] * len(rows))
            chosen = self._choose(rows, sampled)
            now = time.perf_counter() - start
            for came in times:
                came.append(now)
        return times

    def nats(self, window: list[int]) -> float:
        """As `Ours.nats`."""
        import numpy as np

        self.settings = PeerSettings(self.threads)
        self._empty_context(1, 512)
        places = range(len(window))
        self._decode(window, places, [0] * len(window), [True] * len(window))
        logits = self._logits(len(window)).astype(np.float64)
        largest = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
        return float((log_sum[:-1] - logits[places[:-1], window[1:]]).sum())

    def _empty_context(self, streams: int, length: int) -> None:
        """One for as many streams of a length, made anew when these or the settings change: it is fastest at its own size."""
        wanted = streams, length, self.settings
        if self.made_for == wanted:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.library.llama_free(self.context)
        made = self.library.llama_context_default_params()
        made.n_ctx = length if streams == 1 else 256 * streams
        made.n_batch, made.n_ubatch, made.n_seq_max = BATCH, self.settings.physical_batch, streams
        made.n_threads = made.n_threads_batch = self.settings.threads
        flash = self.library.LLAMA_FLASH_ATTN_TYPE_ENABLED, self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        made.flash_attn_type = flash[0] if self.settings.flash_attention else flash[1]
        made.kv_unified = self.settings.unified_cache
        self.context = self.library.llama_init_from_model(self.model, made)
        self.made_for = wanted

    def _make_samplers(self, streams: int) -> None:
        """A chain for each stream, in the order of llama.cpp's own."""
        library = self.library
        for chain in self.samplers:
            library.llama_sampler_free(chain)
        self.samplers = []
        for seed in range(streams):
            chain = library.llama_sampler_chain_init(library.llama_sampler_chain_default_params())
            for part in (
                library.llama_sampler_init_top_k(SAMPLING["top_k"]),
                library.llama_sampler_init_top_p(SAMPLING["top_p"], 1),
                library.llama_sampler_init_temp(SAMPLING["temperature"]),
                library.llama_sampler_init_dist(seed),
            ):
                library.llama_sampler_chain_add(chain, part)
            self.samplers.append(chain)

    def _choose(self, rows: Sequence[int], sampled: bool) -> list[int]:
        """The next tokens of the streams. rows: which tokens of the batch gave their logits."""
        if sampled:
            pairs = zip(self.samplers, rows, strict=True)
            return [self.library.llama_sampler_sample(chain, self.context, row) for chain, row in pairs]
        return list(self._logits(len(rows)).argmax(-1))

    def _logits(self, rows: int) -> Any:
        import numpy as np

        return np.ctypeslib.as_array(self.library.llama_get_logits(self.context), shape=(rows, self.vocab_size))

    def _decode(self, tokens: Any, positions: Sequence[int], sequences: Sequence[int], wanted: list[bool]) -> None:
        rows = self.batch.n_tokens = len(tokens)
        self.tokens[:rows], self.positions[:rows], self.wanted[:rows] = tokens, positions, wanted
        for row, sequence in enumerate(sequences):
            self.batch.seq_id[row][0] = sequence
        failed = self.library.llama_decode(self.context, self.batch)
        assert not failed, f"llama_decode ended with {failed}"


class Transformers:
    """`transformers.generate` in bfloat16."""

    def __init__(self, path: Path, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}, bfloat16, {threads} threads"

    def tune(self, prompts: list[list[int]], what: str) -> dict[str, Any]:
        """As `Ours.tune`."""
        self.run(prompts, TRIAL, what)
        return {}

    def run(self, prompts: list[list[int]], count: int, what: str = "decode_1") -> list[list[float]]:
        """One prompt; the times between tokens are their mean."""
        (prompt,) = prompts
        tokens = self.torch.tensor([prompt])
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        start = time.perf_counter()
        self.model.generate(tokens, max_new_tokens=1, **settings)
        first = time.perf_counter() - start
        start = time.perf_counter()
        self.model.generate(tokens, max_new_tokens=count, **settings)
        each = (time.perf_counter() - start - first) / (count - 1)
        return [[first + each * place for place in range(count)]]

    def nats(self, window: list[int]) -> float:
        """As `Ours.nats`."""
        with self.torch.no_grad():
            tokens = self.torch.tensor([window])
            logits = self.model(tokens).logits[0, :-1].float()
            return float(self.torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))


ENGINES: dict[str, Any] = {"bessemer": Ours, "llama.cpp": Peer, "transformers": Transformers}


def rates(times: list[list[float]], what: str) -> dict[str, float]:
    """One run's `rate`, tokens a second, by which it is compared, and its latencies in seconds.

    Of a prompt the rate counts its own tokens until the first that follows. Of streams it counts what is decoded while all of
    them write: after the last stream's first token, until the first stream ends. `whole` counts all of their tokens, until the
    last has come, the reading of their prompts included.
    """
    firsts = [came[0] for came in times]
    found = {"first_median": statistics.median(firsts), "first_worst": max(firsts)}
    kind, count = kind_of(what)
    if kind == "prompt":
        return {"rate": count / firsts[0]} | found
    between = sorted(later - earlier for came in times for earlier, later in itertools.pairwise(came))
    begin, end = max(firsts), min(came[-1] for came in times)
    rate = sum(begin < at <= end for came in times for at in came) / (end - begin) if end > begin else 0.0
    whole = sum(map(len, times)) / max(came[-1] for came in times)
    latencies = {
        "between_median": statistics.median(between),
        "between_p99": between[min(len(between) - 1, int(0.99 * len(between)))],
    }
    return {"rate": rate, "whole": whole} | found | latencies


def asked_of(what: str, windows: list[list[int]], size: Size) -> tuple[list[list[int]], int]:
    """The prompts of a measurement, and how many tokens each writes. No two prompts begin alike."""
    kind, count = kind_of(what)
    if kind == "prompt":
        return [list(itertools.chain.from_iterable(windows))[:count]], 1
    if count == 1:
        return [windows[0][: size.prompt]], size.answer
    return [window[: size.stream_prompt] for window in windows[:count]], size.stream_answer


def serve_lines(kind: str, path: Path, threads: int, work: Path, model: str) -> None:
    """A worker's life: do what the lines of standard input ask for."""
    engine, size = ENGINES[kind](path, threads), SIZES[model]
    text = json.loads((work / "text.json").read_text(encoding="utf-8"))
    windows: list[list[int]] = text["windows"]
    print(json.dumps(engine.about), flush=True)
    for line in sys.stdin:
        verb, what = line.split()
        if verb == "bits":
            scored = sum(text["bytes"][: size.scored])
            answer: Any = sum(map(engine.nats, windows[: size.scored])) / math.log(2) / scored
        else:
            prompts, count = asked_of(what, windows, size)
            if verb == "tune":
                answer = engine.tune(prompts, what)
            else:
                answer = rates(engine.run(prompts, count, what), what)
        print(json.dumps(answer), flush=True)


def start_once(kind: str, path: Path, threads: int, work: Path) -> None:
    """A worker that opens a file and writes: `first`, on standard output, as soon as the first token is there, then figures.

    opened: seconds until then with the libraries loaded; peak_bytes: the most of this process's memory, TRIAL tokens later.
    """
    text = json.loads((work / "text.json").read_text(encoding="utf-8"))
    prompt: list[int] = text["windows"][0][:TRIAL]
    if kind == "llama.cpp":
        import llama_cpp  # noqa: F401
    else:
        import bessemer.inference.engine  # noqa: F401
        from bessemer.model.cpu_kernels import library

        library()
    begun = time.perf_counter()
    engine = Ours(path, threads, streams=1) if kind == "bessemer" else ENGINES[kind](path, threads)
    engine.run([prompt], 1)
    opened = time.perf_counter() - begun
    print("first", flush=True)
    engine.run([prompt], TRIAL)
    from bessemer.core.environment import peak_memory_bytes

    print(json.dumps({"opened": opened, "peak_bytes": peak_memory_bytes()}), flush=True)
