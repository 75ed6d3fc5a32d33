"""Linear maps of the features: LU layers, permutations, standardizations, and products of these."""

from __future__ import annotations

import torch
from nflows import transforms
from torch import Tensor, nn

from sbi_dist.posterior.sampler.step import Tile, Unknown, with_bias

__all__ = ["LinearStep", "linear_step"]


class LinearStep:
    """v -> A v + b, and back by a matrix that is inverted once, in float64.

    Args:
        matrix: A, float64 (D, D).
        bias: b, float64 (D,).
        log_det: log |det A|.
        inverse: the inverse of A, where it is known already.
    """

    condition_rows = 0

    def __init__(
        self,
        matrix: Tensor,
        bias: Tensor,
        log_det: float,
        inverse: Tensor | None = None,
    ) -> None:
        self.matrix, self.bias, self.log_det = matrix, bias, log_det
        self.inverse = torch.linalg.inv(matrix) if inverse is None else inverse
        self.products = 0  # no network's
        self.width = len(matrix)
        self.to(matrix)

    @classmethod
    def of_order(cls, order: list[int]) -> LinearStep:
        """Feature ``order[i]`` becomes feature i."""
        matrix = torch.eye(len(order), dtype=torch.float64)[order]
        return cls(matrix, torch.zeros(len(order), dtype=torch.float64), 0.0, matrix.T)

    @property
    def is_identity(self) -> bool:
        return torch.equal(self.matrix, torch.eye(len(self.matrix), dtype=torch.float64)) and not (
            bool(self.bias.any())
        )

    def inverted(self) -> LinearStep:
        return LinearStep(self.inverse, -self.inverse @ self.bias, -self.log_det, self.matrix)

    def then(self, other: LinearStep) -> LinearStep:
        """This one and then the other."""
        return LinearStep(
            other.matrix @ self.matrix,
            other.matrix @ self.bias + other.bias,
            self.log_det + other.log_det,
            self.inverse @ other.inverse,
        )

    def to(self, like: Tensor) -> None:
        self._forward = with_bias(self.matrix, self.bias).to(like)
        self._inverse = with_bias(self.inverse, -self.inverse @ self.bias).to(like)

    def conditions(self, context: Tensor) -> Tensor:
        return context.new_empty(0, len(context))

    def bind(self, tile: Tile) -> _LinearRun:
        return _LinearRun(self, tile)


class _LinearRun:
    def __init__(self, step: LinearStep, tile: Tile) -> None:
        self._step, self._tile = step, tile
        self._product = tile.space("product", len(step.matrix), tile.count)

    def _apply(self, matrix: Tensor) -> None:
        torch.mm(matrix, self._tile.values, out=self._product)
        self._tile.features.copy_(self._product)

    def given(self, conditions: Tensor) -> None:
        """Nothing: it is the same for all observations."""

    def inverse(self, with_log_det: bool) -> None:
        self._apply(self._step._inverse)
        if with_log_det:
            self._tile.log_det.sub_(self._step.log_det)

    def forward(self) -> None:
        self._apply(self._step._forward)
        self._tile.log_det.add_(self._step.log_det)


def linear_step(layer: nn.Module, features: int) -> LinearStep:
    """The step of an nflows layer that is linear.

    Raises:
        Unknown: it is none.
    """
    if isinstance(layer, transforms.LULinear):
        lower, upper = (each.detach().double() for each in layer._create_lower_upper())
        inverse = torch.linalg.inv(upper) @ torch.linalg.inv(lower)
        log_det = float(upper.diagonal().log().sum())
        return LinearStep(lower @ upper, layer.bias.detach().double(), log_det, inverse)
    if isinstance(layer, transforms.Permutation) and layer._dim == 1:
        return LinearStep.of_order(layer._permutation.tolist())
    if isinstance(layer, (transforms.PointwiseAffineTransform, transforms.AffineTransform)):
        scale = layer._scale.detach().double().expand(features).clone()
        shift = layer._shift.detach().double().expand(features).clone()
        return LinearStep(
            torch.diag(scale),
            shift,
            float(scale.abs().log().sum()),
            torch.diag(1 / scale),
        )
    if isinstance(layer, transforms.IdentityTransform):
        return LinearStep.of_order(list(range(features)))
    raise Unknown(f"{type(layer).__module__}.{type(layer).__qualname__}")
