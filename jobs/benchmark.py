"""Time what must be fast, each as a ratio to a baseline measured in the same run.

python jobs/benchmark.py: everything

python jobs/benchmark.py --only fit
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import geoopt
import numpy as np
import optuna
import torch
from ray import tune
from rich.table import Table

from hypdefect import geometry
from hypdefect.config import parse_job, run_job, write_json
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.tune import SearchConfig, SearchData, search
from hypdefect.episodes import LabelledFeatures
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.features import FeatureTable
from hypdefect.methods.hypdfs import HypDFS, HypDFSConfig
from hypdefect.types import VIEWS, EpisodeSpec, FeatureBatch
from jobs.display import configure_logging, say, table_console

Part = Literal["geometry", "fit", "tune"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkJob:
    only: tuple[Part, ...] = ("geometry", "fit", "tune")
    rounds: int = 7
    """Interleaved rounds of each timing; the median is reported."""
    tune_trials: int = 60
    """Enough that the start of the actors, paid once, is spread as in a sweep."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.tune_trials < 2:
            raise ConfigError("benchmark needs rounds >= 1 and tune_trials >= 2")


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    baseline: str
    baseline_seconds: float
    seconds: float
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.baseline_seconds / self.seconds


def main() -> None:
    configure_logging()
    job, options = parse_job(BenchmarkJob, description=__doc__)
    torch.set_num_threads(1)
    parts: dict[str, Callable[[BenchmarkJob], list[Row]]] = {"geometry": distances, "fit": fits, "tune": trials}
    rows = []
    for part in job.only:
        say(f"{part} ...")
        rows += parts[part](job)
    table = Table(title=f"benchmark, one thread, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    for column in ("what", "s", "baseline", "baseline, s", "times faster", "note"):
        table.add_column(column, justify="left" if column in ("what", "baseline", "note") else "right")
    for row in rows:
        cells = (f"{row.seconds:.4f}", row.baseline, f"{row.baseline_seconds:.4f}", f"{row.ratio:.2f}", row.note)
        table.add_row(row.what, *cells)
    table_console().print(table)
    if options.json is not None:
        versions = {"torch": torch.__version__, "load": os.getloadavg()}
        write_json(options.json, {"rows": [asdict(r) | {"ratio": r.ratio} for r in rows], **versions})


def interleaved(rounds: int, *calls: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each call, A-B-A-B, after one warm-up each."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for own, call in zip(taken, calls, strict=True):
            begun = time.process_time()
            call()
            own.append(time.process_time() - begun)
    return [statistics.median(own) for own in taken]


def distances(job: BenchmarkJob) -> list[Row]:
    """All distances of 1000 points to 46 in 768 dimensions: Gram form against geoopt's broadcast."""
    generator = torch.Generator().manual_seed(0)
    curvature = 0.05
    rows = []
    for dtype in (torch.float32, torch.float64):
        x, y = (
            geometry.expmap0(torch.randn(n, 768, generator=generator, dtype=dtype) * 4 / 768**0.5, curvature)
            for n in (1000, 46)
        )
        ball = geoopt.PoincareBall(curvature)
        slow, fast = interleaved(
            job.rounds, partial(ball.dist, x[:, None], y[None]), partial(geometry.pairwise_dist, x, y, curvature)
        )
        exact = ball.dist(x.double()[:, None], y.double()[None])
        gap = float((geometry.pairwise_dist(x, y, curvature).double() - exact).abs().max())
        name = str(dtype).removeprefix("torch.")
        rows.append(
            Row(f"pairwise_dist 1000x46x768, {name}", "geoopt dist, broadcast", slow, fast, f"max difference {gap:.0e}")
        )
    return rows


def fits(job: BenchmarkJob) -> list[Row]:
    """One 5-way 5-shot fit with two augmented copies a support, on features of the default backbone's size."""
    generator = torch.Generator().manual_seed(0)
    dim, n = 1392, 5 * 5 * 3
    views = {view: torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1) for view in VIEWS}
    support = FeatureBatch(
        image_ids=tuple(str(i) for i in range(n)),
        views=views,
        labels=torch.arange(5).repeat_interleave(n // 5),
        aug_index=torch.arange(n) % 3,
    )

    def fit(**changes: Any) -> Callable[[], object]:
        return lambda: HypDFS(HypDFSConfig(**changes), dim).adapt(support, 5)

    names: dict[str, dict[str, Any]] = {
        "default": {},
        "ode none": {"ode": "none"},
        "ode sa": {"ode": "sa"},
        "curvature 0": {"curvature": 0.0},
        "adapter none": {"adapter": "none"},
        "adapter full rank": {"adapter_rank": 0},
    }
    default, *others = interleaved(job.rounds, *(fit(**changes) for changes in names.values()))
    rows = [Row("HypDFS fit, 5-way 5-shot, default", "the limit, 1 s", 1.0, default, "CPU seconds")]
    for name, seconds in zip(list(names)[1:], others, strict=True):
        rows.append(Row(f"  {name}", "default", default, seconds))
    return rows


def noop(config: dict[str, Any]) -> None:
    tune.report({"val/episode/acc": config["method.temperature"]})


def _space(trial: optuna.Trial) -> None:
    trial.suggest_float("method.temperature", 0.1, 0.2)


def trials(job: BenchmarkJob) -> list[Row]:
    """Overhead of a trial that does next to nothing: packed as the sweep packs it, against a plain function trial."""
    generator = np.random.default_rng(0)
    ids = np.array([f"{i:03d}" for i in range(16)])
    table = FeatureTable(
        image_ids=ids,
        aug_index=np.zeros(16, dtype=np.int64),
        views={view: generator.normal(size=(16, 4)).astype(np.float32) for view in VIEWS},
    )
    pool = LabelledFeatures(
        class_names=("a", "b"), image_ids=ids, labels=np.arange(16) % 2, groups=ids.copy(), table=table
    )
    space = ModuleType("noop_space")
    space.__dict__.update(METHOD="prototype", METRIC="val/episode/acc", MODE="max", space=_space)
    with tempfile.TemporaryDirectory() as folder, connected():
        begun = time.perf_counter()
        tune.Tuner(
            noop,
            param_space={"method.temperature": tune.uniform(0.1, 0.2)},
            tune_config=tune.TuneConfig(num_samples=job.tune_trials, metric="val/episode/acc", mode="max"),
            run_config=tune.RunConfig(name="plain", storage_path=folder, verbose=0),
        ).fit()
        plain = (time.perf_counter() - begun) / job.tune_trials
        begun = time.perf_counter()
        search(
            space,
            SearchData(pool=pool, normals=None, block_dims=(4,)),
            RunConfig(name="prototype"),
            EpisodeSpec(k_shot=1),
            SearchConfig(trials=job.tune_trials, episodes=1, rungs=1),
            name="noop",
            folder=Path(folder),
        )
        packed = (time.perf_counter() - begun) / job.tune_trials
    note = f"{job.tune_trials} trials, wall seconds each; limit 0.3 s"
    return [Row("packed trial (sweep)", "plain function trial", plain, packed, note)]


if __name__ == "__main__":
    run_job(main)
