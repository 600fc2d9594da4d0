"""Runs of training and what they give to a task: written once, read by whatever starts from one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from hypdefect.config import from_mapping, to_mapping
from hypdefect.evaluation import RunConfig
from hypdefect.families import amc_training, episodic
from hypdefect.families.few_shot import MetaStart
from hypdefect.files import write_json
from hypdefect.training import readable
from hypdefect.types import VIEWS

Config = episodic.MetaConfig | amc_training.PretrainConfig
CONFIGS: dict[str, type[Config]] = {
    episodic.METHOD: episodic.MetaConfig,
    amc_training.METHOD: amc_training.PretrainConfig,
}
"""How each few-shot method that is trained before a task is trained."""
_PROJECTION = "core.projection."


def write_run(folder: Path, model: Any, config: Config, record: dict[str, Any]) -> None:
    """The run directory that `load_start` reads: config.json, checkpoint/core.safetensors and, last, record.json.

    Args:
        model: gives `trained()`.
    """
    (method,) = (name for name, cls in CONFIGS.items() if type(config) is cls)
    (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
    save_file(model.trained(), folder / "checkpoint" / "core.safetensors")
    write_json(folder / "config.json", to_mapping(config) | {"trained": method})
    write_json(folder / "record.json", record)


def load_start(folder: Path) -> tuple[MetaStart, Config]:
    """What a run directory gives to a task, and how it was trained: its `transform` and `train.method` fit the weights.

    Raises:
        ArtifactError: no finished run lies there.
    """
    with readable(folder):
        mapping = json.loads((folder / "config.json").read_text())
        if "episodes_per_step" in mapping["train"]:  # as runs called it once
            mapping["train"]["items_per_step"] = mapping["train"].pop("episodes_per_step")
        method = mapping.pop("trained", episodic.METHOD)
        config = from_mapping(CONFIGS[method], mapping, str(folder))
        return meta_start(method, load_file(folder / "checkpoint" / "core.safetensors")), config


def starting_point(method: str, init: Path | None) -> tuple[MetaStart | None, RunConfig]:
    """What a run directory gives, if one is named, and the configuration that trials of a method start from."""
    if init is None:
        return None, RunConfig(name=method)
    start, config = load_start(init)
    run = RunConfig(
        name=method,
        method=to_mapping(config.train.method) if start.core and method == start.method else None,
        transform=config.transform,
        features="meta" if start.projection else "plain",
    )
    return start, run


def meta_start(method: str, tensors: Mapping[str, Tensor]) -> MetaStart:
    """What `trained` gave, taken apart: the projection belongs to the features, the rest to the method."""
    core = {name: value for name, value in tensors.items() if not name.startswith(_PROJECTION)}
    if len(core) == len(tensors):
        return MetaStart(method=method, projection={}, core=core)
    weight, mean = (dict(zip(VIEWS, tensors[f"{_PROJECTION}{name}"], strict=True)) for name in ("weight", "mean"))
    return MetaStart(method=method, projection=weight, mean=mean, core=core)
