"""What must be fast, each timed beside a baseline in the same process: geometry, fits, trials, the store, extraction.

Every section is a function that gives timings. CPU times are medians of interleaved rounds (`interleaved`).
"""

import hashlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import geoopt
import numpy as np
import optuna
import ray
import torch
from PIL import Image
from ray import tune

from hypdefect import geometry
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.extract import extract
from hypdefect.distributed.tune import SearchConfig, search
from hypdefect.errors import ConfigError, NumericsError
from hypdefect.evaluation import RunConfig
from hypdefect.families.episodes import LabelledFeatures
from hypdefect.families.few_shot import Fitting, Setting
from hypdefect.families.plan import extraction_key
from hypdefect.features.backbones import BackboneSpec, compute_on_one_thread, get_backbone
from hypdefect.features.extract import RecipeConfig, RegionExtractor, extractor_for
from hypdefect.features.spec import FeatureKey, FeatureTable, ImageRequest, RowKey
from hypdefect.features.store import FeatureStore
from hypdefect.features.timm_networks import Backbone, SlicedSame
from hypdefect.images import read_image
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.types import VIEWS, Batch

BATCH = 16
"""Images an actor takes at once, as in `extract`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    rounds: int = 7
    """Interleaved rounds of each timing; the median is reported."""
    tune_trials: int = 60
    """Enough that the start of the actors, paid once, is spread as in a sweep."""
    store_rows: int = 100_000
    """Rows of 768 features loaded from the store."""
    images: int = 192
    """Images extracted by Ray Data and by a bare loop, and seen by PatchCore."""
    anomalib: Path | None = None
    """Virtual environment with anomalib, whose PatchCore is then timed beside ours."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.tune_trials < 2 or self.store_rows < 1 or self.images < 4 * BATCH:
            raise ConfigError(f"benchmark needs rounds, store_rows >= 1, tune_trials >= 2 and images >= {4 * BATCH}")


@dataclass(frozen=True, slots=True)
class Timing:
    what: str
    baseline: str
    baseline_seconds: float
    seconds: float
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.baseline_seconds / self.seconds


def interleaved(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each call, A-B-A-B, after one warm-up each."""
    for call in calls:
        call()
    taken = [[cpu_seconds(call) for call in calls] for _ in range(rounds)]
    return [statistics.median(of_call) for of_call in zip(*taken, strict=True)]


def cpu_seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def wall_seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def distances(config: BenchmarkConfig) -> list[Timing]:
    """All distances of 1000 points to 46 in 768 dimensions: Gram form against geoopt's broadcast."""
    generator = torch.Generator().manual_seed(0)
    curvature = 0.05
    timings = []
    for dtype in (torch.float32, torch.float64):
        x, y = (
            geometry.expmap0(torch.randn(n, 768, generator=generator, dtype=dtype) * 4 / 768**0.5, curvature)
            for n in (1000, 46)
        )
        ball = geoopt.PoincareBall(curvature)
        slow, fast = interleaved(
            config.rounds, partial(ball.dist, x[:, None], y[None]), partial(geometry.pairwise_dist, x, y, curvature)
        )
        exact = ball.dist(x.double()[:, None], y.double()[None])
        gap = float((geometry.pairwise_dist(x, y, curvature).double() - exact).abs().max())
        what = f"pairwise_dist 1000x46x768, {str(dtype).removeprefix('torch.')}"
        timings.append(Timing(what, "geoopt dist, broadcast", slow, fast, f"max difference {gap:.0e}"))
    return timings


def fits(config: BenchmarkConfig) -> list[Timing]:
    """One 5-way 5-shot fit with two augmented copies a support, on features of the default backbone's size."""
    generator = torch.Generator().manual_seed(0)
    dim, n = 1406, 5 * 5 * 3
    views = {view: torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1) for view in VIEWS}
    support = Batch(
        image_ids=tuple(str(i) for i in range(n)),
        views=views,
        labels=torch.arange(5).repeat_interleave(n // 5),
        aug_index=torch.arange(n) % 3,
    )

    def fit(**changes: Any) -> Callable[[], object]:
        return lambda: HypDFS(HypDFSConfig(**changes), dim).adapt(support, 5)

    variants: dict[str, dict[str, Any]] = {
        "ode none": {"ode": "none"},
        "ode sa": {"ode": "sa"},
        "curvature 0": {"curvature": 0.0},
        "no synthesis": {"synthesis": False},
        "no adapter": {"adapter": False},
        "centers": {"head": "centers"},
        "adapter full rank": {"adapter_rank": 0},
    }
    default, *others = interleaved(config.rounds, *(fit(**changes) for changes in ({}, *variants.values())))
    return [
        Timing("HypDFS fit, 5-way 5-shot, default", "the limit, 1 s", 1.0, default, "CPU seconds"),
        *(Timing(f"  {name}", "default", default, seconds) for name, seconds in zip(variants, others, strict=True)),
    ]


def noop(config: dict[str, Any]) -> None:
    tune.report({"val/episode/acc": config["method.temperature"]})


def _space(trial: optuna.Trial) -> None:
    trial.suggest_float("method.temperature", 0.1, 0.2)


def trials(config: BenchmarkConfig) -> list[Timing]:
    """Overhead of a trial that does next to nothing: packed as the sweep packs it, against a plain function trial."""
    space = ModuleType("noop_space")
    space.__dict__.update(METHOD="prototype", METRIC="val/episode/acc", MODE="max", space=_space)
    with tempfile.TemporaryDirectory() as folder, connected():
        tuner = tune.Tuner(
            noop,
            param_space={"method.temperature": tune.uniform(0.1, 0.2)},
            tune_config=tune.TuneConfig(num_samples=config.tune_trials, metric="val/episode/acc", mode="max"),
            run_config=tune.RunConfig(name="plain", storage_path=folder, verbose=0),
        )
        sweep = partial(
            search,
            space,
            _tiny_task(),
            RunConfig(name="prototype"),
            Setting(k_shot=1),
            SearchConfig(trials=config.tune_trials, episodes=1, rungs=1),
            name="noop",
            folder=Path(folder),
        )
        plain, packed = (wall_seconds(call) / config.tune_trials for call in (tuner.fit, sweep))
    note = f"{config.tune_trials} trials, wall seconds each; limit 0.3 s"
    return [Timing("packed trial (sweep)", "plain function trial", plain, packed, note)]


def _tiny_task() -> Fitting:
    """Two classes of eight images with four numbers each."""
    generator = np.random.default_rng(0)
    ids = np.array([f"{i:03d}" for i in range(16)])
    views = {view: generator.normal(size=(16, 4)).astype(np.float32) for view in VIEWS}
    table = FeatureTable(image_ids=ids, aug_index=np.zeros(16, dtype=np.int64), views=views)
    labels = np.arange(16) % 2
    pool = LabelledFeatures(class_names=("a", "b"), image_ids=ids, labels=labels, groups=ids.copy(), table=table)
    return Fitting(pool=pool, normals=None, block_dims=(4,))


def storage(config: BenchmarkConfig) -> list[Timing]:
    """Reading the store, extracting what is there already, what Ray Data costs, and the network's form on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        timings = loads(config, Path(folder) / "load")
        requests = random_images(Path(folder) / "images", config.images)
        with connected():
            timings += extractions(requests, Path(folder) / "twice")
            timings += throughput(requests, Path(folder) / "throughput")
            timings += forms(config, requests[:8])
    return timings


def loads(config: BenchmarkConfig, home: Path) -> list[Timing]:
    """Rows of 768 features into torch: from the store, by their keys, against a copy of one memory-mapped array."""
    dim, generator = 768, np.random.default_rng(0)
    key = FeatureKey(backbone="random", backbone_digest="", block_dims=(dim,), recipe=None, views=("whole",))
    keys = [RowKey(hashlib.sha256(str(i).encode()).hexdigest(), "", 0) for i in range(config.store_rows)]
    array = generator.standard_normal((len(keys), dim), np.float32).astype(key.dtype).astype(np.float32)
    store = FeatureStore(home, key)
    store.create()
    for start in range(0, len(keys), 10_000):
        store.write(keys[start : start + 10_000], {"whole": array[start : start + 10_000]})
    np.save(home / "array.npy", array)
    shuffled = random.Random(0).sample(keys, len(keys))

    def mapped() -> torch.Tensor:
        return torch.from_numpy(np.array(np.load(home / "array.npy", mmap_mode="r")))

    def stored(wanted: list[RowKey]) -> torch.Tensor:
        return torch.from_numpy(FeatureStore(home, key).load(wanted).views["whole"])

    first = cpu_seconds(partial(stored, keys))
    if not torch.equal(stored(keys), torch.from_numpy(array)):
        raise NumericsError("the store gives other rows than were written")
    del array
    plain, in_order, at_random = interleaved(config.rounds, mapped, partial(stored, keys), partial(stored, shuffled))
    what, baseline = f"load {len(keys)} x {dim}", "np.load(mmap_mode) + copy"
    return [
        Timing(what, baseline, plain, in_order, "every row's sum checked; limit 0.5"),
        Timing("  in random order", baseline, plain, at_random),
        Timing("  first load, which makes the float32 copy", baseline, plain, first, "once a node and change"),
    ]


def random_images(folder: Path, count: int) -> list[ImageRequest]:
    """Smooth noise of a tile's size, as requests for extraction."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    requests = []
    for i in range(count):
        path = folder / f"{i:04d}.png"
        Image.fromarray(generator.integers(0, 256, (30, 30, 3), np.uint8)).resize((300, 300)).save(path)
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        requests.append(ImageRequest(uri=str(path), image_id=name, file_id=name, mask_uri="", mask_id="", copies=0))
    return requests


def extractions(requests: list[ImageRequest], home: Path) -> list[Timing]:
    """Extracting an image set, and again with weights that do not exist, so that any forward pass would fail."""
    spec = get_backbone("tiny_random")
    key = extraction_key(spec, RecipeConfig())
    first, second = (
        wall_seconds(partial(extract, requests, home, key, backbone, workers=1, batch_size=BATCH))
        for backbone in (spec, replace(spec, weights="no such file"))
    )
    what = f"second extraction, {len(requests)} images"
    return [Timing(what, "the first", first, second, "no weights at hand for a forward pass; limit 100")]


def throughput(requests: list[ImageRequest], home: Path) -> list[Timing]:
    """Steady state of Ray Data actors against a bare loop over the same images, which stores nothing.

    The loop runs with one thread and with all, before and after; the faster counts. Each actor has one thread for the
    network and one that makes the next image ready.
    """
    cores = min(2, os.cpu_count() or 1)
    spec = get_backbone("efficientnet_lite0")
    key = extraction_key(spec, RecipeConfig())
    extractor = extractor_for(spec, RecipeConfig(), "cuda" if torch.cuda.is_available() else "cpu")

    def forward_all(chosen: list[ImageRequest]) -> None:
        for request in chosen:
            prepared = extractor.prepare(read_image(Path(request.uri)), None, request.image_id, 0)
            extractor.forward(prepared)

    def bare(threads: int, chosen: list[ImageRequest]) -> float:
        torch.set_num_threads(threads)
        return wall_seconds(partial(forward_all, chosen)) / len(chosen)

    half = len(requests) // 2
    bare(1, requests[:1])
    loops: dict[int, list[float]] = {threads: [bare(threads, requests[:half])] for threads in {1, cores}}
    begun, marks = time.perf_counter(), []
    extract(
        requests,
        home,
        key,
        spec,
        workers=cores,
        batch_size=BATCH,
        progress=lambda done, _: marks.append((time.perf_counter(), done)),
    )
    for threads, seconds in loops.items():
        seconds.append(bare(threads, requests[half:]))
    torch.set_num_threads(1)
    baseline, threads = min((statistics.mean(seconds), threads) for threads, seconds in loops.items())
    (start, first), (end, last) = marks[cores - 1], marks[-1]  # every actor is at work by then
    note = f"an image; {start - begun:.1f} s to the first {first}, start of the actors included; limit 0.9"
    what = f"extraction by Ray Data, {cores} actors"
    return [Timing(what, f"bare loop, {threads} threads", baseline, (end - start) / (last - first), note)]


class CopyingBackbone(Backbone):
    """The network as timm runs it: padded copies, all inputs in one pass."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__(spec)
        for parent in list(self.net.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, SlicedSame):
                    setattr(parent, name, child.conv)

    @torch.inference_mode()
    def forward(self, pixels: torch.Tensor, region: torch.Tensor | None = None) -> list[torch.Tensor]:
        return self.maps_of(pixels)


class Features:
    """Ray actor with a heap of its own, as an extraction has: the features of images, in the new form or the old."""

    def __init__(self, *, new: bool) -> None:
        torch.set_num_threads(1)
        if new:
            compute_on_one_thread()
        spec = get_backbone("efficientnet_lite0")
        self.extractor = RegionExtractor(Backbone(spec) if new else CopyingBackbone(spec), RecipeConfig())

    def of(self, paths: list[str]) -> tuple[float, np.ndarray]:
        """CPU seconds an image, and the features."""
        begun = time.process_time()
        rows = [torch.cat(list(self.extractor(read_image(Path(path)), None).values())) for path in paths]
        return (time.process_time() - begun) / len(paths), torch.stack(rows).numpy()


def forms(config: BenchmarkConfig, requests: list[ImageRequest]) -> list[Timing]:
    """Features on one thread of a CPU, against the same network with padded copies, whole batches and freed pages."""
    paths = [request.uri for request in requests]
    actors: list[Any] = [ray.remote(num_cpus=0)(Features).remote(new=new) for new in (False, True)]
    rounds = [[ray.get(actor.of.remote(paths)) for actor in actors] for _ in range(config.rounds + 1)]
    slow, fast = (statistics.median(seconds for seconds, _ in runs[1:]) for runs in zip(*rounds, strict=True))
    (_, before), (_, after) = rounds[0]
    gap = float(np.abs(after - before).max())
    note = f"CPU seconds an image; {1 / slow:.1f} -> {1 / fast:.1f} images a CPU second; max difference {gap:.0e}"
    return [Timing("features, one thread", "padded copies, whole batches, freed pages", slow, fast, note)]


SECTIONS: dict[str, Callable[[BenchmarkConfig], list[Timing]]] = {
    "geometry": distances,
    "fit": fits,
    "tune": trials,
    "store": storage,
}
