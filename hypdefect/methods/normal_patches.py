"""What detectors read off the patches of normal images in one pass: a random sample, their mean and deviation.

Shapes: M patches, D features of a patch.
"""

from collections.abc import Sized

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from hypdefect.errors import ConfigError, DataError
from hypdefect.types import Batches


def sample_patches(normals: Batches, at_most: int, seed: int) -> tuple[Float[Tensor, "M D"], int]:
    """A uniform random sample of the patches of all images, and how many there are in all; `at_most` 0 takes all.

    One pass: every patch draws a number, and those with the lowest are kept.

    Raises:
        DataError: no image. ConfigError: the sample needs more memory than there is.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    keys: list[Tensor] = []
    total = waiting = 0
    for batch in normals:
        rows = batch.views["patch"].flatten(0, 2)
        if not total:
            check_memory(rows, len(batch), normals, at_most)
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


def check_memory(rows: Float[Tensor, "_ D"], images: int, normals: Batches, at_most: int) -> None:
    """Whether the patches that are kept fit, given those of the first `images` images.

    Raises:
        ConfigError: they take more than the memory that is free.
    """
    count = len(normals) if isinstance(normals, Sized) else images
    kept = len(rows) // images * count
    kept = min(kept, 3 * at_most) if at_most else 2 * kept  # parts, and the whole that they become
    needed, free = kept * rows.shape[1] * rows.element_size(), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"the patches of {count} images take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: set "
            "method.candidates to what fits, such as 100000"
        )


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
