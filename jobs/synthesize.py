"""Make pseudo-defects from a product's own good parts: the classes that meta-training learns to tell apart.

python jobs/synthesize.py: on the solar cells that came with the installation

python jobs/synthesize.py --dataset mtd --synthesis.textures 40: more classes, on magnetic tiles

No label of a real defect is used. Where a set has no good parts, pseudo-defects are put beside the marked regions of
its defect images. `jobs/train.py` makes the set by itself where it is missing; this command is to look at it.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure
from rich.table import Table

from hypdefect.command_line import configure_logging, parse_job, run_job, table_console
from hypdefect.distributed.cluster import connected
from hypdefect.distributed.synthesize import pseudo_classes
from hypdefect.families import few_shot
from hypdefect.families.few_shot import TaskConfig
from hypdefect.families.plan import prepare
from hypdefect.files import write_json
from hypdefect.images import read_image
from hypdefect.images.pseudo_defects import SynthesisConfig

SHOWN_IMAGES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesizeJob(TaskConfig):
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)


def main() -> None:
    configure_logging()
    job, options = parse_job(SynthesizeJob, description=__doc__)
    plan = prepare(few_shot, job)
    with connected():
        made = pseudo_classes(plan, job.synthesis)
    table = Table(title=f"pseudo classes of {plan.label}")
    for column in ("shape", "classes", "images", "median region, % of the image"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for shape in sorted(set(made.manifest["family"].to_pylist())):
        rows = [row for row in made.manifest.to_pylist() if row["family"] == shape]
        share = np.median([_area(row["mask_uri"]) for row in rows])
        table.add_row(shape, str(len({row["defect"] for row in rows})), str(len(rows)), f"{100 * share:.2f}")
    table_console().print(table)
    picture = contact_sheet(made.manifest, made.folder / "examples.png")
    print(f"examples: {picture}")
    if options.json is not None:
        classes = len(set(made.manifest["defect"].to_pylist()))
        write_json(options.json, {"folder": str(made.folder), "classes": classes, "images": made.manifest.num_rows})
    print(made.folder)


def _area(mask_uri: str) -> float:
    return float((read_image(Path(mask_uri), name=mask_uri)[..., 0] > 127).mean())


def contact_sheet(manifest: pa.Table, out: Path) -> Path:
    """One class of each shape, one a row, each image with its region outlined."""
    rows = manifest.to_pylist()
    shapes: dict[str, list[str]] = {row["family"]: [] for row in rows}
    for row in rows:
        if row["defect"] not in shapes[row["family"]]:
            shapes[row["family"]].append(row["defect"])
    names = [own[i % len(own)] for i, own in enumerate(shapes.values())]  # another texture each
    figure = Figure(figsize=(1.5 * SHOWN_IMAGES, 1.5 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), SHOWN_IMAGES, squeeze=False)
    for line, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["defect"] == name][:SHOWN_IMAGES]
        for axis in line:
            axis.set_axis_off()
        for axis, row in zip(line, own, strict=False):
            axis.imshow(read_image(Path(row["uri"]), name=row["uri"]))
            region = read_image(Path(row["mask_uri"]), name=row["mask_uri"])[..., 0] > 127
            axis.contour(region, [0.5], colors="#E69F00", linewidths=0.8)
        line[0].set_title(f"{name}: {own[0]['family']}", fontsize=7, loc="left")
    figure.savefig(out, dpi=110)
    return out


if __name__ == "__main__":
    run_job(main)
