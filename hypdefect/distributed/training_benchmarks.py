"""What must be fast of networks that are trained: HADNet's forward and training step, and two workers beside one."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hypdefect.distributed.benchmarks import BenchmarkConfig, Timing, interleaved
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.train import train
from hypdefect.families.amc_training import AMCTrainConfig, AMCTraining
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.segmentation_training import SegmenterTrainConfig
from hypdefect.features.backbones import compute_on_one_thread, get_backbone
from hypdefect.features.spec import FeatureTable
from hypdefect.features.timm_networks import Backbone
from hypdefect.methods.amc import AMCConfig
from hypdefect.methods.hadnet import HADNet, HADNetConfig
from hypdefect.precision import exact_products, fast_products
from hypdefect.training import TrainConfig, Training
from hypdefect.types import Batch

SIDE, CLASSES = 256, 3


def segmenters(config: BenchmarkConfig) -> list[Timing]:
    """HADNet at 256 x 256 beside its backbone's forward pass, its parts, and training with one and two workers."""
    compute_on_one_thread()
    spec = get_backbone("efficientnet_lite0")
    backbone = Backbone(spec)
    model = HADNet(HADNetConfig(), CLASSES)
    model.finish()
    pixels = torch.rand(1, 3, SIDE, SIDE)

    def forward(net: Callable[[Tensor], object]) -> None:
        with torch.inference_mode():
            net(pixels)

    alone, whole = interleaved(config.rounds, partial(forward, backbone), partial(forward, model.scores))
    trained, filters = (HADNet(HADNetConfig(depthwise=depthwise), CLASSES) for depthwise in (False, True))
    item = segmentation_item(0, 4)

    def step(net: nn.Module, loss: Callable[[], Tensor], products: Callable[[], Any] = fast_products) -> None:
        net.zero_grad()
        with products():
            loss().backward()

    def of_maps() -> Tensor:
        return torch.stack([x.square().mean() for x in trained.pyramid(item.views["pixels"])]).sum()

    def loss_of(net: HADNet) -> Callable[[], Tensor]:
        return lambda: net.loss(item, torch.Generator()).total

    maps, all_of_it, with_filters, exact = interleaved(
        config.rounds,
        partial(step, trained, of_maps),
        partial(step, trained, loss_of(trained)),
        partial(step, filters, loss_of(filters)),
        partial(step, trained, loss_of(trained), exact_products),
    )
    cost = cost_of(model)
    weights = f"{cost.weights:.2f} M weights, {cost.trained:.2f} M of them trained, paper 11.35"
    note = f"{weights}; {cost.operations:.2f} G multiply-adds, paper 1.113; limit 1 / 1.3 = 0.77"
    return [
        Timing(f"HADNet, an image of {SIDE} x {SIDE}", "its backbone", alone, whole, note),
        Timing("  a training step of 4 images", "of its backbone alone", maps, all_of_it),
        Timing("  the same", "with depthwise filters trained", with_filters, all_of_it),
        Timing("  the same", "with exact products", exact, all_of_it),
        two_workers("HADNet, a step of 4 images", SegmenterSteps(steps=40)),
    ]


@dataclass(frozen=True, slots=True)
class Cost:
    """Millions of weights, of these the trained ones, and thousand millions of multiply-adds of an image of `SIDE` x
    `SIDE`, each a multiplication of a convolution or matrix product and its addition."""

    weights: float
    trained: float
    operations: float


def cost_of(model: HADNet) -> Cost:
    """What a network costs that looks at an image once."""
    sizes = [(p.numel() / 1e6, p.requires_grad) for p in model.parameters()]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.scores(torch.zeros(1, 3, SIDE, SIDE))
    trained = sum(size for size, learns in sizes if learns)
    return Cost(sum(size for size, _ in sizes), trained, counter.get_total_flops() / 2e9)


def pretraining(config: BenchmarkConfig) -> list[Timing]:
    """Episodes of AMC's pretraining with one and two workers."""
    return [two_workers("AMC, a step of 2 episodes of pretraining", amc_training(300))]


def two_workers(what: str, training: Training) -> Timing:
    """Median seconds of a step with one worker and with two of one thread each, which are trained in turn, twice each.
    A step is measured from when its first item is asked for until the next one's is: starts are left out."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with connected(), tempfile.TemporaryDirectory() as folder:
        if int(ray.cluster_resources().get("CPU", 0)) < 2:
            return Timing(what, "1 worker", 0.0, float("nan"), "one CPU here")
        for turn, workers in enumerate((1, 2, 1, 2)):
            timed = TimedSteps(training, Path(folder) / f"asked{turn}")
            train(timed, workers=workers, name=f"run{turn}", folder=Path(folder))
            asked = [float(line) for line in timed.asked.read_text().split()]
            steps = np.diff(asked)[2:]  # the driver asks once, and the first step warms up
            seconds[workers].append(float(np.median(steps)))
    one, two = (statistics.mean(of_run) for of_run in seconds.values())
    return Timing(f"{what}, 2 workers", "1 worker", one, two, "one thread each; at least 1.6")


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """A `training.Training` on one thread a worker, however many there are; `asked` gets the second of each step."""

    training: Training
    asked: Path

    @property
    def config(self) -> TrainConfig:
        return self.training.config

    def model(self) -> nn.Module:
        torch.set_num_threads(1)
        return self.training.model()

    def item(self, number: int) -> Any:
        if number % self.config.items_per_step == 0:
            with self.asked.open("a") as file:
                file.write(f"{time.perf_counter()}\n")
        return self.training.item(number)


@dataclass(frozen=True, slots=True)
class SegmenterSteps:
    """A `training.Training`: HADNet on images made up."""

    steps: int

    @property
    def config(self) -> SegmenterTrainConfig:
        return SegmenterTrainConfig(steps=self.steps, items_per_step=2, report_every=self.steps)

    def model(self) -> nn.Module:
        return HADNet(HADNetConfig(), CLASSES).train()

    def item(self, number: int) -> Batch:
        return segmentation_item(number, 2)


def segmentation_item(number: int, images: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    none = torch.zeros(images, dtype=torch.long)
    return Batch(
        image_ids=tuple(f"{i}" for i in range(images)),
        views={"pixels": torch.rand(images, 3, SIDE, SIDE, generator=generator)},
        labels=none,
        aug_index=none,
        targets=torch.randint(0, CLASSES + 1, (images, SIDE, SIDE), generator=generator),
    )


def amc_training(steps: int) -> AMCTraining:
    """On noise of the sizes of patchcore_lite0."""
    config = AMCTrainConfig(method=AMCConfig(), steps=steps, report_every=steps, patience=0)
    labels = np.repeat(np.arange(12), 8)
    ids = np.array([f"{i:03d}" for i in range(len(labels))])
    maps = np.random.default_rng(0).normal(size=(len(labels), 8, 8, 112)).astype(np.float32)
    table = FeatureTable(image_ids=ids, aug_index=np.zeros(len(ids), np.int64), views={"patch": maps})
    names = tuple(f"{i:02d}" for i in range(12))
    pool = LabelledFeatures(class_names=names, image_ids=ids, labels=labels, groups=ids, table=table)
    return AMCTraining(pool=pool, config=config)
