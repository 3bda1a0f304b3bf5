"""Documents to pretrain on: sums with their results, without those that reinforcement learning holds out."""

from collections.abc import Iterator
from pathlib import Path

from bessemer.posttraining.rl.config import RLConfig
from bessemer.posttraining.rl.prompts import gather_prompts


def sums(validation_share: float, seed: int) -> Iterator[dict[str, str]]:
    """`12 + 7 = 19`, a line each. validation_share, seed: those of the recipe."""
    config = RLConfig(data=["sums.yaml"], validation_share=validation_share)
    for prompt in gather_prompts(config, Path(__file__).parent, seed).training:
        asked = str(prompt.turns)
        first, second = asked.removesuffix(" =").split(" + ")
        yield {"id": asked, "text": f"{asked} {int(first) + int(second)}\n"}
