"""What a fit of HypDFS on one draw makes of supports, synthetic points and queries.

Shapes: R supports, S synthetic points, Q queries, W ways, N images (R + Q), D features of one view, E = 2 D.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hypdefect import geometry
from hypdefect.errors import ConfigError
from hypdefect.evaluation import RunConfig
from hypdefect.families import few_shot
from hypdefect.families.few_shot import Fitting, MetaStart, Reported, Setting
from hypdefect.methods.centred import CentredClassifier, centred, row_means
from hypdefect.methods.hypdfs import HypDFS, Noise, in_frame
from hypdefect.methods.support import by_image


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
    support = pool.batch(few_shot.supports_of(fitting, setting, number), copies=config.copies(setting.k_shot))
    asked = queries.batch(np.arange(len(queries)))
    with torch.enable_grad():
        model: Any = few_shot.fit(replace(config, temperature=1.0), fitting, setting, number, start)
    if isinstance(model, CentredClassifier):
        means = row_means(support)
        model, support, asked = model.inner, centred(support, means), centred(asked, means)
    assert isinstance(model, HypDFS)
    core = model.fitted
    assert core is not None
    support = by_image(support)  # as the fit read it: the same noise
    tangents, clean = model.tangents(support, core), support.aug_index == 0
    c = float(model.c(core))
    moments = model.moments(core, tangents, support.labels, pool.n_way)
    evolved = model.evolve(core, moments)
    noise = Noise.draw(moments, config.method.n_syn, torch.Generator().manual_seed(config.method.seed))
    made, _ = model.synthesize(core, moments, evolved, noise)
    made = geometry.logmap0(made, c).flatten(0, 1).unflatten(1, (2, -1))
    adapted = model.adapted(core, torch.cat([tangents[clean], model.tangents(asked, core), made]))
    middles = model.classes.get("centers")
    if middles is None:
        still = tangents.new_zeros(pool.n_way, tangents[0].numel())
        middles = model.centers(core, tangents, support.labels, evolved, still)
    centres = geometry.logmap0(middles, model.scoring_c(core)).unflatten(1, (2, -1))
    rows = torch.cat([model.projected(support)[clean], model.projected(asked)]).double()
    plain = model.scaled(rows, core.origin, core.length)
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


def _spanned(x: Float[Tensor, "N V r1"], frame: Float[Tensor, "D r"]) -> Float[Tensor, "N V D"]:
    """Rows from their coordinates in a frame, but for what lies outside of it, which the adapter hardly changes."""
    return x[..., :-1] @ frame.T
