"""Low-rank adapters that requests may name."""

from __future__ import annotations

from itertools import count
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

from bessemer.core.errors import RequestError
from bessemer.model.adapter_folder import adaptable_layers
from bessemer.model.adapters import Adapter
from bessemer.model.decoder import Decoder


class LoadedAdapter(NamedTuple):
    """An adapter; salt: keeps its KV blocks apart from others', and from those of an earlier adapter of the same name."""

    adapter: Adapter
    salt: str


class LoadedAdapters:
    """Names and their adapters. A request keeps the adapter that it began with, or what that was updated to."""

    def __init__(self) -> None:
        self._loaded: dict[str, LoadedAdapter] = {}
        self._default: LoadedAdapter | None = None
        self._generations = count()
        self._updates: WeakKeyDictionary[Adapter, LoadedAdapter] = WeakKeyDictionary()
        #: Adapters of DoRA that a name or a request still has.
        self._with_gains: WeakSet[Adapter] = WeakSet()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are loaded."""
        return tuple(self._loaded)

    def load(self, name: str, adapter: Adapter) -> None:
        """Give a name to an adapter; one that has the name already is replaced."""
        self._loaded[name] = self._with_salt(f"adapter {name}", adapter)

    def _with_salt(self, what: str, adapter: Adapter) -> LoadedAdapter:
        if adapter.gains:
            self._with_gains.add(adapter)
        return LoadedAdapter(adapter, f"{what} {next(self._generations)}")

    def load_default(self, adapter: Adapter) -> None:
        """Take an adapter for the requests that name none."""
        self._default = self._with_salt("default adapter", adapter)

    def update(self, name: str, adapter: Adapter) -> tuple[Adapter, LoadedAdapter]:
        """Put an adapter in the place of one; the one before, and the new one. Raises RequestError for a name not loaded."""
        before = self.find(name).adapter
        self.load(name, adapter)
        self._updates[before] = self._loaded[name]
        return before, self._loaded[name]

    def updated(self, adapter: Adapter) -> LoadedAdapter | None:
        """What an adapter was updated to last; None where it was not."""
        found = None
        while (newer := self._updates.get(adapter)) is not None:
            found, adapter = newer, newer.adapter
        return found

    def refit(self, model: Decoder) -> None:
        """Fit the adapters to weights that have changed; those of requests whose name has another adapter now, too."""
        for adapter in self._with_gains:
            adapter.refit(model)

    def unload(self, name: str) -> None:
        """Remove a name. Raises RequestError where it is not loaded."""
        self.find(name)
        del self._loaded[name]

    def of(self, name: str | None) -> LoadedAdapter | None:
        """The adapter of a request: of the name that it has, or the default one. Raises RequestError as `find`."""
        return self._default if name is None else self.find(name)

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of a name. Raises RequestError where it is not loaded."""
        if name not in self._loaded:
            known = f"loaded: {', '.join(self._loaded)}" if self._loaded else "none is loaded"
            raise RequestError(f"unknown adapter {name!r}; {known}")
        return self._loaded[name]


def copied_adapter(adapter: Adapter, model: Decoder) -> Adapter:
    """An adapter in memory as one of its own for a model: where its weights lie, in their type, and no longer the caller's.

    Raises RequestError for an update of a layer that an adapter of the model cannot change, or of another shape.
    """
    layers = adaptable_layers(model)
    if not adapter.updates:
        raise RequestError("the adapter has no update of any layer")
    for name, (down_RK, up_NR, _, magnitude_N) in adapter.updates.items():
        if name not in layers:
            raise RequestError(f"the adapter changes {name!r}, which is no layer of this model that an adapter can change")
        outputs, inputs = layers[name]
        rank = len(down_RK)
        if (tuple(down_RK.shape), tuple(up_NR.shape)) != ((rank, inputs), (outputs, rank)):
            raise RequestError(
                f"the update of {name!r} has shapes {tuple(down_RK.shape)} and {tuple(up_NR.shape)}, "
                f"not (rank, {inputs}) and ({outputs}, rank)"
            )
        if magnitude_N is not None and tuple(magnitude_N.shape) != (outputs,):
            raise RequestError(f"the magnitudes of {name!r} have shape {tuple(magnitude_N.shape)}, not ({outputs},)")
    copied = Adapter({name: update.each(lambda tensor: tensor.detach().clone()) for name, update in adapter.updates.items()})
    return copied.fitted(model).to(model.device, model.dtype)
