"""Training sharded over workers with Ray Train: DDP over the items of a step, gloo on CPU, nccl on GPU."""

import contextlib
import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import nn

from hypdefect.config import digest
from hypdefect.errors import ConfigError, HypdefectError
from hypdefect.files import home
from hypdefect.progress import lines
from hypdefect.training import TrainConfig, Training, ValidatedTraining, checkpoint_losses, fit, load_checkpoint

DDP_SETTINGS = {
    "gradient_as_bucket_view": True,  # no copy
    "forward_sync_buffers": False,  # no step reads what another one left in a buffer: `training.Training`
}


def _loop(settings: dict[str, Any]) -> None:
    """What each worker runs."""
    training: Training = ray.get(settings["training"][0])
    context = ray.train.get_context()
    torch.set_num_threads(max(1, settings["threads"]))
    device = get_device()
    model = training.model().to(device)

    def report(metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if write is not None:
                write(Path(folder))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if write else None)

    def run(resume: Path | None) -> None:
        fit(
            model,
            training.item,
            training.config,
            report,
            validation=training if isinstance(training, ValidatedTraining) else None,
            wrap=partial(prepare_model, parallel_strategy_kwargs=DDP_SETTINGS),
            rank=context.get_world_rank(),
            world_size=context.get_world_size(),
            resume=resume,
            device=device,
        )

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        run(None)
        return
    with checkpoint.as_directory() as folder:
        run(Path(folder))


def check_workers(config: TrainConfig, workers: int) -> None:
    """What `train` would refuse, before anything is started.

    Raises:
        ConfigError: no worker, more than the cluster has CPUs, or B is no multiple of them.
    """
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if workers > cpus:
        raise ConfigError(f"{workers} training workers need as many CPUs, the cluster has {cpus}; lower --workers")
    if config.items_per_step % workers:
        whole = [n for n in range(1, workers) if config.items_per_step % n == 0]
        raise ConfigError(
            f"items_per_step={config.items_per_step} is no multiple of {workers} workers, which share out the items of "
            f"a step; set --workers to {whole[-1]}, or items_per_step to {workers}"
        )


def run_folder(name: str, settings: dict[str, Any]) -> Path:
    """Where a run of these settings keeps what it leaves; {} in the name stands for their digest.

    Raises:
        ConfigError: a run of that name has other settings.
    """
    folder = home() / "runs" / name.replace("{}", digest(settings)[:12])
    job = folder / "job.json"
    if job.exists() and json.loads(job.read_text()) != settings:
        raise ConfigError(f"run {folder.name!r} exists with other settings; choose another --name")
    return folder


def train(
    training: Training, *, workers: int, name: str, folder: Path, max_failures: int = 2
) -> tuple[nn.Module, list[float]]:
    """Train a model; a run of a known name continues from its last checkpoint.

    Returns:
        The trained model, and the loss of every step since the run was first started, whatever interrupted it.

    Raises:
        ConfigError: more workers than the cluster has CPUs, or B is no multiple of them.
        DataError: too little for the first item.
        HypdefectError: workers failed more often than `max_failures`; what the last of them raised, where it was ours.
    """
    check_workers(training.config, workers)
    training.item(0)
    cpus, gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
    use_gpu = gpus >= workers
    trainer = TorchTrainer(
        _loop,
        train_loop_config={"training": [ray.put(training)], "threads": max(1, cpus // workers)},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": 1, "GPU": int(use_gpu)}
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        with told(folder / name, training.config.steps, f"training {name}"):
            checkpoint = trainer.fit().checkpoint
    except ray.train.TrainingFailedError as error:
        raise _reason(error, name) from error
    assert checkpoint is not None  # the last step is always reported
    model = training.model()
    with checkpoint.as_directory() as finished:
        load_checkpoint(Path(finished), model)
        return model, checkpoint_losses(Path(finished))


@contextmanager
def told(folder: Path, steps: int, what: str) -> Iterator[None]:
    """Say how far a run is, and how well it validated, by its checkpoints, as long as it goes on."""
    advance, over = lines(what), threading.Event()

    def watch() -> None:
        told = 0
        while not over.wait(2.0):
            with contextlib.suppress(OSError, json.JSONDecodeError):  # old checkpoints go, new ones are being written
                states = [json.loads(path.read_text()) for path in folder.glob("*/state.json")]
                last = max(states, key=lambda state: int(state["step"]), default=None)
                if last and last["step"] > told:
                    told, best = last["step"], last.get("best")
                    advance(told, steps, f", best validation {100 * best['value']:.2f} %" if best else "")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _reason(error: ray.train.TrainingFailedError, name: str) -> HypdefectError:
    """What one of the workers raised, if it was one of our errors, else the last line of Ray's report."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, HypdefectError):
            return cause
    last = str(next(iter(failures.values()), error)).strip().splitlines()[-1]
    return HypdefectError(f"training run {name!r} failed: {last}")
