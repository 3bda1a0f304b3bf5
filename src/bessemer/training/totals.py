"""Totals of a batch's terms over micro-batches and processes: the loss of a step, or of a validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from bessemer.distributed.mesh import Mesh
from bessemer.model.device import widest_float
from bessemer.training.objectives import Count, Terms


@dataclass(frozen=True)
class Figure:
    """A metric's sum, count and largest value; minus infinity where none was given."""

    sum: float
    count: float
    max: float


@dataclass(frozen=True)
class Totals:
    """Sums and denominators of the terms, and figures, over whole batches: the same on every process. Totals of batches add
    up."""

    sums: Mapping[str, float] = field(default_factory=dict)
    denominators: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Σ over terms of sum / denominator."""
        return sum(self.terms.values())

    @property
    def terms(self) -> dict[str, float]:
        """Each term's part of the loss."""
        return {name: total / (self.denominators[name] or 1.0) for name, total in self.sums.items()}

    @property
    def metrics(self) -> dict[str, float]:
        """The terms as `loss_TERM`, where there are several, and the figures' means and, as `NAME_max`, largest values.

        A figure of nothing has no mean, and is left out.
        """
        terms = self.terms
        metrics = {f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
        for name, figure in self.figures.items():
            if not figure.count:
                continue
            metrics[name] = figure.sum / figure.count
            if figure.max > -math.inf:
                metrics[f"{name}_max"] = figure.max
        return metrics

    def __add__(self, other: Self) -> Totals:
        figures = dict(self.figures)
        for name, figure in other.figures.items():
            before = figures.get(name, Figure(0.0, 0.0, -math.inf))
            figures[name] = Figure(before.sum + figure.sum, before.count + figure.count, max(before.max, figure.max))
        return Totals(_added(self.sums, other.sums), _added(self.denominators, other.denominators), figures)


def _added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in dict.fromkeys([*first, *second])}


def whole_denominators(counts: Mapping[str, Count], mesh: Mesh) -> dict[str, float]:
    """Denominators of a whole batch from those of this data rank's rows. One all-reduce."""
    layout = mesh.layout
    here = torch.tensor([count.value for count in counts.values()], dtype=torch.float64)
    # every rank of the other axes has the same rows
    everywhere = mesh.sum(here, layout.tensor * layout.pipeline * layout.context)
    return {
        name: count.value if count.per == "constant" else total
        for (name, count), total in zip(counts.items(), everywhere.tolist(), strict=True)
    }


class TotalsReducer:
    """Adds up the terms of a step's micro-batches over the processes of a mesh; knows the names of the figures, which only the
    last stage of a pipeline computes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._names: list[str] | None = None

    def reduced(self, micro_batches: Sequence[Terms], denominators: Mapping[str, float]) -> Totals:
        """The totals of one batch. One wait for the device, and one or two all-reduces of some numbers.

        Raises AssertionError when a term has no denominator.
        """
        return self.reduced_with((), micro_batches, denominators)[0]

    def reduced_with(
        self, others: Sequence[Tensor], micro_batches: Sequence[Terms], denominators: Mapping[str, float]
    ) -> tuple[Totals, list[list[float]]]:
        """The totals of one batch as of `reduced`, and the numbers of other tensors, which come to the host in the same
        transfer; these are not summed."""
        names = self._figure_names(micro_batches)
        terms = list(denominators)
        present = list(dict.fromkeys(name for each in micro_batches for name in each.sums))
        assert set(present) <= set(terms), (present, terms)
        sums = torch.zeros(len(terms) + 2 * len(names), dtype=torch.float64)
        largest = torch.full((len(names),), -math.inf, dtype=torch.float64)
        numbers = [_numbers(each) for each in micro_batches]
        host = on_host([*others, *(number for each in numbers for number in each)])
        of_terms = iter(host[len(others) :])
        for each, count in zip(micro_batches, map(len, numbers), strict=True):
            values = [value for (value,) in islice(of_terms, count)]
            for place, name in enumerate(each.sums):
                sums[terms.index(name)] += values[place]
            rest = iter(values[len(each.sums) :])
            for name, metric in each.metrics.items():
                place = names.index(name)
                sums[len(terms) + place] += next(rest)
                sums[len(terms) + len(names) + place] += next(rest)
                if metric.max is not None:
                    largest[place] = max(float(largest[place]), next(rest))
        # the ranks of the tensor axis have the same values, and those without the last stage of a pipeline have zeros
        totals = self._mesh.sum(sums, self._mesh.layout.tensor).tolist()
        most = self._mesh.largest(largest).tolist() if names else []
        figures = {
            name: Figure(totals[len(terms) + place], totals[len(terms) + len(names) + place], most[place])
            for place, name in enumerate(names)
        }
        return Totals(dict(zip(terms, totals, strict=False)), denominators, figures), host[: len(others)]

    def _figure_names(self, micro_batches: Sequence[Terms]) -> list[str]:
        if self._names is None:
            here = list(dict.fromkeys(name for each in micro_batches for name in each.metrics))
            everywhere = [here]
            if self._mesh.layout.pipeline > 1:
                everywhere = [[] for _ in range(self._mesh.layout.world_size)]
                dist.all_gather_object(everywhere, here)
            self._names = max(everywhere, key=len)
        return self._names


def _numbers(terms: Terms) -> list[Tensor]:
    """The scalars of a micro-batch: sums of terms, then each metric's sum, count and, where it has one, largest value."""
    numbers = [*terms.sums.values()]
    for metric in terms.metrics.values():
        numbers += [metric.sum, torch.as_tensor(metric.count), *(() if metric.max is None else (metric.max,))]
    return numbers


def on_host(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The numbers of each tensor, flat. Of each device all come in one transfer, for which the host waits once."""
    values: list[list[float]] = [[] for _ in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(place)
    for places in by_device.values():
        flat = [tensors[place].detach().flatten() for place in places]
        # whole numbers are counts, which float32 would round
        dtype = torch.float32
        for each in flat:
            dtype = torch.promote_types(dtype, each.dtype if each.is_floating_point() else widest_float(each.device))
        numbers = iter(torch.cat([each.to(dtype) for each in flat]).tolist())
        for place, each in zip(places, flat, strict=True):
            values[place] = list(islice(numbers, each.numel()))
    return values
