"""Meta-training: it learns, it resumes where it stopped, and its steps do not depend on the number of workers."""

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypdefect.config import from_mapping, to_mapping
from hypdefect.errors import ArtifactError, ConfigError, DataError, NumericsError
from hypdefect.evaluation import RunConfig
from hypdefect.families.episodes import LabelledFeatures, build_episode
from hypdefect.families.episodic import (
    EpisodicConfig,
    EpisodicTraining,
    MetaConfig,
    learner,
)
from hypdefect.families.starts import load_start, write_run
from hypdefect.features.transform import FeatureTransform, TransformConfig
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.training import SteppedConfig, TrainConfig, fit
from hypdefect.types import EpisodeSpec, LossTerms
from tests.toy_features import DIM, toy_batch, toy_pool

METHOD = HypDFSConfig(steps=3, adapter_rank=4, ode_hidden=6, n_syn=3)
SMALL = EpisodicConfig(method=METHOD, steps=6, items_per_step=2, n_way=3, n_query=3, report_every=2, lr=1e-2)
Write = Callable[[Path], None] | None


def setup_module() -> None:
    torch.set_num_threads(1)  # so small tensors are slower, and on a busy machine far slower, on two


def quiet(metrics: dict[str, float], write: Write) -> None:
    pass


def train(
    config: EpisodicConfig = SMALL, pool: LabelledFeatures | None = None, **options: Any
) -> tuple[HypDFS, list[float]]:
    training = EpisodicTraining(pool=toy_pool() if pool is None else pool, config=config)
    model = training.model()
    losses = fit(model, training.item, config, options.pop("report", quiet), **options)
    return model, losses


def test_the_loss_of_an_easy_pool_goes_down() -> None:
    pool = toy_pool(n_way=6, per_class=10, spread=0.5)
    episodes = [build_episode(pool, EpisodeSpec(k_shot=1, n_way=3, n_query=3, seed=99), i) for i in range(12)]

    def loss_of(model: HypDFS) -> float:
        with torch.no_grad():
            seeds = map(torch.Generator().manual_seed, range(12))
            return float(np.mean([model.loss(one, seed).total for one, seed in zip(episodes, seeds, strict=True)]))

    method = replace(METHOD, feature_scale=3.0)  # classes far enough apart for a loss that can fall
    before = loss_of(HypDFS(method, DIM))
    model, losses = train(replace(SMALL, method=method, steps=25, items_per_step=2, lr=3e-2), pool)
    assert len(losses) == 25
    assert loss_of(model) < 0.9 * before


def test_training_is_repeatable_and_depends_on_its_seed() -> None:
    a, b, c = train(), train(), train(replace(SMALL, seed=1))
    assert a[1] == b[1] != c[1]
    assert all(torch.equal(x, y) for x, y in zip(a[0].core.parameters(), b[0].core.parameters(), strict=True))


def test_training_moves_the_starting_weights_and_fits_no_task() -> None:
    model, _ = train()
    fresh = HypDFS(METHOD, DIM)
    moved = [not torch.equal(a, b) for a, b in zip(model.core.parameters(), fresh.core.parameters(), strict=True)]
    assert all(moved)
    assert model.fitted is None


def test_reports_carry_the_mean_loss_since_the_last_one() -> None:
    seen: list[dict[str, float]] = []
    _, losses = train(replace(SMALL, steps=5), report=lambda metrics, write: seen.append(metrics))
    assert [m["step"] for m in seen] == [2, 4, 5]
    assert seen[0]["train/loss/total"] == pytest.approx(sum(losses[:2]) / 2)
    assert seen[1]["train/loss/total"] == pytest.approx(sum(losses[2:4]) / 2)


@pytest.mark.parametrize("stop", [2, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, stop: int) -> None:
    def keep(metrics: dict[str, float], write: Write) -> None:
        assert write is not None
        write(tmp_path / str(int(metrics["step"])))

    whole, losses = train(report=keep)
    resumed, rest = train(resume=tmp_path / str(stop))
    assert rest == pytest.approx(losses[stop:], abs=1e-6)
    for a, b in zip(whole.core.parameters(), resumed.core.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    _, none = train(resume=tmp_path / "6")
    assert none == []


def test_the_optimiser_is_resumed_too(tmp_path: Path) -> None:
    """Weights alone give another run: AdamW's moments would start from zero."""

    def keep(metrics: dict[str, float], write: Write) -> None:
        if write is not None and metrics["step"] == 4:
            write(tmp_path / "c")

    whole, _ = train(report=keep)
    saved = torch.load(tmp_path / "c" / "optimizer.pt", weights_only=True)
    (adam,) = saved
    assert adam["state"][0]["step"] == 4
    adam["state"] = {}
    torch.save(saved, tmp_path / "c" / "optimizer.pt")
    other, _ = train(resume=tmp_path / "c")
    gap = max(
        float((a - b).detach().abs().max())
        for a, b in zip(whole.core.parameters(), other.core.parameters(), strict=True)
    )
    assert gap > 1e-4


@pytest.mark.parametrize(
    "damage", ["absent", "no weights", "cut weights", "cut optimizer", "no step", "other model", "other optimiser"]
)
def test_a_checkpoint_that_cannot_be_used_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "ckpt"

    def keep(metrics: dict[str, float], write: Write) -> None:
        if write is not None:
            write(folder)

    train(replace(SMALL, steps=1), report=keep)
    config = SMALL
    if damage == "absent":
        folder = tmp_path / "other"
    elif damage == "no weights":
        (folder / "weights.safetensors").unlink()
    elif damage == "no step":
        (folder / "state.json").write_text("{}")
    elif damage == "other model":
        config = replace(SMALL, method=replace(METHOD, ode="none"))
    elif damage == "other optimiser":
        torch.save(torch.load(folder / "optimizer.pt", weights_only=True)[0], folder / "optimizer.pt")
    else:
        file = folder / ("weights.safetensors" if damage == "cut weights" else "optimizer.pt")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=f"{folder.name} holds no finished training run or checkpoint"):
        train(config, resume=folder)


# ---- several workers -----------------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Stands where DistributedDataParallel would, and keeps what a rank was asked and answered."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.supports: list[tuple[str, ...]] = []
        self.seeds: list[int] = []

    def forward(self, episode: Any, seed: int) -> tuple[torch.Tensor, dict[str, float]]:
        self.supports.append(episode.support.image_ids)
        self.seeds.append(seed)
        answer: tuple[torch.Tensor, dict[str, float]] = self.loss(episode, seed)
        return answer


def keep(recorder: Recorder, recorders: list[Recorder]) -> Recorder:
    recorders.append(recorder)
    return recorder


def first_step(rank: int, world_size: int, config: EpisodicConfig) -> tuple[Recorder, list[torch.Tensor]]:
    model = HypDFS(config.method, DIM)
    with torch.no_grad():  # away from the zeros, so that every weight has a gradient
        for i, p in enumerate(model.core.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    recorders: list[Recorder] = []
    training = EpisodicTraining(pool=toy_pool(), config=replace(config, steps=1))
    ranks = {"rank": rank, "world_size": world_size}
    fit(model, training.item, training.config, quiet, wrap=lambda loss: keep(Recorder(loss), recorders), **ranks)
    return recorders[0], [p.grad for p in model.core.parameters() if p.grad is not None]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_gradients_average_to_those_of_one_process(world_size: int) -> None:
    config = replace(SMALL, items_per_step=4)
    alone, whole = first_step(0, 1, config)
    ranks = [first_step(rank, world_size, config) for rank in range(world_size)]
    assert whole
    for i, gradient in enumerate(whole):
        mean = torch.stack([gradients[i] for _, gradients in ranks]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0
    assert sorted(s for recorder, _ in ranks for s in recorder.supports) == sorted(alone.supports)
    assert sorted(s for recorder, _ in ranks for s in recorder.seeds) == sorted(alone.seeds)
    assert len(set(alone.supports)) == len(set(alone.seeds)) == 4


def test_every_step_has_episodes_of_its_own() -> None:
    recorders: list[Recorder] = []
    train(wrap=lambda loss: keep(Recorder(loss), recorders))
    recorder = recorders[0]
    assert len(set(recorder.seeds)) == SMALL.steps * SMALL.items_per_step
    assert len(set(recorder.supports)) > SMALL.steps


def test_only_rank_0_writes() -> None:
    for rank in range(2):
        writers: list[Write] = []
        train(report=lambda metrics, write, seen=writers: seen.append(write), rank=rank, world_size=2)
        assert [w is not None for w in writers] == [rank == 0] * 3


def test_episodes_must_share_out_evenly() -> None:
    with pytest.raises(ConfigError, match="items_per_step=2 is not a multiple of the 3 workers"):
        train(world_size=3)


# ---- configuration and results -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({n: 0}, f"train.{n} must be at least 1, got 0") for n in ("steps", "items_per_step", "n_way", "k_shot")),
        ({"report_every": 0}, "report_every"),
        ({"n_query": 0}, "n_query"),
        ({"lr": 0.0}, "train.lr must be positive"),
        ({"method": replace(METHOD, adapter=False, ode="none")}, "nothing to meta-train"),
        ({"method": replace(METHOD, adapter=False, ode_steps=0)}, "nothing to meta-train"),
        ({"method": replace(METHOD, synthesis=False)}, "ODE learns through synthetic features"),
    ],
)  # fmt: skip
def test_training_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **values)


def test_a_training_config_survives_its_mapping() -> None:
    assert from_mapping(EpisodicConfig, to_mapping(SMALL)) == SMALL


def test_a_loss_that_leaves_the_numbers_stops_the_run() -> None:
    pool = toy_pool()
    pool.table.views["whole"][:] = math.nan
    with pytest.raises(NumericsError):
        train(pool=pool)
    with pytest.raises(NumericsError):
        train(replace(SMALL, lr=1e30))


def test_a_run_directory_starts_a_classifier(tmp_path: Path) -> None:
    model, losses = train()
    config = MetaConfig(train=SMALL, transform=TransformConfig(whitening=0.5))
    write_run(tmp_path / "run", model, config, {"losses": losses})
    start, known = load_start(tmp_path / "run")
    assert known == config
    assert start.projection == {}
    assert {k: tuple(v.shape) for k, v in start.core.items()} == {
        f"core.{k}": tuple(v.shape) for k, v in model.core.state_dict().items()
    }
    begun = RunConfig(name="hypdfs", method=METHOD).model(DIM, start.core)
    for classifier in (begun, model):
        classifier.adapt(toy_batch(), 3)
    queries = toy_batch(k_shot=5, seed=2)
    assert torch.equal(begun.logits(queries), model.logits(queries))
    scratch = HypDFS(METHOD, DIM)
    scratch.adapt(toy_batch(), 3)
    assert not torch.allclose(scratch.logits(queries), model.logits(queries))


def test_a_learned_representation_goes_to_the_features_and_the_rest_to_the_classifier(tmp_path: Path) -> None:
    """Projected features with the remaining weights are the meta-trained model; shape descriptors pass by."""
    shape_dims = 2
    config = replace(SMALL, projection=3)
    pool = toy_pool()
    model = learner(pool, config, shape_dims)
    before = model.core.state_dict()["projection.weight"].clone()
    fit(model, EpisodicTraining(pool=pool, config=config, shape_dims=shape_dims).item, config, quiet)
    assert not torch.equal(before, model.core.state_dict()["projection.weight"])
    write_run(tmp_path / "run", model, MetaConfig(train=config), {})
    start, _ = load_start(tmp_path / "run")
    assert not any(name.startswith("core.projection") for name in start.core)
    plain = FeatureTransform((DIM - shape_dims, shape_dims), {"shape": torch.ones(shape_dims)})
    transform = plain.projected(start.projection, start.mean)
    support, query = toy_batch(), toy_batch(k_shot=5, seed=2)
    on_plain, on_meta = ([replace(b, views=t(b.views)) for b in (support, query)] for t in (plain, transform))
    assert on_meta[0].views["whole"].shape[1] == 3 + shape_dims
    begun = RunConfig(method=METHOD, features="meta").model(3 + shape_dims, start.core)
    begun.adapt(on_meta[0], 3)
    model.adapt(on_plain[0], 3)
    torch.testing.assert_close(begun.logits(on_meta[1]), model.logits(on_plain[1]), rtol=0, atol=1e-5)


def test_a_projection_wider_than_the_base_classes_span_is_refused() -> None:
    with pytest.raises(DataError, match="span 5 directions at most"):
        learner(toy_pool(), replace(SMALL, projection=6), shape_dims=1)


@pytest.mark.parametrize("missing", ["config.json", "checkpoint/core.safetensors"])
@pytest.mark.parametrize("cut", [False, True])
def test_an_unfinished_run_directory_is_named(tmp_path: Path, missing: str, cut: bool) -> None:
    model, _ = train(replace(SMALL, steps=1))
    write_run(tmp_path / "run", model, MetaConfig(train=SMALL), {})
    file = tmp_path / "run" / missing
    if cut:
        file.write_bytes(file.read_bytes()[:20])
    else:
        file.unlink()
    with pytest.raises(ArtifactError, match="run holds no finished training run"):
        load_start(tmp_path / "run")


class Slope(torch.nn.Module):
    """Its loss falls by 1 where its number grows by 1: AdamW then moves it by the rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def loss(self, item: torch.Tensor, generator: torch.Generator) -> LossTerms:
        return LossTerms(total=-self.number, parts={})


def test_each_step_has_the_rate_of_its_schedule() -> None:
    for config in (TrainConfig(steps=40, lr=0.1, weight_decay=0.0), SteppedConfig(steps=40, lr=0.1, weight_decay=0.0)):
        losses = fit(Slope(), lambda number: torch.zeros(()), config, quiet)
        moved = -np.diff(losses)
        assert moved == pytest.approx([config.rate(step) for step in range(39)], rel=1e-4)
    assert moved[37] == pytest.approx(0.1, rel=1e-3)
    assert moved[38] == pytest.approx(0.01, rel=1e-3)


class TwoSlopes(Slope):
    """A second number, which is to move a tenth as fast."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = torch.nn.Parameter(torch.zeros(()))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.number], "factor": 1.0}, {"params": [self.slow], "factor": 0.1}]

    def loss(self, item: torch.Tensor, generator: torch.Generator) -> LossTerms:
        return LossTerms(total=-self.number - self.slow, parts={})


def test_a_group_of_parameters_has_its_share_of_the_rate() -> None:
    model = TwoSlopes()
    fit(model, lambda number: torch.zeros(()), TrainConfig(steps=10, lr=0.1, weight_decay=0.0), quiet)
    assert model.slow.item() == pytest.approx(0.1 * model.number.item(), rel=1e-3)
    assert model.number.item() > 0.3


class Line(Slope):
    """Its gradient of an item is the item."""

    def loss(self, item: torch.Tensor, generator: torch.Generator) -> LossTerms:
        total = self.number * item
        return LossTerms(total=total, parts={"item": float(item)})


def test_items_of_a_step_are_made_and_forgotten_one_at_a_time_and_their_mean_is_learned_from() -> None:
    model, alive = Line(), list[weakref.ref[torch.Tensor]]()
    held: list[int] = []

    def item(number: int) -> torch.Tensor:
        held.append(sum(one() is not None for one in alive))
        made = torch.tensor(float(1 + number))
        alive.append(weakref.ref(made))
        return made

    seen: list[dict[str, float]] = []
    config = TrainConfig(steps=1, items_per_step=4, report_every=1, lr=1e-3)
    fit(model, item, config, lambda metrics, write: seen.append(metrics))
    assert model.number.grad == pytest.approx(2.5)
    assert seen[0]["train/item"] == pytest.approx(2.5)
    assert max(held) == 0
