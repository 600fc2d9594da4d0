"""Small image sets as annotation tools export them, and the encoders of the masks inside, for tests.

Encoders follow the definitions of the formats, not our decoders: cocodataset/cocoapi common/maskApi.c (rleToString) and
HumanSignal/label-studio-converter label_studio_converter/brush.py (encode_rle).
"""

import csv
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 30, 40
CORNERS = ((5.0, 5.0), (25.0, 5.0), (25.0, 20.0), (5.0, 20.0))
"""Of the region in every defect image: columns 5 to 24, rows 5 to 19."""
CLASSES = ("dent", "scratch", "good")


def make_image(path: Path, seed: int = 0) -> None:
    """Grey noise; no two seeds alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_images(folder: Path, per_class: int, seed: int) -> list[tuple[str, str]]:
    """`per_class` images of each class; returns (name, class)."""
    named = [(f"{name}_{i}.png", name) for name in CLASSES for i in range(per_class)]
    for i, (name, _) in enumerate(named):
        make_image(folder / name, 1000 * seed + i)
    return named


def make_manifest_tree(root: Path, per_class: int = 6, seed: int = 0) -> Path:
    """`manifest.csv`, `images/` and `masks/`: dents have mask files, scratches polygons."""
    lines = [("image_path", "label", "split", "mask_path", "polygon")]
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[5:20, 5:25] = 255
    (root / "masks").mkdir(parents=True)
    for i, (name, label) in enumerate(make_images(root / "images", per_class, seed)):
        split = "train" if i % 2 else "test"
        marked = f"masks/{name}" if label == "dent" else ""
        if marked:
            Image.fromarray(mask).save(root / marked)
        polygon = json.dumps(CORNERS) if label == "scratch" else ""
        lines.append((f"images/{name}", label, split, marked, polygon))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return root


def make_coco_tree(root: Path, per_class: int = 6, seed: int = 0) -> Path:
    """`annotations/instances_default.json` and `images/`."""
    content = coco(categories={1: ("dent", "shape"), 2: ("scratch", "surface")})
    for i, (name, label) in enumerate(make_images(root / "images", per_class, seed)):
        content["images"].append({"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH})
        if label != "good":
            polygon = [value for point in CORNERS for value in point]
            content["annotations"].append(
                {"id": i, "image_id": i, "category_id": 1 + CLASSES.index(label), "segmentation": [polygon]}
            )
    write_json(root / "annotations" / "instances_default.json", content)
    return root


def coco(categories: dict[int, tuple[str, str]]) -> dict[str, Any]:
    named = [{"id": key, "name": name, "supercategory": family} for key, (name, family) in categories.items()]
    return {"images": [], "annotations": [], "categories": named}


def make_labelme_tree(root: Path, per_class: int = 6, seed: int = 0) -> Path:
    """`<name>.json` beside each image."""
    for name, label in make_images(root, per_class, seed):
        shapes = [] if label == "good" else [{"label": label, "points": CORNERS, "shape_type": "polygon"}]
        write_json((root / name).with_suffix(".json"), labelme(name, shapes))
    return root


def labelme(name: str, shapes: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    sizes = {"imageHeight": HEIGHT, "imageWidth": WIDTH}
    return {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": name, "imageData": "AAAA"} | sizes | fields


def make_label_studio_tree(root: Path, per_class: int = 6, seed: int = 0) -> Path:
    """`project-1.json` and `images/`, named as uploads."""
    points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in CORNERS]
    tasks = []
    for i, (name, label) in enumerate(make_images(root / "images", per_class, seed)):
        value = {"points": points, "closed": True, "polygonlabels": [label]}
        results = [] if label == "good" else [label_studio_result("polygonlabels", value)]
        tasks.append(label_studio_task(i, f"/data/upload/1/0a1b2c3d-{name}", results))
    write_json(root / "project-1.json", tasks)
    return root


def label_studio_task(number: int, image: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    annotation = {"id": number, "result": results, "was_cancelled": False, "ground_truth": False}
    return {"id": number, "data": {"image": image}, "annotations": [annotation], "predictions": []}


def label_studio_result(kind: str, value: dict[str, Any], name: str = "r1", **fields: Any) -> dict[str, Any]:
    size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return size | {"id": name, "type": kind, "from_name": "label", "to_name": "image", "value": value} | fields


def make_cvat_tree(root: Path, per_class: int = 6, seed: int = 0) -> Path:
    """`annotations.xml` and `images/`."""
    points = ";".join(f"{x:.2f},{y:.2f}" for x, y in CORNERS)
    images = [
        cvat_image(name, "" if label == "good" else f'<polygon label="{label}" occluded="0" points="{points}"/>')
        for name, label in make_images(root / "images", per_class, seed)
    ]
    (root / "annotations.xml").write_text(cvat(*images))
    return root


def cvat(*images: str) -> str:
    head = '<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><id>1</id></task>'
    return f"{head}</meta>{''.join(images)}</annotations>"


def cvat_image(name: str, shapes: str = "", **fields: str) -> str:
    more = "".join(f' {key}="{value}"' for key, value in fields.items())
    return f'<image id="0" name="{name}" width="{WIDTH}" height="{HEIGHT}"{more}>{shapes}</image>'


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def runs_of(flat: np.ndarray) -> tuple[int, ...]:
    """Lengths of runs of 0, 1, 0, ..., the first of which may be 0."""
    runs = [(bool(value), len(list(members))) for value, members in groupby(flat.tolist())]
    return (0,) * runs[0][0] + tuple(length for _, length in runs)


def coco_text(counts: tuple[int, ...]) -> str:
    text = ""
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            low, x = x & 0x1F, x >> 5
            more = x != -1 if low & 0x10 else x != 0
            text += chr((low | 0x20 if more else low) + 48)
    return text


def brush_rle(values: np.ndarray, in_runs: bool) -> bytes:
    """Runs of equal values, or all values one by one."""
    bits = f"{len(values):032b}{8 - 1:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    if in_runs:
        for value, members in groupby(values.tolist()):
            rest = len(list(members))
            while rest:
                length = min(rest, 2**16)
                size, width = next((s, w) for s, w in enumerate((3, 4, 8, 16)) if length <= 2**w)
                bits += f"1{size:02b}{length - 1:0{width}b}{value:08b}"
                rest -= length
    else:
        bits += f"011{len(values) - 1:016b}" + "".join(f"{value:08b}" for value in values.tolist())
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


ANNOTATED_TREES = {
    "manifest": make_manifest_tree,
    "coco": make_coco_tree,
    "labelme": make_labelme_tree,
    "label_studio": make_label_studio_tree,
    "cvat": make_cvat_tree,
}
