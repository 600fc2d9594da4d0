"""Small trees in the layouts of published image sets; every defect is a rectangle, so that masks are known exactly.

Each builder writes `per_class` rows of every class it has, and more than one product, split or class per image where
the set has such.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 48

Rectangle = tuple[int, int, int, int]


def rectangle(kind: int, i: int) -> Rectangle:
    """x0, y0, x1, y1 of defect `kind` in image i; those of kinds 0, 1 and 2 do not touch."""
    x0, y0 = 2 + 15 * (kind % 3) + i % 3, 5 + i % 7
    return x0, y0, x0 + 10, y0 + 12 + kind % 3


def marked(box: Rectangle) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def indices(kinds: dict[int, int], i: int) -> np.ndarray:
    """Image i's mask of class indices, from {kind: index}."""
    picture = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for kind, index in kinds.items():
        picture[marked(rectangle(kind, i))] = index
    return picture


def photo(path: Path, kinds: tuple[int, ...], i: int, place: int = 0) -> None:
    """Save image i of a place (product, part), unlike any other, that shows defects of some kinds."""
    pixels = np.random.default_rng([place, i, *kinds]).normal(110, 12, (HEIGHT, WIDTH))
    for kind in kinds:
        pixels[marked(rectangle(kind, i))] += 40 * (-1) ** kind + 5 * kind
    save(path, np.clip(pixels, 0, 255).astype(np.uint8))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with every cell quoted, as quotes within cells are doubled."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    path.write_text("".join(",".join('"{}"'.format(str(v).replace('"', '""')) for v in line) + "\n" for line in lines))


def make_mvtec_ad_tree(root: Path, per_class: int = 6) -> Path:
    """`<product>/train/good`, `test/<defect>`, `ground_truth/<defect>/<stem>_mask.png`: two products."""
    for place, (product, defect) in enumerate([("bottle", "broken_large"), ("carpet", "cut")]):
        for i in range(per_class // 2):
            photo(root / product / ("test" if i == 0 else "train") / "good" / f"{i:03d}.png", (), i, place)
        for i in range(per_class):
            photo(root / product / "test" / defect / f"{i:03d}.png", (place,), i, place)
            mask = root / product / "ground_truth" / defect / f"{i:03d}_mask.png"
            save(mask, marked(rectangle(place, i)).astype(np.uint8) * 255)
    return root


def make_mvtec_3d_ad_tree(root: Path, per_class: int = 6) -> Path:
    """`<product>/<part>/<defect>/{rgb,gt}/NNN.png`: two products, the masks of good images all zero."""
    for place, (product, defect) in enumerate([("bagel", "contamination"), ("rope", "cut")]):
        for i in range(per_class // 2):
            folder = root / product / ("train", "validation", "test")[i % 3] / "good"
            photo(folder / "rgb" / f"{i:03d}.png", (), i, place)
            save(folder / "gt" / f"{i:03d}.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
        for i in range(per_class):
            folder = root / product / "test" / defect
            photo(folder / "rgb" / f"{i:03d}.png", (place,), i, place)
            save(folder / "gt" / f"{i:03d}.png", marked(rectangle(place, i)).astype(np.uint8) * 255)
    return root


def make_visa_tree(root: Path, per_class: int = 6) -> Path:
    """`<product>/Data`, `image_anno.csv` and `split_csv/1cls.csv`: pcb1 with one or two labels an image, candle."""
    defects = {"pcb1": [("bent",), ("melt", "scratch")], "candle": [("weird candle wick",)]}
    ids = {"bent": 1, "melt": 2, "scratch": 3, "weird candle wick": 3}
    split = []
    for place, (product, combinations) in enumerate(defects.items()):
        rows = []
        for i in range(per_class // 2):
            image = f"{product}/Data/Images/Normal/{i:04d}.JPG"
            photo(root / image, (), i, place)
            rows.append({"image": image, "label": "normal", "mask": ""})
            split.append({"split": "test" if i == 0 else "train", "label": "normal", "image": image})
        for k, labels in enumerate(combinations):
            kinds = {kind: ids[label] for kind, label in enumerate(labels)}
            for i in range(k * per_class, (k + 1) * per_class):
                image = f"{product}/Data/Images/Anomaly/{i:03d}.JPG"
                mask = f"{product}/Data/Masks/Anomaly/{i:03d}.png"
                photo(root / image, tuple(kinds), i, place)
                save(root / mask, indices(kinds, i))
                rows.append({"image": image, "label": ",".join(labels), "mask": mask})
                split.append({"split": "test", "label": "anomaly", "image": image})
        save_csv(root / product / "image_anno.csv", rows)
    save_csv(root / "split_csv" / "1cls.csv", split)
    return root


def make_mvtec_fs_tree(root: Path, per_class: int = 6) -> Path:
    """`image/<product>` and `CONFIG/<product>_config1/*.csv`: bottle with two regions an image, carpet two classes."""
    regions = {"bottle": [(0, "broken_large"), (1, "broken_large")], "carpet": [(0, "color"), (1, "cut")]}
    for place, (product, shown) in enumerate(regions.items()):
        rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
        for i in range(per_class):
            part, folder = ("train", "training") if i % 2 else ("valid", "testing")
            relative = f"{folder}/{shown[0][1]}/{i:03d}.png"
            photo(root / "image" / product / relative, tuple(kind for kind, _ in shown), i, place)
            for kind, label in [*shown, (2, "combined")]:
                x0, y0, x1, y1 = rectangle(kind, i)
                box = {"x1": x0, "x2": x1, "y1": y0, "y2": y1}
                points = json.dumps([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
                rows[part].append({"img_rel_path": relative, **box, "label": label, "points": points})
        for part, lines in rows.items():
            save_csv(root / "CONFIG" / f"{product}_config1" / f"{part}.csv", lines)
    return root


def make_neu_seg_tree(root: Path, per_class: int = 6) -> Path:
    """`images/<part>/*.jpg` and `annotations/<part>/*.png`: the last image shows all three classes."""
    images = [(kind,) for kind in range(3) for _ in range(per_class - 1)] + [(0, 1, 2)]
    for i, kinds in enumerate(images):
        part = "training" if i % 2 else "test"
        photo(root / "images" / part / f"{i:06d}.jpg", kinds, i)
        save(root / "annotations" / part / f"{i:06d}.png", indices({kind: kind + 1 for kind in kinds}, i))
    return root


def make_fssd_12_tree(root: Path, per_class: int = 6) -> Path:
    """`Steel_<Xx>/{Images,GT}`: three of the classes."""
    for kind, name in enumerate(("Steel_Am", "Steel_Pk", "Steel_Se")):
        for i in range(1, per_class + 1):
            photo(root / name / "Images" / f"{name}_{i}.jpg", (kind,), i)
            save(root / name / "GT" / f"{name}_{i}.png", marked(rectangle(kind, i)).astype(np.uint8) * 255)
    return root


def make_dtd_tree(root: Path, per_class: int = 6) -> Path:
    """`images/<category>/*.jpg` and `labels/{train,val,test}1.txt`: three of the categories."""
    parts = ("train", "val", "test")
    lists: dict[str, list[str]] = {part: [] for part in parts}
    for kind, name in enumerate(("banded", "polka-dotted", "zigzagged")):
        for i in range(per_class):
            relative = f"{name}/{name}_{i:04d}.jpg"
            photo(root / "images" / relative, (kind,), i)
            lists[parts[i % 3]].append(relative)
    (root / "labels").mkdir()
    for part, lines in lists.items():
        (root / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")
    return root


def make_ucf_el_tree(root: Path, per_class: int = 6) -> Path:
    """`AnnotationsCombined.csv` and two image folders: polygons, boxes, an ellipse, and cells without regions."""
    rows = []

    def cell(folder: str, number: int, kinds: tuple[int, ...], regions: list[tuple[str, dict[str, Any]]]) -> None:
        name = f"M{number:04d}C000001.png"
        photo(root / folder / name, kinds, number)
        for shape_class, shape in regions or [("", {})]:
            attributes = {"Defect_Class": shape_class} if shape_class else {}
            texts = {"region_shape_attributes": json.dumps(shape), "region_attributes": json.dumps(attributes)}
            rows.append({"filename": name, "region_count": len(regions), **texts})

    for i in range(per_class):
        x0, y0, x1, y1 = rectangle(0, i)
        box = {"name": "rect", "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        cell("Multi", i, (0,), [("Crack_Closed", box)])
        number = per_class + i
        x0, y0, x1, y1 = rectangle(0, number)
        polygon = {"name": "polygon", "all_points_x": [x0, x1, x1, x0], "all_points_y": [y0, y0, y1, y1]}
        ellipse = {"name": "ellipse", "cx": 38, "cy": 20, "rx": 6, "ry": 3, "theta": 0}
        cell("Mono", number, (0,), [("Contact_Corrosion", polygon), ("Interconnect_BrightSpot", ellipse)])
        cell("Mono", 2 * per_class + i, (), [])
    save_csv(root / "AnnotationsCombined.csv", rows)
    return root


READER_TREES = {
    "mvtec_ad": make_mvtec_ad_tree,
    "mvtec_3d_ad": make_mvtec_3d_ad_tree,
    "visa": make_visa_tree,
    "mvtec_fs": make_mvtec_fs_tree,
    "neu_seg": make_neu_seg_tree,
    "fssd_12": make_fssd_12_tree,
    "dtd": make_dtd_tree,
    "ucf_el": make_ucf_el_tree,
}
