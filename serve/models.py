"""The deployment that holds a published model, of any family."""

import asyncio
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve

from hypdefect import config, files, registry
from hypdefect.errors import DataError, NumericsError
from hypdefect.features.backbones import compute_on_one_thread
from hypdefect.predictor import Predictor
from serve.schemas import ModelInfo, ServedModel

BATCH = 4


class Failure(Exception):
    """What is wrong with us rather than with an image: the traceback, for the log."""


class Model:
    """One loaded model, which computes on one thread. A health check waits its turn on it: it sees a stuck model."""

    def __init__(self, reference: str, home: str | None, version: int | None = None) -> None:
        name, _, which = reference.partition("@")
        entry = registry.resolve(Path(home) if home else files.home(), f"{name}@{version}" if version else reference)
        self.predictor = Predictor.load(entry)
        alias = which if which in entry.aliases else None
        self.model = ServedModel(name=entry.name, version=entry.version, alias=alias)
        digests = json.loads((entry.path / registry.CHECKSUMS).read_text())
        self.info = _info(self.predictor, self.model, digests)
        self.worker = ThreadPoolExecutor(1, "predict", initializer=compute_on_one_thread)
        self.worker.submit(self.predictor.probe).result()

    async def describe(self) -> ModelInfo:
        return self.info

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.002)
    async def predict(
        self, items: list[tuple[np.ndarray, np.ndarray | None]]
    ) -> list[tuple[Any | DataError | Failure, ServedModel]]:
        """Each item's answer, or why it is refused or failed: one bad item of a batch does not fail the others.

        An answer is the dataclass that the family's predictor gives.
        """
        loop = asyncio.get_running_loop()
        return [(answer, self.model) for answer in await loop.run_in_executor(self.worker, self._predict, items)]

    def _predict(self, items: list[tuple[np.ndarray, np.ndarray | None]]) -> list[Any | DataError | Failure]:
        answers: list[Any | DataError | Failure] = []
        for image, mask in items:
            try:  # arrays from Ray's object store are read-only, which torch warns of
                region = None if mask is None else np.require(mask, requirements="W")
                answers += self.predictor.predict([(self.predictor.rgb(np.require(image, requirements="W")), region)])
            except DataError as error:
                answers.append(error)
            except (NumericsError, MemoryError, RuntimeError, ValueError):  # torch has no memory, or is told nonsense
                answers.append(Failure(traceback.format_exc()))
        return answers

    async def check_health(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self.worker, self.predictor.probe)


def _info(predictor: Predictor, model: ServedModel, digests: dict[str, str]) -> ModelInfo:
    card = predictor.card
    return ModelInfo(
        model=model,
        family=card.family,
        class_names=list(card.class_names),
        method=card.run.name,
        config=config.to_mapping(card.run),
        backbone=card.backbone,
        recipe=config.to_mapping(card.recipe),
        uses_mask=card.uses_mask,
        digests=digests | ({"backbone": card.backbone_digest} if card.backbone_digest else {}),
        metrics=dict(card.provenance.get("metrics") or {}),
        provenance=card.provenance,
    )
