"""The optimizer's step: exact gradients over all workers, clipping, AdamW, averaged weights.

All weights are one vector (``fast.FlatParameters``), so that each of these is one operation,
whatever the number of layers. Which rows a step takes and at what rate is the loop's matter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sbi_dist.errors import StageError
from sbi_dist.estimation.fast import FlatParameters
from sbi_dist.estimation.flow import ConditionalFlow
from sbi_dist.estimation.options import TrainOptions
from sbi_dist.estimation.workers import Workers

__all__ = ["Optimization"]

_BETAS = (0.9, 0.999)


class Optimization:
    """The weights of a flow on their way to the least mean of -log q(u | x).

    Args:
        flow: the flow, on the workers' device.
        options: clipping, weight decay, averaging, parts of a batch.
        workers: this worker's place; all take each step together.
        batch_size: rows of a batch over all workers.

    Attributes:
        loss: sum over steps since it was last set to zero of the batch's loss, a float64 scalar.
        skipped: how many of these steps had a gradient that is not a number and changed nothing.
        signal: sum over the workers of the signals given to the last step.
    """

    def __init__(
        self, flow: ConditionalFlow, options: TrainOptions, workers: Workers, batch_size: int
    ) -> None:
        self.flow, self.options, self.workers, self.batch_size = flow, options, workers, batch_size
        self._flat = FlatParameters(flow.parameters())
        self._optimizer = torch.optim.AdamW(
            [self._flat.values],
            lr=0.0,  # each step has its own
            betas=_BETAS,
            weight_decay=options.weight_decay,
            fused=True,
        )
        averaged = options.schedule == "average"
        self._average = self._flat.values.detach().clone() if averaged else None
        device = workers.device
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.signal = torch.zeros((), device=device)
        # The gradient, the loss and the signal travel between workers together.
        self._message = torch.zeros(len(self._flat.grad) + 2, device=device)
        self._replay: _Replay | None = None

    @property
    def weights(self) -> Tensor:
        """The weights to judge and to keep: the averaged ones, or else those of the last step."""
        return self._flat.values.detach() if self._average is None else self._average

    # ---- steps ----

    def step(
        self, u: Tensor, x: Tensor, rate: float, averaging: float, signal: float = 0.0
    ) -> None:
        """One step with this worker's rows of a batch.

        Args:
            u, x: float32 of shapes (n, D) and (n, *x_shape); the shares of all workers make
                ``batch_size`` rows.
            rate: learning rate.
            averaging: part of the new weights in the average.
            signal: a number for the other workers.

        Raises:
            StageError: the rows do not fit the memory; says how many would.
        """
        loss = self._gradient(u, x)
        with torch.no_grad():
            self._update(loss, rate, averaging, signal)

    def _update(self, loss: Tensor, rate: float, averaging: float, signal: float) -> None:
        gradient = self._flat.grad
        if self.workers.count > 1:
            message = self._message
            message[:-2].copy_(gradient)
            message[-2] = loss
            message[-1] = signal
            self.workers.add(message)
            gradient.copy_(message[:-2])
            loss, self.signal = message[-2], message[-1]
        bad = ~torch.isfinite(self._flat.clip_norm(self.options.clip_norm) + loss)
        # Known to torch's fused optimizers: they leave everything as it is where this is 1.
        self._optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        if self._average is not None:
            self._average.lerp_(self._flat.values, averaging)
        self.loss += torch.where(bad, 0.0, loss)
        self.skipped += bad

    def _gradient(self, u: Tensor, x: Tensor) -> Tensor:
        """Put this worker's part of the gradient into the flat vector; its part of the loss."""
        try:
            if u.device.type != "cuda" or self.options.dropout > 0:
                return self._accumulate(u, x)
            if self._replay is None:
                self._replay = _Replay(self._accumulate, u, x)
            return self._replay(u, x)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
        raise self._too_large(u, x)

    def _accumulate(self, u: Tensor, x: Tensor, parts: int | None = None) -> Tensor:
        self._flat.grad.zero_()
        total = torch.zeros((), device=u.device)
        parts = min(parts or self.options.accumulate, len(u))
        for part_u, part_x in zip(u.chunk(parts), x.chunk(parts), strict=True):
            loss = self.flow(part_u, part_x).sum() / -self.batch_size
            loss.backward()
            total += loss.detach()
        return total

    def _too_large(self, u: Tensor, x: Tensor) -> StageError:
        """What to say when a step does not fit the memory: how many rows do."""
        parts = 2 * self.options.accumulate
        while parts <= len(u):
            rows = math.ceil(len(u) / parts)
            try:
                self._accumulate(u[:rows], x[:rows], 1)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                parts *= 2
                continue
            return StageError(
                f"train: out of memory with {math.ceil(len(u) / self.options.accumulate):,} "
                f"simulations at once on {u.device.type}; {rows:,} fit: set "
                f"train.accumulate={parts}, which changes nothing else, or train.batch_size="
                f"{rows * self.workers.count}"
            )
        return StageError(
            f"train: out of memory on {u.device.type} even with one simulation at once; give the "
            "workers more memory, or make the network smaller (train.hidden_features, "
            "train.embedding)"
        )

    # ---- going back, and state ----

    @torch.no_grad()
    def go_back(self, weights: Tensor) -> None:
        """Start again from the given weights, with nothing remembered of the steps before."""
        self._flat.values.copy_(weights)
        if self._average is not None:
            self._average.copy_(weights)
        self._optimizer.state.clear()

    @contextlib.contextmanager
    @torch.no_grad()
    def judged(self) -> Iterator[None]:
        """While the block runs, the flow has the weights to judge."""
        if self._average is None:
            yield
            return
        stepped = self._flat.values.clone()
        self._flat.values.copy_(self._average)
        try:
            yield
        finally:
            self._flat.values.copy_(stepped)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "weights": self._flat.values.detach(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict()["state"],
            "loss": self.loss,
            "skipped": self.skipped,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Take up a state.

        Raises:
            ValueError: it is of another architecture.
        """
        if state["weights"].shape != self._flat.values.shape:
            raise ValueError("it is of another architecture")
        self._flat.values.copy_(state["weights"])
        if self._average is not None:
            self._average.copy_(state["average"])
        self._optimizer.load_state_dict(
            {**self._optimizer.state_dict(), "state": state["optimizer"]}
        )
        self.loss, self.skipped = state["loss"], state["skipped"]


class _Replay:
    """A function of tensors of fixed shapes on a GPU, recorded once as a CUDA graph."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], u: Tensor, x: Tensor) -> None:
        self._u, self._x = u.clone(), x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # Libraries set themselves up in their first calls, which can't be recorded.
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(self._u, self._x)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function(self._u, self._x)

    def __call__(self, u: Tensor, x: Tensor) -> Tensor:
        self._u.copy_(u)
        self._x.copy_(x)
        self._graph.replay()
        return self._result


def _out_of_memory(error: BaseException) -> bool:
    # torch raises a plain RuntimeError for memory of the machine itself.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory")
    )
