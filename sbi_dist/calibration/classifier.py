"""Many small classifiers trained side by side, as the products of stacked matrices.

Each is what scikit-learn's ``MLPClassifier`` is by default, but for the arithmetic: two hidden
layers with rectifiers, logistic loss, Adam on batches of 200 in an order that is new in each epoch,
and an end once ten epochs in a row have not lowered the training loss by 1e-4. One by one, most of
the time would go into calls on matrices of a few hundred numbers. What the classes mean is the
caller's matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fit_classifiers", "scores"]

_BATCH, _RATE, _BETAS, _EPSILON = 200, 1e-3, (0.9, 0.999), 1e-8
_DECAY = 1e-4
_TOLERANCE, _PATIENCE = 1e-4, 10
# Far beyond where these end; nothing is known to reach it.
_MAX_EPOCHS = 10_000


def fit_classifiers(
    x: Tensor, label: Tensor, hidden: int, generators: list[torch.Generator]
) -> Tensor:
    """Train G classifiers, each on its own rows.

    Args:
        x: inputs, float32 of shape (G, n, D).
        label: 0 or 1, float32 of shape (G, n).
        hidden: width of both hidden layers.
        generators: of the initial weights and of the order of batches, one a classifier or one for
            several that follow each other; their number divides G.

    Returns:
        The weights, float32 of shape (G, W), for :func:`scores`.
    """
    groups, rows, size = x.shape
    share = groups // len(generators)
    layers = _layers(size, hidden)
    weights = torch.cat([_initial(layers, share, generator) for generator in generators])
    decay = torch.cat([torch.full((i * o,), _DECAY if i > 1 else 0.0) for i, o in layers])
    result = torch.empty_like(weights)
    alive = torch.arange(groups)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    least = torch.full((groups,), math.inf)
    waited = torch.zeros(groups, dtype=torch.int64)
    step = 0
    for _ in range(_MAX_EPOCHS):
        # Drawn for those that have ended too, so that the others meet the same orders without them.
        order = torch.cat([torch.rand(share, rows, generator=each) for each in generators])
        order = order[alive].argsort(1)
        epoch_x = torch.gather(x, 1, order[:, :, None].expand(-1, -1, size))
        epoch_label = torch.gather(label, 1, order)[:, :, None]
        network = _Network(weights, layers)
        loss = torch.zeros(len(alive))
        for start in range(0, rows, _BATCH):
            batch = slice(start, start + _BATCH)
            loss += network.gradient(epoch_x[:, batch], epoch_label[:, batch])
            step += 1
            gradient = network.flat.addcmul_(weights, decay, value=1 / min(_BATCH, rows - start))
            first.lerp_(gradient, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            rate = _RATE * math.sqrt(1 - _BETAS[1] ** step) / (1 - _BETAS[0] ** step)
            weights.addcdiv_(first, second.sqrt().add_(_EPSILON), value=-rate)
        loss /= rows
        waited = torch.where(loss > least - _TOLERANCE, waited + 1, 0)
        least = torch.minimum(least, loss)
        going = waited <= _PATIENCE
        if bool(going.all()):
            continue
        result[alive[~going]] = weights[~going]
        alive, weights, first, second, least, waited, x, label = (
            each[going] for each in (alive, weights, first, second, least, waited, x, label)
        )
        if not len(alive):
            break
    result[alive] = weights
    return result


def scores(weights: Tensor, x: Tensor, hidden: int) -> Tensor:
    """Logits of class 1, float32 (G, n), of the inputs x (G, n, D)."""
    w1, b1, w2, b2, w3, b3 = _parts(weights, _layers(x.shape[2], hidden))
    inner = torch.baddbmm(b2, torch.baddbmm(b1, x, w1).relu_(), w2).relu_()
    return torch.baddbmm(b3, inner, w3)[:, :, 0]


def _layers(size: int, hidden: int) -> list[tuple[int, int]]:
    """Shapes of weights and of biases, in turn."""
    return [(size, hidden), (1, hidden), (hidden, hidden), (1, hidden), (hidden, 1), (1, 1)]


def _parts(flat: Tensor, layers: list[tuple[int, int]]) -> list[Tensor]:
    parts = flat.split([i * o for i, o in layers], dim=1)
    return [part.view(-1, i, o) for part, (i, o) in zip(parts, layers, strict=True)]


def _initial(layers: list[tuple[int, int]], count: int, generator: torch.Generator) -> Tensor:
    """Uniform weights and biases, as of Glorot and Bengio (2010); (count, W)."""
    parts = []
    for (inputs, outputs), bias in zip(layers[::2], layers[1::2], strict=True):
        # The last layer feeds a logistic unit, for which scikit-learn takes a third of the square.
        bound = math.sqrt((2.0 if outputs == 1 else 6.0) / (inputs + outputs))
        for wide in (inputs * outputs, bias[1]):
            parts.append((torch.rand(count, wide, generator=generator) * 2 - 1) * bound)
    return torch.cat(parts, dim=1)


class _Network:
    """The gradient of G networks, into one matrix."""

    def __init__(self, weights: Tensor, layers: list[tuple[int, int]]) -> None:
        self.flat = torch.zeros_like(weights)
        self._weights, self._gradients = _parts(weights, layers), _parts(self.flat, layers)

    def gradient(self, x: Tensor, label: Tensor) -> Tensor:
        """Set ``flat`` to the gradient of the mean loss; the sum of the losses, (G,)."""
        w1, b1, w2, b2, w3, b3 = self._weights
        g1, c1, g2, c2, g3, c3 = self._gradients
        outer = torch.baddbmm(b1, x, w1).relu_()
        inner = torch.baddbmm(b2, outer, w2).relu_()
        logit = torch.baddbmm(b3, inner, w3)
        loss = torch.nn.functional.softplus(logit) - label * logit
        back = (logit.sigmoid_() - label).div_(x.shape[1])
        torch.bmm(inner.mT, back, out=g3)
        torch.sum(back, 1, keepdim=True, out=c3)
        back = torch.ops.aten.threshold_backward(torch.bmm(back, w3.mT), inner, 0)
        torch.bmm(outer.mT, back, out=g2)
        torch.sum(back, 1, keepdim=True, out=c2)
        back = torch.ops.aten.threshold_backward(torch.bmm(back, w2.mT), outer, 0)
        torch.bmm(x.mT, back, out=g1)
        torch.sum(back, 1, keepdim=True, out=c1)
        return loss.sum((1, 2))
