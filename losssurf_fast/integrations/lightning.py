"""Averages of weights in Lightning: ``Trainer(callbacks=[AveragingCallback()])``."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError(
        "losssurf_fast.integrations.lightning: needs Lightning; pip install 'losssurf_fast[lightning]'"
    ) from error

from losssurf_fast.averaging import AveragedModel, averaged_weights, update_bn
from losssurf_fast.integrations import check_arguments, has_average, install_average, make, refuse_sharded

_REMEDY = "enable_checkpointing=False"


class AveragingCallback(Callback):
    """Averages the weights during ``fit``, evaluates the average, and leaves it in the module at the end.

    The average is updated after optimizer steps (not after the batches between them, where gradients accumulate), or
    after the last batch of an epoch, before that epoch's validation. It is saved in the trainer's checkpoints, so a
    resumed run has the same average; the checkpoint's ``state_dict`` keeps the weights being trained.

    Args:
        make_average: makes the average from the module; ``functools.partial(lsf.AveragedModel, average="ema")``
            gives any other than the equal average of SWA.
        every: "step" or "epoch".
        start: how many optimizer steps, or epochs, pass before the first that is averaged.
        evaluate_average: validate, test and predict with the average in the module, once there is one. Buffers are
            then the average's own; with BatchNorm pass ``use_buffers=True`` to ``make_average``, which averages them.
        copy_at_end: leave the average in the module when training ends.
        recalibrate_bn: then run the training data through the module for its BatchNorm layers (``lsf.update_bn``); the
            module must accept the first item of a batch, or a batch that is a dict as keyword arguments.

    Attributes:
        average: the :class:`lsf.AveragedModel`, None before training.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``make_average`` makes something else.
        NotImplementedError: ``fit`` writes checkpoints of a sharded module (ModelParallelStrategy).
    """

    def __init__(
        self,
        make_average: Callable[[nn.Module], AveragedModel] = AveragedModel,
        *,
        every: str = "step",
        start: int = 0,
        evaluate_average: bool = True,
        copy_at_end: bool = True,
        recalibrate_bn: bool = True,
    ) -> None:
        check_arguments("AveragingCallback", make_average, every, start)
        self.make_average, self.every, self.start = make_average, every, start
        self.evaluate_average, self.copy_at_end, self.recalibrate_bn = evaluate_average, copy_at_end, recalibrate_bn
        self.average: AveragedModel | None = None
        self._loaded: dict | None = None  # a checkpoint's average, until there is a module on its device to make it of
        self._last_step = 0
        self._in_module = False  # whether the module's weights are the average for good
        self._swap = contextlib.ExitStack()

    def _make(self, module: LightningModule) -> None:
        with torch.inference_mode(False):  # Lightning tests within inference mode, whose tensors never leave it
            self.average = make("AveragingCallback", self.make_average, module)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.checkpoint_callbacks:
            refuse_sharded(pl_module, _REMEDY)
        self._make(pl_module)
        self._last_step, self._in_module = trainer.global_step, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        stepped = trainer.global_step > self._last_step
        self._last_step = trainer.global_step
        due = stepped and self._last_step > self.start
        if self.every == "epoch":
            due = trainer.is_last_batch and trainer.current_epoch >= self.start
        if due:
            self.average.update_parameters(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.copy_at_end and has_average(self.average):
            install_average(pl_module, self.average)
            self._in_module = True  # also where the next step fails
            if self.recalibrate_bn:
                precision = trainer.precision_plugin
                with precision.forward_context():
                    loader = map(precision.convert_input, trainer.train_dataloader)
                    update_bn(loader, pl_module, pl_module.device)

    def _swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None and trainer.state.fn != "fit":
            self._make(pl_module)
        if self.evaluate_average and not self._in_module and has_average(self.average):
            self._swap.enter_context(averaged_weights(pl_module, self.average))

    def _swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.close()

    on_validation_start = on_test_start = on_predict_start = _swap_in
    on_validation_end = on_test_end = on_predict_end = _swap_out

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap.close()

    def state_dict(self) -> dict:
        if self.average is not None:  # Trainer.save_checkpoint asks whatever on_train_start has seen
            refuse_sharded(self.average, _REMEDY)
        average = self._loaded if self.average is None else self.average.state_dict()
        return {"average": average, "in_module": self._in_module}

    def load_state_dict(self, state_dict: dict) -> None:
        self._loaded, self._in_module = state_dict["average"], state_dict["in_module"]
