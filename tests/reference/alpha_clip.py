"""AlphaCLIP's image tower as its authors define it, written out tensor by tensor from a checkpoint's own names."""

import torch
import torch.nn.functional as F
from torch import Tensor


def image_features(state: dict[str, Tensor], pixels: Tensor, alpha: Tensor, head_width: int) -> Tensor:
    """`[N, D]` from normalised pixels `[N, 3, S, S]` and a normalised alpha map `[N, 1, S, S]`."""
    patch = state["conv1.weight"].shape[-1]
    x = F.conv2d(pixels, state["conv1.weight"], stride=patch) + F.conv2d(
        alpha, state["conv1_alpha.weight"], stride=patch
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(len(x), 1, -1), x], 1) + state["positional_embedding"]
    width = x.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = norm(x, "ln_pre")
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("transformer.resblocks."))
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.in_proj").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (-1, head_width)).transpose(1, 2) for y in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / head_width**0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")
    return norm(x[:, 0], "ln_post") @ state["proj"]
