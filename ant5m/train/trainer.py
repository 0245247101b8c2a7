"""The training loop: it takes steps, reads what they tell, and lets callbacks act between them."""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from ant5m import kernels
from ant5m.data.loader import Loader
from ant5m.device import autocast
from ant5m.errors import UserError
from ant5m.model.ant import Ant
from ant5m.ranks import Ranks
from ant5m.train.callback import Callback
from ant5m.train.checkpoint import random_state, set_random_state
from ant5m.train.loss_scaler import LossScaler
from ant5m.train.losses import LoopLoss
from ant5m.train.optimizer import Optimizer
from ant5m.train.pace import Pace
from ant5m.train.schedule import Schedule
from ant5m.train.settings import Settings
from ant5m.train.step import CapturedStep, Step, StepStats, make_step
from ant5m.train.stop import REASONS, Stop

READ_SECONDS = 1.0
"""between two readings of the loss from the device: each one waits for it"""


class NonFiniteLoss(UserError):
    """Training cannot go on: the loss, the gradients or the weights are NaN or infinite."""


class Trainer:
    """Trains a model as `settings` say, from its first step or from the state that was loaded.

    It opens and writes nothing: what goes to the disk or the terminal, its callbacks write. Between two
    steps, everything that the rest of the run depends on is in the model, the optimizer and `state_dict`: a
    run that was stopped and resumed is, on a CPU, the same bit for bit as one that was not.
    """

    def __init__(
        self,
        settings: Settings,
        net: Ant,
        loader: Loader,
        eos_token_id: int | None = None,
        callbacks: Sequence[Callback] = (),
        ranks: Ranks | None = None,
        pace: Pace | None = None,
    ):
        """`eos_token_id`: keeps attention inside documents, which end with it; None: inside sequences.
        `loader`: gives this rank's share of each batch. `pace`: of a run that a time limit ends."""
        self.settings, self.net, self.loader, self.callbacks = settings, net, loader, callbacks
        self.ranks, self.pace = ranks or Ranks(), pace
        self._active = [c for c in callbacks if c.everywhere or self.ranks.is_first]
        self.eos_token_id = eos_token_id
        self.optimizer = Optimizer(
            net,
            settings.optimizer,
            settings.learning_rate,
            settings.muon_learning_rate,
            settings.betas,
            settings.eps,
            settings.weight_decay,
            settings.precision,
        )
        self.schedule = Schedule(
            settings.steps, settings.schedule, settings.warmup, settings.decay, settings.final_rate
        )
        self.scaler = LossScaler(net.device) if settings.precision == "fp16" else None
        self.step = 0
        """steps that are done, without those that fp16 skipped or whose statistics were not read yet"""
        self.tokens = 0
        self.skipped = 0
        self.seconds = 0.0
        self.ended = ""
        """why the training ends before its last step and is complete nevertheless; empty: it does not"""
        self.position = 0
        """the least step of the schedule, by the clock, that the learning rate is of"""
        self._position = torch.zeros(1, dtype=torch.int64, device=net.device)
        self._seconds_per_token = 0.0
        """at the last reading"""
        self._unread: list[tuple[StepStats, int, int]] = []
        """of the steps since the last reading: what they tell, the tokens by then, the position"""
        self.context = settings.sequence_length
        """tokens of the pieces into which sequences are cut"""
        self._loop_loss: LoopLoss | None = None
        self._take_step: Step | CapturedStep | None = None
        self._last_batch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._read_at = time.monotonic()
        self._read_tokens = 0

    def fit(self, stop: Stop) -> str | None:
        """Train to the last step, or until a callback ends the training or `stop`, of any rank, asks to end:
        its reason is returned then.

        Raises `NonFiniteLoss` when the training diverged, and `UserError` where memory does not suffice.
        """
        self._read_at = time.monotonic()
        self._read_tokens = self.tokens
        if self.pace is not None:
            self.pace.start(max(self.step, self.position))
        reason = None
        try:
            for callback in self._active:
                callback.on_start(self)
            while not self.complete:
                reason = self._agree(stop)
                if reason or self.complete:
                    break
                if self._train_step(stop):
                    self._between_steps()
            self.flush_metrics()
            self._check_model()
            for callback in self._active:
                callback.on_end(self)
        except torch.OutOfMemoryError:
            raise self._too_large() from None
        finally:
            for callback in self._active:
                callback.close()
        return reason

    @property
    def complete(self) -> bool:
        """Whether no step is left to be taken."""
        return bool(self.ended) or self.step == self.settings.steps

    @property
    def waited(self) -> float:
        """Seconds since a step or callback ended: of the present callback, with the check before it."""
        return time.monotonic() - self._read_at

    def end(self, reason: str) -> None:
        """Let this step be the last one, as if the run had been planned so."""
        self.ended = reason

    def use_loss(self, loop_loss: LoopLoss | None) -> None:
        """What the gradients of the following steps are of; None: the cross-entropy alone."""
        self._loop_loss, self._take_step = loop_loss, None

    def use_context(self, length: int) -> None:
        """Cut the sequences of the following steps into pieces of so many tokens."""
        self.context, self._take_step = length, None

    def log(self, kind: str, **values: Any) -> None:
        """Tell all callbacks what happened at the present step."""
        for callback in self._active:
            callback.on_log(self, kind, values)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors, in plain values for JSON."""
        states = {callback.name: callback.state_dict() for callback in self.callbacks if callback.name}
        return {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "random": random_state(self.net.device),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "kernels": kernels.choices(),
            **({"position": self.position, "ended": self.ended} if self.pace else {}),
            **({"callbacks": states} if states else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.loader.load_state_dict(state["loader"])
        set_random_state(state["random"], self.net.device)
        kernels.restore(state.get("kernels", {}))
        if self.scaler and state["scaler"]:
            self.scaler = LossScaler(self.net.device, **state["scaler"])
        self.step = state["step"]
        self.tokens, self.skipped, self.seconds = state["tokens"], state["skipped"], state["seconds"]
        self._move(state.get("position", 0))
        self.ended = state.get("ended", "")
        states = state.get("callbacks", {})
        for callback in self.callbacks:
            if callback.name in states:
                callback.load_state_dict(states[callback.name])

    def _agree(self, stop: Stop) -> str | None:
        """Why to stop now, the same on all ranks; what is due by the clock of one of them is done on all."""
        reading = time.monotonic() - self._read_at >= READ_SECONDS
        overdue = (callback in self._active and callback.is_overdue() for callback in self.callbacks)
        code, reads, position, *acts = self.ranks.most(stop.code, reading, self._position_here(), *overdue)
        if position >= self.settings.steps:
            self.end("the time limit")
        elif position > self.position:
            self._move(position)
        if reads or any(acts):
            self.flush_metrics()
        self._act([callback for callback, due in zip(self.callbacks, acts, strict=True) if due])
        return REASONS[code]

    def _position_here(self) -> int:
        """The least position of the next step, by this rank's clock."""
        if self.pace is None:
            return 0
        speed = max(self._seconds_per_token, self.seconds / self.tokens if self.tokens else 0.0)
        return self.pace.position(self._attempts, speed)

    @property
    def _attempts(self) -> int:
        """Steps that were taken, with those that fp16 skipped."""
        return self.tokens // (self.settings.batch_size * self.settings.sequence_length)

    def _move(self, position: int) -> None:
        self.position = position
        self._position.fill_(position)
        self.loader.reach(position * self.settings.batch_size)  # phases of a mixture are of the schedule, too

    def _should_abort(self, stop: Stop) -> bool:
        # One rank cannot leave a step without the others.
        return self.ranks.alone and (stop.reason is not None or self._position_here() >= self.settings.steps)

    def _train_step(self, stop: Stop) -> bool:
        """One optimizer step; False when it was aborted to stop."""
        before = self.loader.state_dict()
        batch = (x.reshape(-1, self.context) for x in self.loader.next())
        input_ids, targets = (_to_device(x, self.net.device) for x in batch)
        if self._take_step is None:
            self._take_step = self._make_step()
        stats = self._take_step(input_ids, targets, lambda: self._should_abort(stop))
        if stats is None:
            # The step is taken again as a whole when the run is resumed.
            self.loader.load_state_dict(before)
            return False
        self._last_batch = input_ids, targets
        self.tokens += input_ids.numel() * self.ranks.size
        self._unread.append((stats, self.tokens, self.position))
        return True

    def _make_step(self) -> Step | CapturedStep:
        step = Step(
            self.net,
            self.optimizer,
            self.schedule,
            self._micro_batch_size(self.context),
            self.settings.grad_clip,
            self.settings.precision,
            self.scaler,
            self.step,
            self.eos_token_id,
            self._loop_loss,
            self._position,
            [c.on_update for c in self.callbacks if type(c).on_update is not Callback.on_update],
            self.ranks,
            self.loader.masked,
            self.settings.z_loss,
        )
        self._agree_on_kernels(step)
        return make_step(step)

    def _micro_batch_size(self, length: int) -> int:
        """Rows of so many tokens that are computed at once."""
        return self.settings.micro_batch_size * self.settings.sequence_length // length

    def _agree_on_kernels(self, step: Step) -> None:
        """What is chosen by stopwatch, rank 0 chooses for all: another might find a near tie to be the other
        way, and its part of the sums would have other bits."""
        if self.ranks.alone:
            return
        if self.ranks.is_first:
            step.rehearse(self.context)
        kernels.restore(self.ranks.share(kernels.choices()))

    def _between_steps(self) -> None:
        # With a loss scale the device decides whether a step counts: this is the most it can be.
        reached = self.step + len(self._unread)
        last = self.settings.steps
        if reached < last and not any(callback.is_due(reached) for callback in self.callbacks):
            return
        before = self.step
        self.flush_metrics()
        # Where fp16 skipped all steps since, what was due has been done; what the last step owes is done
        # when the run is finished.
        if before < self.step < last:
            self._act([callback for callback in self.callbacks if callback.is_due(self.step)])

    def _act(self, due: list[Callback]) -> None:
        if due:
            self._check_model()
        for callback in due:
            if callback in self._active:
                callback.act(self)
                self._add_elapsed()

    def flush_metrics(self) -> None:
        """Bring what the steps tell over from the device, and log it."""
        elapsed = self._add_elapsed()
        unread, self._unread = self._unread, []
        if not unread:
            return
        self.ranks.most(0)  # that all began the last step: else its sum, and this GPU, would never end
        speed = (self.tokens - self._read_tokens) / max(elapsed, 1e-9)
        self._seconds_per_token = 1 / max(speed, 1e-9)
        self._read_tokens = self.tokens
        read = torch.stack([stats for stats, _, _ in unread]).tolist()
        for (loss, norm, counted, scale), (_, tokens, position) in zip(read, unread, strict=True):
            if not counted:
                self.skipped += 1
                if scale < 1:
                    raise self._diverged("the gradients overflow fp16 at any loss scale", self.step + 1)
                continue
            self.step += 1
            if loss - loss != 0 or norm - norm != 0:
                raise self._diverged(f"the loss is {loss} and the gradient's norm {norm}", self.step)
            self.log(
                "train",
                loss=loss,
                grad_norm=norm,
                learning_rate=self.settings.learning_rate * self.schedule(max(self.step - 1, position)),
                tokens=tokens,
                skipped=self.skipped,
                tokens_per_second=round(speed, 1),
                seconds=round(self.seconds, 2),
                **({"position": position} if self.pace else {}),
            )

    def _add_elapsed(self) -> float:
        """Seconds since the last call, added to the run's time."""
        now = time.monotonic()
        elapsed, self._read_at = now - self._read_at, now
        self.seconds += elapsed
        return elapsed

    def _check_model(self) -> None:
        """Before anything is written, sampled or evaluated: the step told the loss of the weights before its
        update, and weights that are finite may have products that are not."""
        if not torch.isfinite(torch.nn.utils.get_total_norm(list(self.net.parameters()))):
            raise self._diverged("the weights are NaN or infinite", self.step)
        if self._last_batch is not None:
            # As the step has them: no other kernel is chosen.
            rows = slice(self._micro_batch_size(self._last_batch[0].shape[1]))
            self.net.eval()
            with torch.no_grad(), autocast(self.settings.precision, self.net.device):
                loss = self.net(*(x[rows] for x in self._last_batch)).item()
            self.net.train()
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", self.step)
        if not self.ranks.agree(_sum_of_bits(self.net)):
            raise UserError(
                f"the processes hold different weights at step {self.step}: a device or a driver is faulty. "
                "Resume from the last checkpoint, and test the GPUs one by one with --device cuda:0"
            )

    def _diverged(self, what: str, step: int) -> NonFiniteLoss:
        return NonFiniteLoss(f"training diverged at step {step}: {what}")

    def _too_large(self) -> UserError:
        rows = self.settings.micro_batch_size
        remedy = f"--micro-batch-size {rows // 2}" if rows > 1 else "a shorter --sequence-length"
        return UserError(
            f"the device has no memory for {rows} sequences of {self.settings.sequence_length:,} tokens at "
            f"once: start a new run with {remedy}" + (", or resume this one with it" if rows > 1 else "")
        )


def _sum_of_bits(net: Ant) -> int:
    """Differs where weights differ."""
    sums = [p.detach().view(torch.int32).sum(dtype=torch.int64) for p in net.parameters()]
    return int(torch.stack(sums).sum())


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x there; from pinned memory, so that a GPU's work does not have to be waited for."""
    if x.device == device:
        return x
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
