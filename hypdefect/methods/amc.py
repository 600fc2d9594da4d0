"""AMC: few-shot classification of anomalies by PatchCore's residuals, arXiv 2406.05645.

| paper | here |
| --- | --- |
| residual of each patch to its nearest normal one (eq. 2) | view "patch", by `methods.residuals` |
| vanilla baseline: relation network, weighted BCE (eq. 1), algorithm 2 | `head="relation"` |
| contrastive classifier: shared encoder, InfoNCE (eq. 3), algorithm 1 | `head="contrastive"` |
| direct classification: a new last layer | `head="direct"` |
| passes of fine-tuning by shot, none of one shot | `passes_of` |
| pretraining on pseudo classes (section 4.1.3) | `AMC.loss`, trained by `families.amc_training` |
| MAML (appendix G): a step on some pseudo classes, the loss on others | `AMC.loss` of `Tasks` with `inner` |
| normal images as one more class (appendix F) | `good_class` of a task |

Deviations: residual maps are averaged to `grid` x `grid` cells before the first layer (the paper keeps 28 x 28, 100 352
numbers, into one linear layer), and divided by the root mean square of the supports. A query's support sets are one
step, where algorithm 1 takes one each. Batch normalisation has no running statistics during pretraining: they are taken
afterwards, of some episodes (`settle`), so that they do not depend on the number of workers.

Shapes: N rows, Q queries, W ways, S shots, D features of a patch, g cells a side, E numbers of an embedding.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hypdefect.errors import ConfigError, DataError
from hypdefect.methods.fitting import full_batch
from hypdefect.methods.ranges import require_at_least, require_positive
from hypdefect.methods.support import by_image, check_every_class
from hypdefect.types import Batch, Episode, LossTerms, Method, Needs

SLICE = 64
"""Queries scored at a time."""
DIRECT_STEPS, DIRECT_LR, DIRECT_DECAY = 200, 1e-2, 1e-2
"""Of the direct head; the paper says nothing of its training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AMCConfig:
    head: Literal["contrastive", "relation", "direct"] = "contrastive"
    grid: int = 8
    """Cells a side that a residual map is averaged to."""
    hidden: int = 256
    """Channels of the first layer; the relation network has twice as many."""
    width: int = 128
    """Channels of the second layer, and numbers of an embedding."""
    temperature: float = 0.07
    """T of InfoNCE, and of the probabilities."""
    passes: int | None = None
    """Times that the supports are gone through; None: the paper's number for the shots and the head."""
    copies: bool = False
    """Whether augmented copies are further queries to learn from; the paper has none, and each costs its time."""
    lr: float = 1e-4
    """Of the contrastive and the relation head."""
    inner_lr: float = 0.01
    """Of MAML's inner step, in pretraining alone."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "grid", "hidden", "width", "temperature", "lr", "inner_lr")
        if self.passes is not None:
            require_at_least(self, 0, "passes")


def passes_of(config: AMCConfig, shots: int) -> int:
    """How often the supports are gone through (section 4.1.3)."""
    if shots < 2:
        return 0  # no other image of the class to compare with
    if config.passes is not None:
        return config.passes
    if config.head == "relation" or shots == 2:
        return 45
    return 25 if shots == 3 else 15


def encoder(dim: int, config: AMCConfig) -> nn.Sequential:
    """1 x 1 convolutions, then one linear layer over all cells; embeddings are scaled to unit norm where they are
    compared."""
    return nn.Sequential(
        *_layers(dim, config.hidden, config.width),
        nn.Flatten(),
        nn.Linear(config.width * config.grid**2, config.width),
        nn.ReLU(),
    )


def relation_network(dim: int, config: AMCConfig) -> nn.Sequential:
    """The score, before the sigmoid, of a support's map on top of a query's."""
    return nn.Sequential(
        *_layers(2 * dim, 2 * config.hidden, config.width),
        nn.Flatten(),
        nn.Linear(config.width * config.grid**2, config.width),
        nn.ReLU(),
        nn.Linear(config.width, 1),
    )


def _layers(dim: int, hidden: int, width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in ((dim, hidden), (hidden, width)):
        layers += [nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return layers


@dataclass(frozen=True, slots=True)
class Tasks:
    """An item of pretraining: an episode of pseudo classes; with MAML another one that the inner step is taken on."""

    outer: Episode
    inner: Episode | None = None

    def to(self, device: torch.device | str) -> "Tasks":
        return Tasks(self.outer.to(device), None if self.inner is None else self.inner.to(device))


@dataclass(frozen=True, slots=True)
class Supports:
    """Rows sorted by image; `image` numbers the images, `clean` are the unaugmented rows of each class `[W S]`."""

    maps: Float[Tensor, "N D g g"]
    labels: Int[Tensor, "N"]
    image: Int[Tensor, "N"]
    clean: Int[Tensor, "W S"]


class AMC(nn.Module):
    """Scores of a query with every support, averaged over those of a class."""

    needs: ClassVar[Needs] = "patches"
    compared: Tensor
    """The supports' maps `[W S D g g]`, which queries are compared with; of the direct head its layer `[D+1 W]`."""
    scale: Tensor

    def __init__(self, config: AMCConfig, dim: int) -> None:
        super().__init__()
        self.config, self.dim = config, dim
        self.net: nn.Module = nn.Identity()
        self.initial: dict[str, Tensor] = {}
        self.fitted = False

    def _start(self) -> None:
        """Fresh weights of the seed, or those that were given."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            build = {"contrastive": encoder, "relation": relation_network}.get(self.config.head)
            self.net = nn.Identity() if build is None else build(self.dim, self.config)
        if self.initial:
            self.net.load_state_dict(self.initial)

    # -- pretraining -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """What pretraining starts from.

        Raises:
            ConfigError: the direct head, of which nothing is pretrained.
        """
        if self.config.head == "direct":
            raise ConfigError("the direct head has no network to pretrain: set method.head contrastive or relation")
        self._start()
        for layer in self._normalising():
            layer.momentum = 0.0
        self.train()

    def _normalising(self) -> list[nn.BatchNorm2d]:
        return [layer for layer in self.net.modules() if isinstance(layer, nn.BatchNorm2d)]

    def loss(self, item: Tasks, generator: torch.Generator) -> LossTerms:
        """Of the queries of an episode; with an inner episode of the weights after one step of gradient on that one,
        and differentiated through it (MAML). The part "accuracy" is that of the queries."""
        if item.inner is None:
            return self._episode(item.outer, self.net)
        weights = dict(self.net.named_parameters())
        inner = self._episode(item.inner, self.net).total
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        moved = {
            name: weight - self.config.inner_lr * slope
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        return self._episode(item.outer, partial(torch.func.functional_call, self.net, moved))

    def _episode(self, episode: Episode, net: Callable[[Tensor], Tensor]) -> LossTerms:
        """As `_contrast` and `_relate`, of all queries at once and with supports that are none of them."""
        ways = len(episode.class_names)
        own, queries, labels = self.maps(episode.support), self.maps(episode.query), episode.query.labels
        scale = own.square().mean().sqrt().clamp_min(1e-12)
        own, queries = own[episode.support.labels.argsort(stable=True)] / scale, queries / scale
        if self.config.head == "contrastive":
            z = F.normalize(net(torch.cat([own, queries])), dim=1)
            scores = (z[len(own) :] @ z[: len(own)].T).view(len(queries), ways, -1) / self.config.temperature
            loss = torch.stack([F.cross_entropy(of_shot, labels) for of_shot in scores.unbind(2)]).mean()
            scores = scores.mean(2)
        else:
            first = own[:: len(own) // ways]
            pairs = torch.cat([first.repeat(len(queries), 1, 1, 1), queries.repeat_interleave(ways, 0)], 1)
            scores = net(pairs).view(len(queries), ways)
            truth = F.one_hot(labels, ways).to(scores)
            loss = F.binary_cross_entropy_with_logits(scores, truth, weight=1 + (ways - 2) * truth)
        right = float((scores.detach().argmax(1) == labels).double().mean())
        return LossTerms(loss, {"accuracy": right})

    @torch.no_grad()
    def settle(self, items: Iterable[Tasks]) -> None:
        """Take the statistics of batch normalisation, those of one episode as much as another's."""
        for layer in self._normalising():
            layer.reset_running_stats()
            layer.momentum = None
        self.net.train()
        for item in items:
            self._episode(item.outer, self.net)
        self.net.eval()

    def trained(self) -> dict[str, Tensor]:
        """What pretraining gives to `start_from`."""
        return {f"net.{name}": value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()}

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin every task at pretrained weights.

        Raises:
            ConfigError: they are those of another configuration.
        """
        if self.config.head == "direct":  # it has no network, whatever was pretrained
            return
        self.initial = {name.removeprefix("net."): value for name, value in weights.items()}
        try:
            self._start()
        except RuntimeError as error:
            raise ConfigError(f"pretrained weights do not fit this configuration of AMC: {error}") from error

    # -- a task ------------------------------------------------------------------------------------------------------

    def adapt(self, support: Batch, n_way: int) -> None:
        """Learn from the supports; a query is compared with unaugmented rows alone.

        Raises:
            DataError: a class without an unaugmented row.
        """
        check_every_class(support, n_way)
        self._start()
        rows = by_image(support)
        if not self.config.copies:
            rows = rows.select((rows.aug_index == 0).nonzero().flatten())
            check_every_class(rows, n_way)
        maps = self.maps(rows)
        self.scale = maps.square().mean().sqrt().clamp_min(1e-12)
        maps = maps / self.scale
        names = {name: number for number, name in enumerate(dict.fromkeys(rows.image_ids))}
        image = torch.tensor([names[name] for name in rows.image_ids])
        of_class = [((rows.aug_index == 0) & (rows.labels == way)).nonzero().flatten() for way in range(n_way)]
        shots = min(len(own) for own in of_class)
        if not shots:
            raise DataError(f"rows without augmentation per class are {list(map(len, of_class))}; every one needs 1")
        supports = Supports(maps, rows.labels, image, torch.stack([own[:shots] for own in of_class]))
        if self.config.head == "direct":
            self._linear(supports, n_way)
        else:
            self._train(supports)
            self.compared = maps[supports.clean]
        self.fitted = True

    def maps(self, batch: Batch) -> Float[Tensor, "N D g g"]:
        """Residual maps, averaged to the grid."""
        patches = batch.views["patch"].permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(patches, self.config.grid).contiguous()

    def _train(self, supports: Supports) -> None:
        passes = passes_of(self.config, supports.clean.shape[1])
        optimizer = torch.optim.Adam(self.net.parameters(), lr=self.config.lr, fused=True)
        self.net.train()
        step = self._contrast if self.config.head == "contrastive" else self._relate
        for _ in range(passes):
            for number in range(len(supports.maps)):
                loss = step(supports, number)
                if loss is None:
                    continue
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        self.net.eval()

    def _contrast(self, supports: Supports, number: int) -> Tensor:
        """InfoNCE of a row with the jth image of each class, its own image left out (algorithm 1); mean over j."""
        ways, shots = supports.clean.shape
        others = [
            torch.stack([at for at in own if supports.image[at] != supports.image[number]])[: shots - 1]
            for own in supports.clean
        ]
        chosen = torch.stack(others, 1).flatten()  # j outside, class inside
        z = F.normalize(self.net(torch.cat([supports.maps[number : number + 1], supports.maps[chosen]])), dim=1)
        scores = (z[1:] @ z[0]).view(shots - 1, ways) / self.config.temperature
        return F.cross_entropy(scores, supports.labels[number].expand(shots - 1))

    def _relate(self, supports: Supports, number: int) -> Tensor | None:
        """Weighted BCE (eq. 1) of a row with the first image of each class, none of these itself (algorithm 2)."""
        first = supports.clean[:, 0]
        if (supports.image[first] == supports.image[number]).any():
            return None
        ways = len(first)
        query = supports.maps[number].expand(ways, -1, -1, -1)
        scores = self.net(torch.cat([supports.maps[first], query], 1)).flatten()
        truth = F.one_hot(supports.labels[number], ways).to(scores)
        return F.binary_cross_entropy_with_logits(scores, truth, weight=1 + (ways - 2) * truth)

    def _linear(self, supports: Supports, n_way: int) -> None:
        """Logistic regression on the mean over all cells."""
        x = supports.maps.mean((2, 3)).double()
        weight = torch.zeros(self.dim, n_way, dtype=torch.float64)
        bias = torch.zeros(n_way, dtype=torch.float64)
        full_batch(
            [weight, bias],
            lambda: F.cross_entropy(x @ weight + bias, supports.labels),
            steps=DIRECT_STEPS,
            lr=DIRECT_LR,
            weight_decay=DIRECT_DECAY,
        )
        self.compared = torch.cat([weight, bias[None]])

    @torch.no_grad()
    def logits(self, query: Batch) -> Float[Tensor, "Q W"]:
        """Raises RuntimeError before `adapt`."""
        self._check("logits")
        maps = self.maps(query) / self.scale
        return torch.cat([self._scores(part) for part in maps.split(SLICE)]).double()

    def _scores(self, maps: Float[Tensor, "Q D g g"]) -> Float[Tensor, "Q W"]:
        if self.config.head == "direct":
            return maps.mean((2, 3)).double() @ self.compared[:-1] + self.compared[-1]
        ways, shots = self.compared.shape[:2]
        flat = self.compared.flatten(0, 1)
        if self.config.head == "contrastive":
            z, own = (F.normalize(self.net(x), dim=1) for x in (maps, flat))
            return (z @ own.T).view(len(maps), ways, shots).mean(2) / self.config.temperature
        scores = [self.net(torch.cat([flat, one.expand(len(flat), -1, -1, -1)], 1)).sigmoid().flatten() for one in maps]
        return torch.stack(scores).view(len(maps), ways, shots).mean(2) / self.config.temperature

    @torch.no_grad()
    def embedded(self, batch: Batch) -> Float[Tensor, "N E"]:
        """What the encoder makes of residual maps, of unit norm. Raises RuntimeError without an encoder."""
        if self.config.head != "contrastive" or isinstance(self.net, nn.Identity):
            raise RuntimeError("AMC.embedded needs an encoder: head contrastive, after start_from() or adapt()")
        maps = self.maps(batch)
        self.net.eval()
        return F.normalize(self.net(maps / maps.square().mean().sqrt().clamp_min(1e-12)), dim=1)

    def _check(self, what: str) -> None:
        if not self.fitted:
            raise RuntimeError(f"AMC.{what} needs adapt() first")

    def export(self) -> dict[str, Tensor]:
        """The network, the supports' maps (direct: the linear layer) and their scale."""
        self._check("export")
        weights = {f"net.{name}": value.clone() for name, value in self.net.state_dict().items()}
        return weights | {"compared": self.compared.clone(), "scale": self.scale.clone().view(1)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._start()
        self.net.load_state_dict({n.removeprefix("net."): v for n, v in tensors.items() if n.startswith("net.")})
        self.net.eval()
        self.compared, self.scale = tensors["compared"].clone(), tensors["scale"].clone()[0]
        self.fitted = True


METHODS = {"amc": Method(config=AMCConfig, build=AMC, family="few_shot_patches")}
