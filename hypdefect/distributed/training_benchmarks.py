"""What must be fast of networks that are trained: HADNet's forward and training step, and two workers beside one."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hypdefect.distributed.benchmarks import BenchmarkConfig, Timing, interleaved, wall_seconds
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.train import train
from hypdefect.families.amc_training import AMCTrainConfig, AMCTraining
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.features.backbones import Backbone, compute_on_one_thread, get_backbone
from hypdefect.features.spec import FeatureTable
from hypdefect.methods.amc import AMC, AMCConfig
from hypdefect.methods.hadnet import HADNet, HADNetConfig
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
    trained = HADNet(HADNetConfig(), CLASSES)
    item = segmentation_item(0, 4)

    def step(net: nn.Module, loss: Callable[[], Tensor]) -> None:
        net.zero_grad()
        loss().backward()

    def of_maps() -> Tensor:
        return torch.stack([x.square().mean() for x in trained.pyramid(item.views["pixels"])]).sum()

    maps, all_of_it = interleaved(
        config.rounds,
        partial(step, trained, of_maps),
        partial(step, trained, lambda: trained.loss(item, torch.Generator()).total),
    )
    weights = sum(p.numel() for p in trained.parameters() if p.requires_grad) / 1e6
    with FlopCounterMode(display=False) as counter:
        forward(model.scores)
    sums = counter.get_total_flops() / 2e9  # a multiplication and its addition are one
    note = f"{weights:.2f} M weights, paper 11.35; {sums:.2f} G multiply-adds, paper 1.113; limit 1 / 1.3 = 0.77"
    return [
        Timing(f"HADNet, an image of {SIDE} x {SIDE}", "its backbone", alone, whole, note),
        Timing("  a training step of 4 images", "of its backbone alone", maps, all_of_it),
        two_workers("HADNet, 80 steps of 4 images", SegmenterSteps(steps=80), SegmenterSteps(steps=1)),
    ]


def pretraining(config: BenchmarkConfig) -> list[Timing]:
    """Episodes of AMC's pretraining with one and two workers."""
    return [two_workers("AMC, 2000 episodes of pretraining", amc_training(1000), amc_training(1))]


def two_workers(what: str, training: Training, short: Training) -> Timing:
    """The steps of a training with one worker and with two of one thread each; what the start takes is left out: it is
    that of the same training of a single step."""
    seconds = []
    with connected(), tempfile.TemporaryDirectory() as folder:
        if int(ray.cluster_resources().get("CPU", 0)) < 2:
            return Timing(what, "1 worker", 0.0, float("nan"), "one CPU here")
        for workers in (1, 2):
            each = [
                wall_seconds(partial(train, one, workers=workers, name=f"{name}{workers}", folder=Path(folder)))
                for name, one in (("short", short), ("long", training))
            ]
            seconds.append(each[1] - each[0])
    return Timing(f"{what}, 2 workers", "1 worker", seconds[0], seconds[1], "one thread each; at least 1.6")


@dataclass(frozen=True, slots=True)
class SegmenterSteps:
    """A `training.Training`: HADNet on images made up."""

    steps: int

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(steps=self.steps, items_per_step=2, report_every=self.steps)

    def model(self) -> nn.Module:
        torch.set_num_threads(1)  # however many there are for a worker
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
    return OneThreadAMC(pool=pool, config=config)


class OneThreadAMC(AMCTraining):
    """A worker computes on one thread, however many there are for it."""

    def model(self) -> AMC:
        torch.set_num_threads(1)
        return super().model()
