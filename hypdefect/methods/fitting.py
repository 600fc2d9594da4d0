"""Full-batch training of a few small tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hypdefect.errors import NumericsError


def full_batch(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor], *, steps: int, lr: float, weight_decay: float
) -> None:
    """AdamW with a cosine schedule to 0 on `parameters`, which keep no gradient.

    Raises:
        NumericsError: the loss left the finite numbers.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for step in range(steps):
        value = loss()
        if not torch.isfinite(value):
            raise NumericsError(f"loss at step {step} is {float(value.detach())} with lr {lr}: lower method.lr")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
