"""A discriminator of patches, trained on pseudo-defects that are painted on normal images.

In the spirit of GLASS (Chen et al., ECCV 2024), whose global branch tells normal patch features from those of
synthesised anomalies, and of RealNet (Zhang et al., CVPR 2024). It learns what a defect looks like, where PatchCore
learns what a good part looks like.

| GLASS | here |
| --- | --- |
| features u of a frozen backbone | view "patch", standardised on the normal images |
| discriminator D: perceptron with sigmoid | `PatchDiscriminator.net`, on each patch and its neighbours |
| normal and synthesised patches, binary cross-entropy (eq. 10) | `step_loss` |
| online hard example mining | the share `hard` of the normal cells, those that look worst, counts again by half |

Deviations: no gradient ascent round normal features, and no adaptor before the discriminator: the pseudo-defects here
are images (`images.pseudo_defects`), of ten laws of shape. Cells that a region covers in part are not trained on.

Shapes: N images, h w rows and columns of the patch grid, D features of a patch, H W pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hypdefect.errors import ConfigError, DataError, NumericsError
from hypdefect.methods.anomaly_maps import pixel_maps, top_mean
from hypdefect.methods.normal_patches import standardisation
from hypdefect.methods.ranges import require_at_least, require_positive, require_share
from hypdefect.types import AnomalyMaps, Batch, Batches, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchDiscriminatorConfig:
    hidden: int = 64
    context: int = 3
    """Side of the square of patches that a verdict is based on: 1 is the patch alone."""
    dropout: float = 0.1
    epochs: int = 5
    """Times that every normal image is seen."""
    lr: float = 2e-3
    """AdamW, cosine schedule to 0."""
    hard: float = 0.01
    """Share of the normal cells of a step, those that look worst, whose loss counts again by half; 0: none."""
    top: int = 1
    """An image's score is the mean of its so many highest patches."""
    sigma: float = 4.0
    """Of the Gaussian that smooths the map, in pixels of the network input; 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "hidden", "context", "epochs", "lr", "top")
        if self.context % 2 == 0:
            raise ConfigError(f"method.context must be odd, got {self.context}")
        require_share(self, "dropout", "hard")
        require_at_least(self, 0, "sigma")


class PatchDiscriminator:
    """Anomaly of a patch: the softplus of a small network's logit, which was trained to find pseudo-defects."""

    needs: ClassVar[Needs] = "patches"

    def __init__(self, config: PatchDiscriminatorConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self.mean, self.scale = torch.zeros(dim), torch.ones(dim)
        self.trained = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.net = nn.Sequential(
                nn.Conv2d(dim, config.hidden, config.context, padding=config.context // 2, padding_mode="replicate"),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Conv2d(config.hidden, config.hidden, 1),
                nn.GELU(),
                nn.Conv2d(config.hidden, 1, 1),
            )

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Train on slices of normal images and of pseudo-defects side by side.

        Raises:
            DataError: no normal image, or no pseudo-defect. NumericsError: the loss left the finite numbers.
        """
        self.mean, self.scale, slices = standardisation(normals, self.dim)
        if pseudo is None or next(iter(pseudo), None) is None:
            raise DataError("a discriminator needs pseudo-defects on the normal images: raise --synthesis.per-class")
        steps = slices * self.config.epochs
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.config.lr)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.net.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # of dropout
            for step, (clean, painted) in enumerate(_pairs(normals, pseudo, self.config.epochs)):
                for group in optimizer.param_groups:
                    group["lr"] = self.config.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                loss = self.step_loss(clean, painted, generator)
                if not math.isfinite(float(loss.detach())):
                    raise NumericsError(f"the discriminator's loss at step {step} is not finite; lower method.lr")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        self.net.eval()
        self.trained = True

    def step_loss(self, clean: Batch, painted: Batch, generator: torch.Generator) -> Tensor:
        """Mean cross-entropy of normal cells and of defect cells, half each, and half of that of the hardest normal
        cells; both slices are mirrored at random."""
        assert painted.targets is not None
        _, rows, columns, _ = painted.views["patch"].shape
        covered = F.adaptive_avg_pool2d((painted.targets > 0)[:, None].float(), (rows, columns))[:, 0]
        turned = [axis for axis, chance in zip((1, 2), torch.rand(2, generator=generator), strict=True) if chance < 0.5]
        patches = torch.cat([clean.views["patch"], painted.views["patch"]]).flip(turned)
        cover = torch.cat([covered.new_zeros(len(clean), rows, columns), covered]).flip(turned)
        return balanced_loss(self.logits(patches), cover, self.config.hard)

    def logits(self, patches: Float[Tensor, "N h w D"]) -> Float[Tensor, "N h w"]:
        standardised = (patches - self.mean) / self.scale
        answer: Tensor = self.net(standardised.permute(0, 3, 1, 2))
        return answer[:, 0]

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        self._check("anomaly")
        scores = F.softplus(self.logits(batch.views["patch"]))  # rises with the logit, and is nowhere negative
        return AnomalyMaps(score=top_mean(scores, self.config.top), map=pixel_maps(scores, self.config.sigma))

    def _check(self, what: str) -> None:
        if not self.trained:
            raise RuntimeError(f"{what} needs fit, or restore, before")

    def export(self) -> dict[str, Tensor]:
        """Raises RuntimeError before `fit`."""
        self._check("export")
        weights = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        return weights | {"mean": self.mean, "scale": self.scale}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.mean, self.scale = tensors["mean"], tensors["scale"]
        self.net.load_state_dict(
            {name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")}
        )
        self.net.eval()
        self.trained = True


def balanced_loss(logits: Float[Tensor, "N h w"], cover: Float[Tensor, "N h w"], hard: float) -> Float[Tensor, ""]:
    """Half the mean cross-entropy of normal cells, half that of defect cells, half that of the hardest normal cells.

    A cell is of a defect where a region covers more than half of it, normal where none touches it, else left out.
    """
    clean, defect = logits[cover == 0], logits[cover > 0.5]
    losses = F.softplus(clean)
    total = losses.mean() / 2
    if len(defect):
        total = total + F.softplus(-defect).mean() / 2
    if hard:
        total = total + losses.topk(max(1, round(hard * len(losses)))).values.mean() / 2
    return total


def _pairs(normals: Batches, pseudo: Batches, epochs: int) -> Iterator[tuple[Batch, Batch]]:
    """Every slice of the normals, `epochs` times, each beside the next slice of the pseudo-defects."""
    painted = _again(pseudo)
    for _ in range(epochs):
        for clean in normals:
            yield clean, next(painted)


def _again(batches: Batches) -> Iterator[Batch]:
    while True:
        yield from batches


METHODS = {"patch_discriminator": Method(config=PatchDiscriminatorConfig, build=PatchDiscriminator, family="detection")}
