"""What a server serves, before any of it is open: other processes can be given it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bessemer.inference.engine import Engine, EngineConfig
from bessemer.serving.shelf import Shelf


@dataclass(frozen=True)
class Opening:
    """A model with its adapters, and the models beside it, by name.

    model: a folder or a GGUF file. beside: models that are opened when they are asked for; max_models, models_memory,
    keep_alive: of these, as `Shelf` has them.
    """

    model: Path
    name: str
    device: str = "auto"
    engine: EngineConfig = field(default_factory=EngineConfig)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    beside: Mapping[str, Path] = field(default_factory=dict)
    max_models: int = 2
    models_memory: float | None = None
    keep_alive: float | None = None

    def open_engine(self) -> Engine:
        """The engine with its adapters. Raises what `Engine` and `load_adapter` raise."""
        engine = Engine(self.model, device=self.device, config=self.engine)
        try:
            for name, folder in self.adapters.items():
                engine.load_adapter(name, folder)
        except BaseException:
            engine.close()
            raise
        return engine

    def shelf(self, max_waiting: int) -> Shelf | None:
        """The models beside it, none of them open yet."""
        if not self.beside:
            return None
        return Shelf(
            self.beside,
            lambda place: Engine(place, device=self.device, config=self.engine),
            max_waiting=max_waiting,
            most=self.max_models,
            memory=self.models_memory,
            keep_alive=self.keep_alive,
        )
