"""FSSD-12: surface defects of strip steel in 12 classes (Feng et al., CPANet, IEEE TIM 2023)."""

from collections.abc import Iterable
from pathlib import Path

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.errors import DataError
from hypdefect.files import data_root

CLASSES = {
    "Steel_Am": "abrasion_mask",
    "Steel_Ia": "iron_sheet_ash",
    "Steel_Ld": "liquid",
    "Steel_Op": "oxide_scale",
    "Steel_Os": "oil_spot",
    "Steel_Ws": "water_spot",
    "Steel_Pa": "patch",
    "Steel_Pk": "punching",
    "Steel_Ri": "red_iron_sheet",
    "Steel_Rp": "roll_printing",
    "Steel_Sc": "scratch",
    "Steel_Se": "inclusion",
}


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image of each class folder."""
    present = [folder for folder in CLASSES if (root / folder / "Images").is_dir()]
    if not present:
        raise DataError(f"{root} is not an FSSD-12 folder: no Steel_<Xx>/Images in it; expected {CARD.layout}")
    for folder in present:
        for path in sorted((root / folder / "Images").glob("*.jpg")):
            yield ManifestRow(
                path=path,
                product="strip_steel",
                defect=CLASSES[folder],
                is_defect=True,
                mask_path=root / folder / "GT" / f"{path.stem}.png",
            )


CARD = DatasetCard(
    name="fssd_12",
    title="FSSD-12: strip steel, 12 defects",
    licence="none stated by the authors; ask them (songkc@me.neu.edu.cn)",
    source="the authors of CPANet (https://github.com/yushaodong/CPANet; doi 10.1109/TIM.2023.3246519), who give out "
    "the password. The folders Nd are not read.",
    layout="<root>/Steel_<Xx>/Images/*.jpg and GT/*.png of the same stem; Xx is one of "
    + ", ".join(folder.removeprefix("Steel_") for folder in CLASSES),
    expected=dict.fromkeys(CLASSES.values(), 50),
    good_is_class=False,
    scan=scan,
    default_root=lambda: data_root() / "fssd_12",
)
