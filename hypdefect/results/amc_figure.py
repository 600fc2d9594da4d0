"""Pictures of AMC on a task's support pool: residual maps, and t-SNE before and after its encoder."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from hypdefect.families.few_shot import Fitting
from hypdefect.images import read_image
from hypdefect.methods.amc import AMC, AMCConfig
from hypdefect.results.feature_figures import colour, marker

EACH = 3
"""Images of a class whose residuals are shown."""


def plot_amc(folder: Path, residuals: Fitting, config: AMCConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write residuals.png and, of an encoder, tsne.png.

    Args:
        residuals: a task's support pool behind the transform. weights: what pretraining gave.
    """
    pool = residuals.pool
    batch = pool.batch(np.arange(len(pool)))
    plot_residuals(folder / "residuals.png", residuals)
    if config.head != "contrastive":
        return
    fresh, pretrained = AMC(config, pool.dim), AMC(config, pool.dim)
    fresh.start_from({})
    pretrained.start_from(weights)
    panels = {
        "residual maps": fresh.maps(batch).flatten(1).numpy(),
        "encoder, not trained": fresh.embedded(batch).numpy(),
        "encoder, pretrained": pretrained.embedded(batch).numpy(),
    }
    plot_embeddings(folder / "tsne.png", panels, pool.labels, pool.class_names)


def plot_embeddings(
    path: Path, panels: Mapping[str, Float[np.ndarray, "N _"]], labels: np.ndarray, classes: tuple[str, ...]
) -> None:
    """A t-SNE of each panel's rows, with the class of each."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4 * len(panels), 4.4), layout="constrained")
        for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            perplexity = min(30.0, (len(rows) - 1) / 3)
            xy = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)
            for label, name in enumerate(classes):
                own = labels == label
                style = {"color": colour(label), "marker": marker(label), "s": 18, "label": name}
                axes.scatter(xy[own, 0], xy[own, 1], **style)
            axes.set(title=title, xticks=[], yticks=[])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(classes)))
        figure.savefig(path, dpi=110)


def plot_residuals(path: Path, residuals: Fitting) -> None:
    """Images of each class above the length of each of their residuals, all on one scale."""
    pool = residuals.pool
    shown = [np.flatnonzero(pool.labels == label)[:EACH] for label in range(pool.n_way)]
    lengths = [pool.batch(places).views["patch"].norm(dim=-1).numpy() for places in shown]
    least, most = np.quantile(np.concatenate([x.ravel() for x in lengths]), (0.02, 0.995)).tolist()
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(2.0 * EACH * 2, 1.7 * pool.n_way), layout="constrained")
        rows = figure.subplots(pool.n_way, 2 * EACH, squeeze=False)
        for label, (axes_of_class, places) in enumerate(zip(rows, shown, strict=True)):
            for axes in axes_of_class:
                axes.set_axis_off()
            for number, place in enumerate(places):
                picture, heat = axes_of_class[2 * number : 2 * number + 2]
                picture.imshow(_image(residuals, str(pool.image_ids[place])))
                heat.imshow(lengths[label][number], cmap="magma", vmin=least, vmax=most)
            axes_of_class[0].set_title(pool.class_names[label], loc="left")
        figure.suptitle("support images, and the length of the residual of each patch")
        figure.savefig(path, dpi=110)


def _image(residuals: Fitting, image_id: str) -> UInt8[np.ndarray, "H W 3"]:
    return read_image(Path(residuals.uri_of[image_id]))
