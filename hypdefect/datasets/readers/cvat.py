"""CVAT for images 1.1: annotations.xml and the images (https://docs.cvat.ai/docs/dataset_management/formats/format-cvat).

An image with neither shapes nor tags is a normal one.
"""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from hypdefect.datasets.card import DatasetCard, ManifestRow
from hypdefect.datasets.readers.annotated import (
    AnnotatedImage,
    image_size,
    is_official,
    locate,
    number,
    product_of,
    refused,
    split_named,
    text,
)
from hypdefect.datasets.readers.shapes import Box, Ellipse, Polygon, RleBox, Shape
from hypdefect.errors import DataError
from hypdefect.images import read_bytes

FILE = "annotations.xml"


def scan(root: Path) -> Iterator[ManifestRow]:
    """One row per image and class; splits where every image has a subset named after one, train and test among them."""
    file = root / FILE
    if not file.is_file():
        raise DataError(f"{root} holds no {FILE}; expected {CARD.layout}")
    content = _parse(file)
    if content.tag != "annotations" or content.find("track") is not None:
        found = "a video annotation" if content.tag == "annotations" else f"<{content.tag}>"
        raise DataError(f"{file} is {found}, not CVAT for images 1.1; expected {CARD.layout}")
    product = product_of(root)
    images = content.findall("image")
    official = is_official(split_named(image.get("subset", "")) for image in images)
    for image in images:
        entry = f"image {image.get('name')!r}"
        path = file
        try:
            path = locate(root, _places(text(image.get("name"), "name"), image.get("subset")))
            split = split_named(image.get("subset", "")) if official else ""
            yield from _annotated(path, file, entry, image, product, split).rows()
        except DataError as error:
            yield refused(path, file, f"{file}: {entry}: {error}", product)


class _NoDoctype(ElementTree.TreeBuilder):
    """Entities, which can be bombs or name other files, are declared in a DOCTYPE: it ends the reading."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise DataError(f"a DOCTYPE ({name}), which CVAT does not write; export the annotations again")


def _parse(file: Path) -> ElementTree.Element:
    data = read_bytes(file)
    try:
        return ElementTree.fromstring(data, ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError(f"{file} is not a readable XML file ({error}); expected {CARD.layout}") from error


def _places(name: str, subset: str | None) -> list[str]:
    folders = ["images", "."] if subset is None else [f"images/{subset}", "images", "."]
    return [f"{folder}/{name}" for folder in folders]


def _annotated(
    path: Path, file: Path, entry: str, image: ElementTree.Element, product: str, split: str
) -> AnnotatedImage:
    annotated = AnnotatedImage(
        path=path,
        label_file=file,
        entry=entry,
        product=product,
        size=image_size(image.get("height"), image.get("width")),
        split=split,
    )
    for index, element in enumerate(image):
        label = text(element.get("label"), f"{element.tag} {index}: label")
        if element.tag == "tag":
            annotated.labels.append(label)
        else:
            annotated.regions.append((label, _shape(element, f"{element.tag} {index} ({label})")))
    return annotated


def _shape(element: ElementTree.Element, what: str) -> Shape:
    def value(key: str, default: str | None = None) -> float:
        return number(element.get(key, default), f"{what}: {key}")

    if element.tag == "polygon":
        pairs = [pair.split(",") for pair in element.get("points", "").split(";")]
        if any(len(pair) != 2 for pair in pairs):
            raise DataError(f"{what}: points are not 'x,y;x,y;...'; export the annotations again")
        return Polygon(tuple((number(x, f"{what}: x"), number(y, f"{what}: y")) for x, y in pairs))
    if element.tag == "box":
        return Box(value("xtl"), value("ytl"), value("xbr"), value("ybr"), value("rotation", "0"))
    if element.tag == "ellipse":
        return Ellipse(value("cx"), value("cy"), value("rx"), value("ry"), value("rotation", "0"))
    if element.tag == "mask":
        try:
            counts = tuple(int(count) for count in element.get("rle", "").split(","))
        except ValueError:
            raise DataError(f"{what}: rle is not a list of whole numbers; export the annotations again") from None
        left, top, width, height = (int(value(key)) for key in ("left", "top", "width", "height"))
        return RleBox(counts, left=left, top=top, width=width, height=height)
    raise DataError(f"{what} marks no area; draw a polygon, box, ellipse or mask")


CARD = DatasetCard(
    name="cvat",
    title="CVAT annotations of your own, as CVAT for images 1.1",
    licence="yours",
    source="your own files; format: https://docs.cvat.ai/docs/dataset_management/formats/format-cvat",
    layout=f"<root>/{FILE} (CVAT for images 1.1) and <root>/images/**; images without shapes and tags are normal",
    expected={},
    good_is_class=False,
    scan=scan,
    default_root=lambda: None,
)
