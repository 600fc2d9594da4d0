"""Networks of timm: what the specs of `features.backbones` describe.

timm takes seconds to import: this module is imported where a network is made, and not before.
"""

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.features import torchvision_ops as torchvision_ops  # declares missing operators: before timm
from hypdefect.features.backbones import BackboneSpec, normalised, read_weights

import timm  # isort: skip
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding  # isort: skip

PROBE_SIDE = 224
CPU_BATCH = 2
"""Inputs of one pass of a mobile network on a CPU: their maps stay in the cache, and below the allocator's limits."""


def describe(name: str, family: str, architecture: str, weights: str) -> BackboneSpec:
    """The spec of a network of timm; its weights are not looked at.

    Raises:
        ConfigError: timm has no such architecture, publishes no weights of it, or it has no pyramid for PatchCore.
    """
    if not timm.is_model(architecture):
        near = timm.list_models(f"*{architecture.split('.')[0][:8]}*")[:3]
        raise ConfigError(f"backbone {name}: timm has no {architecture!r}{'; near: ' if near else ''}{', '.join(near)}")
    with torch.device("meta"):  # shapes only, nothing is computed
        net = _create(architecture).eval()
        last, stages = net.forward_intermediates(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE))
    cfg = net.pretrained_cfg
    if not weights:
        if not cfg.get("hf_hub_id"):
            raise ConfigError(f"backbone {name}: timm publishes no weights of {architecture}; add @FILE or @random")
        weights = f"hub:{cfg['hf_hub_id']}/model.safetensors"
    layers: tuple[int, ...]
    dims: tuple[int, ...]
    if family == "patchcore":
        layers, dims = (2, 3), (stages[3].shape[1],)  # timm counts the stem: stages 2 and 3 are layers 2 and 3
        if len({stage.shape[2] for stage in stages[:4]}) < 4:
            raise ConfigError(f"backbone {name}: PatchCore reads a pyramid, and {architecture} has one resolution")
    else:
        at_16 = [i for i, stage in enumerate(stages) if stage.shape[2] == PROBE_SIDE // 16]
        layers = (at_16[-1] if len(at_16) == 1 else len(stages) // 2,)
        head = last if hasattr(net, "conv_head") else stages[-1]
        dims = (stages[layers[0]].shape[1], head.shape[1])
    return BackboneSpec(
        name=name,
        family="patchcore" if family == "patchcore" else "timm",
        architecture=architecture,
        layers=layers,
        dims=dims,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        weights=weights,
        sha256="",
    )


def _create(architecture: str) -> Any:
    """A timm network without a classifier; a vision transformer takes any input side that its patches divide."""
    sized: dict[str, Any] = (
        {"dynamic_img_size": True} if architecture.split(".")[0].startswith(("vit_", "deit", "test_vit")) else {}
    )
    return timm.create_model(architecture, pretrained=False, num_classes=0, **sized)


@functools.cache
def patch_grid(spec: BackboneSpec, side: int) -> tuple[int, int]:
    """Rows and columns of the patch features of a `side` x `side` input."""
    with torch.device("meta"):
        maps = (
            _create(spec.architecture)
            .eval()
            .forward_intermediates(torch.zeros(1, 3, side, side), indices=list(spec.layers), intermediates_only=True)
        )
    return maps[0].shape[2], maps[0].shape[3]


class Backbone(nn.Module):
    """A frozen timm network that returns the maps of its `layers` and its head map, batch-norms folded."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.init_seed)
            self.net: Any = _create(spec.architecture)
        if spec.weights != "random":
            state = read_weights(spec)
            if spec.in_order:
                load_in_order(self.net, state)
            else:
                load_by_name(self.net, state, spec)
        fold_batch_norms(self.net.eval())
        pad_by_slicing(self.net)
        self.requires_grad_(False).eval()
        self.net = self.net.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def forward(
        self, pixels: Float[Tensor, "N 3 H W"], region: Float[Tensor, "N H2 W2"] | None = None
    ) -> list[Float[Tensor, "N _ _ _"]]:
        """Feature maps of RGB pixels in [0, 1]; `region` is for backbones that see it (AlphaCLIP), not for these."""
        mobile = hasattr(self.net, "conv_head")  # much memory moved for little arithmetic
        size = CPU_BATCH if mobile and pixels.device.type == "cpu" else len(pixels)
        parts = [self.maps_of(part) for part in pixels.split(size)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def maps_of(self, pixels: Float[Tensor, "N 3 H W"]) -> list[Float[Tensor, "N _ _ _"]]:
        """Feature maps of one pass through the network."""
        x = normalised(pixels, self.spec).contiguous(memory_format=torch.channels_last)
        layers = list(self.spec.layers)
        if self.spec.family == "patchcore":
            maps: list[Tensor] = self.net.forward_intermediates(x, indices=layers, intermediates_only=True)
            return maps
        if hasattr(self.net, "conv_head"):
            head, maps = self.net.forward_intermediates(x, indices=layers)
            return [*maps, head]
        depth = len(self.net.feature_info)
        return list(self.net.forward_intermediates(x, indices=[*layers, depth - 1], norm=True, intermediates_only=True))


def load_by_name(net: nn.Module, state: dict[str, Tensor], spec: BackboneSpec) -> None:
    """Copy a state dict onto a network of the same tensor names; its classifier is left out.

    Raises:
        ArtifactError: a tensor is missing, left over or of another shape.
    """
    heads = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    kept = {k: v for k, v in state.items() if not k.startswith(tuple(f"{head}." for head in heads))}
    own = net.state_dict()
    missing, extra = sorted(own.keys() - kept.keys()), sorted(kept.keys() - own.keys())
    misshapen = [k for k in sorted(own.keys() & kept.keys()) if own[k].shape != kept[k].shape]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or extra or misshapen:
        wrong = (("missing", missing), ("unknown", extra), ("of another shape", misshapen))
        told = "; ".join(f"{len(names)} {word}, e.g. {names[0]}" for word, names in wrong if names)
        raise ArtifactError(f"backbone {spec.name}: its weights are not those of {spec.architecture}: {told}")
    net.load_state_dict(kept, strict=False)


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


class SlicedSame(nn.Module):
    """A convolution with TensorFlow's SAME padding that makes no padded copy of its input on a CPU; equal bit for bit.

    PyTorch pads both ends alike, SAME the far end by one more where the total is odd. The convolution then pads one
    stride more at both ends, and its first output is dropped. The copy would be the largest tensor of the network.
    """

    def __init__(self, conv: Conv2dSame) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N _ _ _"]:
        conv = self.conv
        if x.device.type != "cpu":
            padded: Tensor = conv(x)
            return padded
        sizes = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        totals = [get_same_padding(*size) for size in sizes]
        odd = [total % 2 for total in totals]
        padding = [total // 2 + extra * stride for total, extra, stride in zip(totals, odd, conv.stride, strict=True)]
        y = F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)
        return y[:, :, odd[0] :, odd[1] :].contiguous(memory_format=torch.channels_last)


def pad_by_slicing(net: nn.Module) -> None:
    """Replace each convolution that copies its input in order to pad it."""
    for parent in list(net.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, Conv2dSame):
                setattr(parent, name, SlicedSame(conv))
