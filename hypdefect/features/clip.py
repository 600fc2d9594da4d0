"""OpenCLIP and AlphaCLIP image towers, and text features of prompts.

AlphaCLIP (Sun et al., CVPR 2024) adds a convolution of the mask to the patch embedding of a CLIP vision transformer:
`x = conv1(image) + conv1_alpha(alpha)`, everything after it as in CLIP. Its official checkpoints hold the whole image
tower, named as in OpenAI's CLIP but for the attention's input projection (`attn.in_proj.weight` where CLIP and OpenCLIP
say `attn.in_proj_weight`). The mask enters as (m - 0.5) / 0.26, m in [0, 1].

Shapes: N images, S input side, D embedding, P prompts.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hypdefect.errors import ArtifactError, ConfigError
from hypdefect.features import torchvision_ops as torchvision_ops  # declares missing operators: before open_clip
from hypdefect.features.backbones import BackboneSpec, normalised, read_weights

import open_clip  # isort: skip
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # isort: skip

ALPHA_MEAN, ALPHA_STD = 0.5, 0.26


def describe(name: str, family: str, architecture: str, weights: str) -> BackboneSpec:
    """The spec of an OpenCLIP or AlphaCLIP name (see `features.backbones`), its weight file not yet hashed.

    `architecture` is a name that OpenCLIP knows or a JSON file in its configuration format. AlphaCLIP was trained from
    OpenAI's weights, whose activation OpenCLIP calls quickgelu: `alphaclip:ViT-L-14` means `ViT-L-14-quickgelu`.

    Raises:
        ConfigError: unknown architecture or tag.
    """
    if family == "alphaclip" and f"{architecture}-quickgelu" in open_clip.list_models():
        architecture = f"{architecture}-quickgelu"
    config = _config(name, architecture)
    mean, std = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none published"
        raise ConfigError(f"backbone {name}: name its weights: {name}@TAG or @FILE; tags: {tags}")
    if weights != "random" and not Path(weights).expanduser().is_file():
        cfg = open_clip.get_pretrained_cfg(architecture, weights)
        if family == "alphaclip" or not cfg:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture))
            known = f"; tags of {architecture}: {tags}" if tags and family == "openclip" else ""
            raise ConfigError(f"backbone {name}: {weights!r} is no file{known}")
        if not cfg.get("hf_hub"):
            raise ConfigError(f"backbone {name}: tag {weights!r} is no hub file; fetch {cfg.get('url')} and name it")
        repository, _, file = cfg["hf_hub"].rpartition("/")
        weights = f"hub:{repository}/{file or HF_SAFE_WEIGHTS_NAME}"
        mean, std = cfg.get("mean") or mean, cfg.get("std") or std
    return BackboneSpec(
        name=name,
        family="alphaclip" if family == "alphaclip" else "openclip",
        architecture=Path(architecture).name,
        dims=(int(config["embed_dim"]),),
        mean=tuple(mean),
        std=tuple(std),
        weights=weights,
        sha256="",
        details=json.dumps(config, sort_keys=True, separators=(",", ":")),
    )


def _config(name: str, architecture: str) -> dict[str, Any]:
    path = Path(architecture).expanduser()
    if path.suffix == ".json":
        try:
            config = json.loads(path.read_text())
            return {key: config[key] for key in ("embed_dim", "vision_cfg", "text_cfg")} | {
                "quick_gelu": bool(config.get("quick_gelu", False))
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"backbone {name}: {path} is no OpenCLIP model configuration: {error!r}") from error
    found = open_clip.get_model_config(architecture)
    if found is None:
        raise ConfigError(f"backbone {name}: OpenCLIP has no {architecture!r}; see open_clip.list_models()")
    return dict(found)


def _towers(spec: BackboneSpec) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.init_seed)
        if spec.architecture in open_clip.list_models():
            logging.disable(logging.WARNING)  # it warns of random weights, which are replaced right afterwards
            try:
                return open_clip.create_model(spec.architecture, pretrained=None, load_weights=False)
            finally:
                logging.disable(logging.NOTSET)
        return open_clip.CLIP(**json.loads(spec.details))


def _load(spec: BackboneSpec) -> Any:
    model = _towers(spec)
    if spec.weights != "random":
        state = read_weights(spec)
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"backbone {spec.name}: its weights are not those of {spec.architecture}: {reason}"
            ) from error
    return model.eval()


class ImageTower(nn.Module):
    """The frozen image tower of an OpenCLIP or AlphaCLIP model: one projected embedding an image."""

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.spec = spec
        self.visual: Any = _alpha_visual(spec) if spec.family == "alphaclip" else _load(spec).visual
        size = self.visual.image_size
        self.side = int(size[0] if isinstance(size, tuple | list) else size)
        self.requires_grad_(False).eval()

    @torch.inference_mode()
    def forward(
        self, pixels: Float[Tensor, "N 3 S S"], region: Float[Tensor, "N H2 W2"] | None = None
    ) -> list[Float[Tensor, "N D"]]:
        """Embeddings of RGB pixels in [0, 1]; AlphaCLIP sees the region, in [0, 1] and of any size, None is everything.

        Raises:
            ConfigError: another input side than the model's.
        """
        if pixels.shape[2:] != (self.side, self.side):
            raise ConfigError(
                f"backbone {self.spec.name} reads {self.side} x {self.side} pixels, not {pixels.shape[3]} x "
                f"{pixels.shape[2]}: set --recipe.whole-size {self.side} --recipe.crop-size {self.side}"
            )
        x = normalised(pixels, self.spec)
        if self.spec.family == "alphaclip":
            alpha = torch.ones_like(pixels[:, :1])
            if region is not None:
                alpha = F.interpolate(
                    region[:, None], size=pixels.shape[2:], mode="bilinear", antialias=True, align_corners=False
                )
            x = torch.cat([x, (alpha - ALPHA_MEAN) / ALPHA_STD], 1)
        return [self.visual(x)]


def _alpha_visual(spec: BackboneSpec) -> Any:
    visual = _towers(spec).visual
    if not hasattr(visual, "conv1") or not hasattr(visual, "positional_embedding"):
        raise ConfigError(f"backbone {spec.name}: AlphaCLIP is read onto vision transformers, not {spec.architecture}")
    visual.conv1 = AlphaEmbedding(visual.conv1)
    if spec.weights != "random":
        load_alpha(visual, read_weights(spec), spec)
    return visual


class AlphaEmbedding(nn.Module):
    """Patch embedding of image and mask: `conv1(image) + conv1_alpha(alpha)`, the second zero to begin with."""

    def __init__(self, conv1: nn.Conv2d) -> None:
        super().__init__()
        self.conv1 = conv1
        size: Any = conv1.kernel_size
        self.conv1_alpha = nn.Conv2d(1, conv1.out_channels, size, stride=size, bias=False)
        nn.init.zeros_(self.conv1_alpha.weight)

    def forward(self, x: Float[Tensor, "N 4 S S"]) -> Float[Tensor, "N _ _ _"]:
        out: Tensor = self.conv1(x[:, :3]) + self.conv1_alpha(x[:, 3:])
        return out


def load_alpha(visual: nn.Module, state: dict[str, Tensor], spec: BackboneSpec) -> None:
    """Load an official AlphaCLIP checkpoint (image tower alone, or a whole model with `visual.` names).

    Raises:
        ArtifactError: a tensor is missing, left over or of another shape, or there is no alpha convolution in it.
    """
    if any(key.startswith("visual.") for key in state):
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    if "conv1_alpha.weight" not in state:
        raise ArtifactError(
            f"backbone {spec.name}: no conv1_alpha.weight in it; a plain CLIP is openclip:..., not alphaclip"
        )
    renamed = {
        key.replace("attn.in_proj.", "attn.in_proj_")
        .replace("conv1.weight", "conv1.conv1.weight")
        .replace("conv1_alpha.weight", "conv1.conv1_alpha.weight"): value.float()
        for key, value in state.items()
    }
    try:
        visual.load_state_dict(renamed, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"backbone {spec.name}: no AlphaCLIP checkpoint of {spec.architecture}: {reason}"
        ) from error


@torch.inference_mode()
def text_features(spec: BackboneSpec, prompts: list[str]) -> Float[Tensor, "P D"]:
    """The text tower's embedding of each prompt, not normalised.

    Raises:
        ConfigError: the backbone has no text tower.
    """
    if spec.family != "openclip":
        raise ConfigError(f"backbone {spec.name} has no text tower; text features come from openclip:MODEL@WEIGHTS")
    model = _load(spec)
    if spec.architecture in open_clip.list_models():
        tokenizer = open_clip.get_tokenizer(spec.architecture)
    else:
        tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    out: Tensor = model.encode_text(tokenizer(prompts))
    return out.float()
