"""GPUs of the planner: vendor figures, the fraction of the peak that training achieves, and the price of an hour.

Peaks, memory and bandwidths are the vendors' (data sheets of NVIDIA's H100, H200, HGX B200, A100, L40S, GeForce RTX 4090
and 3090 — the Ada and Ampere white papers for dense bf16 with float32 sums — and AMD's MI300X), dense, without sparsity.
Links are one direction of one card: NVLink or Infinity Fabric where the node has it, else PCIe; between nodes what the
vendors' reference machines give each card (DGX A100: 200 Gb/s; DGX H100, H200, B200: 400 Gb/s), and 100 Gb/s where there is
no such machine.

Assumptions, marked so wherever they are printed:

`achievable`: the share of the peak that large products reach within a step. One number a generation, from published runs
(docs/planning.md compares them): an A100's 0.70 lies between cuBLAS alone, 0.80 to 0.85, and Megatron's best runs, 0.57 with
everything else in it; an H100's clock falls under full load, so that cuBLAS alone reaches 0.65 to 0.70. Cards without a
published run get the number of their generation.
`price`: dollars an hour, rented on demand, as of 2025; `--price` replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError

_TERA, _GIGA, _GIBI = 1e12, 1e9, 1 << 30


@dataclass(frozen=True)
class Card:
    """An accelerator and its usual machine. FLOP/s, bytes, bytes per second, dollars an hour."""

    name: str
    flops: float
    memory: float
    bandwidth: float
    node_link: float
    network_link: float
    cards_per_node: int
    price: float
    achievable: float
    float8_flops: float | None = None
    #: Whether RMS norms run as one kernel, which stores only its input.
    fused_norms: bool = True

    @property
    def usable_memory(self) -> float:
        """Bytes available to tensors, without the driver, the libraries' workspaces and fragmentation."""
        return self.memory * USABLE_MEMORY


#: Fraction of a card's memory; CUDA's context, NCCL's buffers and cuBLAS's workspaces take 2 to 4 GB, fragmentation some more.
USABLE_MEMORY = 0.92


def _card(
    name: str,
    teraflops: float,
    gigabytes: float,
    bandwidth: float,
    links: tuple[float, float],
    per_node: int,
    price: float,
    achievable: float,
    float8: float | None = None,
) -> Card:
    """A card from the units of data sheets: TFLOP/s, GiB, GB/s, (GB/s in the node, GB/s between nodes)."""
    return Card(
        name,
        teraflops * _TERA,
        gigabytes * _GIBI,
        bandwidth * _GIGA,
        links[0] * _GIGA,
        links[1] * _GIGA,
        per_node,
        price,
        achievable,
        None if float8 is None else float8 * _TERA,
    )


#: Two CPU cores with AVX-512, as in the tests: measured.
_CPU = Card("cpu", 0.4 * _TERA, 16 * _GIBI, 20 * _GIGA, 5 * _GIGA, 1.25 * _GIGA, 1, 0.1, 0.35, fused_norms=False)

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("h100", 989.4, 80, 3350, (450, 50), 8, 3.0, 0.60, 1978.9),
        _card("h100-pcie", 756, 80, 2000, (64, 25), 8, 2.5, 0.60, 1513),
        _card("h200", 989.4, 141, 4800, (450, 50), 8, 3.5, 0.60, 1978.9),
        _card("b200", 2250, 180, 7700, (900, 50), 8, 5.5, 0.60, 4500),
        _card("a100", 312, 80, 2039, (300, 25), 8, 1.8, 0.70),
        _card("a100-40", 312, 40, 1555, (300, 25), 8, 1.3, 0.70),
        _card("l40s", 362, 48, 864, (32, 12.5), 8, 1.0, 0.60, 733),
        _card("rtx4090", 165.2, 24, 1008, (32, 12.5), 8, 0.5, 0.60, 330.3),
        _card("rtx3090", 71.2, 24, 936, (32, 12.5), 8, 0.25, 0.70),
        _card("mi300x", 1307, 192, 5300, (448, 50), 8, 2.5, 0.45, 2615),
        _CPU,
    )
}


def find_card(name: str) -> Card:
    """The card of this name. Raises ConfigError with the nearest name."""
    if name.lower() not in CARDS:
        raise ConfigError(f"no card is named {name!r}{nearest(name.lower(), list(CARDS))}")
    return CARDS[name.lower()]


def card_of_device(name: str) -> Card | None:
    """The card of a PyTorch device name (`torch.cuda.get_device_name`: "NVIDIA A100-SXM4-40GB"); None when it is unknown."""
    words = "".join(character if character.isalnum() else " " for character in name.lower()).replace("rtx ", "rtx").split()
    matching = [card for card in CARDS.values() if all(word in words for word in _words_of(card.name))]
    return max(matching, key=lambda card: len(_words_of(card.name)), default=None)


def _words_of(name: str) -> list[str]:
    """The words of a device name that identify a card: `a100-40` is an a100 with 40gb."""
    return [f"{word}gb" if word.isdecimal() else word for word in name.split("-")]
