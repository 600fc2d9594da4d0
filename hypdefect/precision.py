"""How a CPU computes matrix products and convolutions of float32 numbers.

What goes in and comes out stays float32, and a GPU computes as always.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch


@contextmanager
def fast_products() -> Iterator[None]:
    """Within, factors may be rounded to bfloat16 where the CPU has instructions for that, and oneDNN multiplies.

    Rounded or not, a training of convolutions takes less time by a quarter to a third on AMD's processors
    (`jobs/benchmark.py segment`): by default PyTorch takes MKL, which uses half of their width.
    """
    with _products("bf16"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Within, factors are not rounded, inside of `fast_products` too."""
    with _products("ieee"):
        yield


@contextmanager
def _products(kind: Literal["bf16", "ieee"]) -> Iterator[None]:
    library: Any = torch.backends.mkldnn  # whose parts its types do not show
    parts = (library.matmul, library.conv)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = kind
        yield
    finally:
        for part, own in zip(parts, before, strict=True):
            part.fp32_precision = own
