"""Turn the ledger into a page a person can read: one self-contained HTML file and its pictures as PNG.

python jobs/report.py: the newest run of every task in the ledger; pictures of features where the store holds them

python jobs/report.py --label mtd --out report: one task

python jobs/report.py --readme README.md: write the results tables between the markers of a Markdown file instead
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
import tyro

from hypdefect.command_line import WRITTEN, command_line, configure_logging, parse_job, run_job, say
from hypdefect.config import from_mapping
from hypdefect.distributed.pseudo import stored_start
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Setting, TaskConfig, TaskPlan
from hypdefect.families.plan import prepare
from hypdefect.files import home, replaced_file, write_json
from hypdefect.results import ledger
from hypdefect.results.comparison import OURS, TWIN, Row, best_euclidean, display_name, leaderboard, paired_to
from hypdefect.results.feature_figures import fitted_points, plot_disk, plot_radius, plot_tsne
from hypdefect.results.figures import (
    Bar,
    Curve,
    Role,
    plot_ablations,
    plot_ahead,
    plot_confusions,
    plot_curvature,
    plot_shots,
)
from hypdefect.results.page import (
    Picture,
    Section,
    machine,
    markdown,
    ordered,
    ours,
    page_html,
    replace_results,
    section_html,
    shown,
    variant_of,
)
from hypdefect.types import SplitKind

Hidden = tyro.conf.Suppress


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportJob(TaskConfig):
    """The flags of a task say where its features are, as those of its evaluation; which task it is, the ledger says."""

    label: str = ""
    """Only this task (data set, or data set and product as `mvtec-bottle`); default: every task of the ledger."""
    out: Path | None = field(default=None, metadata=WRITTEN)
    """Folder of the page; default: $HYPDEFECT_HOME/report."""
    readme: Path | None = field(default=None, metadata=WRITTEN)
    """Write the tables between the results markers of this Markdown file, and nothing else."""
    peers: int = 0
    """Peers shown of each kind of features in that file, the best at the largest K; 0: all."""
    features: bool = True
    """Draw what needs the task's features (t-SNE, Poincare disk, label tree)."""
    seed: int = 0
    """Of the draws, as in the evaluation."""
    dataset: Annotated[str, Hidden] = "elpv"
    product: Annotated[str, Hidden] = ""
    split: Annotated[SplitKind, Hidden] = "random"
    backbone: Annotated[str, Hidden] = "efficientnet_lite0"
    k_shot: Annotated[int, Hidden] = 5


def main() -> None:
    configure_logging()
    job, options = parse_job(ReportJob, description=__doc__)
    found = sections(ledger.read(home()), job.label)
    if options.json is not None:
        write_json(options.json, [machine(section) for section in found])
    if job.readme is not None:
        replace_results(job.readme, markdown(found, command_line(), job.peers))
        print(job.readme)
        return
    folder = job.out or home() / "report"
    print(write_page(folder, found, job))


def sections(table: pa.Table, label: str = "") -> list[Section]:
    """The newest runs of every task, the grouped split of a label first.

    Raises:
        ConfigError: the ledger holds no main run, or none of this label.
    """
    newest = ledger.latest(table)
    tasks: dict[tuple[str, str, SplitKind, str], dict[str, pa.Table]] = {}
    names = ("label", "backbone", "split", "protocol", "study")
    keys = list(zip(*(newest[name].to_pylist() for name in names), strict=True))
    for key in dict.fromkeys(keys):
        own = newest.filter(pa.array([k == key for k in keys], pa.bool_()))
        tasks.setdefault(key[:4], {})[key[4]] = own
    found = [
        Section(*task, studies.pop("main"), studies) for task, studies in sorted(tasks.items()) if "main" in studies
    ]
    known = sorted({section.label for section in found})
    chosen = [section for section in found if label in ("", section.label)]
    if not found:
        raise ConfigError("the ledger holds no evaluation yet; make one: python jobs/evaluate.py --dataset elpv")
    if not chosen:
        raise ConfigError(f"the ledger holds no task {label!r}; it holds: {', '.join(known)}")
    return chosen


# -- pictures ------------------------------------------------------------------------------------------------------


def write_page(folder: Path, found: Sequence[Section], job: ReportJob) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for section in found:
        say(f"{section.title} ...")
        pictures, notes = ledger_pictures(folder, section)
        if job.features:
            more, said = feature_pictures(folder, section, job)
            pictures, notes = pictures + more, notes + said
        parts.append(section_html(section, pictures, notes))
    page = folder / "index.html"
    with replaced_file(page) as file:
        file.write(page_html(found, parts).encode())
    return page


def ledger_pictures(folder: Path, section: Section) -> tuple[list[Picture], list[str]]:
    """What the rows show, and a note for each picture they cannot."""
    pictures: list[Picture] = []
    notes: list[str] = []

    def picture(name: str, title: str, caption: str) -> Path:
        pictures.append(Picture(folder / f"{section.slug}-{name}.png", title, caption))
        return pictures[-1].path

    rows = leaderboard(section.main)
    own = ours(rows)
    drawn = curves(section, rows, own)
    title = "Accuracy against K" if len(section.shots) > 1 else "Accuracy"
    over = f"Mean over {section.what}; bars are 95 % intervals." if section.repeated else "One draw: no intervals."
    plot_shots(picture("shots", title, over), drawn)
    if own and len(drawn) > 1:
        caption = (
            "Accuracy of HypDFS minus that of each method over the same draws. Where the bar holds 0 they are level."
        )
        plot_ahead(picture("ahead", "HypDFS against each method", caption), "HypDFS", drawn)
    pictures_of_studies(section, own, picture, notes)
    peer = best_euclidean(rows, max(section.shots), by="accuracy")
    matrices = {f"{shown(r)} ({r.features} features)": r for r in (own, peer) if r}
    if matrices:
        caption = (
            f"K = {max(section.shots)}, all draws together; each row is 100 % of the images of one true class. The "
            "peer is the Euclidean method with the highest accuracy in this table."
        )
        path = picture("confusion", "Confusion: what is taken for what", caption)
        first = next(iter(matrices.values()))
        plot_confusions(path, {name: r.confusion for name, r in matrices.items()}, first.class_names)
    return pictures, notes


def curves(section: Section, rows: Sequence[Row], own: Row | None) -> list[Curve]:
    """Every method as a curve; HypDFS, its twin and the best peer of each kind of features stand out."""
    both = len({row.features for row in rows}) > 1
    k = max(section.shots)
    peers = [r for r in rows if r.k_shot == k and r.method != OURS and not r.variant]
    best = {r.features: r.name for r in sorted(peers, key=lambda r: r.accuracy.mean)}
    ahead = {} if own is None else {(d.k_shot, d.name): d.interval for d in paired_to(section.main, own.name)}
    found = []
    for group in ordered(rows):
        row = group[max(group)]
        role: Role = "other"
        if own and row.name == own.name:
            role = "ours"
        elif own and row.variant == TWIN and row.features == own.features:
            role = "twin"
        elif row.name in best.values():
            role = "peer"
        text = f"{shown(row)} ({row.features})" if both else shown(row)
        deltas = {at: -ahead[at, row.name] for at in group if (at, row.name) in ahead}
        found.append(Curve(text, role, {at: r.accuracy for at, r in group.items()}, deltas))
    return found


def pictures_of_studies(
    section: Section, own: Row | None, picture: Callable[[str, str, str], Path], notes: list[str]
) -> None:
    found = {name: table for name, table in section.studies.items() if name.startswith("ablation/")}
    missing = {"Accuracy against curvature": "curvature" not in section.studies, "Ablations": not found}
    for (what, absent), studies in zip(missing.items(), (("curvature",), ("adapter", "loss", "ode")), strict=True):
        if absent:
            command = section.study_command(*studies)
            notes.append(f"{what}: not measured here. " + (f"Made by {command}" if command else "Measured on mtd."))
    if "curvature" in section.studies:
        table = section.studies["curvature"]
        caption = "HypDFS with nothing changed but c. Right: over the same draws, minus c = 0. " + _of(table)
        plot_curvature(picture("curvature", "Accuracy against curvature", caption), curvature_bars(table))
    if found:
        k = max(max(table["k_shot"].to_pylist()) for table in found.values())
        full = full_config(found, k, None if own is None else _config_of(section.main, own.name, k))
        groups = {name.partition("/")[2]: ablation_bars(table, k, full) for name, table in found.items()}
        caption = f"K = {k}. What each part is worth. " + _of(next(iter(found.values())))
        plot_ablations(picture("ablation", "Ablations", caption), {n: b for n, b in groups.items() if b}, k)


def _of(table: pa.Table) -> str:
    partitions, draws = (len(set(table[name].to_pylist())) for name in ("partition", "draw"))
    return f"{partitions} partition{'s' * (partitions > 1)} × {draws} draw{'s' * (draws > 1)}."


def curvature_bars(table: pa.Table) -> dict[int, list[Bar]]:
    """At each K the variants by curvature (what is no number last), and their paired differences to c = 0."""
    rows = [r for r in leaderboard(table) if r.method == OURS]

    def value(variant: str) -> float:
        match = re.fullmatch(r"c = ([0-9.eE+-]+)", variant)
        return float(match[1]) if match else math.inf

    found: dict[int, list[Bar]] = {}
    zero = next((r.name for r in rows if value(r.variant) == 0), None)
    paired = {} if zero is None else {(d.k_shot, d.name): d.interval for d in paired_to(table, zero)}
    for row in sorted(rows, key=lambda r: (r.k_shot, value(r.variant), r.variant)):
        bar = Bar(row.variant or "default", row.accuracy, paired.get((row.k_shot, row.name)))
        found.setdefault(row.k_shot, []).append(bar)
    return found


def full_config(tables: Mapping[str, pa.Table], k: int, own: str | None) -> str | None:
    """The configuration that most studies have in common at one K, which is the full method; of one study, `own`."""
    counts = Counter(
        config
        for table in tables.values()
        for config in set(table.filter(pc.equal(table["k_shot"], k))["method_config"].to_pylist())
    )
    most = max(counts.values(), default=0)
    return next(config for config, n in counts.items() if n == most) if most > 1 else own


def ablation_bars(table: pa.Table, k: int, config: str | None) -> list[Bar]:
    """The variants at one K, best first after the reference: the one with the full method's configuration, else the
    best."""
    own = table.filter(pc.equal(table["k_shot"], k))
    rows = leaderboard(own)
    if not rows:
        return []
    same = [r for r in rows if config is not None and _config_of(own, r.name, k) == config]
    reference = next(iter([*same, *rows]))
    paired = {d.name: d.interval for d in paired_to(own, reference.name)}
    rows = [reference, *(r for r in rows if r is not reference)]
    return [Bar(variant_of(r, own), r.accuracy, paired.get(r.name)) for r in rows]


def _config_of(table: pa.Table, name: str, k: int, partition: int | None = None) -> str | None:
    """The configuration a method used at one K, on one partition (default: its first)."""
    for row in table.select(["method", "features", "variant", "k_shot", "partition", "method_config"]).to_pylist():
        own = display_name(row["method"], row["features"], row["variant"])
        if (own, row["k_shot"]) == (name, k) and partition in (None, row["partition"]):
            return str(row["method_config"])
    return None


def feature_pictures(folder: Path, section: Section, job: ReportJob) -> tuple[list[Picture], list[str]]:
    """What HypDFS makes of the features of draw 0, or a note why it cannot be drawn.

    On meta-trained features where the evaluation used some and their run is still here, else on plain ones.
    """
    k = max(section.shots)
    chosen = (_config_of(section.main, display_name(OURS, name), k, job.partition) for name in ("meta", "plain"))
    configs = [from_mapping(RunConfig, json.loads(config)) for config in chosen if config is not None]
    if not configs:
        return [], [f"Pictures of the features: HypDFS was not run at K = {k} on partition {job.partition}."]
    settings = {f.name: getattr(job, f.name) for f in fields(TaskConfig)}
    about = {"dataset": section.one("dataset"), "product": section.one("product"), "split": section.split}
    about |= {} if about["dataset"].startswith("imported:") else {"backbone": section.backbone}
    try:
        plan = prepare(few_shot, TaskConfig(**settings | about | {"k_shot": k}))
        fitting, reported = few_shot.load(plan, home())
        config, start = drawable(plan, fitting, configs)
        points = fitted_points(
            fitting, reported, config, Setting(k_shot=k, seed=job.seed, split=section.split), 0, start
        )
    except (ConfigError, DataError, ArtifactError) as error:
        say(f"{section.title}: features not drawn: {error}")
        extract = f"python jobs/extract.py --dataset {about['dataset']} --split {section.split}"
        return [], [f"Pictures of the features: not drawn, as the task's features were not found. Made by {extract}"]
    where = f"{config.features.replace('meta', 'meta-trained')} features, partition {job.partition}, draw 0, K = {k}"
    found = []

    def picture(name: str, title: str, caption: str) -> Path:
        found.append(Picture(folder / f"{section.slug}-{name}.png", title, f"{caption} {where[0].upper()}{where[1:]}."))
        return found[-1].path

    caption = (
        "Each dot is an unseen image; stars are the supports. Distances between far groups mean nothing in a t-SNE."
    )
    plot_tsne(picture("tsne", "Features before and after the adapter", caption), points)
    caption = (
        "Prototypes, supports, synthetic points and unseen images, placed so that hyperbolic distances in the disk are "
        "as close as possible to those in the ball. The stress is the share of them that two dimensions cannot "
        "show. Left: a disk of the ball's own curvature; right: of the curvature that fits best."
    )
    plot_disk(picture("disk", "The Poincaré disk", caption), points)
    caption = (
        "Distance of midpoints from the origin, at each level of the label tree. A midpoint of scattered points lies "
        "nearer to the origin whatever they are: grey bars are 95 % of groups of the same size with shuffled members, "
        "and only a midpoint beyond its bar says that the group holds together. Images share a radius where the "
        "features have unit norm."
    )
    plot_radius(picture("radius", "Radius against depth in the label tree", caption), points, families(plan))
    return found, []


def drawable(plan: TaskPlan, fitting: Fitting, configs: Sequence[RunConfig]) -> tuple[RunConfig, MetaStart | None]:
    """The first configuration whose features can be made here, and what its meta-training gave.

    Raises:
        ConfigError: there is none.
    """
    for config in configs:
        if config.features == "plain":
            return config, None
        if start := stored_start(plan, fitting, config.transform):
            return config, start
    raise ConfigError("the meta-training run of the evaluation is not here")


def families(plan: TaskPlan) -> list[str]:
    """The family of each class: the manifest's, else good and defective where there are both, else one for all."""
    rows = plan.manifest.select(["defect", "family", "is_defect"]).to_pylist()
    about = {row["defect"]: row for row in rows if row["defect"] in plan.classes}
    named = [about[name]["family"] or name for name in plan.classes]
    if len(set(named)) < len(plan.classes):
        return named
    return ["defective" if about[name]["is_defect"] else "good" for name in plan.classes]


if __name__ == "__main__":
    run_job(main)
