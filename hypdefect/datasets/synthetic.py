"""Sets of pseudo-defects on disk: which images they are put on, where they lie, and how a stored one is found."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from hypdefect.config import digest, to_mapping
from hypdefect.datasets.manifest import manifest_digest, read_manifest
from hypdefect.errors import DataError
from hypdefect.images.pseudo_defects import VERSION, SynthesisConfig, load_textures


@dataclass(frozen=True, slots=True)
class SyntheticSet:
    """Pseudo classes as a manifest: `group_id` is the image_id of the picture that a pseudo-defect was put on."""

    manifest: pa.Table
    folder: Path
    cached: bool


def sources(manifest: pa.Table) -> list[dict[str, Any]]:
    """The images pseudo-defects are put on: good parts; without any, the parts of defect images beside the marked
    region.

    Raises:
        DataError: neither is there.
    """
    rows = manifest.to_pylist()
    good = [row for row in rows if not row["is_defect"]]
    chosen = good or [row for row in rows if row["mask_id"]]
    if not chosen:
        raise DataError("pseudo-defects need images of good parts, or masks that say where a part is good")
    return sorted(chosen, key=lambda row: str(row["image_id"]))


def stored(manifest: pa.Table, label: str, home: Path, config: SynthesisConfig) -> SyntheticSet | None:
    """The set that `synthesize` made of these settings and images, if it did."""
    folder = set_folder(manifest, label, home, config, load_textures(config)[0])
    path = folder / "manifest.parquet"
    return SyntheticSet(read_manifest(path), folder, True) if path.is_file() else None


def set_folder(manifest: pa.Table, label: str, home: Path, config: SynthesisConfig, named: str) -> Path:
    settings = to_mapping(config) | {"texture_folder": named}
    if config.kind == "textures":  # sets that were made before there were marks are found
        del settings["kind"]
    identity = [VERSION, settings, manifest_digest(manifest)]
    return home / "synthetic" / f"{label}-{digest(identity)[:12]}"
