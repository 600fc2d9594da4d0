"""anomalib's PatchCore on given images, for `jobs/benchmark.py detect --anomalib DIR`; runs in anomalib's environment.

python docs/anomalib_patchcore.py TASK.json: writes one line of JSON with scores, seconds and peak memory
"""

import json
import sys
import threading
import time
from pathlib import Path

import anomalib
import numpy as np
import psutil
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from PIL import Image
from safetensors.torch import load_file

LAYERS = ["blocks.2", "blocks.4"]  # strides 8 and 16
BATCH = 8


def read(path: str, side: int) -> torch.Tensor:
    image = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (pixels - 0.5) / 0.5  # what these weights were trained on


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(2)
    model = PatchcoreModel(layers=LAYERS, backbone="tf_efficientnet_lite0", pre_trained=False, num_neighbors=9)
    net = model.feature_extractor.feature_extractor
    missing = net.load_state_dict(load_file(task["weights"]), strict=False).missing_keys
    if missing:
        raise SystemExit(f"weights lack {missing[:3]}")
    process, peak, running = psutil.Process(), [0], [True]
    start = process.memory_info().rss

    def watch() -> None:
        while running[0]:
            peak[0] = max(peak[0], process.memory_info().rss - start)
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()
    model.train()
    model.feature_extractor.eval()
    begun = time.perf_counter()
    for first in range(0, len(task["normal"]), BATCH):
        model(torch.stack([read(path, task["side"]) for path in task["normal"][first : first + BATCH]]))
    model.subsample_embedding(task["share"])
    fitted = time.perf_counter()
    model.eval()
    scores = []
    with torch.inference_mode():
        for path in task["test"]:
            scores += model(read(path, task["side"])[None]).pred_score.flatten().tolist()
    tested = time.perf_counter()
    running[0] = False
    answer = {
        "version": anomalib.__version__,
        "scores": scores,
        "bank": list(model.memory_bank.shape),
        "fit_seconds": fitted - begun,
        "test_seconds": tested - fitted,
        "peak_bytes": peak[0],
    }
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
