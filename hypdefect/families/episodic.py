"""Episodic meta-training of HypDFS: what is drawn, and what is trained."""

from dataclasses import dataclass

import torch

from hypdefect.errors import ConfigError, DataError
from hypdefect.families.episodes import LabelledFeatures, build_episode
from hypdefect.features.transform import TransformConfig
from hypdefect.images.pseudo_defects import SynthesisConfig
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig, principal_projection
from hypdefect.training import TrainConfig
from hypdefect.types import VIEWS, Episode, EpisodeSpec, SplitKind

METHOD = "hypdfs"


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodicConfig(TrainConfig):
    """Meta-training of HypDFS's representation, adapter and neural ODE on episodes of base classes."""

    method: HypDFSConfig = HypDFSConfig()
    projection: int = 0
    """Numbers a view of the linear representation that is trained with the rest; 0: the features as they are."""
    n_way: int = 5
    k_shot: int = 1
    n_query: int = 5
    copies: int = 0
    """Augmented copies of each support image used; pseudo-defects have none."""
    split: SplitKind = "random"

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        for name in ("n_way", "k_shot", "n_query"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.projection < 0:
            raise ConfigError(f"train.projection must not be negative, got {self.projection}")
        learns_ode = self.method.ode != "none" and self.method.ode_steps > 0
        if not self.method.adapter and not learns_ode and not self.projection:
            raise ConfigError("train: no projection, no adapter and no ODE: there is nothing to meta-train")
        if not self.method.synthesis and self.method.ode != "none":
            raise ConfigError(
                "train: the ODE learns through synthetic features; set method.synthesis, or method.ode none"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaConfig:
    """Meta-training on pseudo-defects of a product: what there is of them, how it is trained, on which features.

    Projection, adapter and ODE are trained together (docs/experiments.md: level with the projection alone, or ahead).
    """

    synthesis: SynthesisConfig = SynthesisConfig()
    train: EpisodicConfig = EpisodicConfig(
        projection=128,
        steps=100,
        items_per_step=1,
        n_way=10,
        k_shot=2,
        n_query=2,
    )
    transform: TransformConfig = TransformConfig()
    workers: int = 1
    """Training workers, a CPU (or GPU) each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodicTraining:
    """A `training.Training`: HypDFS on episodes of a pool.

    `shape_dims` trailing numbers of each view describe the region's shape and are not projected.
    """

    pool: LabelledFeatures
    config: EpisodicConfig
    shape_dims: int = 0

    def model(self) -> HypDFS:
        """As `learner`."""
        return learner(self.pool, self.config, self.shape_dims)

    def item(self, number: int) -> Episode:
        return build_episode(self.pool, episode_spec(self.config, self.pool), number, copies=self.config.copies)


def learner(pool: LabelledFeatures, config: EpisodicConfig, shape_dims: int = 0) -> HypDFS:
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


def episode_spec(config: EpisodicConfig, pool: LabelledFeatures) -> EpisodeSpec:
    """What is drawn at each step; never more ways than the pool has classes."""
    return EpisodeSpec(
        n_way=min(config.n_way, pool.n_way),
        k_shot=config.k_shot,
        n_query=config.n_query,
        seed=config.seed,
        split=config.split,
    )
