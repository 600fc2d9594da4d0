"""Episodic meta-training: one loop, for a test, a script or a rank of a distributed run; only `report` differs.

Rank r of W takes the episodes `step * B + r, step * B + r + W, ...` of the B of a step: every world size sees the same
stream, and averaging the ranks' gradients (DDP) gives the same step.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ArtifactError, ConfigError, DataError, NumericsError
from hypdefect.evaluation import MetaStart
from hypdefect.families.episodes import LabelledFeatures, build_episode
from hypdefect.features.transform import TransformConfig
from hypdefect.files import write_json
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig, principal_projection
from hypdefect.types import VIEWS, EpisodeSpec, SplitKind

_PROJECTION = "core.projection."
Report = Callable[[dict[str, float], Callable[[Path], None] | None], None]
"""Called by every rank after `report_every` steps with the metrics and, on rank 0, a writer of the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Meta-training of HypDFS's representation, adapter and neural ODE on episodes of base classes."""

    method: HypDFSConfig = HypDFSConfig()
    projection: int = 0
    """Numbers a view of the linear representation that is trained with the rest; 0: the features as they are."""
    steps: int = 200
    episodes_per_step: int = 4
    """B, shared out over the workers: must be a multiple of their number."""
    n_way: int = 5
    k_shot: int = 1
    n_query: int = 5
    copies: int = 0
    """Augmented copies of each support image used."""
    split: SplitKind = "random"
    lr: float = 3e-4
    """AdamW, cosine schedule to 0 over all steps."""
    weight_decay: float = 1e-2
    report_every: int = 20
    """Steps between reports; each is also a checkpoint."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "episodes_per_step", "n_way", "k_shot", "n_query", "report_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ConfigError(f"train.lr must be positive, got {self.lr}")
        if self.projection < 0:
            raise ConfigError(f"train.projection must not be negative, got {self.projection}")
        if self.method.adapter == "none" and self.method.ode == "none" and not self.projection:
            raise ConfigError("train: no projection, and adapter and ode are 'none': there is nothing to meta-train")
        if self.method.adapter != "real+synthetic" and self.method.ode != "none":
            raise ConfigError("train: the ODE learns through synthetic features; set method.adapter real+synthetic")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaConfig:
    """Meta-training on pseudo-defects of a product: what there is of them, how it is trained, on which features."""

    synthesis: SynthesisConfig = SynthesisConfig()
    train: TrainConfig = TrainConfig(
        # adapter and ODE are left to the task: trained with the projection they lose points (docs/experiments.md)
        method=HypDFSConfig(adapter="none", ode="none", loss="hyperbolic"),
        projection=128,
        steps=100,
        episodes_per_step=1,
        n_way=10,
        k_shot=2,
        n_query=2,
    )
    transform: TransformConfig = TransformConfig()
    workers: int = 1
    """Training workers, a CPU (or GPU) each."""


def learner(pool: LabelledFeatures, config: TrainConfig, shape_dims: int = 0) -> HypDFS:
    """What meta-training starts from; the projection starts at the pool's principal directions.

    Args:
        shape_dims: trailing numbers of each view that describe the region's shape and are not projected.

    Raises:
        DataError: a projection to more numbers than the pool's images span.
    """
    views = pool.table.views
    dim = int(views[VIEWS[0]].shape[1])
    if not config.projection:
        return HypDFS(config.method, dim)
    most = min(dim - shape_dims, len(pool) - 1)
    if config.projection > most:
        raise DataError(
            f"the {len(pool)} images of the base classes span {most} directions at most, train.projection is "
            f"{config.projection}: give more (--synthesis.per-class), or lower it"
        )
    clean = pool.table.aug_index == 0
    stacked = torch.stack([torch.from_numpy(views[view][clean]) for view in VIEWS], 1)
    return HypDFS(config.method, dim, principal_projection(stacked, config.projection, shape_dims))


def meta_train(
    model: HypDFS,
    pool: LabelledFeatures,
    config: TrainConfig,
    report: Report,
    *,
    wrapped: nn.Module | None = None,
    rank: int = 0,
    world_size: int = 1,
    resume: Path | None = None,
    device: str | torch.device = "cpu",
) -> list[float]:
    """Train `model.core` in place; the mean loss of every step this process saw.

    Args:
        wrapped: the model inside DistributedDataParallel, where there are several ranks.
        resume: checkpoint folder to continue from.

    Raises:
        ConfigError: B is no multiple of the world size. NumericsError: the loss left the finite numbers.
    """
    if config.episodes_per_step % world_size:
        raise ConfigError(
            f"train.episodes_per_step={config.episodes_per_step} is not a multiple of the {world_size} workers"
        )
    spec = episode_spec(config, pool)
    call = wrapped if wrapped is not None else model
    optimizer = torch.optim.AdamW(model.core.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    first = 0 if resume is None else load_checkpoint(resume, model, optimizer)
    earlier = [] if resume is None else checkpoint_losses(resume)
    losses: list[float] = []
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        numbers = [step * config.episodes_per_step + i for i in range(rank, config.episodes_per_step, world_size)]
        episodes = []
        for number in numbers:
            episode = build_episode(pool, spec, number, copies=config.copies)
            moved = {"support": episode.support.to(device), "query": episode.query.to(device)}
            episodes.append(type(episode)(**moved, class_names=episode.class_names))
        loss = call(episodes, [config.seed * 1_000_003 + number for number in numbers])
        mean = _mean_over_ranks(loss, world_size)
        if not math.isfinite(mean):
            raise NumericsError(f"meta-training loss at step {step} is {mean}; lower train.lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(mean)
        if (step + 1) % config.report_every == 0 or step + 1 == config.steps:
            window = losses[-config.report_every :]
            metrics = {"step": float(step + 1), "train/loss/total": sum(window) / len(window)}
            done = step + 1
            stream = earlier + losses
            write = (lambda to, n=done, s=stream: save_checkpoint(to, model, optimizer, n, s)) if rank == 0 else None
            report(metrics, write)
    return losses


def episode_spec(config: TrainConfig, pool: LabelledFeatures) -> EpisodeSpec:
    """What is drawn at each step; never more ways than the pool has classes."""
    return EpisodeSpec(
        n_way=min(config.n_way, pool.n_way),
        k_shot=config.k_shot,
        n_query=config.n_query,
        seed=config.seed,
        split=config.split,
    )


def _mean_over_ranks(loss: Tensor, world_size: int) -> float:
    """The loss of the whole step: the same number on every rank, so that all of them stop where one is not finite."""
    mean = loss.detach().clone()
    if world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= world_size
    return float(mean)


def save_checkpoint(
    folder: Path, model: HypDFS, optimizer: torch.optim.Optimizer, step: int, losses: Sequence[float] = ()
) -> None:
    """core.safetensors, optimizer.pt (plain tensors) and state.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(core_tensors(model), folder / "core.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    write_json(folder / "state.json", {"step": step, "dim": model.dim, "losses": list(losses)})


def load_checkpoint(folder: Path, model: HypDFS, optimizer: torch.optim.Optimizer) -> int:
    """Restore weights and optimiser; the number of steps done.

    Raises:
        ArtifactError: the folder holds no complete checkpoint.
    """
    with _readable(folder):
        model.load_state_dict({**model.state_dict(), **load_file(folder / "core.safetensors")})
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        return int(json.loads((folder / "state.json").read_text())["step"])


def checkpoint_losses(folder: Path) -> list[float]:
    """The loss of every step up to a checkpoint.

    Raises:
        ArtifactError: the folder holds no complete checkpoint.
    """
    with _readable(folder):
        return [float(x) for x in json.loads((folder / "state.json").read_text())["losses"]]


def core_tensors(model: HypDFS) -> dict[str, Tensor]:
    """The meta-trained weights under the names `HypDFS.load_state_dict` knows."""
    return {f"core.{k}": v.detach().cpu().contiguous() for k, v in model.core.state_dict().items()}


def write_run(folder: Path, model: HypDFS, config: MetaConfig, record: dict[str, Any]) -> None:
    """The run directory that `load_start` reads: config.json, checkpoint/core.safetensors and, last, record.json."""
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    save_file(core_tensors(model), folder / "checkpoint" / "core.safetensors")
    write_json(folder / "config.json", to_mapping(config))
    write_json(folder / "record.json", record)


def load_start(folder: Path) -> tuple[MetaStart, MetaConfig]:
    """What a run directory gives to a task, and how it was trained: its `transform` and `train.method` fit the weights.

    Raises:
        ArtifactError: no finished run lies there.
    """
    with _readable(folder):
        config = from_mapping(MetaConfig, json.loads((folder / "config.json").read_text()), str(folder))
        return meta_start(load_file(folder / "checkpoint" / "core.safetensors")), config


def meta_start(tensors: Mapping[str, Tensor]) -> MetaStart:
    """`core_tensors` taken apart: the projection belongs to the features, the rest to HypDFS."""
    own = {name: value for name, value in tensors.items() if not name.startswith(_PROJECTION)}
    if len(own) == len(tensors):
        return MetaStart(projection={}, core=own)
    weight, mean = (dict(zip(VIEWS, tensors[f"{_PROJECTION}{name}"], strict=True)) for name in ("weight", "mean"))
    return MetaStart(projection=weight, mean=mean, core=own)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, KeyError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{folder} holds no finished training run or checkpoint: {error}") from error
