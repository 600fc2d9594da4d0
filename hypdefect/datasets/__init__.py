"""The image sets there are: one file in `readers/` (`scan(root) -> rows` and a `CARD`) and one line here each."""

import difflib
import importlib

from hypdefect.datasets.card import DatasetCard
from hypdefect.errors import ConfigError

_MODULES = (
    "elpv",
    "mtd",
    "folder",
    "mvtec_ad",
    "mvtec_3d_ad",
    "visa",
    "mvtec_fs",
    "neu_seg",
    "fssd_12",
    "dtd",
    "ucf_el",
    "manifest",
    "coco",
    "labelme",
    "label_studio",
    "cvat",
)
DATASETS: dict[str, DatasetCard] = {
    name: importlib.import_module(f"{__name__}.readers.{name}").CARD for name in _MODULES
}


def get_dataset(name: str) -> DatasetCard:
    """The card of a data set.

    Raises:
        ConfigError: unknown name, with the nearest known one.
    """
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown dataset {name!r}; {hint}known: {', '.join(DATASETS)}")
