"""DTD: describable textures (Cimpoi et al., CVPR 2014). Its categories are classes, none of them a defect."""

from collections.abc import Iterable
from pathlib import Path

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.errors import DataError
from hypdefect.files import data_root

SPLITS = ("train", "val", "test")
CATEGORIES = (
    "banded",
    "blotchy",
    "braided",
    "bubbly",
    "bumpy",
    "chequered",
    "cobwebbed",
    "cracked",
    "crosshatched",
    "crystalline",
    "dotted",
    "fibrous",
    "flecked",
    "freckled",
    "frilly",
    "gauzy",
    "grid",
    "grooved",
    "honeycombed",
    "interlaced",
    "knitted",
    "lacelike",
    "lined",
    "marbled",
    "matted",
    "meshed",
    "paisley",
    "perforated",
    "pitted",
    "pleated",
    "polka-dotted",
    "porous",
    "potholed",
    "scaly",
    "smeared",
    "spiralled",
    "sprinkled",
    "stained",
    "stratified",
    "striped",
    "studded",
    "swirly",
    "veined",
    "waffled",
    "woven",
    "wrinkled",
    "zigzagged",
)


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image of each category, with the first of the ten official splits where its lists are there."""
    folders = sorted(p for p in (root / "images").glob("*") if p.is_dir())
    if not folders:
        raise DataError(f"{root} is not a DTD folder: no images/<category> in it; expected {CARD.layout}")
    split_of = _official_split(root / "labels")
    for folder in folders:
        for path in sorted(folder.glob("*.jpg")):
            split = split_of.get(f"{folder.name}/{path.name}", "")
            yield ManifestRow(
                path=path,
                product="texture",
                defect=folder.name,
                is_defect=False,
                split=split,
                refused="" if split or not split_of else f"{path}: in none of the lists {root}/labels/*1.txt",
            )


def _official_split(labels: Path) -> dict[str, str]:
    lists = {split: labels / f"{split}1.txt" for split in SPLITS}
    if not any(path.is_file() for path in lists.values()):
        return {}
    missing = [path.name for path in lists.values() if not path.is_file()]
    if missing:
        raise DataError(f"{labels}: {', '.join(missing)} missing; expected {CARD.layout}")
    return {line: split for split, path in lists.items() for line in path.read_text().split()}


CARD = DatasetCard(
    name="dtd",
    title="DTD: 47 categories of textures",
    licence="for research purposes",
    source="https://www.robots.ox.ac.uk/~vgg/data/dtd (dtd-r1.0.1.tar.gz). For classification: the categories are "
    "classes of the few-shot task, and no image counts as a defect. With the lists in labels/, the first of the ten "
    "official splits.",
    layout="<root>/images/<category>/*.jpg; optional labels/train1.txt, val1.txt and test1.txt (<category>/<file>)",
    expected=dict.fromkeys(CATEGORIES, 120),
    good_is_class=True,
    scan=scan,
    default_root=lambda: data_root() / "dtd",
)
