"""The one who guesses, as an engine's settings ask for it."""

from __future__ import annotations

from bessemer.inference.engine_config import SpeculationConfig
from bessemer.inference.ngrams import NGramProposer
from bessemer.inference.pace import Pace
from bessemer.inference.speculation import Proposer


def new_proposer(config: SpeculationConfig | None) -> Proposer | None:
    """Who guesses ahead for an engine; nobody where none is asked for."""
    if config is None:
        return None
    return NGramProposer(Pace(config.tokens, config.adapt))
