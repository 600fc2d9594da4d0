"""The float32 copy of a feature store that a node maps into memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hypdefect.features.sealed import DamageError

ROW = ("image_id", "mask_id", "aug_index")


@dataclass(frozen=True, slots=True)
class View:
    """The float32 copy of a whole store on this node: `arrays[view]` is `[N, ...]`, memory-mapped, in row order."""

    folder: Path
    index: pa.Table
    arrays: dict[str, np.ndarray]

    def positions(self, wanted: pa.Table) -> np.ndarray:
        """Where the rows of the given ids lie; -1 for those that are not there."""
        there = self.index.select(ROW)
        if len(wanted):  # as they were written: the order in which most are asked for
            start = pc.index(there["image_id"], wanted["image_id"][0]).as_py()
            if start >= 0 and there.slice(start, len(wanted)).equals(wanted):
                return np.arange(start, start + len(wanted))
        return pc.index_in(joined(wanted), value_set=joined(there)).fill_null(-1).to_numpy()

    def sorted_positions(self) -> np.ndarray:
        """Of all rows, in the order of their keys."""
        return pc.sort_indices(self.index, sort_keys=[(name, "ascending") for name in ROW]).to_numpy()

    def take(self, view: str, positions: np.ndarray) -> np.ndarray:
        """Copy rows, each checked against its sum.

        Raises:
            DamageError: a row is not what was written.
        """
        source, sums = self.arrays[view], self.index[f"sum {view}"].to_numpy()
        out = np.empty((len(positions), *source.shape[1:]), np.float32)
        step = max(1, 2**20 // (4 * max(1, out[:1].size)))  # rows that stay in the processor's cache between the two
        for start in range(0, len(positions), step):
            chosen = positions[start : start + step]
            rows = np.take(source, chosen, axis=0, out=out[start : start + step], mode="clip")
            if (row_sums(rows) != sums[chosen]).any():
                raise DamageError(self.folder / f"{view}.npy", "wrong checksum of a row")
        return out


def row_sums(rows: np.ndarray) -> np.ndarray:
    """Sum of the bits of each float32 row modulo 2^32, which any one changed byte changes."""
    return np.add.reduce(rows.reshape(len(rows), -1).view(np.uint32), axis=1, dtype=np.uint32)


def ids(image_id: Sequence[str], mask_id: Sequence[str], aug_index: Sequence[int]) -> pa.Table:
    """Row keys as a table of the columns `ROW`."""
    columns = pa.array(image_id, pa.string()), pa.array(mask_id, pa.string()), pa.array(aug_index, pa.int16())
    return pa.table(columns, names=ROW)


def joined(ids: pa.Table) -> pa.ChunkedArray:
    """The ids as one string a row; digests contain no newline."""
    return pc.binary_join_element_wise(ids["image_id"], ids["mask_id"], ids["aug_index"].cast(pa.string()), "\n")
