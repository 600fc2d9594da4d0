"""What must be fast of detectors: the choice of a bank, the search in it, a training step, and anomalib's PatchCore."""

import json
import logging
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hypdefect.distributed.benchmarks import BenchmarkConfig, Timing, interleaved, wall_seconds
from hypdefect.errors import HypdefectError, NumericsError
from hypdefect.features.backbones import get_backbone, read_weights
from hypdefect.features.extract import PatchExtractor, RecipeConfig, extractor_for
from hypdefect.features.timm_networks import load_in_order
from hypdefect.files import data_root
from hypdefect.images import read_image
from hypdefect.images.pseudo_defects import SynthesisConfig, draw_laws, load_textures, pseudo_defect
from hypdefect.methods.hypad import HypAD, HypADConfig
from hypdefect.methods.memory_bank import Neighbours, coreset_bytes, greedy_coreset
from hypdefect.methods.patchcore import PatchCore, PatchCoreConfig
from hypdefect.types import Batch

logger = logging.getLogger(__name__)
ROWS, DIM, SHARE = 15_680, 1024, 0.1
SLOW_PICKS = 40
"""Picks of the plain form that are timed; each takes as long as the next."""
ANOMALIB = Path(__file__).resolve().parents[2] / "docs" / "anomalib_patchcore.py"


def detectors(config: BenchmarkConfig) -> list[Timing]:
    """The pieces on random patches, and anomalib's PatchCore where an environment with anomalib is named."""
    timings = [*coresets(), *searches(config), *steps(config)]
    if config.anomalib is None:
        logger.warning("anomalib not timed: python3.11 -m venv DIR; DIR/bin/pip install anomalib; then --anomalib DIR")
        return timings
    return timings + beside_anomalib(config.anomalib / "bin" / "python", config.images)


def plain_coreset(features: Tensor, num: int, first: int) -> list[int]:
    """Greedy k-centre as PatchCore's authors and anomalib write it: the norm of all differences, pick by pick."""
    chosen, nearest = [first], torch.full((len(features),), torch.inf)
    while len(chosen) < num:
        nearest = torch.minimum(nearest, torch.linalg.vector_norm(features - features[chosen[-1]], dim=1))
        chosen.append(int(nearest.argmax()))
    return chosen


def coresets() -> list[Timing]:
    """A pick of 15 680 x 1024, 10 %: Gram form against norms of differences; the indices must be the same."""
    features = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    num = round(SHARE * ROWS)
    greedy_coreset(features, 2)  # what libraries take once is not the coreset's
    with PeakMemory() as peak:
        begun = time.process_time()
        fast = greedy_coreset(features, num)
        seconds = (time.process_time() - begun) / num
    begun = time.process_time()
    slow = plain_coreset(features, SLOW_PICKS, int(fast[0]))
    plain = (time.process_time() - begun) / SLOW_PICKS
    if slow != fast[:SLOW_PICKS].tolist():
        raise NumericsError("the Gram form picks other rows than norms of differences")
    whole = features.nbytes + coreset_bytes(ROWS, DIM)
    measured = features.nbytes + peak.bytes
    note = f"same {SLOW_PICKS} rows; peak {measured / 2**20:.0f} MiB, estimate {whole / 2**20:.0f}; limit 8"
    return [Timing(f"coreset, a pick of {ROWS} x {DIM}", "norm(F - centre)", plain, seconds, note)]


class PeakMemory:
    """The most that this process took beyond what it had at the start, sampled every millisecond."""

    def __enter__(self) -> "PeakMemory":
        self.process, self.bytes, self.running = psutil.Process(), 0, True
        self.start = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, self.process.memory_info().rss - self.start)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def searches(config: BenchmarkConfig) -> list[Timing]:
    """The nearest of 16 384 x 1024 rows to each of 784 patches: ours against bare faiss."""
    generator = torch.Generator().manual_seed(0)
    bank, query = torch.randn(16_384, DIM, generator=generator), torch.randn(784, DIM, generator=generator)
    index = faiss.IndexFlatL2(DIM)
    index.add(bank.numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    nearest, on_ball = Neighbours(bank), Neighbours(bank * (0.5 / DIM**0.5), curvature=1.0)
    near = query * (0.5 / DIM**0.5)
    bare, ours, ball = interleaved(
        config.rounds,
        partial(index.search, query.numpy(), 1),
        partial(nearest.search, query, 1),
        partial(on_ball.search, near, 1),
    )
    what = "nearest of 16384 x 1024 to 784 patches"
    return [
        Timing(what, "bare faiss, flat", bare, ours, "limit 1 / 1.1 = 0.91"),
        Timing("  on the ball", "bare faiss, flat", bare, ball),
    ]


def steps(config: BenchmarkConfig) -> list[Timing]:
    """A training step of HypAD on four images of 256 pixels against its Euclidean twin's."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"patch": (4, 32, 32, 112), "pixels": (4, 3, 256, 256), "unrelated": (4, 3, 128, 128)}
    views = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    none = torch.zeros(4, dtype=torch.long)
    item = Batch(image_ids=tuple("abcd"), views=views, labels=none, aug_index=none)

    def step(curvature: float) -> Callable[[], object]:
        model = HypAD(HypADConfig(curvature=curvature), 112)
        model.begin([item])

        def run() -> None:
            model.zero_grad()
            model.loss(item, generator).total.backward()

        return run

    flat, bent = interleaved(config.rounds, step(0.0), step(0.05))
    return [Timing("HypAD, a training step of 4 images", "its c = 0 twin", flat, bent, "limit 1 / 1.15 = 0.87")]


def beside_anomalib(python: Path, images: int) -> list[Timing]:
    """PatchCore of anomalib on the same images, weights, input size and bank size, in its own environment.

    Raises:
        HypdefectError: that environment cannot run it.
    """
    with tempfile.TemporaryDirectory() as folder:
        normal, held, odd = benchmark_images(Path(folder), images)
        recipe = RecipeConfig(whole_size=256)
        spec = get_backbone("patchcore_lite0")
        extractor = extractor_for(spec, recipe)
        assert isinstance(extractor, PatchExtractor)
        weights = Path(folder) / "weights.safetensors"
        net = timm.create_model(spec.architecture)
        load_in_order(net, read_weights(spec))
        save_file(net.state_dict(), weights)
        tested = [*held, *odd]
        task = {"normal": normal, "test": tested, "weights": str(weights), "side": 256, "share": 0.01}
        (Path(folder) / "task.json").write_text(json.dumps(task))
        done = subprocess.run(
            [str(python), str(ANOMALIB), str(Path(folder) / "task.json")], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HypdefectError(f"{python} could not run anomalib: {done.stderr.strip().splitlines()[-1]}")
        theirs: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        torch.set_num_threads(2)
        model = PatchCore(PatchCoreConfig(bank_share=0.01, bank_size=0, candidates=0), spec.dims[0])

        def seen(path: str) -> Batch:
            none = torch.zeros(1, dtype=torch.long)
            views = extractor.forward(extractor.prepare(read_image(Path(path)), None))
            return Batch(image_ids=(path,), views=views, labels=none, aug_index=none)

        with PeakMemory() as peak:
            fit_seconds = wall_seconds(lambda: model.fit([seen(path) for path in normal]))
            scores: list[float] = []
            seconds = wall_seconds(lambda: scores.extend(float(model.anomaly(seen(p)).score[0]) for p in tested))
        torch.set_num_threads(1)
    truth = [0] * len(held) + [1] * len(odd)
    ours, other = (float(roc_auc_score(truth, s)) for s in (scores, theirs["scores"]))
    note = f"AUROC {ours:.4f}, theirs {other:.4f}; limit 1 / 0.7 = 1.43"
    memory = f"peak {peak.bytes / 2**20:.0f} MiB beyond the start, theirs {theirs['peak_bytes'] / 2**20:.0f}"
    each = len(tested)
    name = f"anomalib {theirs['version']}"
    return [
        Timing(f"PatchCore, fit of {len(normal)} images", name, theirs["fit_seconds"], fit_seconds, memory),
        Timing("PatchCore, an image", name, theirs["test_seconds"] / each, seconds / each, note),
    ]


def benchmark_images(folder: Path, images: int) -> tuple[list[str], list[str], list[str]]:
    """Normal images to learn from, normal ones to test, and pseudo-defects on as many others; of magnetic tiles where
    they are, else of smooth noise."""
    found = sorted((data_root() / "mtd").glob("MT_Free/Imgs/*.jpg"))
    if not found:
        generator = np.random.default_rng(0)
        for i in range(images):
            small = Image.fromarray(generator.integers(96, 160, (24, 24), np.uint8))
            small.resize((300, 300)).save(folder / f"{i:04d}.png")
        found = sorted(folder.glob("*.png"))
    chosen = [found[i] for i in np.random.default_rng(0).permutation(len(found))[:images].tolist()]
    half, quarter = len(chosen) // 2, len(chosen) // 4
    _, textures = load_textures(SynthesisConfig())
    odd = []
    laws = draw_laws(0)
    for number, path in enumerate(chosen[half : half + quarter]):
        rng = np.random.default_rng([3, number])
        made = pseudo_defect(read_image(path), laws[number % len(laws)], textures[number % len(textures)], rng, None)
        if made is not None:
            odd.append(folder / f"odd-{number:04d}.png")
            Image.fromarray(made[0]).save(odd[-1])
    return [str(p) for p in chosen[:half]], [str(p) for p in chosen[half + quarter :]], [str(p) for p in odd]
