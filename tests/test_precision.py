"""How products are computed is a setting of the process: it must hold where it is asked for, and nowhere else."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from hypdefect.families.segmentation_training import SegmenterTrainConfig
from hypdefect.methods.hadnet import HyperbolicScores
from hypdefect.precision import exact_products, fast_products
from hypdefect.training import TrainConfig, fit
from hypdefect.types import LossTerms


def kinds() -> tuple[str, str]:
    library: Any = torch.backends.mkldnn
    return library.matmul.fp32_precision, library.conv.fp32_precision


def test_the_setting_ends_with_the_context_whatever_happens() -> None:
    before = kinds()
    with fast_products():
        assert kinds() == ("bf16", "bf16")
        with exact_products():
            assert kinds() == ("ieee", "ieee")
        assert kinds() == ("bf16", "bf16")
    assert kinds() == before
    with pytest.raises(ValueError, match="broken"), fast_products():
        raise ValueError("broken")
    assert kinds() == before


class Seen(torch.autograd.Function):
    """Notes how products are computed on the way there and back."""

    notes: ClassVar[list[tuple[str, str]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Seen.notes.append(kinds())
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        Seen.notes.append(kinds())
        return gradients[0]


class Noting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def loss(self, item: Tensor, generator: torch.Generator) -> LossTerms:
        return LossTerms(Seen.apply(self.weight).square().sum(), {})


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (SegmenterTrainConfig(steps=1, items_per_step=1, report_every=1), "bf16"),
        (TrainConfig(steps=1, items_per_step=1, report_every=1), None),
    ],
)
def test_segmenters_are_trained_with_fast_products_both_ways_and_others_are_not(
    config: TrainConfig, kind: str | None
) -> None:
    before = kinds()
    Seen.notes.clear()
    fit(Noting(), lambda number: torch.zeros(()), config, lambda metrics, write: None)
    assert Seen.notes == [before if kind is None else (kind, kind)] * 2
    assert kinds() == before


def test_distances_on_the_ball_are_exact_in_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypdefect import geometry

    notes = []
    real = geometry.hyperplane_dist

    def noting(*args: Any) -> Tensor:
        notes.append(kinds())
        return real(*args)

    monkeypatch.setattr(geometry, "hyperplane_dist", noting)
    with fast_products():
        HyperbolicScores(8, 3, 4, 0.01)(torch.randn(1, 8, 2, 2))
    assert notes == [("ieee", "ieee")]
