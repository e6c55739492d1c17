"""Averages of weights in Hugging Face's Trainer: ``Trainer(..., callbacks=[AveragingCallback()])``."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn
from torch.utils.data import DataLoader

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "losssurf_fast.integrations.transformers: needs transformers; pip install 'losssurf_fast[transformers]'"
    ) from error

from losssurf_fast.averaging import AveragedModel, averaged_weights, update_bn
from losssurf_fast.files import load_state, save_state
from losssurf_fast.integrations import check_arguments, has_average, install_average, make, refuse_sharded

FILE = "weight_average.pt"  # in a checkpoint's folder


class AveragingCallback(TrainerCallback):
    """Averages the weights during ``train`` and leaves the average in the model at the end.

    The average is updated after optimizer steps (not after the batches between them, where gradients accumulate), or
    after the last step of an epoch. Each checkpoint folder gets it as ``weight_average.pt``, written whole or not at
    all, and ``train(resume_from_checkpoint=...)`` goes on with it; not so in a hyperparameter search.

    Evaluations during training see the weights being trained: the Trainer has no event before them. A trainer class
    that begins with :class:`EvaluateAverage` evaluates the average instead.

    Args:
        make_average: makes the average from the model; ``functools.partial(lsf.AveragedModel, average="ema")`` gives
            any other than the equal average of SWA.
        every: "step" or "epoch".
        start: how many optimizer steps, or epochs, pass before the first that is averaged.
        copy_at_end: leave the average in the model when training ends, also in place of the best checkpoint that
            ``load_best_model_at_end`` loads.
        recalibrate_bn: then run the training data through the model for its BatchNorm layers (``lsf.update_bn``).
        resume_from: the folder with the average to go on with; needed only where a run resumes from a folder that is
            neither ``args.resume_from_checkpoint`` nor ``<output_dir>/checkpoint-<step>``.

    Attributes:
        average: the :class:`lsf.AveragedModel`, None before training.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``make_average`` makes something else.
        NotImplementedError: ``train`` writes checkpoints of a sharded model.
    """

    def __init__(
        self,
        make_average: Callable[[nn.Module], AveragedModel] = AveragedModel,
        *,
        every: str = "step",
        start: int = 0,
        copy_at_end: bool = True,
        recalibrate_bn: bool = True,
        resume_from: str | os.PathLike | None = None,
    ) -> None:
        check_arguments("AveragingCallback", make_average, every, start)
        self.make_average, self.every, self.start = make_average, every, start
        self.copy_at_end, self.recalibrate_bn, self.resume_from = copy_at_end, recalibrate_bn, resume_from
        self.average: AveragedModel | None = None
        self._in_model = False  # whether the model's weights are the average for good

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if args.save_strategy != "no":
            refuse_sharded(model, "save_strategy='no'")
        average = make("AveragingCallback", self.make_average, model)
        if state.global_step > 0:
            average.load_state_dict(load_state("AveragingCallback", self._saved(args, state)))
        self.average, self._in_model = average, False

    def _saved(self, args: TrainingArguments, state: TrainerState) -> Path:
        folders = [Path(args.output_dir) / f"checkpoint-{state.global_step}"]
        if isinstance(args.resume_from_checkpoint, str) and args.resume_from_checkpoint.lower() != "true":
            folders.insert(0, Path(args.resume_from_checkpoint))
        if self.resume_from is not None:
            folders = [Path(self.resume_from)]
        for folder in folders:
            if (folder / FILE).is_file():
                return folder / FILE
        raise RuntimeError(
            f"AveragingCallback: training resumes at step {state.global_step} but there is no {FILE} in "
            f"{' or '.join(map(str, folders))}; pass resume_from the folder that has it"
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        done = state.global_step if self.every == "step" else state.epoch
        if done == int(done) and done > self.start:
            self.average.update_parameters(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.should_save and not state.is_hyper_param_search:  # an event does not tell a trial's folder
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_state(self.average.state_dict(), folder / FILE)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: DataLoader,
        **kwargs,
    ) -> None:
        if self.copy_at_end and has_average(self.average):
            install_average(model, self.average)
            self._in_model = True  # also where the next step fails
            if self.recalibrate_bn:
                update_bn(train_dataloader, model, args.device)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module):
        """Within it ``model`` has the average, if there is one that it does not have for good."""
        if self._in_model or not has_average(self.average):
            yield
        else:
            with averaged_weights(model, self.average):
                yield


class EvaluateAverage:
    """What makes a trainer class evaluate and predict with its :class:`AveragingCallback`'s average::

        class AveragingTrainer(EvaluateAverage, Trainer):
            pass

    It applies to every evaluation, during training and after, of one dataset or several.
    """

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ):
        with contextlib.ExitStack() as stack:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, AveragingCallback):
                    stack.enter_context(callback.evaluating(self.model))
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
