"""Pictures of a fitted HypDFS on a task's features: t-SNE round the adapter, the Poincare disk, the label tree."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from scipy.linalg import orthogonal_procrustes
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor

from hypdefect import geometry
from hypdefect.config import from_mapping
from hypdefect.errors import ArtifactError, ConfigError, DataError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Setting, TaskConfig, TaskPlan
from hypdefect.families.plan import prepare
from hypdefect.features.imported import is_imported
from hypdefect.features.transform import TransformConfig
from hypdefect.files import home
from hypdefect.results.comparison import OURS, display_name
from hypdefect.results.embedding import DiskEmbedding, embed_in_disk, midpoint_radii
from hypdefect.results.figures import DARK, GREY, GRID, LIGHT, Album, new_figure, short
from hypdefect.results.fitted_points import FittedPoints, fitted_points
from hypdefect.results.sections import Section, config_of
from hypdefect.types import SplitKind

logger = logging.getLogger(__name__)

StartFinder = Callable[[TaskPlan, Fitting, TransformConfig], MetaStart | None]
"""What a finished meta-training run gave to a task behind a transform; None: there is no such run."""

# Okabe and Ito's colours without the yellow; a further class repeats a colour with the next marker
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#444444")
MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">")
NODE = "D"  # a prototype, a midpoint
FLAT = 1e-6


def draw_features(album: Album, section: Section, data: TaskConfig, seed: int, find_start: StartFinder) -> None:
    """What HypDFS makes of the features of draw 0, or a note why it cannot be drawn; of a blend, what counts most.

    On meta-trained features where the evaluation used some and their run is still here, else on plain ones.

    Args:
        data: where the section's features are and which partition to draw; which task it is, the section says.
        seed: of the draws, as in the evaluation.
    """
    k, partition = max(section.shots), data.partition
    names = [display_name(OURS, features) for features in ("meta", "plain")]
    chosen = [config_of(section.main, name, k, partition) for name in names]
    configs = [from_mapping(RunConfig, json.loads(text)) for text in chosen if text is not None]
    members = {(config.blend or (config,))[0]: len(config.blend) for config in configs}
    configs = list(members)
    if not configs:
        album.notes.append(f"Pictures of the features: HypDFS was not run at K = {k} on partition {partition}.")
        return
    task = task_of(section, data)
    try:
        plan = prepare(few_shot, task)
        fitting, reported = few_shot.load(plan, home())
        config, start = _drawable(plan, fitting, configs, find_start)
        setting = Setting(k_shot=k, seed=seed, split=task.split)
        points = fitted_points(fitting, reported, config, setting, 0, start)
    except (ConfigError, DataError, ArtifactError) as error:
        logger.info("%s: features not drawn: %s", section.title, error)
        reason = f"not drawn, as the task's features were not found. Made by {how_to_extract(task)}"
        album.notes.append(f"Pictures of the features: {reason}")
        return
    where = f"{config.features.replace('meta', 'meta-trained')} features, partition {partition}, draw 0, K = {k}"
    where += f", the first of a blend of {members[config]}" if members[config] else ""
    _draw_points(album, points, families_of(plan), f"{where[0].upper()}{where[1:]}.")


def task_of(section: Section, data: TaskConfig) -> TaskConfig:
    """The task of a section: what `data` says of places, with the set, split and K of the ledger.

    The ledger names the split that was made. A set's official one is what a set that has one gives for `random`.
    """
    split = cast(SplitKind, section.split if section.split == "grouped" else "random")
    dataset = section.value("dataset")
    backbone = data.backbone if is_imported(dataset) else section.backbone
    k_shot, product = max(section.shots), section.value("product")
    return replace(data, dataset=dataset, product=product, split=split, backbone=backbone, k_shot=k_shot)


def how_to_extract(task: TaskConfig) -> str:
    """The command that fills the store for a task; imported features are read from their files again."""
    if is_imported(task.dataset):
        return f"python jobs/extract.py --import FILE... --name {task.dataset.partition(':')[2]}"
    product = f" --product {task.product}" if task.product else ""
    return f"python jobs/extract.py --dataset {task.dataset}{product} --split {task.split}"


def _drawable(
    plan: TaskPlan, fitting: Fitting, configs: Sequence[RunConfig], find_start: StartFinder
) -> tuple[RunConfig, MetaStart | None]:
    """The first configuration whose features can be made here, and what its meta-training gave.

    Raises:
        ConfigError: there is none.
    """
    for config in configs:
        if config.features == "plain":
            return config, None
        if start := find_start(plan, fitting, config.transform):
            return config, start
    raise ConfigError("the meta-training run of the evaluation is not here")


def families_of(plan: TaskPlan) -> list[str]:
    """The family of each class: the manifest's, else good and defective where there are both, else one for all."""
    rows = plan.manifest.select(["defect", "family", "is_defect"]).to_pylist()
    about = {row["defect"]: row for row in rows if row["defect"] in plan.classes}
    families = [about[name]["family"] or name for name in plan.classes]
    if len(set(families)) < len(plan.classes):
        return families
    return ["defective" if about[name]["is_defect"] else "good" for name in plan.classes]


def _draw_points(album: Album, points: FittedPoints, families: Sequence[str], where: str) -> None:
    caption = (
        "Each dot is an unseen image; stars are the supports. Distances between far groups mean nothing in a t-SNE. "
    )
    plot_tsne(album.add("tsne", "Features before and after the adapter", caption + where), points)
    caption = (
        "Prototypes, supports, synthetic points and unseen images, placed so that hyperbolic distances in the disk are "
        "as close as possible to those in the ball. The stress is the share of them that two dimensions cannot "
        "show. Left: a disk of the ball's own curvature; right: of the curvature that fits best. "
    )
    plot_disk(album.add("disk", "The Poincaré disk", caption + where), points)
    caption = (
        "Distance of midpoints from the origin, at each level of the label tree. A midpoint of scattered points lies "
        "nearer to the origin whatever they are: grey bars are 95 % of groups of the same size with shuffled members, "
        "and only a midpoint beyond its bar says that the group holds together. Images share a radius where the "
        "features have unit norm. "
    )
    plot_radius(album.add("radius", "Radius against depth in the label tree", caption + where), points, families)


def colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def marker(label: int) -> str:
    return MARKERS[label // len(COLOURS) % len(MARKERS)]


def _scatter(axes: Axes, xy: np.ndarray, labels: np.ndarray, **style: Any) -> None:
    for label in np.unique(labels):
        members = xy[labels == label]
        axes.scatter(members[:, 0], members[:, 1], **({"marker": marker(int(label)), "c": colour(int(label))} | style))


def _handles(classes: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], ls="", marker=marker(i), color=colour(i), label=short(name.replace("_", " "), 22))
        for i, name in enumerate(classes)
    ]


def plot_tsne(path: Path, points: FittedPoints, seed: int = 0) -> None:
    """t-SNE (van der Maaten and Hinton, JMLR 2008) of the features before and after the adapter, turned to agree.

    The silhouettes are of the features themselves, not of the picture.
    """
    labels, supports = points.labels.numpy(), points.num_supports
    first: np.ndarray | None = None
    with new_figure(path, 9.6, 5.0) as figure:
        for axes, (name, x) in zip(
            figure.subplots(1, 2), {"before": points.plain, "after": points.adapted}.items(), strict=True
        ):
            values = x.double().numpy()
            perplexity = min(30.0, (len(values) - 1) / 3)
            xy = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(values).astype(np.float64)
            xy -= xy.mean(0)
            if first is None:
                first = xy
            else:  # a picture may be turned and mirrored at will
                xy = xy @ orthogonal_procrustes(xy, first)[0]
            _scatter(axes, xy[supports:], labels[supports:], s=16, alpha=0.75, linewidths=0)
            _scatter(axes, xy[:supports], labels[:supports], s=70, marker="*", edgecolors="black", linewidths=0.8)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(True)
            axes.set_title(f"{name} the adapter (silhouette of the features {silhouette_score(values, labels):.3f})")
        star = Line2D([], [], ls="", marker="*", ms=10, color="white", mec="black", label="support image")
        handles = [*_handles(points.class_names), star]
        figure.legend(handles=handles, loc="outside lower center", ncols=_columns(len(handles)), frameon=False)


def plot_disk(path: Path, points: FittedPoints, most_queries: int = 80) -> list[DiskEmbedding]:
    """Prototypes, supports, synthetic points and some queries in the Poincare disk, by hyperbolic MDS of their
    distances in the ball; the ball's origin is the middle. One disk has the ball's curvature, one the best fitting.
    """
    supports, n_way = points.num_supports, len(points.prototypes)
    step = max(1, -(-(len(points.ball) - supports) // most_queries))
    groups = [points.prototypes, points.ball[:supports], points.synthetic, points.ball[supports::step]]
    labels = [torch.arange(n_way), points.labels[:supports], points.synthetic_labels, points.labels[supports::step]]
    x = torch.cat([points.prototypes[:1] * 0, *groups])
    distances = geometry.pairwise_dist(x, x, points.c).fill_diagonal_(0)
    distances = (distances + distances.T) / 2
    fits = [embed_in_disk(distances, points.c), embed_in_disk(distances)]
    styles: list[dict[str, Any]] = [
        {"s": 75, "marker": NODE, "edgecolors": "black", "linewidths": 1.3, "zorder": 5},
        {"s": 75, "marker": "*", "edgecolors": "black", "linewidths": 0.7, "zorder": 4},
        {"s": 20, "marker": "x", "linewidths": 1.0, "zorder": 3},
        {"s": 15, "alpha": 0.65, "linewidths": 0, "zorder": 2},
    ]
    with new_figure(path, 11.0, 7.1) as figure:
        for axes, fit, name in zip(
            figure.subplots(1, 2),
            fits,
            ("a disk of the ball's curvature", "a disk of the curvature that fits best"),
            strict=True,
        ):
            _disk(axes, fit)
            parts = _in_unit_disk(fit)[1:].split([len(group) for group in groups])
            for part, classes, style in zip(parts, labels, styles, strict=True):
                _scatter(axes, part.numpy(), classes.numpy(), **style)
            axes.set_title(
                f"{name}, c = {fit.c:.2g}\nstress {fit.stress:.2f}, rank correlation {fit.rank_correlation:.2f}"
            )
        kinds = {NODE: "prototype", "*": "support", "x": "synthetic", "o": "unseen image"}
        handles = _handles(points.class_names) + [
            Line2D([], [], ls="", marker=m, color="black" if m == "x" else "white", mec="black", label=name)
            for m, name in kinds.items()
        ]
        title = f"hyperbolic MDS of {len(x) - 1} points of the ball (c = {points.c:g}) round its origin (+)"
        title += f"; one unseen image in {step}" if step > 1 else ""
        columns = _columns(len(handles))
        figure.legend(handles=handles, title=title, loc="outside lower center", ncols=columns, frameon=False)
    return fits


def _in_unit_disk(fit: DiskEmbedding) -> Tensor:
    """The points as they are drawn: a disk without curvature has no wall, and is scaled to its furthest point."""
    return fit.unit_disk if fit.c > FLAT else fit.points * (0.9 / float(fit.points.norm(dim=1).max()))


def _disk(axes: Axes, fit: DiskEmbedding) -> None:
    """The wall, and circles at round distances from the middle."""
    axes.plot(0, 0, "+", color=DARK, ms=9)
    furthest = float(geometry.dist0(fit.points, fit.c).max())
    scale = 0.9 / float(fit.points.norm(dim=1).max())
    for distance in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, furthest):
        if 0 < distance <= furthest:
            radius = np.tanh(fit.c**0.5 * distance / 2) if fit.c > FLAT else scale * distance / 2
            axes.add_patch(Circle((0, 0), radius, fill=False, color="#dfe3e7", lw=0.9, zorder=0))
            axes.annotate(
                f"{distance:g}",
                (0, radius),
                color=GREY,
                fontsize=7,
                ha="center",
                va="center",
                bbox={"fc": "white", "ec": "none", "pad": 0.6},
                zorder=0,
            )
    if fit.c > FLAT:
        axes.add_patch(Circle((0, 0), 1, fill=False, color=GREY, lw=1.2))
    axes.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal")
    axes.axis("off")


def _columns(entries: int, most: int = 6) -> int:
    """Columns of a legend whose rows are filled evenly."""
    return -(-entries // -(-entries // most))


def plot_radius(path: Path, points: FittedPoints, families: Sequence[str], seed: int = 0) -> None:
    """Distance from the origin against depth in the label tree: all, family, class, image. `families`: one a class.

    Beside each midpoint is the range of midpoints of as many points with shuffled labels: any midpoint of scattered
    points lies nearer to the origin, and only what is beyond this range says something about the labels.
    """
    labels, c = points.labels, points.c
    names = tuple(dict.fromkeys(families))
    family_of = torch.tensor([names.index(family) for family in families])
    levels: list[tuple[str, Tensor, tuple[str, ...]]] = [("all images", torch.zeros_like(labels), ("all",))]
    if 1 < len(names) < len(families):
        levels.append(("families", family_of[labels], names))
    levels.append(("classes", labels, points.class_names))
    images = geometry.dist0(points.ball, c).numpy()
    generator, jitter = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    parents: dict[int, tuple[float, float]] = {}
    with new_figure(path, 9.6, 4.8) as figure:
        axes = figure.subplots()
        for depth, (_, groups, nodes) in enumerate(levels):
            heights = midpoint_radii(points.ball, groups, c).tolist()
            shuffled = torch.stack([midpoint_radii(points.ball, _shuffled(groups, generator), c) for _ in range(200)])
            low, high = shuffled.quantile(0.025, 0).tolist(), shuffled.quantile(0.975, 0).tolist()
            order = (
                torch.argsort(family_of, stable=True).argsort()
                if depth == len(levels) - 1
                else torch.arange(len(nodes))
            )
            xs = depth + _places(len(nodes))[order.numpy()]
            placed = {}
            for node, (x, y) in enumerate(zip(xs, heights, strict=True)):
                if depth:
                    axes.plot([x, x], [low[node], high[node]], color=LIGHT, lw=9, solid_capstyle="butt", zorder=1)
                member = int(torch.nonzero(groups == node)[0])
                if depth:
                    up = parents[int(levels[depth - 1][1][member])]
                    axes.plot([up[0], x], [up[1], y], color=GREY, lw=0.8, zorder=2)
                shade = colour(node) if depth == len(levels) - 1 else DARK
                axes.scatter(x, y, s=62, marker=NODE, c=shade, edgecolors="black", linewidths=0.9, zorder=4)
                if 0 < depth < len(levels) - 1:
                    text = short(nodes[node].replace("_", " "), 16)
                    axes.annotate(text, (x, y), (0, 9), textcoords="offset points", ha="center", fontsize=8, color=DARK)
                placed[node] = (float(x), float(y))
            parents = placed
        last, n_way = len(levels), len(points.class_names)
        for label in range(n_way):
            radii = images[labels.numpy() == label]
            middle = last + parents[label][0] - (last - 1)
            x = middle + jitter.uniform(-0.22, 0.22, len(radii)) / n_way
            axes.plot(
                [parents[label][0], middle], [parents[label][1], radii.mean()], color=colour(label), lw=0.8, zorder=1
            )
            axes.scatter(x, radii, s=9, c=colour(label), marker=marker(label), alpha=0.6, linewidths=0, zorder=3)
        ticks = [f"{name}\n(midpoint{'s' if depth else ''})" for depth, (name, *_) in enumerate(levels)]
        axes.set_xticks(range(last + 1), [*ticks, "images"])
        axes.set_xlim(-0.4, last + 0.45)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.set_ylabel(f"distance from the origin (c = {c:g})")
        null = Line2D([], [], color=LIGHT, lw=7, label="95 % with\nshuffled labels")
        figure.legend(handles=[*_handles(points.class_names), null], loc="outside right upper", frameon=False)


def _places(count: int) -> np.ndarray:
    return np.linspace(-0.32, 0.32, count) if count > 1 else np.zeros(1)


def _shuffled(groups: Tensor, generator: torch.Generator) -> Tensor:
    return groups[torch.randperm(len(groups), generator=generator)]
