"""A folder of your own: one sub-folder per class."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.errors import DataError

READ = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
REFUSED = {".avif", ".gif", ".heic", ".jp2", ".webp"}  # scanned too, so that the quarantine names them and the remedy
GOOD = {"good", "normal", "free", "ok"}
MASKS, MASK_SUFFIX = "masks", "_mask"


def scan(root: Path) -> Iterable[ManifestRow]:
    """One row per image of each class folder, with its mask where there is one."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        lying = " (images lie directly in it: move them into class folders)" if _images(root) else ""
        raise DataError(f"{root} has no class folders{lying}; expected {CARD.layout}")
    product = root.resolve().name or "product"
    for folder in folders:
        paths = _images(folder)
        if not paths:
            below = [p.name for p in sorted(folder.iterdir()) if p.is_dir()]
            found = f"only the folders {', '.join(below[:5])}" if below else "no image file"
            raise DataError(f"class folder {folder} holds {found}; expected {CARD.layout}")
        is_defect = folder.name.lower() not in GOOD
        mask_of = {path: _mask_of(path) if is_defect else None for path in paths}
        for path, mask in mask_of.items():
            yield ManifestRow(path=path, product=product, defect=folder.name, is_defect=is_defect, mask_path=mask)
        for path, reason in _passed_over(folder, {*mask_of, *mask_of.values()}, is_defect):
            yield ManifestRow(path=path, product=product, defect=folder.name, is_defect=is_defect, refused=reason)


def _images(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.iterdir()) if not p.is_dir() and p.suffix.lower() in READ | REFUSED]
    stems = {p.stem for p in files}
    return [
        p
        for p in files
        if not p.name.startswith(".")
        and not (p.stem.endswith(MASK_SUFFIX) and p.stem.removesuffix(MASK_SUFFIX) in stems)
    ]


def _mask_of(path: Path) -> Path | None:
    beside = path.with_name(f"{path.stem}{MASK_SUFFIX}.png")
    for mask in (path.parent / MASKS / f"{path.stem}.png", beside):
        if mask.is_file():
            return mask
    return None


def _passed_over(folder: Path, used: Collection[Path | None], is_defect: bool) -> Iterator[tuple[Path, str]]:
    """Images below a class folder that are neither its images nor their masks, and why."""
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder).parts
        if path in used or path.suffix.lower() not in READ or path.is_dir() or any(n.startswith(".") for n in below):
            continue
        if path.parent.name == MASKS or path.stem.endswith(MASK_SUFFIX):
            if is_defect:
                places = f"{MASKS}/<stem>.png or <stem>{MASK_SUFFIX}.png"
                yield path, f"{path}: the mask of no image; call it {places}, <stem> being that of its image"
        else:
            yield path, f"{path}: in a folder below its class folder {folder.name}; move it up"


CARD = DatasetCard(
    name="folder",
    title="a folder of your own, one sub-folder per class",
    licence="yours",
    source="your own files",
    layout="<root>/<class>/*.png|jpg|bmp|tif; a class called good, normal, free or ok holds the normal images; "
    "optional masks <root>/<class>/masks/<stem>.png or <root>/<class>/<stem>_mask.png",
    expected={},
    good_is_class=False,
    scan=scan,
    default_root=lambda: None,
)
