"""MVTec AD (Bergmann et al., CVPR 2019), and any folder laid out like it."""

from collections.abc import Iterable
from pathlib import Path

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.errors import DataError
from hypdefect.files import data_root

GOOD = "good"
SPLITS = ("train", "test")


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image; a root that is one product's folder is that product alone."""
    products = [p for p in (root, *sorted(root.iterdir())) if any((p / split).is_dir() for split in SPLITS)]
    if not products:
        raise DataError(f"{root} is not an MVTec AD folder: no <product>/train and test in it; expected {CARD.layout}")
    for product in products:
        for split in SPLITS:
            folders = sorted(p for p in (product / split).glob("*") if p.is_dir())
            if not folders:
                raise DataError(f"{product / split} is missing or has no class folders; expected {CARD.layout}")
            for folder in folders:
                is_defect = folder.name != GOOD
                for path in sorted(folder.glob("*.png")):
                    mask = product / "ground_truth" / folder.name / f"{path.stem}_mask.png"
                    yield ManifestRow(
                        path=path,
                        product=product.resolve().name,
                        defect=folder.name,
                        is_defect=is_defect,
                        mask_path=mask if is_defect else None,
                        split=split,
                    )


CARD = DatasetCard(
    name="mvtec_ad",
    title="MVTec AD: 15 products, 73 kinds of defects",
    licence="CC BY-NC-SA 4.0, no commercial use",
    source="https://www.mvtec.com/company/research/datasets/mvtec-ad. All defects are in the test part: the "
    "official split serves anomaly detection only.",
    layout="<root>/<product>/train/good/*.png, test/<defect>/*.png and ground_truth/<defect>/<stem>_mask.png; or the "
    "folder of one product",
    expected={
        "bottle": 292,
        "cable": 374,
        "capsule": 351,
        "carpet": 397,
        "grid": 342,
        "hazelnut": 501,
        "leather": 369,
        "metal_nut": 335,
        "pill": 434,
        "screw": 480,
        "tile": 347,
        "toothbrush": 102,
        "transistor": 313,
        "wood": 326,
        "zipper": 391,
    },
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "mvtec_ad",
)
