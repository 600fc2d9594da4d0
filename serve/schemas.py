"""What the service answers, as it appears in `/openapi.json`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """A body of ours: strict, and without NaN or infinity."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ServedModel(Answer):
    """Which published version answered."""

    name: str
    version: int
    alias: str | None
    """The alias it was deployed by; null where a version was named."""


class Classification(Answer):
    label: str
    probability: float
    """Of the label."""
    probabilities: dict[str, float]
    region: Literal["mask", "whole image"]
    """What the features were pooled over."""
    notes: list[str]
    """What a user should know about this input, e.g. that a mask was read as `> 0`."""
    model: ServedModel
    request_id: str


class Region(Answer):
    polygon: list[list[float]]
    """Corners [x, y] of the closed outline, in pixels of the image; it has no holes."""
    area: int
    """Pixels; of a class, those inside the outline that are not of it do not count."""


class Detected(Answer):
    verdict: Literal["good", "anomalous"]
    """anomalous where the p-value is at most `false_alarms`."""
    p_value: float
    """Of "this part is good"; 1 / (n + 1) of the n images it was calibrated on is the lowest there is."""
    false_alarms: float
    """The share of good parts that are called anomalous, as it was chosen."""
    score: float
    regions: list[Region]
    """Where the map exceeds what good parts reach, largest first, at most 100."""
    map_png: str | None
    """With ?map=1 the anomaly map: a grey PNG of the image's size in base64, 128 where a region begins."""
    notes: list[str]
    model: ServedModel
    request_id: str


class ClassRegion(Region):
    label: str


class Segmented(Answer):
    label: str
    """The class with the most pixels of the map; good where none has any."""
    shares: dict[str, float]
    """Of each class, the share of the image's pixels that the map gives it."""
    regions: list[ClassRegion]
    """Class by class, largest first, at most 100 of each."""
    map_png: str | None
    """With ?map=1 the number of the class of each pixel, from 1 in the order of the shares, 0 for none: a grey PNG of
    the image's size in base64. A class has no regions of fewer than 9 pixels there."""
    notes: list[str]
    model: ServedModel
    request_id: str


class Predicted(Answer):
    answer: dict[str, Any]
    """What the model's family says of an image, such as `label`, `probabilities` and `region`."""
    notes: list[str]
    model: ServedModel
    request_id: str


class ModelInfo(Answer):
    model: ServedModel
    family: str
    """What kind of answer it gives: few_shot (which defect?) and others."""
    class_names: list[str]
    method: str
    config: dict[str, Any]
    backbone: str
    recipe: dict[str, Any]
    uses_mask: bool
    digests: dict[str, str]
    """sha256 of each file of the version, and of the backbone's description."""
    metrics: dict[str, Any]
    """As measured when it was published."""
    provenance: dict[str, Any]


class Health(Answer):
    status: Literal["live", "ready"]


class Problem(Answer):
    """RFC 7807. `type` is "about:blank": the status says what kind of problem it is."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str
