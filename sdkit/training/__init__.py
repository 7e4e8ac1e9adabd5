"""Fine-tuning: `train_unet(UNetConfig(...))` and `train_vae(VAEConfig(...))`; and the words that every stage and the
loop share."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from sdkit.errors import ArgumentError, SdkitError
from sdkit.lazy import attributes
from sdkit.processes import is_main_process

if TYPE_CHECKING:
    from types import FrameType

    import torch
    from accelerate import Accelerator
    from torch import Tensor, nn

    from sdkit.training.settings import UNetConfig, VAEConfig
    from sdkit.training.stages.unet import train_unet
    from sdkit.training.stages.vae import train_vae

    Loss = Callable[[Mapping[str, nn.Module], dict[str, Any], int], tuple[Tensor, Mapping[str, float | Tensor]]]

T = TypeVar("T")
Samples = list[tuple[int, int]]  # (n, item): the n-th sample since the run began is example `item`

# Names of diffusers.optimization.get_scheduler, but the one whose rules are a language of their own.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What the loop asks of every stage's settings, which are a subclass."""

    max_steps: int = 1000
    """Optimizer steps in all."""
    batch_size: int = 1
    """Samples of each process and micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches to an optimizer step."""
    mixed_precision: str = "no"
    """Autocast to "bf16" or "fp16"; "no" is float32. Trained weights are float32 in each."""
    seed: int = 0
    """Of everything that is drawn."""
    lr_scheduler: str = "constant"
    """constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial; counts optimizer steps."""
    lr_warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from 0, for the schedules that have them."""
    max_grad_norm: float | None = 1.0
    """Gradients are clipped to it; None clips none."""
    use_8bit_adam: bool = False
    """AdamW of bitsandbytes, with its state in 8 bits."""
    ema_decay: float = 0.9999
    """Of the moving average of the weights, which is what validation and result see; 0 has none."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """The last N are kept."""
    validate_every: int = 100
    """Steps between validations; there is one before the first step and one after the last, too."""
    report_to: tuple[str, ...] = ()
    """Trackers that also get the metrics, such as tensorboard and wandb."""

    # What a run may be taken up again with other values of; the first two as long as a step takes as many samples.
    may_change: ClassVar[frozenset[str]] = frozenset({
        *("batch_size", "data", "gradient_accumulation_steps", "keep_checkpoints", "max_steps", "model", "out_dir"),
        *("report_to", "save_every", "validate_every"),
    })  # fmt: skip

    def __post_init__(self) -> None:
        from sdkit.arguments import flag, number, one_of, strings, whole_number  # which loads PyTorch

        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "save_every", "keep_checkpoints"):
            self._keep(name, whole_number(name, getattr(self, name), 1))
        self._keep("validate_every", whole_number("validate_every", self.validate_every, 1))
        self._keep("lr_warmup_steps", whole_number("lr_warmup_steps", self.lr_warmup_steps, 0))
        self._keep("seed", whole_number("seed", self.seed, 0, 2**31 - 1))
        self._keep("ema_decay", number("ema_decay", self.ema_decay, 0, 1))
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ArgumentError("lr_scheduler constant has no lr_warmup_steps; take constant_with_warmup.")
        if self.max_grad_norm is not None:
            self._keep("max_grad_norm", number("max_grad_norm", self.max_grad_norm, 1e-9))
        one_of("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        one_of("lr_scheduler", self.lr_scheduler, LR_SCHEDULERS)
        flag("use_8bit_adam", self.use_8bit_adam)
        self._keep("report_to", tuple(strings("report_to", self.report_to)) if self.report_to else ())

    def _keep(self, name: str, value: object) -> None:
        """Set a field to what its check made of it: of NumPy's numbers Python's, which config.json can hold."""
        object.__setattr__(self, name, value)

    def accelerator(self, out_dir: Path) -> Accelerator:
        """Accelerate's view of the processes, with precision and trackers as set here (not as in its configuration:
        what trains is what config.json says)."""
        from accelerate import Accelerator, DistributedType
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        from accelerate.utils import DynamoBackend, GradientAccumulationPlugin

        from sdkit.arguments import one_of
        from sdkit.training.distributed import set_up_fsdp

        for name in self.report_to:
            one_of("report_to", name, LOGGER_TYPE_TO_CLASS)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":  # which steps in the backward pass
            raise ArgumentError(
                "DeepSpeed does not work here; launch with FSDP (fsdp_version: 2), which shares as much."
            )
        # Else a second run in this process could not have another precision, nor FSDP again.
        again = PartialState._shared_state.get("distributed_type") == DistributedType.FSDP
        AcceleratorState._reset_state(reset_partial_state=again)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "`log_with=")  # of a missing tracker, which is an error below
                accelerator = Accelerator(
                    mixed_precision=self.mixed_precision,
                    gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop counts for itself
                    log_with=list(self.report_to) or None,
                    project_dir=out_dir / "trackers",
                )
        except ValueError as error:  # fp16 without a GPU, a tracker that does not exist
            raise ArgumentError(str(error)) from error
        if len(accelerator.log_with) < len(set(self.report_to)):
            missing = [name for name in self.report_to if name not in map(str, accelerator.log_with)]
            raise ArgumentError(f"report_to names {missing[0]!r}, which is not installed; install it, or leave it out.")
        if self.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would use float32
            raise ArgumentError("mixed_precision 'fp16' needs a GPU; use 'bf16' or 'no'.")
        # Checked on torch 2.13: more than half of a U-Net's parameters get a gradient of 0 there, in silence.
        if accelerator.device.type == "cpu" and accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            AcceleratorState._reset_state()  # it would be the next Accelerator's, too
            raise ArgumentError("torch.compile loses gradients on a CPU; leave Accelerate's dynamo_backend off.")
        if accelerator.distributed_type == DistributedType.FSDP:
            set_up_fsdp(accelerator)
            if self.use_8bit_adam:
                raise ArgumentError("use_8bit_adam does not work with FSDP; leave it off.")
        return accelerator

    def optimizer(self, player: Player, device: torch.device) -> torch.optim.Optimizer:
        """AdamW over what `player` trains."""
        from torch.optim import AdamW

        parameters = [p for p in player.network.parameters() if p.requires_grad]
        options: dict[str, Any] = {
            "lr": player.learning_rate, "betas": player.betas, "weight_decay": player.weight_decay
        }  # fmt: skip
        if not self.use_8bit_adam:
            return AdamW(parameters, **options, fused=device.type in ("cpu", "cuda"))  # three times as fast
        try:
            library = import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ArgumentError("use_8bit_adam needs bitsandbytes; install it, or leave it off.") from error
        optimizer: torch.optim.Optimizer = library.AdamW8bit(parameters, **options)
        return optimizer

    def lr_factor(self, player: Player) -> Callable[[int], float]:
        """What multiplies the learning rate in optimizer step n of `player`, counted from its first."""
        import torch
        from diffusers.optimization import get_scheduler

        any_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=player.learning_rate)
        steps = max(1, self.max_steps - player.starts_at)  # a player that starts after the end takes none
        try:
            schedule = get_scheduler(
                self.lr_scheduler, any_optimizer, num_warmup_steps=self.lr_warmup_steps, num_training_steps=steps
            )
        except ValueError as error:  # polynomial ends at 1e-7
            raise ArgumentError(f"lr_scheduler {self.lr_scheduler}: {error}; take another, or another rate.") from error
        factor: Callable[[int], float] = schedule.lr_lambdas[0]
        return factor


@dataclass(frozen=True)
class Player:
    """A network in training, with an optimizer and a loss of its own: a GAN has two.

    What is trained are the network's parameters that require gradients when training begins. `loss(networks, batch,
    step)` gives the loss, a mean over the batch, and its parts to be logged. It gets the networks of all players by
    name, as prepared for many processes, and may only call them (`networks["unet"](...)`), for gradients are reduced
    by what hooks on to that. (With FSDP they are copies: the stage's own networks have the trained weights in
    `validate` and `export` alone.) `batch` lives as long as the optimizer step: an earlier player can leave things in
    it.
    """

    name: str
    network: nn.Module
    loss: Loss
    _: KW_ONLY
    learning_rate: float
    starts_at: int = 0  # its first optimizer step; its learning-rate schedule counts from there
    ema: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01


class Trained:
    """A player prepared for precision and processes, with what training adds to it. Where processes share the weights,
    its network is a copy of the stage's."""

    def __init__(self, player: Player, settings: LoopSettings, accelerator: Accelerator) -> None:
        from sdkit.training.distributed import copy_to_split, is_sharded
        from sdkit.training.ema import EMA

        for p in player.network.parameters():
            if p.requires_grad:
                p.data = p.data.float()  # in half precision a small step rounds to nothing
        self.stages_network = player.network
        if is_sharded(accelerator):
            player = replace(player, network=copy_to_split(player.network, accelerator))
        self.player, self.device = player, accelerator.device
        optimizer = settings.optimizer(player, accelerator.device)
        self.network, self.optimizer = accelerator.prepare(player.network.train(), optimizer)
        self.parameters = [p for p in player.network.parameters() if p.requires_grad]
        self.ema = EMA(player.network, settings.ema_decay) if player.ema else None
        self.lr_factor = settings.lr_factor(player)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """The stage's network has averaged weights and is in evaluation mode inside."""
        from sdkit.training.distributed import gather

        network = self.stages_network
        with self.ema.swapped() if self.ema else contextlib.nullcontext():
            if network is not self.player.network:
                gather(self.player.network, network.to(self.device))
            network.eval()
            try:
                yield
            finally:
                network.train()
        if network is not self.player.network:
            network.to("cpu")  # where it is in nobody's way


@contextlib.contextmanager
def alone(turn: Trained, trained: Sequence[Trained], accelerator: Accelerator) -> Iterator[None]:
    """Of `trained` only `turn` gathers gradients inside; the others let them through, to it, and reduce none."""
    from sdkit.training.distributed import is_sharded, put_away

    with contextlib.ExitStack() as stack:
        for other in trained:
            if is_sharded(accelerator):
                stack.callback(put_away, other.network)
            if other is not turn:
                stack.enter_context(accelerator.no_sync(other.network))
                for p in other.parameters:
                    stack.callback(p.requires_grad_, True)
                    p.requires_grad_(False)
        yield


class Stage(Protocol):
    """What the loop is given to train."""

    @property
    def players(self) -> Sequence[Player]:
        """Trained in this order in each optimizer step. The first one's metrics carry no name."""

    @property
    def size(self) -> int:
        """The number of training examples."""

    @property
    def identity(self) -> Mapping[str, str]:
        """What a run goes on with alone, wherever it lies: of "data" and "model", a word that is another for others."""

    def batch(self, samples: Samples) -> dict[str, Any]:
        """The batch of some samples (n, item): n counts samples since the run began, and is what noise may depend on
        (with the seed); item is the index of the example. Called ahead, from other threads; the loop moves tensors to
        the device."""

    def names(self, samples: Samples) -> list[str]:
        """What to call these samples in messages, as by their files."""

    def validate(self, step: int) -> dict[str, float]:
        """Metrics after `step` steps, the same on every process. Called on every process, with the averaged weights in
        the networks, in evaluation mode and without gradients; a stage splits the work itself. May raise `Unfinished`
        (see `raise_if_stopped`), on every process."""

    def export(self, folder: Path) -> None:
        """Fill an empty folder with the result. Called on the main process, in the state that `validate` finds. May
        raise `Unfinished`."""


class TrainingStopped(SdkitError):  # noqa: N818 - it is none
    """The run was asked to stop, and did so with a checkpoint. `exit_code` is 128 and the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Unfinished(Exception):  # noqa: N818 - it is none
    """Work after the last finished step was abandoned, because the process was asked to stop."""


class StopSignals:
    """SIGTERM, SIGHUP, and Ctrl-C as a wish that the loop looks at: `exit_code` is 0 until one came, then 128 and its
    number.

    They are noted from entering to leaving; a second Ctrl-C is handled as before, and so raises KeyboardInterrupt.
    """

    noting: ClassVar[StopSignals | None] = None  # the one that is entered: signals are the whole process's

    def __init__(self) -> None:
        self.exit_code = 0
        self._interrupted = False

    def __enter__(self) -> StopSignals:
        in_main = threading.current_thread() is threading.main_thread()  # Python gives signals to no other thread
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        taken = [n for n in known if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]  # as nohup's SIGHUP
        self._before = {n: signal.signal(n, self._note) for n in taken if in_main}
        StopSignals.noting = self if in_main else StopSignals.noting
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)
        if StopSignals.noting is self:
            StopSignals.noting = None

    def _note(self, which: int, frame: FrameType | None) -> None:
        if which == signal.SIGINT and self._interrupted:
            before = self._before[which]
            (before if callable(before) else signal.default_int_handler)(which, frame)
        if which == signal.SIGINT:
            self._interrupted = True
            if is_main_process():
                with contextlib.suppress(OSError):  # stderr may be closed
                    os.write(2, b"\nsdkit: stopping with a checkpoint; Ctrl-C again leaves at once.\n")
        self.exit_code = self.exit_code or 128 + which


def raise_if_stopped() -> None:
    """Raise `Unfinished` if this process was asked to stop. Call it before each pass of a network."""
    if StopSignals.noting and StopSignals.noting.exit_code:
        raise Unfinished


@contextlib.contextmanager
def tracked(accelerator: Accelerator, settings: LoopSettings) -> Iterator[None]:
    """The trackers that `settings` asks for take what `accelerator.log` gets inside."""
    values = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in asdict(settings).items()}
    accelerator.init_trackers("sdkit", values)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def on_main(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """What `do` returns, called on the main process; every process gets it, or the `SdkitError` that it ended with."""
    from accelerate.utils import broadcast_object_list

    said: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            said[0] = do()
        except SdkitError as error:
            said[1] = error
    result, failure = broadcast_object_list(said)
    if failure:
        raise failure
    return result  # type: ignore[no-any-return]


__all__ = ["TrainingStopped", "UNetConfig", "VAEConfig", "train_unet", "train_vae"]

_HOMES = {
    "UNetConfig": "sdkit.training.settings",
    "VAEConfig": "sdkit.training.settings",
    "train_unet": "sdkit.training.stages.unet",
    "train_vae": "sdkit.training.stages.vae",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and so finds a misspelt name
    __getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
