"""What golden outputs are made of: tests that fail when a stage's output changes, and not because of another processor.

Weights are quotients of whole numbers: the last digits of random ones are the vector library's choice. What is made of bytes or
rounded to codes is held exactly; what was trained or measured, to a tolerance far below what a changed formula moves.
"""

import torch

from bessemer.model.decoder import Decoder


def exact_weights(decoder: Decoder) -> Decoder:
    """Fill every matrix with numbers in [-0.1, 0.1] that are the same on every machine; vectors stay as they are."""
    with torch.no_grad():
        for number, weight in enumerate(decoder.parameters()):
            if weight.dim() > 1:
                places = torch.arange(weight.numel()) + 1_000 * number
                weight.copy_(((places * places * 31 + places * 7_919) % 20_011 - 10_005).div(100_050).view_as(weight))
    return decoder


def checksum(tensor: torch.Tensor) -> float:
    """A figure that every weight moves."""
    return torch.dot(tensor.flatten().double(), torch.arange(tensor.numel()).double().cos()).item()
