"""Text features of prompts, stored like others: what a CLIP's text tower says of a class.

Shapes: P prompts, W ways (classes), T numbers of an embedding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, from_numpy

from hypdefect.errors import ConfigError
from hypdefect.features.backbones import BackboneSpec
from hypdefect.features.spec import TEXT_VIEWS, FeatureKey, prompt_key
from hypdefect.features.store import FeatureStore

TEMPLATE = "a photo of a part with a {} defect"


def has_text_tower(spec: BackboneSpec) -> bool:
    """Whether prompts can be embedded into the space of a backbone's image features."""
    return spec.family == "openclip"


def text_store(spec: BackboneSpec, home: Path) -> FeatureStore:
    """The store of a backbone's text features."""
    key = FeatureKey(
        backbone=spec.name, backbone_digest=spec.digest, block_dims=spec.dims, recipe=None, views=TEXT_VIEWS
    )
    return FeatureStore(home, key)


def embed_prompts(spec: BackboneSpec, prompts: Sequence[str], home: Path) -> int:
    """Store the text features of prompts, those that are not there yet; how many these were.

    Raises:
        ConfigError: the backbone has no text tower.
    """
    store = text_store(spec, home)
    store.create()
    keys = {prompt_key(prompt): prompt for prompt in prompts}
    missing = store.missing(keys)
    if missing:
        from hypdefect.features import clip  # open_clip takes seconds to import

        features = clip.text_features(spec, [keys[key] for key in missing])
        store.write(missing, {"text": features.numpy()})
    return len(missing)


def load_prompts(spec: BackboneSpec, prompts: Sequence[str], home: Path) -> Float[Tensor, "P T"]:
    """The stored text features of prompts, in their order.

    Raises:
        ArtifactError: some are not stored.
    """
    keys = [prompt_key(prompt) for prompt in prompts]
    table = text_store(spec, home).load(list(dict.fromkeys(keys)))
    position = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return from_numpy(table.views["text"][[position[key] for key in keys]].copy())


def prompts_of(classes: Sequence[str], template: str, given: Mapping[str, str]) -> list[str]:
    """The prompt of each class: the given one, or the template with the class's name in place of `{}`.

    Raises:
        ConfigError: a prompt for a class that is not there, or a template without `{}`.
    """
    if odd := sorted(given.keys() - set(classes)):
        raise ConfigError(f"prompts for {', '.join(map(repr, odd))}; the classes are {', '.join(classes)}")
    if "{}" not in template:
        raise ConfigError(f"prompt_template {template!r} has no {{}} where the name of a class belongs")
    return [given.get(name) or template.replace("{}", name.replace("_", " ")) for name in classes]
