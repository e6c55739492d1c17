"""The callbacks in the real libraries' loops; lightning and transformers take seconds to import, here alone."""

import functools
import importlib
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerControl, TrainerState, TrainingArguments

import losssurf_fast as lsf
from losssurf_fast.integrations import lightning as for_lightning
from losssurf_fast.integrations import transformers as for_transformers
from losssurf_fast.integrations.transformers import EvaluateAverage

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
]
EMA = functools.partial(lsf.AveragedModel, average="ema", decay=0.7, use_buffers=True)


def samples(count=16):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, generator=generator), torch.randint(2, (count,), generator=generator)


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def mean_of(models):
    return {name: torch.stack([m[name] for m in models]).mean(0) for name in models[0]}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-6, rtol=1e-5)


# ---- lightning ------------------------------------------------------------------------------------------------------


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.after_steps, self.in_validation, self.in_test, self.fails = [], [], [], False

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        if self.fails:
            raise ZeroDivisionError
        self.in_validation.append(weights(self))

    def test_step(self, batch, index):
        self.in_test.append(weights(self))

    predict_step = test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.after_steps.append(weights(self))


def loader(count=16):
    return DataLoader(TensorDataset(*samples(count)), batch_size=4)


def trainer(tmp_path, callback, **options):
    options = {"max_epochs": 2, "enable_checkpointing": False, **options}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet, **options)


def test_lightning_averages_optimizer_steps_and_validates_the_average(tmp_path):
    callback = for_lightning.AveragingCallback(start=1, copy_at_end=False)
    module = Module()
    run = trainer(tmp_path, callback, accumulate_grad_batches=2)
    run.fit(module, loader(), loader(4))
    steps = module.after_steps
    assert len(steps) == 4  # 8 batches
    assert callback.average.n_averaged == 3
    assert_close(weights(callback.average.module), mean_of(steps[1:]))
    sanity, first, second = module.in_validation[0], module.in_validation[-2], module.in_validation[-1]
    assert_close(sanity, weights(Module()))
    assert_close(first, steps[1])
    assert_close(second, mean_of(steps[1:]))
    assert_close(weights(module), steps[-1])
    run.test(module, loader(4), verbose=False)
    run.predict(module, loader(4))
    for seen in module.in_test:
        assert_close(seen, mean_of(steps[1:]))
    assert len(module.in_test) == 2
    assert_close(weights(module), steps[-1])


def test_lightning_recalibrates_in_the_trainers_precision(tmp_path):
    module = Module()
    trainer(tmp_path, for_lightning.AveragingCallback(), precision="bf16-true").fit(module, loader())
    assert module.net[1].running_mean.dtype == torch.bfloat16 and module.net[1].num_batches_tracked == 4


def test_lightning_epochs_and_what_is_left_in_the_module(tmp_path):
    callback = for_lightning.AveragingCallback(every="epoch", start=1)
    module = Module()
    run = trainer(tmp_path, callback, max_epochs=3)
    run.fit(module, loader(), loader(4))
    steps = module.after_steps
    expected = mean_of([steps[7], steps[11]])
    assert_close(module.in_validation[-2], steps[7])  # the epoch that is being validated is in the average
    assert_close(module.in_validation[-1], expected)
    assert_close(weights(module), expected)
    by_hand = Module()
    by_hand.load_state_dict(module.state_dict())
    lsf.update_bn(loader(), by_hand)
    assert torch.equal(by_hand.net[1].running_mean, module.net[1].running_mean)
    assert torch.equal(by_hand.net[1].running_var, module.net[1].running_var)
    statistics = module.net[1].running_mean.clone()
    run.test(module, loader(4), verbose=False)
    assert torch.equal(module.net[1].running_mean, statistics)


def test_lightning_restores_the_module_after_an_exception(tmp_path):
    module = Module()
    module.fails = True
    run = trainer(tmp_path, for_lightning.AveragingCallback(), num_sanity_val_steps=0)
    with pytest.raises(ZeroDivisionError):
        run.fit(module, loader(), loader(4))
    assert_close(weights(module), module.after_steps[-1])


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_lightning_resumes_with_the_same_average(tmp_path, every):
    make = functools.partial(for_lightning.AveragingCallback, EMA, every=every)
    whole, half, resumed, tested = make(), make(), make(), make()
    trainer(tmp_path, whole, max_epochs=3).fit(Module(), loader())
    path = tmp_path / "half.ckpt"
    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="half", save_top_k=-1)
    run = trainer(tmp_path, half, max_epochs=2, enable_checkpointing=True)
    run.callbacks.append(save)
    run.fit(Module(), loader(), loader(4))
    assert path.is_file()
    trainer(tmp_path, resumed, max_epochs=3).fit(Module(), loader(), ckpt_path=path)
    expected, actual = whole.average.state_dict(), resumed.average.state_dict()
    assert actual["n_averaged"] == expected["n_averaged"] == (12 if every == "step" else 3)
    assert_close(actual, expected)

    module = Module()
    trainer(tmp_path, tested).test(module, loader(4), ckpt_path=path, verbose=False)
    assert tested.average.n_averaged < 12
    assert_close(module.in_test[0], weights(tested.average.module))


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class ShardedModule(Module):
    def configure_model(self):
        fully_shard(self.net)


SHARDED = "AveragingCallback: a sharded average is not written to checkpoints yet; use "


def test_lightning_refuses_to_save_a_sharded_average(tmp_path, one_rank):
    run = trainer(tmp_path, for_lightning.AveragingCallback(), enable_checkpointing=True)
    with pytest.raises(NotImplementedError, match=SHARDED + "enable_checkpointing=False"):
        run.fit(ShardedModule(), loader(), loader(4))
    callback = for_lightning.AveragingCallback(recalibrate_bn=False)
    run = trainer(tmp_path, callback)
    run.fit(ShardedModule(), loader(), loader(4))
    assert callback.average.n_averaged == 8
    with pytest.raises(NotImplementedError, match=SHARDED + "enable_checkpointing=False"):
        run.save_checkpoint(tmp_path / "by hand.ckpt")


# ---- transformers ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.evaluated = []

    def forward(self, x, labels=None):
        if not self.training:
            self.evaluated.append(weights(self))
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Recorder(for_transformers.AveragingCallback):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.after_steps = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after_steps.append(weights(model))
        super().on_step_end(args, state, control, model, **kwargs)


class AveragingTrainer(EvaluateAverage, Trainer):
    pass


def rows(count=16):
    return [{"x": x, "labels": y} for x, y in zip(*samples(count), strict=True)]


def hf_trainer(tmp_path, callback, kind=Trainer, epochs=2, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        **{"save_strategy": "no", **options},
    )
    evaluated = {"a": rows(4), "b": rows(8)}
    return kind(Classifier(), arguments, train_dataset=rows(), eval_dataset=evaluated, callbacks=[callback])


def test_transformers_averages_optimizer_steps_and_evaluates_the_average(tmp_path):
    callback = Recorder(start=1, copy_at_end=False)
    run = hf_trainer(tmp_path, callback, AveragingTrainer, gradient_accumulation_steps=2, eval_strategy="epoch")
    run.train()
    steps, model = callback.after_steps, run.model
    assert len(steps) == 4
    expected = mean_of(steps[1:])
    assert_close(weights(callback.average.module), expected)
    assert_close(model.evaluated[0], steps[1])
    assert_close(model.evaluated[-1], expected)
    assert_close(weights(model), steps[-1])
    del model.evaluated[:]
    run.evaluate()
    assert len(model.evaluated) == 2
    assert_close(model.evaluated[1], expected)
    assert_close(weights(model), steps[-1])


def test_transformers_epochs_and_what_is_left_in_the_model(tmp_path):
    callback = Recorder(every="epoch", start=1)
    run = hf_trainer(tmp_path, callback, AveragingTrainer, epochs=3, eval_strategy="no")
    run.train()
    assert_close(weights(run.model), mean_of([callback.after_steps[7], callback.after_steps[11]]))
    statistics = run.model.net[1].running_mean.clone()
    by_hand = Classifier()
    by_hand.load_state_dict(run.model.state_dict())
    lsf.update_bn(run.get_train_dataloader(), by_hand)
    torch.testing.assert_close(by_hand.net[1].running_mean, statistics)
    run.evaluate()
    assert torch.equal(run.model.net[1].running_mean, statistics)


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_transformers_resumes_with_the_same_average(tmp_path, every):
    make = functools.partial(for_transformers.AveragingCallback, EMA, every=every)
    whole, half, resumed, moved = make(), make(), make(), make(resume_from=tmp_path / "moved")
    hf_trainer(tmp_path / "whole", whole, epochs=3).train()
    hf_trainer(tmp_path / "half", half, epochs=2, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "half" / "checkpoint-4"
    hf_trainer(tmp_path / "half", resumed, epochs=3).train(resume_from_checkpoint=str(checkpoint))
    expected, actual = whole.average.state_dict(), resumed.average.state_dict()
    assert actual["n_averaged"] == expected["n_averaged"] == (12 if every == "step" else 3)
    assert_close(actual, expected)

    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(RuntimeError, match="at step 4 but there is no weight_average.pt in .*checkpoint-4; pass"):
        hf_trainer(tmp_path / "half", make()).train(resume_from_checkpoint=str(tmp_path / "moved"))
    hf_trainer(tmp_path / "half", moved, epochs=3).train(resume_from_checkpoint=str(tmp_path / "moved"))
    assert_close(moved.average.state_dict(), expected)
    file = tmp_path / "moved" / "weight_average.pt"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ValueError, match="AveragingCallback: .*weight_average.pt is damaged"):
        hf_trainer(tmp_path / "half", moved).train(resume_from_checkpoint=str(tmp_path / "moved"))


def test_transformers_refuses_to_save_a_sharded_average(tmp_path, one_rank):
    callback, model = for_transformers.AveragingCallback(), fully_shard(network())
    begin = functools.partial(callback.on_train_begin, state=TrainerState(), control=TrainerControl(), model=model)
    with pytest.raises(NotImplementedError, match=SHARDED + "save_strategy='no'"):
        begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="steps"))
    begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="no"))
    assert callback.average.n_averaged == 0


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [for_lightning, for_transformers])
def test_recalibration_that_fails_leaves_an_average_that_is_known_as_such(module, tmp_path, monkeypatch):
    def fails(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(module, "update_bn", fails)
    callback, model = module.AveragingCallback(), Module()
    with pytest.raises(ZeroDivisionError):
        if module is for_lightning:
            trainer(tmp_path, callback).fit(model, loader())
        else:
            run = hf_trainer(tmp_path, callback)
            model = run.model
            run.train()
    assert_close(weights(model), weights(callback.average.module))
    assert callback._in_module if module is for_lightning else callback._in_model


@pytest.mark.parametrize("module", [for_lightning, for_transformers])
def test_bad_arguments(module):
    with pytest.raises(ValueError, match="AveragingCallback: every must be 'step' or 'epoch', got 'day'"):
        module.AveragingCallback(every="day")
    for start in (-1, 0.5, True):
        with pytest.raises(ValueError, match=f"AveragingCallback: start must be an int of at least 0, got {start}"):
            module.AveragingCallback(start=start)
    with pytest.raises(TypeError, match="AveragingCallback: make_average must be a function .* got AveragedModel"):
        module.AveragingCallback(lsf.AveragedModel(nn.Linear(2, 2)))


def test_make_average_makes_an_averaged_model(tmp_path):
    with pytest.raises(TypeError, match="AveragingCallback: make_average must return an AveragedModel, got SWAG"):
        hf_trainer(tmp_path, for_transformers.AveragingCallback(lsf.SWAG)).train()


@pytest.mark.parametrize(("library", "extra"), [("lightning.pytorch", "lightning"), ("transformers", "transformers")])
def test_missing_library(monkeypatch, library, extra):
    name = f"losssurf_fast.integrations.{extra}"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"{name}: needs .*pip install 'losssurf_fast\[{extra}\]'"):
        importlib.import_module(name)


def test_the_package_imports_neither():
    code = "import sys, losssurf_fast; print([m for m in ('lightning', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_gpt2s_conv1d_is_listed_as_left():
    """transformers' Conv1D is a linear layer with a transposed weight, and no torch layer."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16))
    report = lsf.conversion_report(lsf.to_lrt(model))
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    for layer in layers:
        assert report.left[f"transformer.h.0.{layer}"] == "Conv1D: there is no stochastic layer for it"
    assert report.converted["lm_head"] == "additive" and model.lm_head.weight is model.transformer.wte.weight
