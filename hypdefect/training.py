"""The training loop, one for every method: for a test, a script or a rank of a distributed run; only `report` differs.

Rank r of W takes the items `step * B + r, step * B + r + W, ...` of the B of a step: every world size sees the same
stream, and averaging the ranks' gradients (DDP) gives the same step.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import geoopt
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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

    def products(self) -> AbstractContextManager[None]:
        """What a CPU computes the loss and its gradient within."""
        return nullcontext()

    def stops(self, parts: Mapping[str, float]) -> bool:
        """Whether a step with these means of `LossTerms.parts` is the last one."""
        return False

    def is_stale(self, reports: int) -> bool:
        """Whether so many reports in a row without a better validation are the end."""
        return False


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


@runtime_checkable
class Validation(Protocol):
    """How good a model is on what it is not trained on. Ranks see a share each, and what they saw is added up."""

    def seen(self, model: nn.Module, share: slice) -> Float[Tensor, "_"]:
        """What the model answers of a share of the images or episodes, as numbers that add up exactly: those of other
        shares are 0. It may change buffers of the model alone."""
        ...

    def value(self, seen: Float[Tensor, "_"]) -> float:
        """Of all shares together, in [0, 1]; more is better."""
        ...


@runtime_checkable
class ValidatedTraining(Training, Validation, Protocol):
    """A training whose best weights are kept, of those at every report."""


@dataclass(slots=True)
class Best:
    """The weights that validated best so far, and the reports since."""

    value: float = -math.inf
    reports: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def see(self, value: float, model: nn.Module) -> None:
        self.reports += 1
        if value > self.value:
            self.value, self.reports = value, 0
            self.weights = {name: x.detach().clone() for name, x in model.state_dict().items()}


@dataclass(frozen=True, slots=True)
class Begun:
    """Where a training goes on: steps done, the loss of each, whether it has ended, and its best weights so far."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    finished: bool = False
    best: Best = field(default_factory=Best)


class ItemLoss(nn.Module):
    """Loss of an item, with noise of its own seed: what distributed training differentiates; and each of its parts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, item: Any, seed: int) -> tuple[Tensor, dict[str, float]]:
        model: Any = self.model
        terms = model.loss(item, torch.Generator().manual_seed(seed))
        return terms.total, terms.parts


def fit(
    model: nn.Module,
    stream: Callable[[int], Any],
    config: TrainConfig,
    report: Report,
    *,
    validation: Validation | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    rank: int = 0,
    world_size: int = 1,
    resume: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[float]:
    """Train a model in place; the mean loss of every step this process saw.

    Args:
        stream: gives item `number`.
        validation: asked at every report; the model then ends at its best weights.
        wrap: puts a module inside DistributedDataParallel, where there are several ranks.
        resume: checkpoint folder to continue from.

    Raises:
        ConfigError: B is no multiple of the world size. NumericsError: the loss left the finite numbers.
    """
    if config.items_per_step % world_size:
        raise ConfigError(f"train.items_per_step={config.items_per_step} is not a multiple of the {world_size} workers")
    call = wrap(ItemLoss(model))
    optimizer = optimizer_of(model, config)
    begun = Begun() if resume is None else _resumed(resume, model, optimizer)
    best, losses = begun.best, list[float]()
    if begun.finished:
        return losses
    for step in range(begun.step, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step) * group.get("factor", 1.0)
        numbers = [step * config.items_per_step + i for i in range(rank, config.items_per_step, world_size)]
        optimizer.zero_grad()
        own, parts = _accumulated(call, stream, numbers, config, device)
        mean, *others = _mean_over_ranks([own, *parts.values()], world_size, device)
        if not math.isfinite(mean):
            raise NumericsError(f"training loss at step {step} is {mean}; lower train.lr")
        optimizer.step()
        losses.append(mean)
        done = step + 1
        parts = dict(zip(parts, others, strict=True))
        last = done == config.steps or config.stops(parts)
        if done % config.report_every and not last:
            continue
        window = losses[-config.report_every :]
        metrics = {"step": float(done), "train/loss/total": sum(window) / len(window)}
        metrics |= {f"train/{name}": value for name, value in parts.items()}
        if validation is not None:
            seen = validation.seen(model, slice(rank, None, world_size))
            metrics["val"] = validation.value(_sum_over_ranks(seen, world_size, device))
            best.see(metrics["val"], model)
            last = last or config.is_stale(best.reports)
            if last:
                model.load_state_dict(best.weights)
        state = {"step": done, "losses": begun.losses + losses, "finished": last}
        write = partial(save_checkpoint, model=model, optimizer=optimizer, state=state, best=best)
        report(metrics, write if rank == 0 else None)
        if last:
            break
    return losses


def _accumulated(
    call: nn.Module, stream: Callable[[int], Any], numbers: Sequence[int], config: TrainConfig, device: Any
) -> tuple[float, dict[str, float]]:
    """Add up the gradient of the mean loss of these items, one at a time: a step needs the memory of one of them. The
    mean loss, and that of each of its parts. Ranks are heard at the last item alone."""
    mean, means = 0.0, dict[str, float]()
    for number in numbers:
        waits = isinstance(call, DistributedDataParallel) and number != numbers[-1]
        with cast(DistributedDataParallel, call).no_sync() if waits else nullcontext(), config.products():
            with config.precision(device):
                loss, parts = call(stream(number).to(device), config.seed * 1_000_003 + number)
            (loss / len(numbers)).backward()
        mean += float(loss.detach()) / len(numbers)
        means = {name: means.get(name, 0.0) + parts[name] / len(numbers) for name in sorted(parts)}
    return mean, means


class Optimizers:
    """Optimisers of parts of a model, used as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: Any) -> None:
        """What `state_dict` gave. Raises RuntimeError where the state is of other optimisers."""
        if not isinstance(state, list) or len(state) != len(self.parts):
            raise RuntimeError("its optimiser is that of another version of hypdefect; delete the folder of the run")
        for part, own in zip(self.parts, state, strict=True):
            part.load_state_dict(own)


def optimizer_of(model: nn.Module, config: TrainConfig) -> Optimizers:
    """AdamW, in one kernel; of points on a manifold `RiemannianAdam`, which leaves them there.

    A model's `parameter_groups`, where it has such, say with which "factor" of the rate each of them is trained.
    """
    named: Any = getattr(model, "parameter_groups", None)
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}] if named is None else named()
    parts: list[torch.optim.Optimizer] = []
    for kind, curved in ((partial(torch.optim.AdamW, fused=True), False), (geoopt.optim.RiemannianAdam, True)):
        own = [group | {"params": [p for p in group["params"] if _is_curved(p) is curved]} for group in groups]
        if own := [group for group in own if group["params"]]:
            parts.append(kind(own, lr=config.lr, weight_decay=config.weight_decay))
    return Optimizers(*parts)


def _is_curved(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, geoopt.ManifoldParameter)


def _mean_over_ranks(values: Sequence[float], world_size: int, device: str | torch.device) -> list[float]:
    """The same numbers on every rank, so that all of them stop where one does."""
    *totals, ranks = _sum_over_ranks(torch.tensor([*values, 1.0], dtype=torch.float64), world_size, device).tolist()
    return [total / ranks for total in totals]


def _sum_over_ranks(values: Float[Tensor, "_"], world_size: int, device: str | torch.device) -> Float[Tensor, "_"]:
    total = values.to(device, torch.float64)
    if world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total.cpu()


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizers, state: dict[str, Any], best: Best | None = None
) -> None:
    """weights.safetensors, optimizer.pt (plain tensors), state.json and, of a validated training, best.safetensors.

    Args:
        state: "step", "losses" of every step, and whether training has "finished".
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_stored(model.state_dict()), folder / "weights.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    if best is not None and best.weights:
        save_file(_stored(best.weights), folder / "best.safetensors")
        state = state | {"best": {"value": best.value, "reports": best.reports}}
    write_json(folder / "state.json", state)


def _stored(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizers | None = None) -> int:
    """Restore weights and optimiser; the number of steps done.

    Raises:
        ArtifactError: the folder holds no complete checkpoint.
    """
    with readable(folder):
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        if optimizer is not None:
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return int(_state(folder)["step"])


def checkpoint_losses(folder: Path) -> list[float]:
    """The loss of every step up to a checkpoint.

    Raises:
        ArtifactError: the folder holds no complete checkpoint.
    """
    with readable(folder):
        return [float(x) for x in _state(folder)["losses"]]


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def _resumed(folder: Path, model: nn.Module, optimizer: Optimizers) -> Begun:
    """Restore weights and optimiser, and say where they stand. Raises ArtifactError as `load_checkpoint`."""
    step = load_checkpoint(folder, model, optimizer)
    with readable(folder):
        state = _state(folder)
        kept, best = state.get("best"), Best()
        if kept is not None:
            best = Best(float(kept["value"]), int(kept["reports"]), load_file(folder / "best.safetensors"))
        return Begun(step, checkpoint_losses(folder), bool(state.get("finished", False)), best)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Whatever is wrong with the files of a run or checkpoint is an ArtifactError that names the folder."""
    try:
        yield
    except (OSError, EOFError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{folder} holds no finished training run or checkpoint: {error}") from error
