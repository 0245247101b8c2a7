"""The training loop."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ant5m.data.loader import Loader
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import Evaluation, evaluate
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import checkpoints, latest_checkpoint
from ant5m.model.doctor import count_flops
from ant5m.model.generation import generate
from ant5m.train.checkpoint import (
    load_checkpoint,
    prune_checkpoints,
    random_state,
    save_checkpoint,
    set_random_state,
)
from ant5m.train.losses import make_loop_loss
from ant5m.train.metrics import Metrics
from ant5m.train.optimizer import Optimizer
from ant5m.train.plan import keeps_tokens
from ant5m.train.precision import LossScaler, autocast, choose_precision, peak_flops
from ant5m.train.progress import TrainingProgress
from ant5m.train.run import Run
from ant5m.train.schedule import Schedule
from ant5m.train.step import CapturedStep, Numbers, Step, make_step
from ant5m.train.stop import Stop

PROMPTS = ("The", "Returns a list of", "This is an example of how to", "The history of the")
SAMPLE_TOKENS = 64
READ_SECONDS = 1.0
"""between two readings of the loss from the device: each one waits for it"""


class NonFiniteLoss(UserError):
    """Training cannot go on: the loss or the gradients are no numbers any more."""


@dataclass
class _Logged:
    """One step that was taken; its numbers stay on the device until they are read."""

    numbers: Numbers
    tokens: int


class Trainer:
    """Trains the model of a run that `ant5m.train.plan` has completed, from its newest checkpoint on.

    Between two steps, everything that the rest of the run depends on is in the checkpoint's files: a run that
    was stopped and resumed is, on a CPU, the same bit for bit as one that was not.
    """

    def __init__(self, run: Run, net: Ant, train: Shards, validation: Shards, tokenizer: Tokenizer):
        config = run.config
        assert config.steps and config.batch_size and config.micro_batch_size and config.sequence_length
        assert config.learning_rate
        self.learning_rate = config.learning_rate
        self.run, self.config, self.net, self.tokenizer = run, config, net, tokenizer
        self.validation = validation
        self.steps = config.steps
        self.precision = choose_precision(config.precision, net.device)
        self.optimizer = Optimizer(
            net,
            config.optimizer,
            config.learning_rate,
            config.muon_learning_rate,
            config.betas,
            config.eps,
            config.weight_decay,
            self.precision,
        )
        self.schedule = Schedule(
            config.steps, config.schedule, config.warmup, config.decay, config.final_rate
        )
        resident = net.device if keeps_tokens(train.num_tokens, net.device) else None
        self.loader = Loader(train, config.batch_size, config.sequence_length, config.seed, resident=resident)
        self.scaler = LossScaler(net.device) if self.precision == "fp16" else None
        self.step = 0
        self.tokens = 0
        self.skipped = 0
        self.seconds = 0.0
        self._pending: list[_Logged] = []
        self._resume()
        self._acted = self.step  # no validation, sample or checkpoint is due at it or before
        self._eos_token_id = train.eos_token_id if config.document_mask else None
        self._turn = self.steps - round(config.loop_loss_share * self.steps)  # where the loop loss sets in
        self.take_step = self._make_step()
        run.claim()
        self.metrics = Metrics(run.folder, self.step)
        flops = 3 * sum(count_flops(net.config, config.sequence_length).values())
        self.progress = TrainingProgress(self.steps, self.step, flops, peak_flops(net.device, self.precision))

    def fit(self, stop: Stop) -> None:
        """Train to the last step, or until `stop` asks to end; the state is saved in both cases.

        Raises `NonFiniteLoss` without saving when the training has broken down.
        """
        self._read_at = time.monotonic()
        self._read_tokens = self.tokens
        with self.progress:
            try:
                while self.step < self.steps and not stop.reason:
                    if self._train_step(stop):
                        self._after_step()
                self._read()
                self._save()
            except torch.OutOfMemoryError:
                raise self._too_large() from None
            finally:
                self.metrics.close()

    def _train_step(self, stop: Stop) -> bool:
        """One optimizer step; False when it was given up to stop.

        With a loss scale the device decides whether the step counts, and until the next `_read` `self.step`
        may be too high.
        """
        before = self.loader.state_dict()
        input_ids, targets = (_to_device(x, self.net.device) for x in self.loader.next())
        numbers = self.take_step(input_ids, targets, lambda: stop.reason is not None)
        if numbers is None:
            # The step is taken up again as a whole when the run is resumed.
            self.loader.load_state_dict(before)
            return False
        self.step += 1
        self.tokens += input_ids.numel()
        self._pending.append(_Logged(numbers, self.tokens))
        return True

    def _make_step(self) -> Step | CapturedStep:
        """How the steps after `self.step` are taken."""
        config = self.config
        assert config.micro_batch_size
        self._turned = config.loop_loss == "none" or self.step >= self._turn
        late = config.loop_loss != "none" and self._turned
        step = Step(
            self.net,
            self.optimizer,
            self.schedule,
            config.micro_batch_size,
            config.grad_clip,
            self.precision,
            self.scaler,
            self.step,
            self._eos_token_id,
            make_loop_loss(config.loop_loss, config.loop_loss_weight) if late else None,
        )
        return make_step(step)

    def _after_step(self) -> None:
        actions = (
            (self.config.eval_every, self._validate),
            (self.config.sample_every, self._sample),
            (self.config.checkpoint_every, self._save),
        )
        turning = not self._turned and self.step >= self._turn
        due = self.step == self.steps or any(every and self.step % every == 0 for every, _ in actions)
        if due or turning or time.monotonic() - self._read_at >= READ_SECONDS:
            self._read()
        if turning and self.step >= self._turn:  # of steps that counted
            self.take_step = self._make_step()
        if self.step == self._acted or self._pending:
            return
        self._acted = self.step
        for every, action in actions:
            # What the last step owes is done when the run is finished.
            if every and self.step % every == 0 and self.step < self.steps:
                action()
                self._lap()

    def _read(self) -> None:
        """Bring the pending losses over from the device and write them down."""
        elapsed = self._lap()
        if not self._pending:
            return
        numbers = torch.stack([one.numbers for one in self._pending]).tolist()
        speed = (self.tokens - self._read_tokens) / max(elapsed, 1e-9)
        self._read_tokens = self.tokens
        self.step -= len(self._pending)
        shown = None
        for one, (loss, norm, counted, scale) in zip(self._pending, numbers, strict=True):
            if not counted:
                self.skipped += 1
                if scale < 1:
                    raise self._broken("the gradients overflow fp16 at any loss scale", self.step + 1)
                continue
            self.step += 1
            if loss - loss != 0 or norm - norm != 0:
                raise self._broken(f"the loss is {loss} and the gradient's norm {norm}", self.step)
            rate = self.learning_rate * self.schedule(self.step - 1)
            self.metrics.write(
                "train",
                self.step,
                loss=loss,
                grad_norm=norm,
                learning_rate=rate,
                tokens=one.tokens,
                skipped=self.skipped,
                tokens_per_second=round(speed, 1),
                seconds=round(self.seconds, 2),
            )
            shown = self.step, loss, rate, speed
        self._pending.clear()
        if shown:
            self.progress.update(*shown)

    def _lap(self) -> float:
        """Seconds since the last call, added to the run's time."""
        now = time.monotonic()
        elapsed, self._read_at = now - self._read_at, now
        self.seconds += elapsed
        return elapsed

    def _validate(self) -> None:
        result = self.evaluate(self.config.eval_tokens)
        self.metrics.write("validation", self.step, loss=result.loss, tokens=result.tokens)
        self.progress.print(f"step {self.step:,}: validation loss {result.loss:.3f}")

    def evaluate(self, limit_tokens: int | None) -> Evaluation:
        """Perplexities on the validation split, on a GPU in the precision of the training."""
        assert self.config.micro_batch_size
        with autocast(self.precision, self.net.device):
            return evaluate(
                self.net,
                self.validation,
                batch_size=self.config.micro_batch_size,
                sequence_length=self.config.sequence_length,
                limit_tokens=limit_tokens,
                document_mask=self.config.document_mask,
            )

    @property
    def prompts(self) -> Sequence[str]:
        """Those of the standard ones that leave room in the model's context, or the empty one."""
        context = self.net.config.max_position_embeddings
        return [prompt for prompt in PROMPTS if len(self.tokenizer.encode(prompt)) < context] or [""]

    def _sample(self) -> None:
        prompts = self.prompts
        texts = generate(
            self.net, self.tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, seed=self.config.seed
        )
        samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        self.metrics.write("sample", self.step, samples=samples)
        shown = " ".join(f"{prompts[0]}{texts[0]}".split())
        self.progress.print(f"step {self.step:,}: {shown}")

    def _save(self) -> None:
        state = {
            "tokenizer": self.tokenizer.fingerprint,
            "loader": self.loader.state_dict(),
            "random": random_state(self.net.device),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "seconds": self.seconds,
        }
        if not torch.isfinite(torch.nn.utils.get_total_norm(list(self.net.parameters()))):
            raise self._broken("the weights are no numbers any more", self.step)
        save_checkpoint(self.run.checkpoints, self.step, self.net, self.optimizer, state)
        prune_checkpoints(self.run.checkpoints, self.config.keep_last)

    def _resume(self) -> None:
        folder = latest_checkpoint(self.run.folder)
        if folder is None:
            if checkpoints(self.run.checkpoints):
                raise UserError(f"no checkpoint in {self.run.checkpoints} is good: start a new run")
            return
        state = load_checkpoint(folder, self.net, self.optimizer)
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise UserError(f"{folder} was trained with another tokenizer than {self.run.tokenizer}")
        self.loader.load_state_dict(state["loader"])
        set_random_state(state["random"], self.net.device)
        if self.scaler and state["scaler"]:
            self.scaler = LossScaler(self.net.device, **state["scaler"])
        self.step = state["step"]
        self.tokens, self.skipped, self.seconds = state["tokens"], state["skipped"], state["seconds"]

    def _too_large(self) -> UserError:
        rows = self.config.micro_batch_size
        assert rows
        remedy = f"--micro-batch-size {rows // 2}" if rows > 1 else "a shorter --sequence-length"
        return UserError(
            f"the device has no memory for {rows} sequences of {self.config.sequence_length:,} tokens at once"
            f": start a new run with {remedy}" + (", or resume this one with it" if rows > 1 else "")
        )

    def _broken(self, what: str, step: int) -> NonFiniteLoss:
        good = latest_checkpoint(self.run.folder)
        rescue = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
        return NonFiniteLoss(
            f"training broke down at step {step}: {what}; {rescue}. Start anew with a lower learning rate"
        )


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x there; from pinned memory, so that a GPU's work does not have to be waited for."""
    if device.type == "cpu" or x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True)
