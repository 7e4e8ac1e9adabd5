"""The training loop, shared by all stages. It knows players, samples, and steps, but nothing of diffusion."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import InitVar, asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from sdkit.errors import TrainingError
from sdkit.training.batches import loaded_ahead
from sdkit.training.checkpoint import load, restore, rng_state, set_rng_state, snapshot
from sdkit.training.distributed import full_tensor, make_accelerator, on_main
from sdkit.training.prepared import PreparedPlayer, only_gradients_of
from sdkit.training.run_folder import RunFolder
from sdkit.training.settings import LoopSettings
from sdkit.training.signals import StopSignals, TrainingStopped, Unfinished, raise_if_stopped
from sdkit.training.stage import Samples, Stage

BAD_STEPS = 10  # this many skipped steps in a row end a run


def fit(stage: Stage, settings: LoopSettings, out_dir: str | Path, *, before: Callable[[], None] | None = None) -> Path:
    """Train `stage` in a run folder, or resume the run in it.

    Resuming is exact: a step depends only on its number, the checkpoint, and the settings that may not change.

    After a stop signal, at most one more pass of a network is made, and the unfinished step is discarded. The step is
    finished, however, if an optimizer has already made its update, or if there are several processes, which must all
    stop after the same step.

    Args:
        stage: Networks, losses, and data.
        settings: Settings of the loop.
        out_dir: The run folder; see `RunFolder` for its contents.
        before: Called on every process once the folder is open, while the networks are as they were before training;
            also when a run is resumed. It may raise `Unfinished`, as `Stage.validate` may.

    Returns:
        The run folder, with the exported result in result/.

    Raises:
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.
        TrainingError: The folder holds another run, or cannot be written; or the loss or its gradient was NaN or
            infinite in 10 steps in a row.
    """
    accelerator = make_accelerator(settings, Path(out_dir))
    run = RunFolder(Path(out_dir))
    rank, world = accelerator.process_index, accelerator.num_processes
    with ExitStack() as stack:
        stack.callback(run.close)
        start = on_main(accelerator, lambda: run.open(settings, world, stage.identity))
        if start.step >= settings.max_steps and start.exported == start.step:
            accelerator.print(f"{run.path} is finished: step {start.step}, see {run.result}.", file=sys.stderr)
            return run.path
        stop = stack.enter_context(StopSignals())
        if before is not None:
            _prepare(before, stop)
        loop = _Loop(stage, settings, accelerator, run, stop, start.checkpoint)
        stack.enter_context(_trackers(accelerator, settings))
        batches = stack.enter_context(loaded_ahead(stage, settings, loop.step, rank, world, accelerator.device))
        hidden = rank > 0 or None  # None: tqdm hides the bar if stderr is no terminal
        bar = stack.enter_context(tqdm(total=settings.max_steps, initial=loop.step, disable=hidden, desc="training"))
        saved = loop.step if start.checkpoint else -1  # the step of the newest checkpoint
        validated, stopping = start.validated, False
        while True:
            done = loop.step >= settings.max_steps
            if (done or loop.step % settings.validate_every == 0) and not validated:
                stopping = loop.validate()
            if stopping or done:
                break
            try:
                loss, stopping = loop.train_step(batches)
            except Unfinished:
                stopping = True
                break
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()
            if stopping or loop.step % settings.save_every == 0 or loop.step == settings.max_steps:
                saved = loop.save()
            validated = stopping  # a stopping run leaves this step's validation to the run that resumes it
        if saved < loop.step:
            loop.save()
        if stopping:
            message = f"stopped after step {loop.step}, with a checkpoint; the same command resumes it."
            raise TrainingStopped(message, stop.exit_code or 143)  # 143 (SIGTERM): only another process got a signal
        with loop.evaluation_mode():
            on_main(accelerator, lambda: _export(run, stage, loop.step, stop))
    return run.path


def _prepare(before: Callable[[], None], stop: StopSignals) -> None:
    try:
        before()
    except Unfinished as error:
        message = "stopped before the first step; the same command resumes it."
        raise TrainingStopped(message, stop.exit_code or 143) from error


def _export(run: RunFolder, stage: Stage, step: int, stop: StopSignals) -> None:
    try:
        run.export(stage.export, step)
    except Unfinished as error:
        message = "stopped before the result was written; the same command writes it."
        raise TrainingStopped(message, stop.exit_code) from error


@contextmanager
def _trackers(accelerator: Accelerator, settings: LoopSettings) -> Iterator[None]:
    """Start the trackers of `settings`, and finish them afterwards."""
    values = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in asdict(settings).items()}
    accelerator.init_trackers("sdkit", values)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


class _Turn(NamedTuple):
    """Outcome of one player's turn in a step.

    Attributes:
        metrics: Means over all processes, by name.
        bad_micro_batches: None if the weights were updated. If the update was skipped, the indices of this process's
            micro-batches whose loss is not finite.
        stopping: Whether any process was asked to stop.
    """

    metrics: dict[str, float]
    bad_micro_batches: set[int] | None
    stopping: bool


@dataclass
class _Loop:
    """State of a run: its players, and the numbers of steps made and skipped.

    Attributes:
        stage: Networks, losses, and data.
        settings: Settings of the loop.
        accelerator: The run's Accelerator.
        run: The run folder.
        stop: Context that records stop signals.
        checkpoint: The checkpoint to resume from; None starts from step 0.
    """

    stage: Stage
    settings: LoopSettings
    accelerator: Accelerator
    run: RunFolder
    stop: StopSignals
    checkpoint: InitVar[Path | None]

    def __post_init__(self, checkpoint: Path | None) -> None:
        set_seed(self.settings.seed, device_specific=True)
        self.players = [PreparedPlayer(player, self.settings, self.accelerator) for player in self.stage.players]
        self.networks: dict[str, nn.Module] = {each.player.name: each.network for each in self.players}
        self.step = self.skipped = self.skipped_in_a_row = 0
        if checkpoint:
            loaded = load(checkpoint)
            restore(self.players, self.accelerator, loaded)
            self.step, (self.skipped, self.skipped_in_a_row) = loaded.step, loaded.state["skipped"]
            self.accelerator.print(f"resuming from {checkpoint}", file=sys.stderr)

    def save(self) -> int:
        """Write a checkpoint, and return its step."""
        checkpoint = snapshot(self.players, self.accelerator, self.step, (self.skipped, self.skipped_in_a_row))
        on_main(self.accelerator, lambda: self.run.save(checkpoint, self.settings.keep_checkpoints))
        return self.step

    def train_step(self, batches_ahead: Iterator[tuple[Samples, dict[str, Any]]]) -> tuple[float, bool]:
        """Make one optimizer step of each player.

        Args:
            batches_ahead: This process's micro-batches, with their samples.

        Returns:
            The first player's loss (NaN if it has not started), and whether any process was asked to stop.

        Raises:
            Unfinished: The only process was asked to stop. Everything has been restored to the state before the step.
        """
        began, stopping = time.perf_counter(), False
        loaded = []
        for _ in range(self.settings.gradient_accumulation_steps):
            self._raise_if_stopped()
            loaded.append(next(batches_ahead))
        batches = [send_to_device(batch, self.accelerator.device, non_blocking=True) for _, batch in loaded]

        # A discarded step must leave no trace in buffers and random numbers; a skipped one must leave none in buffers.
        # With a single micro-batch the random numbers need no copy: such a step can stop only before it draws any.
        buffers = [(b, b.clone()) for network in self.networks.values() for b in network.buffers()]
        rng = rng_state(self.accelerator.device) if len(loaded) > 1 else None

        metrics: dict[str, float] = {"step": self.step + 1}
        bad: list[set[int]] = []  # indices of this process's bad micro-batches, for each player that skipped its update
        for prepared in self.players:
            if self.step < prepared.player.starts_at:
                continue
            try:
                turn = self._turn(prepared, batches, may_stop=len(metrics) == 1)
            except Unfinished:
                self._undo(buffers, rng)
                raise
            prefix = "" if prepared is self.players[0] else f"{prepared.player.name}/"
            metrics |= {prefix + key: value for key, value in turn.metrics.items()}
            stopping = turn.stopping
            if turn.bad_micro_batches is not None:
                bad.append(turn.bad_micro_batches)

        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        if bad:
            metrics["skipped"] = self.skipped = self.skipped + 1
            self._undo(buffers, None)
        self._log(metrics | {"seconds": time.perf_counter() - began})
        if bad:
            samples = [samples_of_batch for samples_of_batch, _ in loaded]
            self._report_skipped_step([samples[i] for i in set.union(*bad)], samples)
        return metrics.get("loss", math.nan), stopping

    def _raise_if_stopped(self) -> None:
        if self.accelerator.num_processes == 1:  # with several processes, the rest would wait forever for this one
            raise_if_stopped()

    def _undo(self, buffers: Sequence[tuple[Tensor, Tensor]], rng: Mapping[str, Tensor] | None) -> None:
        """Restore buffers, gradients, and random numbers to what they were before the step."""
        for buffer, before in buffers:
            buffer.copy_(before)
        for prepared in self.players:
            prepared.optimizer.zero_grad()
        if rng is not None:
            set_rng_state(rng, self.accelerator.device)

    def _turn(self, prepared: PreparedPlayer, batches: Sequence[dict[str, Any]], *, may_stop: bool) -> _Turn:
        """Make one optimizer step of one player.

        Args:
            prepared: The player.
            batches: The micro-batches of this process.
            may_stop: Whether the step can still be discarded, because no optimizer has stepped in it.

        Raises:
            Unfinished: The process was asked to stop, and `may_stop` is true.
        """
        # The learning rate follows from the step's number alone, so a resumed run needs no state of a schedule.
        learning_rate = self._set_learning_rate(prepared)

        # Forward and backward passes of all micro-batches. Only this player's gradients accumulate.
        names, rows = self._accumulate_gradients(prepared, batches, may_stop=may_stop)

        # Clip, then average everything the processes must agree on.
        norm = self._clip_gradients(prepared)
        *means, grad_norm, stopping = self._reduce(rows, norm)

        # Update the weights, unless the loss or a gradient is NaN or infinite on some process.
        bad_micro_batches, more = None, dict[str, float]()
        if self._gradients_are_good(grad_norm) and math.isfinite(means[0]):
            more = self._take_step(prepared, grad_norm, batches)
        else:
            bad_micro_batches = self._skip_step(rows)
        prepared.optimizer.zero_grad()

        metrics = {**dict(zip(names, means, strict=True)), **more, "lr": learning_rate, "grad_norm": grad_norm}
        return _Turn(metrics, bad_micro_batches, stopping > 0)

    def _set_learning_rate(self, prepared: PreparedPlayer) -> float:
        """Set the learning rate of this step, and return it."""
        learning_rate = prepared.player.learning_rate * prepared.lr_factor(self.step - prepared.player.starts_at)
        for group in prepared.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def _accumulate_gradients(
        self, prepared: PreparedPlayer, batches: Sequence[dict[str, Any]], *, may_stop: bool
    ) -> tuple[list[str], list[Tensor]]:
        """Make the forward and backward passes of all micro-batches, and accumulate the gradients of their mean loss.

        Returns:
            The names of the loss and its parts, and a row of their values for each micro-batch.
        """
        names, rows = list[str](), list[Tensor]()
        with only_gradients_of(prepared, self.players, self.accelerator):
            for i, batch in enumerate(batches):
                if may_stop:
                    self._raise_if_stopped()
                # Processes exchange gradients once per step, in the backward pass of the last micro-batch.
                with self.accelerator.no_sync(prepared.network) if i + 1 < len(batches) else nullcontext():
                    loss, parts = prepared.player.loss(self.networks, batch, self.step)
                    self.accelerator.backward(loss / len(batches))
                names, values = ["loss", *parts], (loss, *parts.values())
                device = self.accelerator.device
                rows.append(torch.stack([torch.as_tensor(v).detach().to(device, torch.float32) for v in values]))
        return names, rows

    def _clip_gradients(self, prepared: PreparedPlayer) -> Tensor:
        """Clip the gradients to `max_grad_norm`, and return their norm before clipping."""
        limit = self.settings.max_grad_norm
        self.accelerator.unscale_gradients()  # else the norm would contain float16's loss scale
        norm = nn.utils.clip_grad_norm_(prepared.parameters, math.inf if limit is None else limit)
        return full_tensor(norm).to(self.accelerator.device)

    def _reduce(self, rows: list[Tensor], norm: Tensor) -> list[float]:
        """Return averages over all processes: of the loss and its parts, of the gradient norm, and of the stop flags.

        A flag is 1 if the process was asked to stop, or else 0. All values are sent in one tensor, so that processes
        communicate once.
        """
        stopping = norm.new_tensor([self.stop.exit_code > 0])
        local = torch.cat([torch.stack(rows).mean(0), norm[None], stopping])
        values: list[float] = self.accelerator.reduce(local, "mean").tolist()
        return values

    def _gradients_are_good(self, grad_norm: float) -> bool:
        """Return whether the gradients are finite, or overflowed only because float16's scale is still too high.

        Gradients that overflow at a scale below 1 would overflow without a scale too, and are bad.
        """
        scaler = self.accelerator.scaler
        return math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1)

    def _take_step(
        self, prepared: PreparedPlayer, grad_norm: float, batches: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Update the weights and their moving average. After an overflow the scaler skips the update by itself.

        Returns:
            Metrics of the player's `after_update`.
        """
        prepared.optimizer.step()
        metrics = dict[str, float]()
        if math.isfinite(grad_norm):
            if prepared.player.after_update:
                with torch.no_grad():
                    metrics |= prepared.player.after_update(self.networks, batches, self.step)
            if prepared.ema:
                prepared.ema.update()
        return metrics

    def _skip_step(self, rows: list[Tensor]) -> set[int]:
        """Skip the update. Return the indices of this process's micro-batches whose loss is not finite."""
        if self.accelerator.scaler:
            self.accelerator.scaler.update()  # without this, the scaler refuses to unscale the next gradients
        return {i for i, row in enumerate(rows) if not math.isfinite(row[0])}

    def _report_skipped_step(self, to_blame: list[Samples], all_samples: list[Samples]) -> None:
        """Warn of a skipped step, with the names of its bad samples. Raise TrainingError after `BAD_STEPS` in a row.

        If all losses are finite but a gradient is not, no single sample can be blamed, and all samples of the step are
        named.
        """
        names = gather_object([name for samples in to_blame for name in self.stage.names(samples)])
        names = names or gather_object([name for samples in all_samples for name in self.stage.names(samples)])
        problem = f"the loss or its gradient is not finite ({', '.join(dict.fromkeys(names))})"
        if self.skipped_in_a_row >= BAD_STEPS:
            raise TrainingError(f"in {BAD_STEPS} steps in a row {problem}; look at them, or lower the learning rate.")
        if self.accelerator.is_main_process:
            warnings.warn(f"step {self.step} is skipped: {problem}.", stacklevel=2)

    def _log(self, metrics: Mapping[str, float]) -> None:
        """Log to metrics.jsonl, with null for values that are not finite, and to the trackers, without those values."""
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if self.accelerator.is_main_process:
            self.run.log({key: finite.get(key) for key in metrics})
        self.accelerator.log({key: value for key, value in finite.items() if key != "step"}, step=int(metrics["step"]))

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Use averaged weights, evaluation mode, and no gradients in the context. Then restore random generators."""
        rng = rng_state(self.accelerator.device)
        with ExitStack() as stack, torch.no_grad():
            for prepared in self.players:
                stack.enter_context(prepared.evaluation_mode())
            stack.callback(set_rng_state, rng, self.accelerator.device)
            yield

    def validate(self) -> bool:
        """Validate the stage, and log its metrics. Return whether any process was asked to stop."""
        began = time.perf_counter()
        try:
            with self.evaluation_mode():
                metrics = {f"validation/{key}": value for key, value in self.stage.validate(self.step).items()}
        except Unfinished:
            return True
        self._log({"step": self.step, **metrics, "validation/seconds": time.perf_counter() - began})
        stopping = torch.tensor([float(self.stop.exit_code > 0)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(stopping, "sum").item() > 0)
