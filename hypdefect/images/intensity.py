"""Deep pixels as 8-bit ones: a window per channel, fixed on the normal images of the product.

Shapes: H W pixels, C channels.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Shaped, UInt8

from hypdefect.errors import DataError

PIXELS_PER_IMAGE = 2**16  # drawn of each image to fit a window


@dataclass(frozen=True, slots=True)
class PixelKind:
    """The pixels of a file: numpy type, and colour channels (alpha left out)."""

    dtype: str
    channels: int

    @property
    def plain(self) -> bool:
        return self.dtype == "uint8" and self.channels in (1, 3)

    def __str__(self) -> str:
        text = f"{self.channels} channel{'s' * (self.channels > 1)} of {self.dtype}"
        return text if self.dtype in ("uint8", "int8") else f"more than 8 bits a channel ({text})"


@dataclass(frozen=True, slots=True)
class Intensity:
    """How deep pixels become 8-bit: `(x - low) / (high - low)`, clipped to [0, 1], times 255, rounded.

    Args:
        low, high: the window of each chosen channel, in the file's units.
        channels: the one or three channels used, from 0; one is repeated three times.
        dtype, num_channels: the kind of pixels it was fitted on; others are refused.

    Raises:
        DataError: not one or three channels, channels that are not there, or an empty or infinite window.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    channels: tuple[int, ...]
    dtype: str
    num_channels: int

    def __post_init__(self) -> None:
        if len(self.channels) not in (1, 3) or not all(0 <= c < self.num_channels for c in self.channels):
            raise DataError(f"channels {self.channels}: name 1 or 3 of the {self.num_channels} channels, from 0")
        if not len(self.low) == len(self.high) == len(self.channels):
            raise DataError(f"{len(self.low)} low and {len(self.high)} high ends for {len(self.channels)} channels")
        for channel, low, high in zip(self.channels, self.low, self.high, strict=True):
            if not (low < high and math.isfinite(high - low)):
                raise DataError(
                    f"channel {channel}: the intensity window from {low:g} to {high:g} is empty or infinite; the "
                    f"normal images are constant or saturated: leave those out, or convert the images to 8 bits"
                )

    def to_json(self) -> str:
        """Canonical text: equal rules give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Intensity":
        """The rule that `to_json` wrote.

        Raises:
            DataError: another text.
        """
        try:
            value = json.loads(text)
            return cls(
                low=tuple(map(float, value["low"])),
                high=tuple(map(float, value["high"])),
                channels=tuple(map(int, value["channels"])),
                dtype=str(value["dtype"]),
                num_channels=int(value["num_channels"]),
            )
        except (ValueError, TypeError, LookupError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{text[:80]!r} is not an intensity rule ({error}); run jobs/ingest.py again") from error

    def apply(self, raw: Shaped[np.ndarray, "H W C"], name: str = "image") -> UInt8[np.ndarray, "H W 3"]:
        """The 8-bit image of raw pixels.

        Raises:
            DataError: pixels of another kind than the rule was fitted on.
        """
        found, wanted = PixelKind(str(raw.dtype), raw.shape[2]), PixelKind(self.dtype, self.num_channels)
        if found != wanted:
            raise DataError(f"{name}: {found}, the intensity rule is for {wanted}: export the images alike")
        out = np.empty((*raw.shape[:2], 3), np.uint8)
        rows_at_once = max(1, 2**20 // raw.shape[1])
        for start in range(0, len(raw), rows_at_once):
            rows = slice(start, start + rows_at_once)
            for i in range(3):
                j = i % len(self.channels)
                low, high = self.low[j], self.high[j]
                x = np.clip(raw[rows, :, self.channels[j]].astype(np.float64), low, high)
                out[rows, :, i] = np.rint((x - low) / (high - low) * 255)
        return out


def fit_intensity(
    arrays: Iterable[Shaped[np.ndarray, "_ _ C"]],
    lower: float = 0.5,
    upper: float = 99.5,
    channels: Sequence[int] | None = None,
) -> Intensity:
    """The window between two percentiles of the pixels of some images, at most `PIXELS_PER_IMAGE` of each.

    One channel is grey and three are RGB, which share one window so that hues stay. Named channels have a window each.

    Args:
        arrays: what `read_raw` gave, all of one kind; consumed one at a time.
        lower, upper: percentiles, 0 to 100.
        channels: which one or three channels to use, from 0; needed where there are neither one nor three.

    Raises:
        DataError: no array, arrays of several kinds, another number of channels without names, or constant images.
    """
    kind: PixelKind | None = None
    samples: list[np.ndarray] = []
    for raw in arrays:
        found = PixelKind(str(raw.dtype), raw.shape[2])
        if kind is not None and found != kind:
            raise DataError(f"images of several kinds ({kind}; {found}) have no common window: export them alike")
        kind = found
        pixels = raw.reshape(-1, raw.shape[2])
        if len(pixels) > PIXELS_PER_IMAGE:
            pixels = pixels[np.random.default_rng(len(samples)).integers(0, len(pixels), PIXELS_PER_IMAGE)]
        samples.append(pixels)
    if kind is None:
        raise DataError("no image to fit an intensity window on")
    if channels is None and kind.channels not in (1, 3):
        raise DataError(
            f"{kind.channels} channels: name 1 or 3 of them (--channels, from 0), or export those as an image"
        )
    chosen = tuple(range(kind.channels)) if channels is None else tuple(channels)
    if not all(0 <= c < kind.channels for c in chosen):
        raise DataError(f"channels {chosen}: the images have {kind.channels}, counted from 0")
    window = np.percentile(np.concatenate(samples)[:, chosen], (lower, upper), axis=0, method="nearest")
    low, high = window.tolist()
    if channels is None:
        low, high = [min(low)] * len(low), [max(high)] * len(high)
    return Intensity(tuple(map(float, low)), tuple(map(float, high)), chosen, kind.dtype, kind.channels)
