"""Which few-shot method is best here: all of them on the same features, validation episodes, draws and queries.

python jobs/evaluate.py --dataset mtd --methods all --split grouped --partitions 10 --draws 10

python jobs/evaluate.py --dataset mtd --draws 5: the protocol of the papers of HypDFS and MVREC, five random draws

python jobs/evaluate.py --sweep NAME: the configuration a sweep selected, on that sweep's own task

Every method is tuned by the same number of trials on the same episodes drawn inside the support pool, for each
partition and K anew; the queries are scored with what won there. All draws go into the ledger (hypdefect/ledger.py).
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from hypdefect.command_line import configure_logging, parse_job, run_job, say, table_console
from hypdefect.config import from_mapping, to_mapping
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.evaluate import compare, evaluate
from hypdefect.errors import ConfigError, DataError
from hypdefect.evaluation import Entrant, MetaStart, RunConfig, Scored, candidates, first_support
from hypdefect.families.episodes import draw_support
from hypdefect.families.few_shot import FewShotTask, TaskConfig, TaskPlan, load_task, plan_task
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home, write_json
from hypdefect.methods import METHODS, get_method
from hypdefect.methods.hypdfs import HypDFSConfig
from hypdefect.progress import progress
from hypdefect.results import ledger
from hypdefect.results.comparison import Difference, Row, best_euclidean, claims, leaderboard, paired_to
from hypdefect.results.page import CEILING, ceiling_text
from hypdefect.statistics import Interval
from hypdefect.training import MetaConfig, load_start
from jobs.extract import fill, prepare
from jobs.train import trained
from tune_spaces import get_space, with_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob(TaskConfig):
    methods: tuple[str, ...] = ("hypdfs", "prototype", "logistic_regression", "shrinkage_lda")
    """Names of methods, or all."""
    shots: tuple[int, ...] = (1, 3, 5)
    partitions: int = 1
    """Partitions into pool and queries, from --partition on; intervals and tests are then over partition means."""
    protocol: Literal["draws", "first"] = "draws"
    """draws: random supports from the pool; first: AMC's rule, the first K images of each class by file name, once."""
    draws: int = 20
    """Random support draws of each partition and K; 5 is the protocol of the papers of HypDFS and MVREC."""
    trials: int = 8
    """Configurations tried of every method, its defaults first; 0: the defaults, without validation."""
    episodes: int = 12
    """Validation episodes of a trial, drawn inside the support pool."""
    seed: int = 0
    transform: TransformConfig = TransformConfig()
    """What every method's first trial does to the features."""
    support_copies: int = 2
    """Augmented copies of each support image in every method's first trial."""
    method: HypDFSConfig = HypDFSConfig()
    """HypDFS's first trial."""
    features: Literal["plain", "plain+meta"] = "plain+meta"
    """plain+meta: every method also on the representation that is meta-trained on the product's pseudo-defects."""
    meta: MetaConfig = field(default_factory=MetaConfig)
    sweep: str = ""
    """Evaluate what this sweep selected, on its own task, instead."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        for name, least in (("partitions", 1), ("draws", 1), ("trials", 0), ("episodes", 1), ("support_copies", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.shots or min(self.shots) < 1:
            raise ConfigError(f"shots must be one or more numbers of at least 1, got {list(self.shots)}")
        for name in self.methods if self.methods != ("all",) else ():
            get_method(name)


def main() -> None:
    configure_logging()
    job, options = parse_job(EvaluateJob, description=__doc__)
    job, fixed = selected(job) if job.sweep else (job, None)
    begun = time.monotonic()
    spent: dict[str, float] = defaultdict(float)
    rows: list[dict[str, Any]] = []
    limits: list[dict[str, Any]] = []
    with connected():
        plans = planned(job)
        run, limit = (ledger.identity(job, plans, protocol=job.protocol, study=study) for study in ("main", CEILING))
        fill(*plans)
        ready = time.monotonic()
        for plan in plans:
            task = load_task(plan, home())
            start = start_of(task, plan, job)
            number = plan.config.partition
            with progress(f"partition {number}: trials and draws") as advance:
                scored = compare(
                    task,
                    fixed or entrants(job, start, plan.searched_parts),
                    supports_of(job, plan, task),
                    episodes=0 if fixed or not job.trials else job.episodes,
                    split=job.split,
                    seed=job.seed,
                    start=start,
                    progress=advance,
                )
            for one in scored:
                spent[one.config.name] += one.seconds
            rows += ledger.rows_of(scored, run, number, plan.classes)
            limits += ledger.rows_of(ceiling(task, job, start), limit, number, plan.classes)
    seconds = {"features": ready - begun, "methods": time.monotonic() - ready}
    part, above = ledger.append(rows, home()), ledger.append(limits, home())
    summary = show(ledger.read_part(part), job)
    summary["ceiling"] = [asdict(r) for r in leaderboard(ledger.read_part(above))]
    print(ceiling_text(ledger.read_part(above)))
    each = ", ".join(f"{name} {value:.0f}" for name, value in sorted(spent.items(), key=lambda item: -item[1]))
    print(f"times: features {seconds['features']:.0f} s, methods {seconds['methods']:.0f} s (CPU seconds: {each})")
    if options.json is not None:
        write_json(options.json, plain({"job": to_mapping(job), "run": run, "seconds": seconds, **summary}))
    print(above)
    print(part)


def planned(job: EvaluateJob) -> list[TaskPlan]:
    """The task at each partition, every K possible on all of them."""
    most = replace(job, k_shot=max(job.shots))
    first = prepare(most)
    for transform in (job.transform, job.meta.transform):
        transform.part_numbers(first.num_parts)  # one that is not there: say so before any work
    numbers = range(job.partition + 1, job.partition + job.partitions)
    return [first, *(plan_task(replace(most, partition=n), first.manifest, first.imported) for n in numbers)]


def start_of(task: FewShotTask, plan: TaskPlan, job: EvaluateJob) -> MetaStart | None:
    """What meta-training on pseudo-defects gives to this task, made where missing; None where it cannot be."""
    if job.features == "plain" or job.sweep or plan.imported:
        return None
    try:
        return load_start(trained(plan, task, job.meta))[0]
    except DataError as error:
        say(f"no meta-training: {error}")
        return None


def entrants(job: EvaluateJob, start: MetaStart | None, searched_parts: int = 1) -> list[Entrant]:
    """Every method on plain features and, where there are any, on meta-trained ones, with the same number of trials.

    Of the trials on meta-trained features one has plain ones: whether to use what was learned is chosen with the rest,
    on the support pool.
    """
    names = METHODS if job.methods == ("all",) else dict.fromkeys(job.methods)
    found = []
    for name in names:
        method = job.method if name == "hypdfs" else None
        base = RunConfig(name=name, method=method, transform=job.transform, support_copies=job.support_copies)
        space = with_parts(get_space(name), searched_parts)
        found.append(Entrant(candidates=candidates(base, space, job.trials, job.seed)))
    for name in names if start and start.projection else ():
        learned = name == "hypdfs" and bool(start and start.core)
        method = (job.meta.train.method if learned else job.method) if name == "hypdfs" else None
        base = RunConfig(
            name=name,
            method=method,
            transform=job.meta.transform,
            features="meta",
            support_copies=job.support_copies,
        )
        space = get_space("hypdfs_meta" if learned else name)
        # the projection was trained behind one transform
        sampled = [replace(c, transform=base.transform) for c in candidates(base, space, 3 * job.trials, job.seed)]
        tried = dict.fromkeys([base, replace(base, features="plain"), *sampled])
        found.append(Entrant(candidates=tuple(tried)[: max(job.trials, 1)]))
    return found


def ceiling(task: FewShotTask, job: EvaluateJob, start: MetaStart | None) -> list[Scored]:
    """What a linear head reaches that is given every label of the pool, many more than a draw's K a class."""
    base = RunConfig(name="logistic_regression", transform=job.transform, support_copies=0)
    configs = {"plain": base}
    if start and start.projection:
        configs["meta"] = replace(base, transform=job.meta.transform, features="meta")
    scores = evaluate(task, configs, [np.arange(len(task.pool))], start=start)
    return [
        Scored(
            config=config,
            features=name,
            variant="all labels of the pool",
            k_shot=0,
            validation=math.nan,
            draws=tuple(scores[name]),
            seconds=0.0,
        )
        for name, config in configs.items()
    ]


def supports_of(job: EvaluateJob, plan: TaskPlan, task: FewShotTask) -> dict[int, list[np.ndarray]]:
    """Support positions of every draw at every K."""
    if job.protocol == "first":
        uri_of = dict(zip(plan.manifest["image_id"].to_pylist(), plan.manifest["uri"].to_pylist(), strict=True))
        return {k: [first_support(task.pool, k, uri_of)] for k in job.shots}
    return {k: [draw_support(task.pool, k, job.seed, number) for number in range(job.draws)] for k in job.shots}


def selected(job: EvaluateJob) -> tuple[EvaluateJob, list[Entrant]]:
    """The task and the configurations of a finished sweep.

    Raises:
        ConfigError: no such sweep, or more partitions than its own asked for.
    """
    folder = home() / "sweeps" / job.sweep
    if not (folder / "result.json").is_file():
        known = ", ".join(sorted(p.parent.name for p in folder.parent.glob("*/result.json"))) or "none"
        raise ConfigError(f"no finished sweep {job.sweep!r}; known: {known}")
    if job.partitions != 1:
        raise ConfigError(f"sweep {job.sweep!r} was tuned on one partition; --partitions must be 1")
    settings = json.loads((folder / "sweep.json").read_text())["job"]
    names = {f.name for f in fields(TaskConfig)}
    task = from_mapping(TaskConfig, {k: v for k, v in settings.items() if k in names})
    result = json.loads((folder / "result.json").read_text())
    winner, peer = (from_mapping(RunConfig, result[key], job.sweep) for key in ("selected", "prototype"))
    if winner.pretrained and settings["init"]:
        raise ConfigError(f"sweep {job.sweep!r} started from {settings['init']}; its own table is its evaluation")
    say(f"{job.sweep}: trial {result['selected_trial']}, K = {task.k_shot}, partition {task.partition}")
    configs = [winner] if winner.name == peer.name else [winner, peer]
    base = {name: getattr(task, name) for name in names}
    return replace(job, **base, shots=(task.k_shot,)), [Entrant(candidates=(config,)) for config in configs]


def show(table: pa.Table, job: EvaluateJob) -> dict[str, Any]:
    """Print the leaderboard of each K and HypDFS's comparisons; the same as plain values."""
    rows = leaderboard(table)
    draws = "the first K images" if job.protocol == "first" else f"{job.draws} draws"
    what = f"{table['label'][0]}, {job.split} split, {job.partitions} partition{'s'[: job.partitions > 1]} x {draws}"
    paired: list[Difference] = []
    for k_shot in job.shots:
        at_k = table.filter(pc.equal(table["k_shot"], k_shot))
        fair, strict = best_euclidean(rows, k_shot), best_euclidean(rows, k_shot, by="accuracy")
        against = [paired_to(at_k, r.name) if r else [] for r in (fair, strict)]
        paired += against[0] if fair == strict else [*against[0], *against[1]]
        shown = leaderboard_table([r for r in rows if r.k_shot == k_shot], *against)
        shown.title = f"{what}, K = {k_shot}: accuracy, %"
        if fair and strict:
            by = "fixed: nothing was validated" if math.isnan(fair.validation) else "by validation accuracy"
            shown.caption = (
                f"± is the 95 % interval over {'partitions' if job.partitions > 1 else 'draws'}; p is Wilcoxon's, "
                f"corrected (Holm).\nBest Euclidean: {fair.name} ({by}); strictest: {strict.name}, best on the queries."
            )
        table_console(170).print(shown)
    decided = claims(table)
    if decided.plain or decided.meta or decided.twin:
        table_console(170).print(claims_table(decided.plain, decided.meta, decided.twin, job.shots))
    return {"leaderboard": [asdict(r) for r in rows], "paired": [asdict(d) for d in paired], "claims": asdict(decided)}


def leaderboard_table(rows: Sequence[Row], fair: Sequence[Difference], strict: Sequence[Difference]) -> Table:
    table = Table()
    columns = ("method", "accuracy", "std", "balanced", "macro F1", "ECE", "fit, ms", "predict, ms")
    for column in (*columns, "- best Euclidean", "p", "- strictest", "p"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        differences = [cell for side in (fair, strict) for cell in difference_cells(side, row.name)]
        table.add_row(
            row.name,
            points(row.accuracy),
            "" if math.isnan(row.std) else f"{100 * row.std:.2f}",
            points(row.balanced),
            f"{100 * row.macro_f1:.2f}",
            f"{100 * row.ece:.1f}",
            f"{1000 * row.fit_seconds:.1f}",
            f"{1000 * row.predict_seconds:.1f}",
            *differences,
        )
    return table


def claims_table(
    plain_: Sequence[Difference], meta: Sequence[Difference], twin: Sequence[Difference], shots: Sequence[int]
) -> Table:
    """HypDFS minus each peer, a column for each K."""
    table = Table(title="HypDFS against the others: accuracy points, paired, ± 95 % (p corrected)")
    for column in ("", *(f"K = {k}" for k in shots)):
        table.add_column(column, justify="right" if column else "left")
    for title, side in (
        ("(a) every peer on plain features", plain_),
        ("(b) the same peers on the same meta-trained features", meta),
        ("(c) its own c = 0 twin at matched distance scale", twin),
    ):
        table.add_section()
        table.add_row(f"{title}{'' if side else ': not in this run'}", style="bold")
        for name, reference in dict.fromkeys((d.name, d.reference) for d in side):
            cells = {d.k_shot: d for d in side if (d.name, d.reference) == (name, reference)}
            texts = (f"{signed(cells[k].interval)} ({cells[k].p:.3f})" if k in cells else "" for k in shots)
            table.add_row(f"  {name} - {reference}", *texts)
    return table


def difference_cells(side: Sequence[Difference], name: str) -> tuple[str, str]:
    for found in side:
        if found.name == name:
            return signed(found.interval), f"{found.p:.3f}"
    return "", ""


def points(value: Interval) -> str:
    return value.percent() if value.n > 1 else f"{100 * value.mean:.2f}"


def signed(value: Interval) -> str:
    return f"{100 * value.mean:+.2f}{f' ± {100 * value.half_width:.2f}' if value.n > 1 else ''}"


def plain(value: Any) -> Any:
    """As JSON takes it: arrays as lists, and None for what is not finite (the interval of a single draw)."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    run_job(main)
