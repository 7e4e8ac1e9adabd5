"""The training loop, one for every stage: it knows players, samples and steps, and nothing of diffusion."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import InitVar, asdict, dataclass
from pathlib import Path
from typing import Any

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

BAD_STEPS = 10  # in a row, without a finite loss, end a run


def fit(stage: Stage, settings: LoopSettings, out_dir: str | Path) -> Path:
    """Train `stage` in the run folder `out_dir`, or resume the run that is there, and return the folder.

    Resuming is exact: a step depends on its number, the checkpoint, and settings that may not change, alone. Raises
    TrainingStopped after SIGTERM or Ctrl-C, once a checkpoint is written, and TrainingError where it cannot go on.

    A signal waits for at most one pass of a network, and the micro-batches of that step are discarded. A step is
    finished if an optimizer has stepped in it, or if there are several processes, which would have to agree.
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
        loop = _Loop(stage, settings, accelerator, run, stop, start.checkpoint)
        stack.enter_context(_trackers(accelerator, settings))
        batches = stack.enter_context(loaded_ahead(stage, settings, loop.step, rank, world))
        hidden = rank > 0 or None  # None: where stderr is no terminal
        bar = stack.enter_context(tqdm(total=settings.max_steps, initial=loop.step, disable=hidden, desc="training"))
        saved, validated, stopping = (loop.step if start.checkpoint else -1), start.validated, False
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
            validated = stopping  # the next run can do that
        if saved < loop.step:
            loop.save()
        if stopping:
            message = f"stopped after step {loop.step}, with a checkpoint; the same command goes on from there."
            raise TrainingStopped(message, stop.exit_code or 143)  # 143: another process was told to
        with loop.at_rest():
            on_main(accelerator, lambda: _export(run, stage, loop.step, stop))
    return run.path


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


@dataclass
class _Loop:
    stage: Stage
    settings: LoopSettings
    accelerator: Accelerator
    run: RunFolder
    stop: StopSignals
    checkpoint: InitVar[Path | None]

    def __post_init__(self, checkpoint: Path | None) -> None:
        set_seed(self.settings.seed, device_specific=True)
        self.prepared = [PreparedPlayer(player, self.settings, self.accelerator) for player in self.stage.players]
        self.networks: dict[str, nn.Module] = {t.player.name: t.network for t in self.prepared}
        self.step = self.skipped = self.skipped_in_a_row = 0
        if checkpoint:
            found = load(checkpoint)
            restore(self.prepared, self.accelerator, found)
            self.step, (self.skipped, self.skipped_in_a_row) = found.step, found.state["skipped"]
            self.accelerator.print(f"going on from {checkpoint}", file=sys.stderr)

    def save(self) -> int:
        checkpoint = snapshot(self.prepared, self.accelerator, self.step, (self.skipped, self.skipped_in_a_row))
        on_main(self.accelerator, lambda: self.run.save(checkpoint, self.settings.keep_checkpoints))
        return self.step

    def train_step(self, ahead: Iterator[tuple[Samples, dict[str, Any]]]) -> tuple[float, bool]:
        """One optimizer step of each player. Returns the first one's loss, and whether any process is to stop. Raises
        `Unfinished`, with everything as after the step before, where this process, the only one, was asked to."""
        began, stopping = time.perf_counter(), False
        loaded = []
        for _ in range(self.settings.gradient_accumulation_steps):
            self._raise_if_stopped()
            loaded.append(next(ahead))
        batches = [send_to_device(batch, self.accelerator.device, non_blocking=True) for _, batch in loaded]
        buffers = [(b, b.clone()) for network in self.networks.values() for b in network.buffers()]
        rng = rng_state(self.accelerator.device) if len(loaded) > 1 else None  # else it stops before the first draw
        line: dict[str, float] = {"step": self.step + 1}
        bad: list[set[int]] = []  # of each player that made no step, the micro-batches here that are to blame
        for t in self.prepared:
            if self.step >= t.player.starts_at:
                try:
                    values, blamed, stopping = self._turn(t, batches, may_stop=len(line) == 1)
                except Unfinished:
                    self._undo(buffers, rng)
                    raise
                prefix = "" if t is self.prepared[0] else f"{t.player.name}/"
                line |= {prefix + key: value for key, value in values.items()}
                bad += [] if blamed is None else [blamed]
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if bad else 0
        if bad:
            line["skipped"] = self.skipped = self.skipped + 1
            self._undo(buffers, None)
        self._log(line | {"seconds": time.perf_counter() - began})
        if bad:
            samples = [own for own, _ in loaded]
            self._complain([samples[i] for i in set.union(*bad)], samples)
        return line.get("loss", math.nan), stopping

    def _raise_if_stopped(self) -> None:
        if self.accelerator.num_processes == 1:  # others would wait for this one
            raise_if_stopped()

    def _undo(self, buffers: Sequence[tuple[Tensor, Tensor]], rng: Mapping[str, Tensor] | None) -> None:
        """Restore buffers, gradients, and random numbers as before the step, in which no optimizer has stepped."""
        for buffer, before in buffers:
            buffer.copy_(before)
        for t in self.prepared:
            t.optimizer.zero_grad()
        if rng is not None:
            set_rng_state(rng, self.accelerator.device)

    def _turn(
        self, turn: PreparedPlayer, batches: Sequence[dict[str, Any]], *, may_stop: bool
    ) -> tuple[dict[str, float], set[int] | None, bool]:
        """One optimizer step of one player.

        Returns:
            Means over all processes; this process's bad micro-batches where the step was skipped, else None; and
            whether any process is to stop.
        """
        learning_rate = self._set_learning_rate(turn)
        names, rows = self._accumulate_gradients(turn, batches, may_stop=may_stop)
        norm = self._clip_gradients(turn)
        *means, grad_norm, stopping = self._reduce(rows, norm)
        line = {**dict(zip(names, means, strict=True)), "lr": learning_rate, "grad_norm": grad_norm}
        blamed = None
        if self._gradients_are_good(grad_norm) and math.isfinite(means[0]):
            self._take_step(turn, grad_norm)
        else:
            blamed = self._skip_step(rows)
        turn.optimizer.zero_grad()
        return line, blamed, stopping > 0

    def _set_learning_rate(self, turn: PreparedPlayer) -> float:
        """Set the learning rate of this step, which follows from the step's number alone, and return it."""
        learning_rate = turn.player.learning_rate * turn.lr_factor(self.step - turn.player.starts_at)
        for group in turn.optimizer.param_groups:
            group["lr"] = learning_rate
        return learning_rate

    def _accumulate_gradients(
        self, turn: PreparedPlayer, batches: Sequence[dict[str, Any]], *, may_stop: bool
    ) -> tuple[list[str], list[Tensor]]:
        """Add up the gradients of all micro-batches.

        Returns:
            The names of the loss and its parts, and a row of their values for each micro-batch.
        """
        names, rows = list[str](), list[Tensor]()
        with only_gradients_of(turn, self.prepared, self.accelerator):
            for i, batch in enumerate(batches):
                if may_stop:
                    self._raise_if_stopped()
                # Processes exchange gradients once a step, in the backward pass of the last micro-batch.
                with self.accelerator.no_sync(turn.network) if i + 1 < len(batches) else nullcontext():
                    loss, parts = turn.player.loss(self.networks, batch, self.step)
                    self.accelerator.backward(loss / len(batches))
                names, values = ["loss", *parts], (loss, *parts.values())
                device = self.accelerator.device
                rows.append(torch.stack([torch.as_tensor(v).detach().to(device, torch.float32) for v in values]))
        return names, rows

    def _clip_gradients(self, turn: PreparedPlayer) -> Tensor:
        """Clip the gradients to `max_grad_norm`, and return their norm before that."""
        limit = self.settings.max_grad_norm
        self.accelerator.unscale_gradients()  # with float16's scaler, the norm would else be that of scaled gradients
        norm = nn.utils.clip_grad_norm_(turn.parameters, math.inf if limit is None else limit)
        return full_tensor(norm).to(self.accelerator.device)

    def _reduce(self, rows: list[Tensor], norm: Tensor) -> list[float]:
        """Average over all processes: the rows' mean, the gradient norm, and whether this process was asked to stop.

        All values travel in one tensor, so that processes reduce once.
        """
        stopping = norm.new_tensor([self.stop.exit_code > 0])
        local = torch.cat([torch.stack(rows).mean(0), norm[None], stopping])
        values: list[float] = self.accelerator.reduce(local, "mean").tolist()
        return values

    def _gradients_are_good(self, grad_norm: float) -> bool:
        """Whether gradients are finite, or have overflowed only because float16's scaler is still finding its scale.

        Where they overflow at a scale below 1, the gradients themselves are bad.
        """
        scaler = self.accelerator.scaler
        return math.isfinite(grad_norm) or (scaler is not None and scaler.get_scale() >= 1)

    def _take_step(self, turn: PreparedPlayer, grad_norm: float) -> None:
        """Update the weights, and the moving average of them. A scaler skips the update where gradients overflowed."""
        turn.optimizer.step()
        if turn.ema and math.isfinite(grad_norm):
            turn.ema.update()

    def _skip_step(self, rows: list[Tensor]) -> set[int]:
        """Return this process's micro-batches whose loss is not finite."""
        if self.accelerator.scaler:
            self.accelerator.scaler.update()  # else it would refuse to unscale the next gradients
        return {i for i, row in enumerate(rows) if not math.isfinite(row[0])}

    def _complain(self, blamed: list[Samples], all_of_them: list[Samples]) -> None:
        names = gather_object([name for samples in blamed for name in self.stage.names(samples)])
        names = names or gather_object([name for samples in all_of_them for name in self.stage.names(samples)])
        what = f"the loss or its gradient is not finite ({', '.join(dict.fromkeys(names))})"
        if self.skipped_in_a_row >= BAD_STEPS:
            raise TrainingError(f"in {BAD_STEPS} steps in a row {what}; look at them, or lower the learning rate.")
        if self.accelerator.is_main_process:
            warnings.warn(f"step {self.step} is skipped: {what}.", stacklevel=2)

    def _log(self, line: Mapping[str, float]) -> None:
        finite = {key: value for key, value in line.items() if math.isfinite(value)}
        if self.accelerator.is_main_process:
            self.run.log({key: finite.get(key) for key in line})
        self.accelerator.log({key: value for key, value in finite.items() if key != "step"}, step=int(line["step"]))

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients; the random number generators are restored afterwards."""
        rng = rng_state(self.accelerator.device)
        with ExitStack() as stack, torch.no_grad():
            for t in self.prepared:
                stack.enter_context(t.at_rest())
            stack.callback(set_rng_state, rng, self.accelerator.device)
            yield

    def validate(self) -> bool:
        """Log the stage's metrics. Returns whether any process is to stop."""
        began = time.perf_counter()
        try:
            with self.at_rest():
                metrics = {f"validation/{key}": value for key, value in self.stage.validate(self.step).items()}
        except Unfinished:
            return True
        self._log({"step": self.step, **metrics, "validation/seconds": time.perf_counter() - began})
        wish = torch.tensor([float(self.stop.exit_code > 0)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(wish, "sum").item() > 0)
