"""Settings of the training loop, which the settings of each stage extend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdkit.errors import ArgumentError
from sdkit.fields import with_inherited_fields

# Names in diffusers.optimization.get_scheduler, except piecewise_constant, which needs rules in a syntax of its own.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the training loop. The settings of each stage are a subclass.

    Attributes:
        max_steps: Total number of optimizer steps.
        batch_size: Samples per process and micro-batch.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        mixed_precision: Autocast to "bf16" or "fp16"; "no" is float32. Trained weights are always float32.
        seed: Random seed.
        lr_scheduler: Learning-rate schedule: constant, constant_with_warmup, linear, cosine,
            cosine_with_restarts, or polynomial.
        lr_warmup_steps: Optimizer steps in which the learning rate rises from 0, for schedules with a
            warmup.
        max_grad_norm: Largest gradient norm; gradients above it are clipped. None turns clipping off.
        optimizer: adamw, or muon: Muon for the matrices of hidden layers (Jordan et al. 2024), and AdamW for
            all other parameters, at the same learning rate.
        use_8bit_adam: Use AdamW of bitsandbytes, with its state in 8 bits.
        ema_decay: Decay of the moving average of the weights, which is validated and exported; 0 turns it
            off.
        save_every: Save a checkpoint every N steps.
        keep_checkpoints: Keep the last N checkpoints.
        validate_every: Validate every N steps, and before the first step and after the last.
        report_to: Trackers that metrics are also sent to, such as tensorboard and wandb.
    """

    max_steps: int = 1000
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    mixed_precision: str = "no"
    seed: int = 0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    optimizer: str = "adamw"
    use_8bit_adam: bool = False
    ema_decay: float = 0.9999
    save_every: int = 100
    keep_checkpoints: int = 2
    validate_every: int = 100
    report_to: tuple[str, ...] = ()

    # Settings that may change when a run is resumed. batch_size and gradient_accumulation_steps may change only if a
    # step still takes the same number of samples.
    may_change: ClassVar[frozenset[str]] = frozenset({
        *("batch_size", "data", "gradient_accumulation_steps", "keep_checkpoints", "max_steps", "model", "out_dir"),
        *("report_to", "save_every", "validate_every"),
    })  # fmt: skip

    def __init_subclass__(cls) -> None:
        cls.__doc__ = with_inherited_fields(cls)

    def __post_init__(self) -> None:
        from sdkit.arguments import flag, number, one_of, strings, whole_number  # imported late: it loads PyTorch

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
        one_of("optimizer", self.optimizer, ("adamw", "muon"))
        if flag("use_8bit_adam", self.use_8bit_adam) and self.optimizer == "muon":
            raise ArgumentError("use_8bit_adam belongs to the optimizer adamw; leave it off.")
        self._keep("report_to", tuple(strings("report_to", self.report_to)) if self.report_to else ())

    def _keep(self, name: str, value: object) -> None:
        """Set a field to its checked value. A NumPy number becomes a Python number, which JSON can store."""
        object.__setattr__(self, name, value)
