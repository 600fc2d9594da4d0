"""Fill a feature store with Ray Data: a pool of actors, each with the backbone loaded once, each image decoded once.

Inside an actor a thread reads, decodes and resizes the next image while the network sees the present one.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext

from hypdefect.distributed.cluster import num_workers
from hypdefect.distributed.synthesize import made_or_stored
from hypdefect.errors import DataError
from hypdefect.families.plan import Plan, image_requests, unmasked_requests
from hypdefect.features.backbones import BackboneSpec, compute_on_one_thread
from hypdefect.features.extract import FULL_REGION, Prepared, extractor_for
from hypdefect.features.prompts import embed_prompts
from hypdefect.features.spec import FeatureKey, ImageRequest, RowKey
from hypdefect.features.store import FeatureStore
from hypdefect.files import home
from hypdefect.images import exif_orientation, read_image, read_mask, read_unchanged
from hypdefect.images.intensity import Intensity
from hypdefect.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """Images found in the store, extracted now, and refused with the reason."""

    cached: int
    extracted: int
    failed: tuple[tuple[str, str], ...]


class Extractor:
    """Ray Data actor: features of a batch of images, committed to the store as one part."""

    def __init__(self, home: str, key: FeatureKey, spec: BackboneSpec) -> None:
        compute_on_one_thread()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert key.recipe is not None  # imported features are never extracted
        self.extractor = extractor_for(spec, key.recipe, device)
        self.store = FeatureStore(Path(home), key)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        fields = ("uri", "image_id", "file_id", "mask_uri", "mask_id", "copies", "intensity")
        requests = [
            ImageRequest(**dict(zip(fields, row, strict=True)))
            for row in zip(*(batch[name].tolist() for name in fields), strict=True)
        ]
        keys: list[RowKey] = []
        rows: dict[str, list[np.ndarray]] = {view: [] for view in self.extractor.views}
        errors = []
        for request, prepared in zip(requests, self.prepared(requests), strict=True):
            if isinstance(prepared, DataError):
                errors.append(str(prepared))
                continue
            errors.append("")
            keys.extend(request.row_keys())
            for view, features in self.extractor.forward(prepared).items():
                rows[view].append(features.numpy())
        if keys:
            self.store.write(keys, {view: np.concatenate(values) for view, values in rows.items()})
        return {"uri": [r.uri for r in requests], "error": errors}

    def prepared(self, requests: Sequence[ImageRequest]) -> Iterator[Prepared | DataError]:
        """Network inputs of each image, or why it has none; the next image is made ready while one is used."""
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.prepare, requests[0])
            for following in [*requests[1:], None]:
                ready = coming.result()
                if following is not None:
                    coming = thread.submit(self.prepare, following)
                yield ready

    def prepare(self, request: ImageRequest) -> Prepared | DataError:
        try:
            image, mask = self.read(request)
        except DataError as error:
            return error
        return self.extractor.prepare(image, mask, request.image_id, request.copies)

    def read(self, request: ImageRequest) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and mask, their bytes checked against the manifest's hashes."""
        data = read_unchanged(Path(request.uri), request.file_id)
        intensity = Intensity.from_json(request.intensity) if request.intensity else None
        image = read_image(data, name=request.uri, intensity=intensity)
        mask = None
        if request.mask_id == FULL_REGION:
            mask = np.ones(image.shape[:2], dtype=bool)
        elif request.mask_uri:
            mask_data = read_unchanged(Path(request.mask_uri), request.mask_id)
            turned = exif_orientation(data, name=request.uri)
            mask, _ = read_mask(mask_data, image.shape[:2], name=request.mask_uri, orientation=turned)
        return image, mask


def extract(
    requests: Sequence[ImageRequest],
    home: Path,
    key: FeatureKey,
    spec: BackboneSpec,
    *,
    workers: int,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> ExtractReport:
    """Extract what the store lacks. A killed run leaves whole parts behind, and the next one continues from them.

    Args:
        workers: actors, one CPU each (and a share of a GPU where there is one).
        batch_size: images a part: what a kill can cost an actor.
        progress: called with (images done, images to do).

    Raises:
        ArtifactError: the store is damaged or cannot be written.
    """
    store = FeatureStore(home, key)
    store.create()
    there = store.rows()
    pending = [r for r in requests if not there.issuperset(r.row_keys())]
    if not pending:
        return ExtractReport(len(requests), 0, ())
    workers = max(1, min(workers, -(-len(pending) // batch_size)))
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the job shows progress of its own
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    gpus = ray.cluster_resources().get("GPU", 0)
    dataset = ray.data.from_items(
        [asdict(r) for r in pending], override_num_blocks=-(-len(pending) // batch_size)
    ).map_batches(
        Extractor,
        fn_constructor_args=(str(home), key, spec),
        batch_size=batch_size,
        compute=ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=min(1.0, gpus / workers) if gpus else 0,
    )
    failed: list[tuple[str, str]] = []
    done = 0
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        done += len(batch["uri"])
        failed += [(str(u), str(e)) for u, e in zip(batch["uri"], batch["error"], strict=True) if e]
        if progress is not None:
            progress(done, len(pending))
    return ExtractReport(len(requests) - len(pending), len(pending) - len(failed), tuple(failed))


def fill(plan: Plan, *others: Plan, workers: int = 0, everything: bool = False) -> ExtractReport:
    """Extract what the store lacks of a task.

    Args:
        others: the same task at other partitions.
        everything: every image of the set, not only those of the task.

    Raises:
        DataError: some images could not be extracted; all others are stored.
    """
    wanted = {r.image_id: r for r in plan.requests()}
    for request in (r for other in others for r in other.requests()):
        if request.copies > wanted.setdefault(request.image_id, request).copies:
            wanted[request.image_id] = request
    requests = list(wanted.values())
    if plan.imported:
        return ExtractReport(len(requests), 0, ())
    if plan.prompts and (embedded := embed_prompts(plan.spec, plan.prompts, home())):
        logger.info("text features: %d prompts embedded", embedded)
    if everything:
        copies = dict.fromkeys(plan.manifest["image_id"].to_pylist(), 0)
        copies |= {r.image_id: r.copies for r in requests}
        requests = image_requests(plan.manifest, copies, plan.uses_mask)
    if (painted := plan.pseudo()) is not None:
        made = made_or_stored(*painted, plan.label)
        what = "features of pseudo-defects"
        extract_all(unmasked_requests(made.manifest), plan, f"{what} of {plan.label}", what, workers)
    return extract_all(requests, plan, f"features of {plan.config.dataset}", "features", workers)


def extract_all(requests: Sequence[ImageRequest], plan: Plan, label: str, what: str, workers: int = 0) -> ExtractReport:
    """`extract` with the backbone and recipe of a plan, a progress bar and a line that says what was there.

    Raises:
        DataError: some images could not be extracted; all others are stored.
    """
    with progress(label) as advance:
        report = extract(requests, home(), plan.key, plan.spec, workers=num_workers(workers), progress=advance)
    logger.info("%s: %d images cached, %d extracted", what, report.cached, report.extracted)
    if report.failed:
        raise DataError(f"{len(report.failed)} {what} could not be extracted; first: {report.failed[0][1]}")
    return report
