"""The training loop."""

import time
from dataclasses import dataclass

import torch

from ant5m.data.loader import Loader
from ant5m.data.shards import Shards
from ant5m.data.tokenizer import Tokenizer
from ant5m.errors import UserError
from ant5m.eval.perplexity import Evaluation, evaluate
from ant5m.model.ant import Ant
from ant5m.model.checkpoint import latest_checkpoint
from ant5m.model.doctor import count_flops
from ant5m.model.generation import generate
from ant5m.train.checkpoint import (
    load_checkpoint,
    prune_checkpoints,
    random_state,
    save_checkpoint,
    set_random_state,
)
from ant5m.train.metrics import Metrics
from ant5m.train.optimizer import Optimizer, clip
from ant5m.train.precision import LossScaler, autocast, choose_precision, peak_flops
from ant5m.train.progress import TrainingProgress
from ant5m.train.run import Run
from ant5m.train.schedule import Schedule
from ant5m.train.stop import Stop

PROMPTS = ("The", "Returns a list of", "This is an example of how to", "The history of the")
SAMPLE_TOKENS = 64
READ_SECONDS = 1.0
"""between two readings of the loss from the device: each one waits for it"""


class NonFiniteLoss(UserError):
    """Training cannot go on: the loss or the gradients are no numbers any more."""


@dataclass
class _Logged:
    """One finished step; the numbers stay on the device until they are read."""

    step: int
    loss: torch.Tensor
    norm: torch.Tensor
    factor: float
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
        )
        self.schedule = Schedule(
            config.steps, config.schedule, config.warmup, config.decay, config.final_rate
        )
        self.loader = Loader(train, config.batch_size, config.sequence_length, config.seed)
        self.scaler = LossScaler() if self.precision == "fp16" else None
        self.parameters = list(net.parameters())
        self.step = 0
        self.tokens = 0
        self.skipped = 0
        self.seconds = 0.0
        self.best_loss: float | None = None
        self._pending: list[_Logged] = []
        self._resume()
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
            finally:
                self.metrics.close()

    def _train_step(self, stop: Stop) -> bool:
        """One optimizer step; False when it did not count: skipped for an overflow, or given up to stop."""
        before = self.loader.state_dict()
        input_ids, targets = (x.to(self.net.device, non_blocking=True) for x in self.loader.next())
        size = self.config.micro_batch_size
        assert size
        scale = size / len(input_ids) * (self.scaler.scale if self.scaler else 1.0)
        loss = torch.zeros((), device=self.net.device)
        for part, part_targets in zip(input_ids.split(size), targets.split(size), strict=True):
            if stop.reason:
                # The step is taken up again as a whole when the run is resumed.
                self.loader.load_state_dict(before)
                self.optimizer.zero_grad()
                return False
            with autocast(self.precision, self.net.device):
                part_loss = self.net(part, part_targets)
            (part_loss * scale).backward()
            loss += part_loss.detach() * (size / len(input_ids))
        return self._update(loss, input_ids.numel())

    def _update(self, loss: torch.Tensor, tokens: int) -> bool:
        if self.scaler:
            self.scaler.unscale([p.grad for p in self.parameters if p.grad is not None])
        norm = clip(self.parameters, self.config.grad_clip)
        self.tokens += tokens
        if self.scaler and not self._fits_fp16(norm):
            self.optimizer.zero_grad()
            return False
        factor = self.schedule(self.step)
        self.optimizer.step(factor)
        self.optimizer.zero_grad()
        self.step += 1
        self._pending.append(_Logged(self.step, loss, norm, factor, self.tokens))
        return True

    def _fits_fp16(self, norm: torch.Tensor) -> bool:
        assert self.scaler
        finite = bool(torch.isfinite(norm))
        self.scaler.update(finite)
        self.skipped += not finite
        if self.scaler.scale < 1:
            raise self._broken("the gradients overflow fp16 at any loss scale", self.step + 1)
        return finite

    def _after_step(self) -> None:
        if time.monotonic() - self._read_at >= READ_SECONDS:
            self._read()
        for every, action in (
            (self.config.eval_every, self._validate),
            (self.config.sample_every, self._sample),
            (self.config.checkpoint_every, self._save),
        ):
            # What the last step owes is done when the run is finished.
            if every and self.step % every == 0 and self.step < self.steps:
                self._read()
                action()
                self._lap()

    def _read(self) -> None:
        """Bring the pending losses over from the device and write them down."""
        elapsed = self._lap()
        if not self._pending:
            return
        numbers = torch.stack(
            [torch.stack((one.loss.float(), one.norm.float())) for one in self._pending]
        ).tolist()
        speed = (self.tokens - self._read_tokens) / max(elapsed, 1e-9)
        self._read_tokens = self.tokens
        for one, (loss, norm) in zip(self._pending, numbers, strict=True):
            if loss - loss != 0 or norm - norm != 0:
                raise self._broken(f"the loss is {loss} and the gradient's norm {norm}", one.step)
            self.metrics.write(
                "train",
                one.step,
                loss=loss,
                grad_norm=norm,
                learning_rate=self.learning_rate * one.factor,
                tokens=one.tokens,
                skipped=self.skipped,
                tokens_per_second=round(speed, 1),
                seconds=round(self.seconds, 2),
            )
        last = self._pending[-1]
        self._pending.clear()
        self.progress.update(last.step, loss, self.learning_rate * last.factor, speed)

    def _lap(self) -> float:
        """Seconds since the last call, added to the run's time."""
        now = time.monotonic()
        elapsed, self._read_at = now - self._read_at, now
        self.seconds += elapsed
        return elapsed

    def _validate(self) -> None:
        result = self.evaluate(self.config.eval_tokens)
        self.best_loss = min(result.loss, self.best_loss or result.loss)
        self.metrics.write("validation", self.step, loss=result.loss, tokens=result.tokens)
        self.progress.print(f"step {self.step:,}: validation loss {result.loss:.3f}")

    def evaluate(self, limit_tokens: int | None) -> Evaluation:
        """Perplexities on the validation split, in the precision of the training."""
        assert self.config.micro_batch_size
        with autocast(self.precision, self.net.device):
            return evaluate(
                self.net,
                self.validation,
                batch_size=self.config.micro_batch_size,
                sequence_length=self.config.sequence_length,
                limit_tokens=limit_tokens,
            )

    def _sample(self) -> None:
        texts = generate(
            self.net, self.tokenizer, PROMPTS, max_new_tokens=SAMPLE_TOKENS, seed=self.config.seed
        )
        samples = [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
        self.metrics.write("sample", self.step, samples=samples)
        shown = " ".join(f"{PROMPTS[0]}{texts[0]}".split())
        self.progress.print(f"step {self.step:,}: {shown}")

    def _save(self) -> None:
        state = {
            "tokenizer": self.tokenizer.fingerprint,
            "loader": self.loader.state_dict(),
            "random": random_state(self.net.device),
            "scaler": vars(self.scaler) if self.scaler else None,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "best_loss": self.best_loss,
        }
        if not torch.isfinite(torch.nn.utils.get_total_norm(self.parameters)):
            raise self._broken("the weights are no numbers any more", self.step)
        save_checkpoint(self.run.checkpoints, self.step, self.net, self.optimizer, state)
        prune_checkpoints(self.run.checkpoints, self.config.keep_last)

    def _resume(self) -> None:
        folder = latest_checkpoint(self.run.folder)
        if folder is None:
            if any(self.run.checkpoints.glob("step-*")):
                raise UserError(f"no checkpoint in {self.run.checkpoints} is good: start a new run")
            return
        state = load_checkpoint(folder, self.net, self.optimizer)
        if state["tokenizer"] != self.tokenizer.fingerprint:
            raise UserError(f"{folder} was trained with another tokenizer than {self.run.tokenizer}")
        self.loader.load_state_dict(state["loader"])
        set_random_state(state["random"], self.net.device)
        if self.scaler and state["scaler"]:
            self.scaler = LossScaler(**state["scaler"])
        self.step = state["step"]
        self.tokens, self.skipped, self.seconds = state["tokens"], state["skipped"], state["seconds"]
        self.best_loss = state["best_loss"]

    def _broken(self, what: str, step: int) -> NonFiniteLoss:
        good = latest_checkpoint(self.run.folder)
        rescue = f"the last good checkpoint is {good}" if good else "there is no checkpoint before it"
        return NonFiniteLoss(
            f"training broke down at step {step}: {what}; {rescue}. Start anew with a lower learning rate"
        )
