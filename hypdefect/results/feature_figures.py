"""Pictures of a fitted HypDFS on a task's features: t-SNE round the adapter, the Poincare disk, the label tree.

Shapes: R supports, S synthetic points, Q queries, W ways, N images (R + Q), D features of one view, E = 2 D.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from scipy.linalg import orthogonal_procrustes
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor

from hypdefect import geometry
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting
from hypdefect.methods.centred import CentredClassifier, centred, row_means
from hypdefect.methods.hypdfs import HypDFS, in_frame
from hypdefect.results.embedding import DiskEmbedding, embed_in_disk, midpoint_radii
from hypdefect.results.figures import DARK, GREY, GRID, LIGHT, drawn, short

# Okabe and Ito's colours without the yellow; a further class repeats a colour with the next marker
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#444444")
MARKERS = ("o", "s", "^", "v", "P", "X", "<", ">")
NODE = "D"  # a prototype, a midpoint
FLAT = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedPoints:
    """What a fit on one draw made of supports (unaugmented, R), synthetic points (S) and queries (Q).

    `plain` and `adapted` are tangents `[R + Q, E]` before and after the adapter; `ball` the points of the adapted ones,
    `synthetic` `[S, E]` and `prototypes` `[W, E]` points of the same ball of curvature -c.
    """

    plain: Tensor
    adapted: Tensor
    ball: Tensor
    labels: Tensor
    num_supports: int
    synthetic: Tensor
    synthetic_labels: Tensor
    prototypes: Tensor
    c: float
    class_names: tuple[str, ...]
    accuracy: float


@torch.no_grad()
def fitted_points(
    fitting: Fitting,
    reported: Reported,
    config: RunConfig,
    setting: Setting,
    number: int,
    start: MetaStart | None = None,
) -> FittedPoints:
    """Fit HypDFS on draw `number`, as the evaluation does, and keep its points.

    Args:
        start: what a meta-training run gave to the evaluation.

    Raises:
        ConfigError: another method, or a configuration on meta-trained features without their projection.
    """
    if config.name != "hypdfs":
        raise ConfigError(f"the points are those of HypDFS, not of {config.name!r}")
    if config.features == "meta" and (start is None or not start.projection):
        raise ConfigError("the configuration is for meta-trained features, and no projection is given")
    transform = few_shot.transform_of(config, fitting, start)
    fitting, queries = few_shot.transformed(fitting, transform), few_shot.transformed(reported, transform).queries
    pool = fitting.pool
    support = pool.batch(few_shot.supports_of(fitting, setting, number), copies=config.support_copies)
    asked = queries.batch(np.arange(len(queries)))
    with torch.enable_grad():
        model: Any = few_shot.fit(config, fitting, setting, number, start)
    if isinstance(model, CentredClassifier):
        means = row_means(support)
        model, support, asked = model.inner, centred(support, means), centred(asked, means)
    assert isinstance(model, HypDFS)
    core = model.fitted
    assert core is not None
    tangents, clean = model.tangents(support, core), support.aug_index == 0
    c = float(model.c(core))
    evolved = model.evolve(core, model.moments(core, tangents, support.labels, pool.n_way))
    made, _ = model.synthesize(core, evolved, torch.Generator().manual_seed(config.method.seed))
    made = geometry.logmap0(made, c).flatten(0, 1).unflatten(1, (2, -1))
    adapted, _ = model.points(core, tangents[clean], model.tangents(asked, core), made)
    centres = geometry.logmap0(model.centers_WE, model.scoring_c(core)).unflatten(1, (2, -1))
    plain = torch.cat([model.tangents(support)[clean], model.tangents(asked)])
    if core.frame is not None:
        outside = plain - _spanned(in_frame(plain, core.frame), core.frame)
        adapted, centres = _spanned(adapted, core.frame), _spanned(centres, core.frame)
        adapted[: len(plain)] += outside
    ball, synthetic = model.to_ball(core, adapted).split([len(plain), len(made)])
    per_class = len(made) // pool.n_way
    return FittedPoints(
        plain=plain.flatten(1),
        adapted=adapted[: len(plain)].flatten(1),
        ball=ball.double(),
        labels=torch.cat([support.labels[clean], asked.labels]),
        num_supports=int(clean.sum()),
        synthetic=synthetic.double(),
        synthetic_labels=torch.arange(pool.n_way).repeat_interleave(per_class),
        prototypes=model.to_ball(core, centres).double(),
        c=float(model.scoring_c(core)),
        class_names=pool.class_names,
        accuracy=float((model.logits(asked).argmax(1) == asked.labels).double().mean()),
    )


def _spanned(x: Float[Tensor, "N V r1"], frame: Float[Tensor, "V D r"]) -> Float[Tensor, "N V D"]:
    """Rows from their coordinates in a frame, but for what lies outside of it, which the adapter hardly changes."""
    return torch.einsum("nvr,vdr->nvd", x[..., :-1], frame)


def colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def marker(label: int) -> str:
    return MARKERS[label // len(COLOURS) % len(MARKERS)]


def _scatter(axes: Axes, xy: np.ndarray, labels: np.ndarray, **style: Any) -> None:
    for label in np.unique(labels):
        own = xy[labels == label]
        axes.scatter(own[:, 0], own[:, 1], **({"marker": marker(int(label)), "c": colour(int(label))} | style))


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
    with drawn(path, 9.6, 5.0) as figure:
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
    with drawn(path, 11.0, 7.1) as figure:
        for axes, fit, name in zip(
            figure.subplots(1, 2),
            fits,
            ("a disk of the ball's curvature", "a disk of the curvature that fits best"),
            strict=True,
        ):
            _disk(axes, fit)
            parts = _in_unit_disk(fit)[1:].split([len(group) for group in groups])
            for part, own, style in zip(parts, labels, styles, strict=True):
                _scatter(axes, part.numpy(), own.numpy(), **style)
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
    with drawn(path, 9.6, 4.8) as figure:
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
            own = images[labels.numpy() == label]
            middle = last + parents[label][0] - (last - 1)
            x = middle + jitter.uniform(-0.22, 0.22, len(own)) / n_way
            axes.plot(
                [parents[label][0], middle], [parents[label][1], own.mean()], color=colour(label), lw=0.8, zorder=1
            )
            axes.scatter(x, own, s=9, c=colour(label), marker=marker(label), alpha=0.6, linewidths=0, zorder=3)
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
