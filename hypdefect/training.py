"""The training loop, one for every method: for a test, a script or a rank of a distributed run; only `report` differs.

Rank r of W takes the items `step * B + r, step * B + r + W, ...` of the B of a step: every world size sees the same
stream, and averaging the ranks' gradients (DDP) gives the same step.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypdefect.errors import ArtifactError, ConfigError, NumericsError
from hypdefect.files import write_json

Report = Callable[[dict[str, float], Callable[[Path], None] | None], None]
"""Called by every rank after `report_every` steps with the metrics and, on rank 0, a writer of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What the loop needs to know, whatever it trains."""

    steps: int = 200
    items_per_step: int = 4
    """B, episodes or batches of a step, shared out over the workers: must be a multiple of their number."""
    lr: float = 3e-4
    """AdamW, cosine schedule to 0 over all steps (`rate`)."""
    weight_decay: float = 1e-2
    report_every: int = 20
    """Steps between reports; each is also a checkpoint."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "items_per_step", "report_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ConfigError(f"train.lr must be positive, got {self.lr}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def precision(self, device: str | torch.device) -> AbstractContextManager[Any]:
        """What the loss is computed within."""
        return nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class SteppedConfig(TrainConfig):
    """Of networks trained from scratch on images, as in EfficientAD: the rate falls to a tenth for the last 5 % of the
    steps. A GPU computes in bfloat16 where that is safe, a CPU in float32."""

    def rate(self, step: int) -> float:
        return self.lr if step < 0.95 * self.steps else self.lr / 10

    def precision(self, device: str | torch.device) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if torch.device(device).type == "cuda" else nullcontext()


@runtime_checkable
class Training(Protocol):
    """Something to train: what Ray Train carries to its workers."""

    @property
    def config(self) -> TrainConfig: ...

    def model(self) -> nn.Module:
        """A `types.Trainable` as it is before step 0: principal directions found, statistics of normals taken."""
        ...

    def item(self, number: int) -> Any:
        """Batch or episode `number` of the stream, the same for every world size; it has `.to(device)`."""
        ...


class MeanLoss(nn.Module):
    """Mean loss of some items, each with noise of its own seed: what distributed training differentiates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, items: Sequence[Any], seeds: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        model: Any = self.model
        return torch.stack([model.loss(i, g).total for i, g in zip(items, generators, strict=True)]).mean()


def fit(
    model: nn.Module,
    stream: Callable[[int], Any],
    config: TrainConfig,
    report: Report,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    rank: int = 0,
    world_size: int = 1,
    resume: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[float]:
    """Train a model in place; the mean loss of every step this process saw.

    Args:
        stream: gives item `number`.
        wrap: puts a module inside DistributedDataParallel, where there are several ranks.
        resume: checkpoint folder to continue from.

    Raises:
        ConfigError: B is no multiple of the world size. NumericsError: the loss left the finite numbers.
    """
    if config.items_per_step % world_size:
        raise ConfigError(f"train.items_per_step={config.items_per_step} is not a multiple of the {world_size} workers")
    call = wrap(MeanLoss(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first = 0 if resume is None else load_checkpoint(resume, model, optimizer)
    earlier = [] if resume is None else checkpoint_losses(resume)
    losses: list[float] = []
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        numbers = [step * config.items_per_step + i for i in range(rank, config.items_per_step, world_size)]
        items = [stream(number).to(device) for number in numbers]
        with config.precision(device):
            loss = call(items, [config.seed * 1_000_003 + number for number in numbers])
        mean = _mean_over_ranks(loss, world_size)
        if not math.isfinite(mean):
            raise NumericsError(f"training loss at step {step} is {mean}; lower train.lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(mean)
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            window = losses[-config.report_every :]
            metrics = {"step": float(step + 1), "train/loss/total": sum(window) / len(window)}
            done = step + 1
            past = earlier + losses
            write = (lambda to, n=done, s=past: save_checkpoint(to, model, optimizer, n, s)) if rank == 0 else None
            report(metrics, write)
    return losses


def _mean_over_ranks(loss: Tensor, world_size: int) -> float:
    """The loss of the whole step: the same number on every rank, so that all of them stop where one is not finite."""
    mean = loss.detach().clone()
    if world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= world_size
    return float(mean)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, losses: Sequence[float] = ()
) -> None:
    """weights.safetensors, optimizer.pt (plain tensors) and state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    write_json(folder / "state.json", {"step": step, "losses": list(losses)})


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Restore weights and optimiser; the number of steps done.

    Raises:
        ArtifactError: the folder holds no complete checkpoint.
    """
    with readable(folder):
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        if optimizer is not None:
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return int(json.loads((folder / "state.json").read_text())["step"])


def checkpoint_losses(folder: Path) -> list[float]:
    """The loss of every step up to a checkpoint.

    Raises:
        ArtifactError: the folder holds no complete checkpoint.
    """
    with readable(folder):
        return [float(x) for x in json.loads((folder / "state.json").read_text())["losses"]]


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Whatever is wrong with the files of a run or checkpoint is an ArtifactError that names the folder."""
    try:
        yield
    except (OSError, EOFError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{folder} holds no finished training run or checkpoint: {error}") from error
