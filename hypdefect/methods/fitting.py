"""Full-batch training of a few small tensors."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hypdefect.errors import NumericsError


def full_batch(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor], *, steps: int, lr: float, weight_decay: float
) -> None:
    """`descend` with the gradient that autograd finds of `loss`."""

    def slope() -> tuple[Tensor, Sequence[Tensor]]:
        value = loss()
        return value, torch.autograd.grad(value, parameters)

    for parameter in parameters:
        parameter.requires_grad_(True)
    descend(parameters, slope, steps=steps, lr=lr, weight_decay=weight_decay)
    for parameter in parameters:
        parameter.requires_grad_(False)


def descend(
    parameters: Sequence[Tensor],
    slope: Callable[[], tuple[Tensor, Sequence[Tensor]]],
    *,
    steps: int,
    lr: float,
    weight_decay: float,
) -> None:
    """AdamW with a cosine schedule to 0 on `parameters`, which keep no gradient.

    Args:
        slope: the loss and its gradient by each parameter, at what the parameters are now.

    Raises:
        NumericsError: the loss left the finite numbers.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    (group,) = optimizer.param_groups
    for step in range(steps):
        value, gradients = slope()
        if not math.isfinite(value.item()):
            raise NumericsError(f"loss at step {step} is {value.item()} with lr {lr}: lower method.lr")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
