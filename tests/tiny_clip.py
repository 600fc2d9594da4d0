"""A CLIP small enough for tests: its OpenCLIP configuration, and checkpoints with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypdefect.features import torchvision_ops as torchvision_ops

import open_clip  # isort: skip

SIDE, HEAD_WIDTH = 32, 16
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 32, "patch_size": 8, "head_width": HEAD_WIDTH},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def clip_model(seed: int = 0) -> open_clip.CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return open_clip.CLIP(**CONFIG).eval()


def write_config(folder: Path) -> Path:
    path = folder / "tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


def alpha_state(seed: int = 0, alpha_scale: float = 0.02) -> dict[str, Tensor]:
    """An image tower with AlphaCLIP's tensor names, its alpha convolution random of the given scale."""
    visual = clip_model(seed).visual
    state = {key.replace("attn.in_proj_", "attn.in_proj."): value for key, value in visual.state_dict().items()}
    size = (CONFIG["vision_cfg"]["width"], 1, 8, 8)
    generator = torch.Generator().manual_seed(seed + 1)
    return state | {"conv1_alpha.weight": alpha_scale * torch.randn(size, generator=generator)}


def write_alpha(folder: Path, seed: int = 0, alpha_scale: float = 0.02) -> str:
    """The backbone name of a checkpoint written as AlphaCLIP's authors publish theirs."""
    path = folder / "clip_tiny_grit.pth"
    torch.save(alpha_state(seed, alpha_scale), path)
    return f"alphaclip:{write_config(folder)}@{path}"
