"""Make `import torchvision` work where its compiled operators are absent.

The CUDA wheel of torchvision beside a CPU build of torch cannot load its C++ library; its Python code then fails on
import with "operator torchvision::nms does not exist" because it registers fake kernels for operators that nobody
declared. Declaring the two missing schemas is enough for open_clip and timm, which call neither operator. Import this
module before anything that imports torchvision; where the library loads, it does nothing.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _load_compiled_operators() -> None:
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                continue


def _declare_missing() -> torch.library.Library | None:
    _load_compiled_operators()
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    return library


_LIBRARY = _declare_missing()  # kept alive: a collected Library takes its schemas with it
