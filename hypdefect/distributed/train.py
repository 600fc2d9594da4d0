"""Meta-training sharded over workers with Ray Train: DDP over episodes, gloo on CPU, nccl on GPU."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model

from hypdefect.config import from_mapping, to_mapping
from hypdefect.episodes import LabelledFeatures
from hypdefect.errors import ConfigError
from hypdefect.evaluation import dimension
from hypdefect.methods.hypdfs import HypDFS
from hypdefect.training import TrainConfig, load_checkpoint, meta_train


def _loop(settings: dict[str, Any]) -> list[float]:
    """What each worker runs."""
    config = from_mapping(TrainConfig, settings["config"])
    pool: LabelledFeatures = ray.get(settings["pool"][0])
    context = ray.train.get_context()
    torch.set_num_threads(max(1, settings["threads"]))
    device = get_device()
    model = HypDFS(config.method, dimension(pool))
    wrapped = prepare_model(model)

    def report(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if write is not None:
                write(Path(folder))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if write else None)

    def run(resume: Path | None) -> list[float]:
        return meta_train(
            model,
            pool,
            config,
            report,
            wrapped=wrapped,
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            resume=resume,
            device=device,
        )

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return run(None)
    with checkpoint.as_directory() as folder:
        return run(Path(folder))


def train(
    pool: LabelledFeatures,
    config: TrainConfig,
    *,
    workers: int,
    name: str,
    folder: Path,
    max_failures: int = 2,
) -> tuple[HypDFS, list[float]]:
    """Meta-train on the pool's classes; a run of a known name continues from its last checkpoint.

    Returns:
        The trained model, and the losses of the steps run by this call (rank 0's share of each).

    Raises:
        ConfigError: more workers than the cluster has CPUs or GPUs for, or B is no multiple of them.
        ray.train.TrainingFailedError: a worker failed more often than `max_failures`.
    """
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    use_gpu = gpus >= workers
    if workers > cpus:
        raise ConfigError(f"{workers} training workers need as many CPUs, the cluster has {cpus}; lower --workers")
    if config.episodes_per_step % workers:
        raise ConfigError(f"train.episodes_per_step={config.episodes_per_step} is no multiple of {workers} workers")
    result = TorchTrainer(
        _loop,
        train_loop_config={
            "config": to_mapping(config),
            "pool": [ray.put(pool)],
            "threads": max(1, cpus // workers),
        },
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, "GPU": int(use_gpu)}
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()
    model = HypDFS(config.method, dimension(pool))
    optimizer = torch.optim.AdamW(model.core.parameters())
    with result.checkpoint.as_directory() as checkpoint:
        load_checkpoint(Path(checkpoint), model, optimizer)
    return model, list(result.return_value or [])
