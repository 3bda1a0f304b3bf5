"""Batches that grow: the rows of a source in its own order, cut into batches of other sizes."""

from __future__ import annotations

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_value
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.training.batch_sizes import BatchSizes
from bessemer.training.data.batches import Batch, BatchSource, StatelessBatches, concatenated


def read_rows(source: BatchSource, rows: range, mesh: Mesh = ALONE) -> Batch:
    """Rows of a source with batches of one size, counted through all of them: row r is row r mod size of step r // size."""
    size = source.batch_size
    parts = []
    for step in range(rows.start // size, -(-rows.stop // size)):
        begin = step * size
        parts.append(source.batch(step, slice(max(rows.start - begin, 0), min(rows.stop - begin, size)), mesh))
    return concatenated(parts)


class WarmedUpBatches(StatelessBatches):
    """A source's rows in batches of `sizes`."""

    def __init__(self, source: BatchSource, sizes: BatchSizes) -> None:
        """Raises ConfigError for a source whose batches depend on the weights: they are made whole."""
        if not source.lookahead:
            raise ConfigError(
                "batch_size_warmup cuts data that is read into other batches; this method makes its own: leave it out"
            )
        assert source.batch_size == sizes.final
        self.batch_size = sizes.final
        self.lookahead = source.lookahead
        self.fingerprint = hash_value([source.fingerprint, sizes.final, sizes.stages])
        self._source = source
        self._sizes = sizes

    def batch_size_at(self, step: int) -> int:
        """Rows of the whole batch of `step`."""
        return self._sizes.of_step(step)

    def batch(self, step: int, rows: slice = slice(None), mesh: Mesh = ALONE) -> Batch:
        """The rows `rows` of the batch of `step`, counted from 0."""
        begin = self._sizes.rows_before(step)
        return read_rows(self._source, range(begin, begin + self._sizes.of_step(step))[rows], mesh)
