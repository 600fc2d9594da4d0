"""What detectors read off the patches of normal images in one pass: a random sample, their mean and deviation.

Shapes: M patches, D features of a patch.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from hypdefect.errors import DataError
from hypdefect.types import Batches


def sample_patches(normals: Batches, at_most: int, seed: int) -> tuple[Float[Tensor, "M D"], int]:
    """A uniform random sample of the patches of all images, and how many there are in all; `at_most` 0 takes all.

    One pass: every patch draws a number, and those with the lowest are kept.

    Raises:
        DataError: no image.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    keys: list[Tensor] = []
    total = waiting = 0
    for batch in normals:
        rows = batch.views["patch"].flatten(0, 2)
        total += len(rows)
        waiting += len(rows)
        kept.append(rows)
        keys.append(torch.rand(len(rows), generator=generator, dtype=torch.float64))
        if at_most and waiting > 2 * at_most:
            kept, keys = _lowest(kept, keys, at_most)
            waiting = at_most
    if not total:
        raise DataError("a detector needs at least one normal image")
    if at_most and waiting > at_most:
        kept, keys = _lowest(kept, keys, at_most)
    return torch.cat(kept), total


def _lowest(kept: list[Tensor], keys: list[Tensor], num: int) -> tuple[list[Tensor], list[Tensor]]:
    key = torch.cat(keys)
    chosen = key.topk(num, largest=False).indices.sort().values
    return [torch.cat(kept)[chosen]], [key[chosen]]


def standardisation(normals: Batches, dim: int) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"], int]:
    """Mean and standard deviation of the normal patches, and how many slices there are.

    Raises:
        DataError: no image.
    """
    total, squares, count, slices = torch.zeros(dim).double(), torch.zeros(dim).double(), 0, 0
    for batch in normals:
        rows = batch.views["patch"].flatten(0, 2).double()
        total, squares, count, slices = (
            total + rows.sum(0),
            squares + rows.square().sum(0),
            count + len(rows),
            slices + 1,
        )
    if not count:
        raise DataError("a detector needs at least one normal image")
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    return mean.float(), deviation.clamp_min(1e-6 * float(deviation.max()) + 1e-12).float(), slices
