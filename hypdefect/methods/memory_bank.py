"""PatchCore's memory bank: the choice of its rows (Roth et al., CVPR 2022, algorithm 1) and the search in them.

Shapes: M candidate rows, B rows of the bank, Q queries, D features, k neighbours.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hypdefect import geometry
from hypdefect.errors import ConfigError, DataError, NumericsError

MAX_BYTES = 2 * 2**30
"""What the choice of a bank may take beside the candidates themselves."""
QUERIES = 4096
"""Queries whose differences to their neighbours are held at a time."""


def coreset_bytes(num_rows: int, dim: int, projection: int | None = None) -> int:
    """Peak memory of `greedy_coreset` beside the features, in bytes: three numbers a row, and the projected rows."""
    return 4 * num_rows * (3 + (projection or 0)) + 4 * dim * (projection or 0)


def greedy_coreset(
    features: Float[Tensor, "M D"],
    num: int,
    *,
    seed: int = 0,
    projection: int | None = None,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> Int64[Tensor, "num"]:
    """Rows such that every other row is near one: each pick is the row furthest from those picked (k-centre greedy).

    Distances come from the Gram form |f|^2 - 2 f.c + |c|^2: a pick is one matrix-vector product and no `[M, D]`
    temporary.

    Args:
        projection: distances are those after a random projection to so many numbers (Johnson-Lindenstrauss).
        progress: called with (picks done, `num`) about a hundred times.

    Raises:
        ConfigError: more rows than there are, or more memory than `max_bytes`. NumericsError: a row is not finite.

    Numerics: distances below about 3e-4 of a row's length are noise in float32; a picked row is never picked again.
    """
    rows, dim = features.shape
    if not 1 <= num <= rows:
        raise ConfigError(f"a bank of {num} rows from {rows} patches: choose 1 to {rows}")
    if (needed := coreset_bytes(rows, dim, projection)) > max_bytes:
        raise ConfigError(
            f"choosing a bank from {rows} patches of {dim} numbers takes {needed / 2**30:.1f} GiB, more than the "
            f"{max_bytes / 2**30:.1f} GiB it may: lower method.candidates, or set method.projection"
        )
    generator = torch.Generator().manual_seed(seed)
    if projection:
        directions = torch.randn(dim, projection, generator=generator, dtype=features.dtype) / projection**0.5
        features = features @ directions.to(features.device)
    square = torch.linalg.vector_norm(features, dim=1).square()
    if not torch.isfinite(square).all():
        raise NumericsError(f"row {int((~torch.isfinite(square)).nonzero()[0])} of the bank's candidates is not finite")
    nearest, product = torch.full_like(square, torch.inf), torch.empty_like(square)
    chosen = torch.empty(num, dtype=torch.long)
    pick = int(torch.randint(rows, (1,), generator=generator))
    for i in range(num):
        chosen[i] = pick
        torch.mv(features, features[pick], out=product)
        product.mul_(-2).add_(square).add_(square[pick]).clamp_min_(0)
        torch.minimum(nearest, product, out=nearest)
        nearest[pick] = -1  # further rows that equal a picked one have 0 and come before it
        pick = int(nearest.argmax())
        if progress is not None and ((i + 1) % max(1, num // 100) == 0 or i + 1 == num):
            progress(i + 1, num)
    return chosen


class Neighbours:
    """Nearest rows of a bank: by Euclidean distance, or by that of the Poincare ball of curvature -c.

    At c > 0 bank and queries are points of the ball, and distances are d / 2: for c -> 0 these become |x - y|.

    The search is faiss's: exact, or among the rows of the nearest of `cells` Voronoi cells (IVF). It stays one at
    c > 0: of the rows y, the nearest to x has the least |x - y|^2 / A_y with the gap A_y = 1 - c|y|^2, which is minus
    the inner product of (x, |x|^2, 1) and (2 y, -1, -|y|^2) / A_y.
    """

    def __init__(self, bank: Float[Tensor, "B D"], curvature: float = 0.0, cells: int = 0, probes: int = 8) -> None:
        if not len(bank):
            raise DataError("a bank needs at least one row")
        geometry.validate_curvature(curvature)
        self.bank, self.curvature, self.cells, self.probes = bank.float().contiguous(), curvature, cells, probes
        self._index: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None}

    def search(self, query: Float[Tensor, "Q D"], k: int) -> tuple[Float[Tensor, "Q k"], Int64[Tensor, "Q k"]]:
        """Distances to the k nearest rows, nearest first, and their positions; an IVF search that finds fewer repeats
        the nearest.

        Raises:
            ConfigError: more neighbours than rows.

        Numerics: which row is nearest is decided in float32 by the Gram form, to about 3e-4 of a row's length; the
        distances to the chosen rows are those of their differences.
        """
        if not 1 <= k <= len(self.bank):
            raise ConfigError(f"{k} neighbours in a bank of {len(self.bank)} rows")
        import faiss  # takes a while to import, and most jobs do not search

        faiss.omp_set_num_threads(torch.get_num_threads())
        if self._index is None:
            self._index = self._built(faiss)
        x = query.float()
        lifted = torch.cat([x, x.square().sum(1, keepdim=True), torch.ones(len(x), 1)], 1) if self.curvature else x
        _, found = self._index.search(lifted.cpu().contiguous().numpy(), k)
        at = torch.from_numpy(found)
        at = torch.where(at < 0, at[:, :1], at)
        distances = torch.cat(
            [self._distances(*pair) for pair in zip(x.split(QUERIES), at.split(QUERIES), strict=True)]
        )
        order = distances.argsort(dim=1, stable=True)
        return distances.gather(1, order), at.gather(1, order)

    def _distances(self, x: Float[Tensor, "Q D"], at: Int64[Tensor, "Q k"]) -> Float[Tensor, "Q k"]:
        rows = self.bank[at]
        if not self.curvature:
            return torch.linalg.vector_norm(rows - x[:, None], dim=2)
        return geometry.dist(x[:, None], rows, self.curvature) / 2

    def _built(self, faiss: Any) -> Any:
        """The index of the bank, on every GPU that faiss sees."""
        rows = self.bank
        if self.curvature:
            square = rows.square().sum(1, keepdim=True)
            rows = torch.cat([2 * rows, -torch.ones_like(square), -square], 1) / (1 - self.curvature * square)
        metric = faiss.METRIC_INNER_PRODUCT if self.curvature else faiss.METRIC_L2
        index = faiss.IndexFlat(rows.shape[1], metric)
        given = rows.cpu().contiguous().numpy()
        if self.cells:
            index = faiss.IndexIVFFlat(index, rows.shape[1], min(self.cells, len(rows)), metric)
            index.train(given)
            index.nprobe = self.probes
        elif getattr(faiss, "get_num_gpus", lambda: 0)():
            index = faiss.index_cpu_to_all_gpus(index)
        index.add(given)
        return index
