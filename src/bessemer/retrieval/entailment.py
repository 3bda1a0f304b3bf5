"""Whether a source bears a sentence out: an entailment head over the states of a small encoder.

Shared words say little: "It is not closed on Sundays" has every word of "It is closed on Sundays". The head aligns each token
of a sentence with the tokens of its source, compares the aligned states, and sums what it found (decomposable attention,
Parikh et al. 2016). Its inputs are the states of the encoder with which the passages are embedded, which stay as they are, and
a few numbers of words that both have. It is trained on pairs made from an index (`entailment_training.py`), and its
probabilities are calibrated by a temperature (Guo et al. 2017).
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.core.errors import ArtefactError
from bessemer.retrieval.embed import missing_minilm, packaged_minilm
from bessemer.retrieval.encoder_texts import EncoderTexts
from bessemer.retrieval.terms import PLAIN_WORDS, terms_of, words_of_text

# Shapes: N pairs, B of a batch, S tokens of a sentence, P tokens of its source, D of a state, A of the attention, H hidden,
# F numbers of shared words.

FORMAT = 1
_TRAINING = "bessemer.retrieval.entailment_training"
#: Sizes of the head: of the space in which tokens are aligned, and of what is compared.
_ALIGNED, _HIDDEN = 48, 48
#: Pairs that are read at once.
_PAIRS_AT_ONCE = 16
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_NAME = re.compile(r"\b\w+(?:[._]\w+)+\b|\b[A-Z]\w*[A-Z0-9]\w*\b|(?<=[a-z,] )[A-Z]\w+")
_NEGATION = re.compile(r"\b(not|no|never|none|nothing|nobody|cannot|without|neither|nor)\b|n't\b", re.IGNORECASE)
_SPELLED = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    )
}
#: Numbers that `shared` gives of a pair.
SHARED = 8


class EntailmentHead(nn.Module):
    """Logits (B,) that sources bear sentences out. temperature: what a logit is divided by for a probability."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.align = nn.Linear(width, _ALIGNED)
        self.compare = nn.Linear(4 * _ALIGNED, _HIDDEN)
        self.judge = nn.Sequential(nn.Linear(2 * _HIDDEN + SHARED, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
        self.register_buffer("temperature", torch.ones(()))

    def forward(
        self, sentence_BSD: Tensor, sentence_mask_BS: Tensor, source_BPD: Tensor, source_mask_BP: Tensor, shared_BF: Tensor
    ) -> Tensor:
        own_BSA, other_BPA = self.align(sentence_BSD), self.align(source_BPD)
        scores_BSP = functional.normalize(own_BSA, dim=-1) @ functional.normalize(other_BPA, dim=-1).transpose(1, 2) * 16
        weights_BSP = scores_BSP.masked_fill(~source_mask_BP[:, None, :], -torch.inf).softmax(-1)
        aligned_BSA = weights_BSP @ other_BPA
        both = (own_BSA, aligned_BSA, own_BSA - aligned_BSA, own_BSA * aligned_BSA)
        compared_BSH = self.compare(torch.cat(both, -1)).relu() * sentence_mask_BS[:, :, None]
        mean_BH = compared_BSH.sum(1) / sentence_mask_BS.sum(1, keepdim=True).clamp(min=1)
        return self.judge(torch.cat((mean_BH, compared_BSH.amax(1), shared_BF), -1))[:, 0]


@dataclass(frozen=True)
class Entailment:
    """A head with its encoder. made: how it was trained."""

    texts: EncoderTexts
    head: EntailmentHead
    made: Mapping[str, Any]

    def probabilities(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Of each (sentence, source), (N,) float32: how likely the source bears the sentence out."""
        if not pairs:
            return np.empty(0, np.float32)
        states = states_of(self.texts, list(dict.fromkeys(text for pair in pairs for text in pair)))
        found = []
        with torch.inference_mode():
            for first in range(0, len(pairs), _PAIRS_AT_ONCE):
                some = pairs[first : first + _PAIRS_AT_ONCE]
                logits_B = self.head(*batch_of([(states[one], states[other]) for one, other in some], map_shared(some)))
                found.append((logits_B / self.head.temperature).sigmoid())
        return torch.cat(found).numpy()

    def save(self, path: Path) -> None:
        """Write the head, in half precision, and how it was made."""
        described = {"format": FORMAT, "width": self.head.width, "made": dict(self.made)}
        description = np.frombuffer(json.dumps(described, sort_keys=True).encode(), np.uint8)
        arrays = {name: tensor.half().numpy() for name, tensor in self.head.state_dict().items()}
        np.savez_compressed(path, description=description, **arrays)


def load_entailment(path: Path, folder: Path) -> Entailment:
    """Open a head's file, for the encoder of a folder. Raises ArtefactError, in one line, where it is none, is damaged, or is
    for states of another width."""
    texts = EncoderTexts(folder)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            described = json.loads(arrays["description"].tobytes())
            tensors = {name: torch.from_numpy(arrays[name]).float() for name in arrays.files if name != "description"}
        if described["format"] != FORMAT:
            raise ArtefactError(f"{path}: this entailment head has format {described['format']}, and {FORMAT} is known here")
        if described["width"] != texts.encoder.config.hidden_size:
            raise ArtefactError(f"{path}: it reads states of {described['width']} numbers, and {folder} gives others")
        head = EntailmentHead(int(described["width"]))
        head.load_state_dict(tensors)
        return Entailment(texts, head.eval(), dict(described["made"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        raise ArtefactError(f"{path}: this is no entailment head, or a damaged one ({error})") from None


def open_entailment(path: Path) -> Entailment:
    """The head of a file, for all-MiniLM-L6-v2. Raises ArtefactError as `load_entailment`, and where that is not installed."""
    if not path.is_file():
        raise ArtefactError(f"{path}: no entailment head is here; python -m {_TRAINING} INDEX {path} trains one")
    folder = packaged_minilm()
    if folder is None:
        raise missing_minilm()
    return load_entailment(path, folder)


@torch.inference_mode()
def states_of(texts: EncoderTexts, wanted: Sequence[str]) -> dict[str, Tensor]:
    """The states (T, D) of each text."""
    found = {}
    for batch in texts.batches(list(wanted)):
        hidden_BTD = texts.encoder(batch.ids_BT, batch.mask_BT)
        for row, place in enumerate(batch.places_B):
            found[wanted[place]] = hidden_BTD[row, : int(batch.mask_BT[row].sum())].clone()
    return found


def batch_of(states: Sequence[tuple[Tensor, Tensor]], shared_BF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the head reads of pairs of states: padded, with masks."""
    padded: list[Tensor] = []
    for side in range(2):
        own = [pair[side] for pair in states]
        lengths_B = torch.tensor([len(one) for one in own])
        padded += [nn.utils.rnn.pad_sequence(own, batch_first=True), torch.arange(int(lengths_B.max())) < lengths_B[:, None]]
    return padded[0], padded[1], padded[2], padded[3], shared_BF


def map_shared(pairs: Sequence[tuple[str, str]]) -> Tensor:
    """`shared` of each pair, (B, F)."""
    return torch.tensor([shared(sentence, source) for sentence, source in pairs], dtype=torch.float32)


def shared(sentence: str, source: str) -> list[float]:
    """What words of a sentence its source has: shares, from 0 to 1, of all content words, of numbers and of names, whether
    there are numbers and names, and negations in either."""
    own, known = _terms(sentence), set(_terms(source))
    numbers, others = _numbers(sentence), _numbers(source)
    names = set(_NAME.findall(sentence))
    lowered = source.lower()
    return [
        sum(word in known for word in own) / len(own) if own else 1.0,
        len(numbers & others) / len(numbers) if numbers else 1.0,
        float(bool(numbers)),
        sum(name.lower() in lowered for name in names) / len(names) if names else 1.0,
        float(bool(names)),
        float(bool(_NEGATION.search(sentence))),
        float(bool(_NEGATION.search(source))),
        min(1.0, len(own) / 20),
    ]


def _terms(text: str) -> list[str]:
    words = (word for word in words_of_text(text) if word.lower() not in PLAIN_WORDS)
    return [term for word in words for term in terms_of(word)]


def _numbers(text: str) -> set[str]:
    """Its numbers, also those that are spelled, in digits."""
    spelled = {_SPELLED[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _SPELLED}
    return spelled | {number.replace(",", "") for number in _NUMBER.findall(text)}
