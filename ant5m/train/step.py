"""One optimizer step: forward and backward over micro-batches, clipping, update, loss scale.

All that a step decides, it decides on the device: whether an fp16 overflow skips it, the loss scale, how far
the learning rate is. So nothing in it waits for the device, and on a GPU the whole step is one CUDA graph:
a step of `ant-5m` is more than a thousand launches, which take a host longer than a GPU computes.

In half precision the matrices of the layers are cast once a step (`half_precision_weights`), and the products
read these. A parameter then costs 6 bytes of traffic a step. Autocast joins q, k, v in fp32 and casts that in
each micro-batch: 8 + 6 bytes.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ant5m.data.loader import document_starts
from ant5m.data.shards import IGNORE
from ant5m.device import DTYPES, autocast, casts
from ant5m.model.ant import Ant
from ant5m.ranks import Ranks
from ant5m.train.half_precision_weights import half_precision_weights
from ant5m.train.loss_scaler import LossScaler
from ant5m.train.losses import LoopLoss
from ant5m.train.optimizer import Optimizer, clip
from ant5m.train.schedule import Schedule

WARM_UP = 3
"""steps before the capture: kernels are compiled and memory is laid out by then"""

LEAST_SHARE = 1e-30
"""of the targets that count, so that a batch without any has a loss of 0"""

StepStats = torch.Tensor
"""What a step tells, fp32 [4] on the device: loss, gradient norm, whether it counted (1 or 0), loss scale."""


def _never() -> bool:
    return False


class Step:
    """A step as it is, each operation by itself.

    Args:
        schedule: gives the factor on the learning rates by the number of steps that counted.
        micro_batch_size: sequences computed at once; divides the batch.
        grad_clip: largest 2-norm of the gradient; 0: no limit.
        scaler: for fp16; then a step whose gradients overflow changes nothing but the scale.
        done: steps that counted before.
        eos_token_id: keeps attention inside the documents that end with it; None: inside the sequence.
        loop_loss: adds to the gradient of the cross-entropy.
        z_loss: weight of `kernels.linear_cross_entropy`'s, which a loss against loops knows by itself.
        position: int64 [1] on the device, the least step of the schedule that the factor is of, however few
            steps counted; None: 0.
        on_update: called behind the optimizer with 1, or 0 where the step was skipped; see `Callback`.
        ranks: each takes a step on its own sequences; gradients and losses are averaged over all of them.
        masked: some targets do not count; the mean is then over those that do, of the whole batch.
    """

    def __init__(
        self,
        net: Ant,
        optimizer: Optimizer,
        schedule: Schedule,
        micro_batch_size: int,
        grad_clip: float = 1.0,
        precision: str = "fp32",
        scaler: LossScaler | None = None,
        done: int = 0,
        eos_token_id: int | None = None,
        loop_loss: LoopLoss | None = None,
        position: torch.Tensor | None = None,
        on_update: Sequence[Callable[[torch.Tensor], None]] = (),
        ranks: Ranks | None = None,
        masked: bool = False,
        z_loss: float = 0.0,
    ):
        self.net, self.optimizer, self.scaler = net, optimizer, scaler
        self.ranks, self.masked, self.z_loss = ranks or Ranks(), masked, z_loss
        self.micro_batch_size, self.grad_clip, self.precision = micro_batch_size, grad_clip, precision
        self.eos_token_id, self.loop_loss, self.on_update = eos_token_id, loop_loss, on_update
        self._parameters = list(net.parameters())
        # A table, because only the device knows which step this is.
        factors = np.fromiter(map(schedule, range(schedule.steps)), np.float32, schedule.steps)
        self._factors = torch.tensor(factors, device=net.device)
        self._done = torch.tensor([done], device=net.device)
        self._position = torch.zeros_like(self._done) if position is None else position

    def __call__(
        self, input_ids: torch.Tensor, targets: torch.Tensor, should_abort: Callable[[], bool] = _never
    ) -> StepStats | None:
        """Take one step on int64 [B, T] on the device. None, and nothing has changed, when it was aborted
        between micro-batches."""
        result = self.gradients(input_ids, targets, should_abort)
        if result is None:
            return None
        self.ranks.sum(result)
        return self.update(result)

    def gradients(
        self, input_ids: torch.Tensor, targets: torch.Tensor, should_abort: Callable[[], bool] = _never
    ) -> torch.Tensor | None:
        """Leave the gradient of the mean loss, times the loss scale, in the parameters; returns the loss,
        fp32 [1]. None, and no gradients, when it was aborted.

        Where some targets do not count, it is [2], the second being the share of those that do: gradients and
        loss are still sums over these, divided by the number of all targets. Among several ranks these are
        this rank's parts of the sums, and what is returned is all of them in one buffer, the gradients first,
        so that one message sums them.
        """
        size = self.micro_batch_size
        share = size / (len(input_ids) * self.ranks.size)
        weights = self._half_precision_weights()
        loss = torch.zeros(1 + self.masked, device=self.net.device)
        for part, part_targets in zip(input_ids.split(size), targets.split(size), strict=True):
            if should_abort():
                self.optimizer.zero_grad()
                return None
            part_loss = self._loss(weights, part, part_targets)
            if self.masked:
                counted = (part_targets != IGNORE).to(loss.dtype).mean()
                loss[1] += counted * share
                part_loss = part_loss * counted
            (part_loss * (share if self.scaler is None else self.scaler.scale * share)).backward()
            loss[0] += part_loss.detach() * share
        return loss if self.ranks.alone else torch.cat([x.flatten() for x in (*self._gradients(), loss)])

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _unpack(self, joined: torch.Tensor) -> torch.Tensor:
        """Make the gradients views of the buffer, and return what stands behind them."""
        sizes = [x.numel() for x in self._gradients()]
        *parts, loss = torch.split(joined, [*sizes, 1 + self.masked])
        with_gradient = (p for p in self._parameters if p.grad is not None)
        for parameter, part in zip(with_gradient, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return loss

    def _half_precision_weights(self) -> dict[str, torch.Tensor]:
        """The matrices of the layers in the products' dtype; their gradients arrive in fp32."""
        if not casts(self.precision, self.net.device):
            return {}
        return half_precision_weights(self.net, DTYPES[self.precision])

    def _loss(
        self, weights: dict[str, torch.Tensor], input_ids: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """The mean loss over a micro-batch."""
        forward = functools.partial(self._forward, weights)
        with autocast(self.precision, self.net.device):
            if self.loop_loss is None:
                return forward(input_ids, targets=targets)
            return self.loop_loss(forward, input_ids, targets)

    def _forward(self, weights: dict[str, torch.Tensor], ids: torch.Tensor, **head: Any) -> torch.Tensor:
        if self.eos_token_id is not None:
            head["starts"] = document_starts(ids, self.eos_token_id)
        if self.z_loss and "targets" in head:
            head["z_loss"] = self.z_loss
        out: torch.Tensor = torch.func.functional_call(self.net, weights, (ids,), head)
        return out

    def rehearse(self, length: int) -> None:
        """Compute the loss of a micro-batch as a step does, and forget it: it decides who runs each op."""
        ids = torch.zeros((self.micro_batch_size, length), dtype=torch.int64, device=self.net.device)
        with autocast(self.precision, self.net.device):
            self._forward(self._half_precision_weights(), ids, targets=ids)

    def update(self, result: torch.Tensor) -> StepStats:
        """Unscale and clip the gradients, take the optimizer's step, and forget them. `result`: of
        `gradients`, summed over the ranks."""
        sums = result if self.ranks.alone else self._unpack(result)
        loss = sums[0]
        if self.masked:
            share = sums[1].clamp(min=LEAST_SHARE)
            loss = loss / share
            torch._foreach_div_(self._gradients(), share)
        if self.scaler is not None:
            self.scaler.unscale(self._gradients())
        norm = clip(self._parameters, self.grad_clip)
        counted = torch.ones_like(norm) if self.scaler is None else torch.isfinite(norm).to(norm.dtype)
        factor = self._factors.index_select(0, torch.maximum(self._done, self._position)).squeeze(0)
        self.optimizer.step(factor, None if self.scaler is None else 1 - counted)
        self.optimizer.zero_grad()
        self._done += counted.to(self._done.dtype)
        for on_update in self.on_update:
            on_update(counted)
        if self.scaler is None:
            return torch.stack((loss, norm, counted, counted))
        self.scaler.update(counted)
        return torch.stack((loss, norm, counted, self.scaler.scale))


class CapturedStep:
    """A `Step` as one CUDA graph: the first calls run as they are, the next one is captured and replayed.

    Every call is a step of the training. Where the capture fails, a warning says why, and steps go on as
    they are. Among several ranks it is two graphs with the sum between them: a sum inside a graph can hang
    when the process group is destroyed (pytorch#115388).
    """

    def __init__(self, step: Step):
        self.step = step
        self._replay: Callable[[], StepStats] | None = None
        self._calls = 0
        self._batch: tuple[torch.Tensor, torch.Tensor] | None = None
        # What comes before a capture must not run on the default stream either.
        self._stream = torch.cuda.Stream(step.net.device)
        # With no more than two steps queued, a GPU never idles, and the host can stop soon.
        self._ends = [torch.cuda.Event(blocking=True) for _ in range(2)]

    def __call__(
        self, input_ids: torch.Tensor, targets: torch.Tensor, should_abort: Callable[[], bool] = _never
    ) -> StepStats:
        """As `Step`; it is too short to be aborted."""
        end = self._ends[self._calls % 2]
        end.synchronize()
        if self._batch is None:
            self._batch = torch.empty_like(input_ids), torch.empty_like(targets)
        for place, given in zip(self._batch, (input_ids, targets), strict=True):
            place.copy_(given)
        if self._calls == WARM_UP:
            self._capture()
        self._calls += 1
        stats = self._warm_up() if self._replay is None else self._replay().clone()
        end.record(torch.cuda.current_stream(self.step.net.device))
        return stats

    @property
    def captured(self) -> bool:
        return self._replay is not None

    def _run(self) -> StepStats:
        assert self._batch is not None
        stats = self.step(*self._batch)
        assert stats is not None
        return stats

    def _warm_up(self) -> StepStats:
        current = torch.cuda.current_stream(self.step.net.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            stats = self._run()
        current.wait_stream(self._stream)
        return stats

    def _capture(self) -> None:
        reason = ""
        try:
            replay = self._record_step()
        except RuntimeError as error:
            self.step.optimizer.zero_grad()
            reason = str(error).strip().splitlines()[0]
        if any(self.step.ranks.most(bool(reason))):
            reason = reason or "it failed in another process"
            warnings.warn(f"the step could not be captured as a CUDA graph: {reason}", stacklevel=2)
            return
        self._replay = replay

    def _record_step(self) -> Callable[[], StepStats]:
        if self.step.ranks.alone:
            return _Graph(self._run, self._stream, "global")
        # NCCL's watchdog thread asks for events of its own meanwhile: only this thread's calls are captured.
        gradients = _Graph(self._run_gradients, self._stream, "thread_local")
        update = _Graph(lambda: self.step.update(gradients.result), self._stream, "thread_local")

        def replay() -> StepStats:
            self.step.ranks.sum(gradients())
            return update()

        return replay

    def _run_gradients(self) -> torch.Tensor:
        assert self._batch is not None
        result = self.step.gradients(*self._batch)
        assert result is not None
        return result


class _Graph:
    """A CUDA graph of `run`, which only queues work on fixed memory; calling it does that work again.

    `result` is what `run` returned: the memory that every call fills again.
    """

    def __init__(self, run: Callable[[], torch.Tensor], stream: torch.cuda.Stream, errors: str):
        self._graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back where the capture fails; torch's own does not.
        current = torch.cuda.current_stream(stream.device)
        graph = torch.cuda.graph(self._graph, stream=stream, capture_error_mode=errors)
        with torch.cuda.stream(current), graph:
            self.result = run()

    def __call__(self) -> torch.Tensor:
        self._graph.replay()
        return self.result


def make_step(step: Step) -> Step | CapturedStep:
    """The way that a step is taken on its device."""
    return CapturedStep(step) if step.net.device.type == "cuda" else step
