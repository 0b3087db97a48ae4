"""What every task shares: building and adapting the model, the optimiser, steps, logging and checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from visadapt.callbacks.adapter_ema import AdapterEMA
from visadapt.callbacks.adapter_steps import AdapterSteps
from visadapt.callbacks.calibrate import Calibrate
from visadapt.callbacks.check_reached import CheckReached
from visadapt.callbacks.exact_resume import ExactResume
from visadapt.callbacks.last_checkpoint import LastCheckpoint
from visadapt.callbacks.save_on_signal import SaveOnSignal
from visadapt.core.adapter import Adapter
from visadapt.core.model import Adaptation, adapters
from visadapt.core.state import base_identity
from visadapt.core.train import parameter_groups, penalty
from visadapt.optim.flat import flatten, sync_gradients
from visadapt.optim.schedule import Schedule, total_steps
from visadapt.tasks import checkpoint as ck
from visadapt.tasks.hparams import UNKNOWN, plain
from visadapt.tasks.sharding import allow_rest, shard
from visadapt.tasks.start import Start

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torchmetrics import MetricCollection

Stage = Literal["train", "val", "test"]
DEFAULT_SCHEDULE = Schedule()


class BaseTask(L.LightningModule):
    """Adapts a model to a task. A subclass states ``build``, ``criterion``, ``metrics``, perhaps ``_step``.

    ``self.model`` exists after ``configure_model`` (call it yourself outside a Trainer).

    Args:
        adapters: Sets of adapters, applied in order; everything else is frozen, then ``thaw`` decides.
        optimizer: Any torch optimiser; its ``lr`` and ``weight_decay`` are those of the matrices.
        schedule: Warm-up and decay of the learning rate.
        up_lr_ratio: Learning rate of up factors over that of the others (LoRA+).
        ema_decay: Keep an exponential average of the trained tensors with this decay, evaluate and save it.
        rates: Learning rates of parts, by the name of a set of adapters or by the path of a module; the rest has the
            optimiser's.
        start: Adapter file whose tensors the sets of the same name start from; a resumed run does not read it.
    """

    def __init__(
        self,
        adapters: list[Adaptation] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = DEFAULT_SCHEDULE,
        up_lr_ratio: float = 1.0,
        ema_decay: float | None = None,
        rates: dict[str, float] | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._make_hparams_plain()
        self.strict_loading = False  # checkpoints lack the frozen base; on_load_checkpoint is strict about the rest
        self.adaptations = list(adapters or [])
        self.optimizer = optimizer
        self.schedule = schedule
        self.up_lr_ratio = up_lr_ratio
        self.ema_decay = ema_decay
        self.rates = dict(rates or {})
        self.start = start
        self._start_error: Exception | None = None
        self._total: int | None = None  # optimiser steps, known once there is an optimiser
        self.base: dict[str, str] = {}
        self.model: nn.Module = None  # type: ignore[assignment]  # made by configure_model

    # --- stated by tasks ---------------------------------------------------------------
    def build(self) -> nn.Module:
        """The model before adaptation, with its weights; called once."""
        raise NotImplementedError(f"{type(self).__name__} must state build()")

    def thaw(self, model: nn.Module) -> None:
        """Set ``requires_grad`` of what trains besides the adapters (a head, everything); all is frozen."""

    def criterion(self, output: Any, target: Any) -> Tensor:
        """The loss of one batch, a 0-d tensor."""
        raise NotImplementedError(f"{type(self).__name__} must state criterion(output, target)")

    def metrics(self) -> MetricCollection | None:
        """Fresh metrics of (output, target); one collection each is kept for validation and test."""
        return None

    def _step(self, batch: Any, stage: Stage) -> Tensor:
        """Loss of one batch of any stage; updates and logs the metrics of the stage."""
        inputs, target = batch
        output = self.model(inputs)
        loss = self.criterion(output, target)
        self.report(stage, loss, output, target)
        return loss

    # --- derived -----------------------------------------------------------------------
    def _make_hparams_plain(self) -> None:
        """Objects become the data they are made from; what cannot (a lambda) is left to its default on loading."""
        known = {name: plain(value) for name, value in self.hparams.items()}
        self.hparams.clear()
        self.hparams.update({name: value for name, value in known.items() if value is not UNKNOWN})
        self.hparams.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")
        self._hparams_initial = copy.deepcopy(self.hparams)

    def configure_model(self) -> None:
        """Build, adapt, decide what trains; shards the model under ``ModelParallelStrategy``. Runs once."""
        if self.model is not None:
            return
        from torchmetrics import MeanMetric

        model = self.build()
        model.requires_grad_(False)
        self._adapt(model)
        self.base = base_identity(model)  # now: training moves the statistics of trained norms
        self.model = model
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        if (metrics := self.metrics()) is not None:
            self.val_metrics, self.test_metrics = metrics.clone(prefix="val/"), metrics.clone(prefix="test/")
        if self._trainer is not None and any(adapter.takes_turns for adapter in adapters(model).values()):
            allow_rest(self.trainer.strategy)
        if self._device_mesh is not None:
            shard(model, self._device_mesh["data_parallel"])
            # A folder of shards would have to hold the frozen base as well; the trained tensors fit in one file.
            self.trainer.strategy._save_distributed_checkpoint = False  # type: ignore[attr-defined]
        self.train(self.training)

    def _adapt(self, model: nn.Module) -> None:
        """Adapters, what trains, and where they start.

        A file that does not fit is told of later: a resumed run has its values from a checkpoint instead, and the
        file may be gone by then.
        """
        found: Start | None = None
        if self.start is not None:
            try:
                found = Start(model, self.start)
            except (OSError, ValueError) as error:
                self._start_error = error
        for adaptation in self.adaptations:
            adaptation.apply(model)
        self.thaw(model)
        if found is not None:
            try:
                found.fill(model)
            except ValueError as error:
                self._start_error = error

    def _check_start(self) -> None:
        if self._start_error is not None:
            raise self._start_error

    on_validation_start = on_test_start = on_predict_start = _check_start

    def adapter_metadata(self) -> dict[str, str]:
        """What the adapter file of a run says besides the adapters."""
        return {} if self.start is None else {"start": self.start}

    def train(self, mode: bool = True) -> BaseTask:
        """As usual, but a frozen BatchNorm stays in evaluation mode: its statistics belong to the base."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and not _trains(module):
                module.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of the task plus what the adapters ask to add."""
        return self._step(batch, "train") + penalty(self.model)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics of one validation batch."""
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics of one test batch."""
        self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The output for a batch of inputs, alone or with a target that is ignored."""
        return self.model(batch[0] if isinstance(batch, list | tuple) else batch)

    def report(self, stage: Stage, loss: Tensor, output: Any, target: Any) -> None:
        """Log the loss, and in evaluation update and log the metrics of the stage."""
        size = len(target) if isinstance(target, Tensor) and target.dim() else 1
        if stage == "train":
            self.log("train/loss", loss, prog_bar=True, batch_size=size)
            return
        # A metric, not `sync_dist=True`: Lightning 2.6 truncates the mean batch size of the processes to an integer.
        mean = getattr(self, f"{stage}_loss")
        mean.update(loss.detach(), size)
        self.log(f"{stage}/loss", mean, prog_bar=True, on_step=False, on_epoch=True, batch_size=size)
        metrics = getattr(self, f"{stage}_metrics", None)
        if metrics is not None:
            metrics.update(output, target)
            self.log_dict(metrics, batch_size=size)

    # --- optimiser ---------------------------------------------------------------------
    def step_now(self) -> tuple[int, int | None]:
        """The optimiser step under way, from 0, and how many there will be, as adapters' hooks count them."""
        return self.trainer.global_step, self._total

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One group per (decay, learning rate); small tensors are stepped as one (see ``optim.flat``)."""
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self._check_start()
        defaults = self.optimizer([nn.Parameter(torch.zeros(1))]).defaults
        decay = float(defaults.get("weight_decay", 0.0))
        optimizer = self.optimizer(self.groups(float(defaults["lr"]), decay))
        flatten(optimizer)
        self._configured = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        total = total_steps(self.trainer)
        if total is None and self.schedule.shape != "constant":
            raise ValueError(
                f"the {self.schedule.shape} schedule needs an end: set trainer.max_epochs or trainer.max_steps, or "
                "model.schedule.shape to constant"
            )
        self._total = total
        scheduler = self.schedule.scheduler(optimizer, total or 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def groups(self, lr: float, decay: float) -> list[dict[str, Any]]:
        """The optimiser's groups, every trainable tensor in one of them."""
        return parameter_groups(self.model, lr, decay, self.up_lr_ratio, self.rates)

    def on_train_start(self) -> None:
        """After a resume: state comes from the checkpoint, hyper-parameters from the configuration."""
        self._check_start()
        for optimizer, schedule in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs):
            scheduler: Any = schedule.scheduler
            for i, (group, configured) in enumerate(zip(optimizer.param_groups, self._configured)):
                group.update(configured)
                group["initial_lr"] = scheduler.base_lrs[i] = configured["lr"]
                group["lr"] = configured["lr"] * scheduler.lr_lambdas[i](scheduler.last_epoch)

    def on_after_backward(self) -> None:
        """Bring the gradients where the optimiser, gradient scaling and clipping look for them."""
        self._sync_gradients()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Again, for gradients that a callback or an adapter replaced."""
        self._sync_gradients()

    def _sync_gradients(self) -> None:
        for optimizer in self.trainer.optimizers:
            sync_gradients(optimizer)

    def configure_callbacks(self) -> list[L.Callback]:
        """What every run needs; a Trainer without checkpoints gets none of the resuming ones."""
        wanted: list[L.Callback] = [AdapterSteps(), CheckReached()]
        if any(type(a.method).calibrate is not Adapter.calibrate for a in self.adaptations):
            wanted.insert(0, Calibrate())  # before averages begin
        if self.ema_decay is not None:
            wanted.append(AdapterEMA(self.ema_decay))
        if self.trainer.checkpoint_callbacks:
            wanted += [ExactResume(), LastCheckpoint(), SaveOnSignal()]
        # Lightning takes the first checkpoint callback for the one that knows the best checkpoint.
        present: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        present.sort(key=lambda c: isinstance(c, LastCheckpoint | SaveOnSignal))
        return [c for c in wanted if type(c) not in set(map(type, present))]

    # --- checkpoints -------------------------------------------------------------------
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As usual, but unless ``strict`` the frozen base is not missing (Lightning would list all of it)."""
        keys = super().load_state_dict(state_dict, strict, assign)
        if not strict and keys.missing_keys:
            trained = ck.trained_names(self)
            keys.missing_keys[:] = [name for name in keys.missing_keys if name in trained]
        return keys

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, say what that is, and on which base."""
        kept = ck.trained_state(checkpoint["state_dict"], ck.trained_names(self))
        checkpoint["state_dict"] = kept
        checkpoint["trained"] = {name: list(tensor.shape) for name, tensor in kept.items()}
        checkpoint["base"] = dict(self.base)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Missing may be the frozen base only, unexpected nothing, and the base must be the same.

        Raises:
            ValueError: otherwise; says which tensors.
        """
        self.configure_model()
        # ModelParallelStrategy has loaded "state_dict" by now and taken it out.
        tensors = {name: list(tensor.shape) for name, tensor in checkpoint.get("state_dict", {}).items()}
        shapes = checkpoint.get("trained", tensors)
        ck.check_base(checkpoint.get("base"), self.base, "the checkpoint")
        ck.check_names(ck.trained_names(self), set(shapes), "the checkpoint")
        ck.check_shapes(self, shapes, "the checkpoint")
        self._start_error = None


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
