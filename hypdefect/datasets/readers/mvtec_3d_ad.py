"""MVTec 3D-AD (Bergmann et al., VISAPP 2022): the colour images; the point clouds in xyz/ are not read."""

from collections.abc import Iterable
from pathlib import Path

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.errors import DataError
from hypdefect.files import data_root

GOOD = "good"
SPLITS = {"train": "train", "validation": "val", "test": "test"}


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per colour image; the masks of good images are all zero and are not read."""
    products = sorted(p for p in root.iterdir() if any((p / part).is_dir() for part in SPLITS))
    if not products:
        raise DataError(
            f"{root} is not an MVTec 3D-AD folder: no <product>/train, validation and test in it; "
            f"expected {CARD.layout}"
        )
    for product in products:
        for part, split in SPLITS.items():
            folders = sorted(p for p in (product / part).glob("*") if (p / "rgb").is_dir())
            if not folders:
                raise DataError(f"{product / part} is missing or has no <defect>/rgb folder; expected {CARD.layout}")
            for folder in folders:
                is_defect = folder.name != GOOD
                for path in sorted((folder / "rgb").glob("*.png")):
                    yield ManifestRow(
                        path=path,
                        product=product.name,
                        defect=folder.name,
                        is_defect=is_defect,
                        mask_path=folder / "gt" / path.name if is_defect else None,
                        split=split,
                    )


CARD = DatasetCard(
    name="mvtec_3d_ad",
    title="MVTec 3D-AD: 10 products, colour images",
    licence="CC BY-NC-SA 4.0, no commercial use",
    source="https://www.mvtec.com/company/research/datasets/mvtec-3d-ad. Point clouds are not read. All defects are in "
    "the test part; some test images show several at once and form the class combined.",
    layout="<root>/<product>/train|validation|test/<defect>/rgb/NNN.png, with the mask in gt/NNN.png",
    expected={
        "bagel": 376,
        "cable_gland": 354,
        "carrot": 474,
        "cookie": 363,
        "dowel": 452,
        "foam": 363,
        "peach": 535,
        "potato": 447,
        "rope": 432,
        "tire": 351,
    },
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "mvtec_3d_ad",
)
