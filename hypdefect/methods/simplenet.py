"""SimpleNet: Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR 2023.

| paper | here |
| --- | --- |
| locally aware features o (section 3.1) | view "patch", standardised on the normal images |
| feature adaptor G, one fully connected layer (section 3.2) | `SimpleNet.adaptor` |
| anomalous features q- = q + e, e ~ N(0, sigma^2) (eq. 5) | `SimpleNet.loss`, sigma is `noise` |
| discriminator D, two layers (section 3.4) | `SimpleNet.discriminator` |
| truncated L1 loss with th+ = -th- = 0.5 (eq. 6) | `SimpleNet.loss` |
| score -D(q), of an image the maximum (eq. 8, 9) | `SimpleNet.anomaly` |

Deviations: features are standardised, so that sigma is in deviations of a feature (the paper's 0.015 belongs to
WideResNet-50's scale). A step sees the patches of a slice of images, not of four.

Shapes: N images, h w rows and columns of the patch grid, D features of a patch, M patches.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hypdefect.errors import NumericsError
from hypdefect.methods.anomaly_maps import pixel_maps, top_mean
from hypdefect.methods.normal_patches import standardisation
from hypdefect.methods.ranges import require_at_least, require_positive
from hypdefect.types import AnomalyMaps, Batch, Batches, Method, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class SimpleNetConfig:
    noise: float = 0.5
    """sigma, in standard deviations of a feature."""
    hidden: int = 128
    """Width of the discriminator."""
    margin: float = 0.5
    """th: normal patches are pushed above it, noisy ones below minus it."""
    epochs: int = 8
    """Times that every normal image is seen."""
    lr: float = 1e-3
    """Adam, of the discriminator; the adaptor learns at half of it, as in the paper."""
    weight_decay: float = 1e-5
    top: int = 1
    """An image's score is the mean of its so many highest patches; 1, the maximum, is the paper's."""
    sigma: float = 4.0
    """Of the Gaussian that smooths the map, in pixels of the network input; 0: none."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "noise", "hidden", "margin", "epochs", "lr", "top")
        require_at_least(self, 0, "weight_decay", "sigma")


class SimpleNet:
    """Anomaly of a patch: minus the answer of a discriminator that learned to tell normal patches from noisy ones."""

    needs: ClassVar[Needs] = "patches"

    def __init__(self, config: SimpleNetConfig, dim: int) -> None:
        self.config, self.dim = config, dim
        self.mean, self.scale = torch.zeros(dim), torch.ones(dim)
        self.trained = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.adaptor = nn.Linear(dim, dim)
            self.discriminator = nn.Sequential(
                nn.Linear(dim, config.hidden),
                nn.BatchNorm1d(config.hidden),
                nn.LeakyReLU(0.2),
                nn.Linear(config.hidden, 1, bias=False),
            )
        self.net = nn.ModuleDict({"adaptor": self.adaptor, "discriminator": self.discriminator})

    def fit(self, normals: Batches, pseudo: Batches | None = None) -> None:
        """Train adaptor and discriminator. Pseudo-defects play no part.

        Raises:
            DataError: no normal image. NumericsError: the loss left the finite numbers.
        """
        self.mean, self.scale, _ = standardisation(normals, self.dim)
        lr = self.config.lr
        parameters = (
            {"params": self.discriminator.parameters(), "lr": lr},
            {"params": self.adaptor.parameters(), "lr": lr / 2},
        )
        optimizer = torch.optim.Adam(parameters, weight_decay=self.config.weight_decay)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.net.train()
        for epoch in range(self.config.epochs):
            for batch in normals:
                loss = self.loss(self.standardised(batch), generator)
                if not math.isfinite(float(loss.detach())):
                    raise NumericsError(f"SimpleNet's loss in epoch {epoch} is not finite; lower method.lr")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        self.net.eval()
        self.trained = True

    def standardised(self, batch: Batch) -> Float[Tensor, "M D"]:
        return (batch.views["patch"].flatten(0, 2) - self.mean) / self.scale

    def loss(self, rows: Float[Tensor, "M D"], generator: torch.Generator) -> Float[Tensor, ""]:
        """Mean of max(0, th - D(q)) over the patches and of max(0, th + D(q + e)) over their noisy copies."""
        adapted = self.adaptor(rows)
        noisy = adapted + self.config.noise * torch.randn(adapted.shape, generator=generator)
        answers = self.discriminator(torch.cat([adapted, noisy]))[:, 0]
        clean, anomalous = answers.split(len(rows))
        return F.relu(self.config.margin - clean).mean() + F.relu(self.config.margin + anomalous).mean()

    @torch.no_grad()
    def anomaly(self, batch: Batch) -> AnomalyMaps:
        """Raises RuntimeError before `fit`."""
        self._check("anomaly")
        answers = self.discriminator(self.adaptor(self.standardised(batch)))
        scores = -answers.view(batch.views["patch"].shape[:3])
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


METHODS = {"simplenet": Method(config=SimpleNetConfig, build=SimpleNet, family="detection")}
