"""What the experiments share: flags, the trainer with its checkpoints and ranks, and the record."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import experiments
import losssurf_fast as lsf
from experiments import __main__ as listing
from experiments import command, models, report, trainer
from experiments import data as experiment_data
from tests.distributed import run_ranks

DEFAULTS = {
    "digits": {"model": "preresnet8", "width": 2, "epochs": 4, "batch_size": 32, "lr": 0.1},
    "mnist": {"model": "vgg16", "width": 2, "epochs": 4, "batch_size": 32, "lr": 0.1},
    "cifar10": {"model": "vgg16", "width": 2, "epochs": 4, "batch_size": 32, "lr": 0.1},
    "quick": {"epochs": 2},
}


def run(procedure, out, *flags):
    def wrapped(setting):
        return report.Result("text", {"found": procedure(setting)}, {})

    assert (
        command.main("trial", wrapped, DEFAULTS, [*map(str, flags), "--quick", "--threads", "1", "--out", str(out)])
        == 0
    )
    return json.loads((out / "trial.json").read_text())["results"]["found"]


def averaged_training(setting, stop_after=None, epochs=4):
    """The history of a training with schedule and average, and its weights' sums; killed after so many epochs."""
    data = setting.load_data()
    model = setting.build(data)
    swa = lsf.AveragedModel(model)
    optimizer = trainer.sgd(setting, model, 1e-3)
    schedule = lsf.SWAConstantLR(optimizer, 0.05, 2)
    noisy = lambda m, x, y, done: trainer.cross_entropy(m, x + 0.1 * torch.randn_like(x), y, done)

    def measure(epoch):
        if epoch == stop_after:
            raise KeyboardInterrupt
        return trainer.evaluate(setting, model, setting.test_batches(data))

    batches = setting.train_batches(data)
    history = trainer.train(
        setting, "net", model, batches, optimizer, epochs, loss=noisy, schedule=schedule, average=swa, measure=measure
    )
    return {"history": history, "sums": [sum(p.double().sum().item() for p in m.parameters()) for m in (model, swa)]}


def test_training_learns_and_its_record_is_complete(tmp_path, capsys):
    found = run(averaged_training, tmp_path)
    assert len(found["history"]) == 4
    assert found["history"][-1]["loss"] < found["history"][0]["loss"]
    assert found["history"][-1]["error"] < 0.9
    record = json.loads((tmp_path / "trial.json").read_text())
    assert record["flags"]["epochs"] == 2
    assert record["flags"]["width"] == 2
    assert record["versions"]["torch"] == torch.__version__
    assert record["date"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pt", "trial.json"]
    assert "saved" in capsys.readouterr().out


def test_interrupted_training_goes_on_with_the_same_numbers(tmp_path):
    whole = run(averaged_training, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(lambda setting: averaged_training(setting, stop_after=3), tmp_path / "parts")
    torch.manual_seed(77)  # the generator's state of another process
    assert run(averaged_training, tmp_path / "parts") == whole


def test_finished_training_is_loaded(tmp_path, monkeypatch):
    whole = run(averaged_training, tmp_path)
    monkeypatch.setattr(trainer, "_epoch", None)
    assert run(averaged_training, tmp_path) == whole


def test_checkpoint_of_another_run_is_refused(tmp_path):
    run(averaged_training, tmp_path)
    before = (tmp_path / "net.pt").read_bytes()
    for flags, message in (
        (("--seed", 1), "is of a run with seed 0, this run has 1"),
        (("--width", 3), "is of a run with width 2, this run has 3"),
        (("--lr", 0.2), "is of a run with lr 0.1, this run has 0.2"),
        (("--compile",), "is of a run with compile False, this run has True"),
    ):
        with pytest.raises(SystemExit, match=message + ";\nuse its flags, delete it, or give another --out"):
            run(averaged_training, tmp_path, *flags)
    with pytest.raises(SystemExit, match="with length 4, this run has 5"):
        run(lambda setting: averaged_training(setting, epochs=5), tmp_path)
    assert (tmp_path / "net.pt").read_bytes() == before


def test_checkpoint_of_another_architecture_is_refused(tmp_path, monkeypatch):
    run(averaged_training, tmp_path)
    build = lambda channels, classes, width: nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))
    monkeypatch.setitem(models.MODELS, "preresnet8", models.Architecture(build))
    with pytest.raises(SystemExit, match="is of a run with another architecture"):
        run(averaged_training, tmp_path)


def test_damaged_checkpoint_is_refused(tmp_path):
    (tmp_path / "net.pt").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="is damaged or no file of trial;\ndelete it, or give another --out"):
        run(averaged_training, tmp_path)
    torch.save({"weights": torch.ones(2)}, tmp_path / "net.pt")
    with pytest.raises(SystemExit, match="is no checkpoint of an experiment"):
        run(averaged_training, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    def procedure(setting):
        data = setting.load_data()
        model = setting.build(data)
        nan = lambda m, x, y, done: trainer.cross_entropy(m, x, y, done) * float("nan")
        trainer.train(setting, "net", model, setting.train_batches(data), trainer.sgd(setting, model, 0.0), 2, loss=nan)

    with pytest.raises(SystemExit, match="the loss of net is nan in epoch 1;\ntry a smaller --lr than 0.1"):
        run(procedure, tmp_path)
    assert not (tmp_path / "net.pt").exists()


def test_bf16(tmp_path):
    dtypes = []

    def procedure(setting):
        data = setting.load_data()
        model = setting.build(data)
        model.stem.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        batches = setting.train_batches(data)
        return trainer.train(setting, "net", model, batches, trainer.sgd(setting, model, 0.0), 1)

    assert run(procedure, tmp_path, "--bf16")[0]["loss"] < 3
    assert set(dtypes) == {torch.bfloat16}


def linear_training(setting):
    """Full batches and no BatchNorm: then ranks compute what one process does."""
    data = setting.load_data()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = trainer.sgd(setting, model, 1e-3)
    measure = lambda epoch: trainer.evaluate(setting, model, setting.test_batches(data))
    history = trainer.train(setting, "net", model, setting.train_batches(data), optimizer, 2, measure=measure)
    return {"history": history, "sum": model[1].weight.double().sum().item()}


def _ranks_train(rank, folder):
    for _ in range(2):  # the second time all ranks load what the first has written
        command.main(
            "trial", lambda setting: report.Result("", {"found": linear_training(setting)}, {}), DEFAULTS,
            ["--quick", "--out", str(Path(folder) / "ranks")],
        )  # fmt: skip
    with pytest.raises(SystemExit, match="is of a run with seed 0, this run has 9"):
        command.main("trial", linear_training, DEFAULTS, ["--quick", "--seed", "9", "--out", f"{folder}/ranks"])


def test_two_ranks_train_as_one_process(tmp_path):
    alone = run(linear_training, tmp_path / "alone")
    run_ranks(_ranks_train, str(tmp_path))
    record = json.loads((tmp_path / "ranks" / "trial.json").read_text())
    assert record["flags"]["world"] == 2
    together = record["results"]["found"]
    assert together["sum"] == pytest.approx(alone["sum"], rel=1e-4)
    for ours, theirs in zip(together["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    with pytest.raises(SystemExit, match="is of a run with number of ranks 2, this run has 1"):
        run(linear_training, tmp_path / "ranks")


def measured_again(setting):
    """What a training with BatchNorm found last, and what its network gives afterwards; ranks have equal buffers."""
    data = setting.load_data()
    model = setting.build(data)
    measure = lambda epoch=None: trainer.evaluate(setting, model, setting.test_batches(data))
    optimizer = trainer.sgd(setting, model, 1e-3)
    history = trainer.train(setting, "net", model, setting.train_batches(data), optimizer, 2, measure=measure)
    for buffer in model.buffers():
        others = [torch.empty_like(buffer) for _ in range(setting.world)]
        dist.all_gather(others, buffer)
        assert all(torch.equal(buffer, other) for other in others)
    return [history[-1], measure()]


def _ranks_measure_again(rank, folder):
    found = []
    procedure = lambda setting: found.append(measured_again(setting)) or report.Result("", {}, {})
    for _ in range(2):  # the second time it is loaded
        command.main("trial", procedure, DEFAULTS, ["--quick", "--out", folder])
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]


def test_ranks_measure_the_network_that_is_saved(tmp_path):
    run_ranks(_ranks_measure_again, str(tmp_path))


def _fail(*args, **options):
    raise OSError("the first rank's disk")


def _first_rank_fails(rank, folder):
    expected = (OSError, "the first rank's disk") if rank == 0 else (RuntimeError, "trial: 1 other ranks failed")
    places = ((experiment_data, "load"), (trainer, "load_state"), (trainer, "save_state"), (report, "prepare"))
    for owner, name in places:
        if name == "load_state":
            (Path(folder) / "net.pt").touch()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(expected[0], match=expected[1]):
            if rank == 0:
                patch.setattr(owner, name, _fail)
            command.main("trial", linear_training, DEFAULTS, ["--quick", "--out", folder])
        dist.barrier()
        if rank == 0:
            (Path(folder) / "net.pt").unlink(missing_ok=True)
        dist.barrier()


def test_no_rank_waits_for_a_first_one_that_failed(tmp_path):
    run_ranks(_first_rank_fails, str(tmp_path), timeout=60)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number of at least 1, got '0'"),
        (["--lr", "-1"], "argument --lr: must be a positive number, got '-1'"),
        (["--lr", "fast"], "argument --lr: must be a positive number, got 'fast'"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 2^31 - 1, got '-1'"),
        (["--data", "imagenet"], "invalid choice: 'imagenet'"),
        (["--model", "alexnet"], "invalid choice: 'alexnet'"),
        (["--device", "bogus"], "argument --device: must be cpu or cuda, got 'bogus'"),
    ],
)
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main("trial", None, DEFAULTS, flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_unusable_output_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="trial: --out must be a folder, .*file is none"):
        command.main("trial", None, DEFAULTS, ["--out", str(tmp_path / "file")])


def test_models():
    x = torch.randn(2, 3, 32, 32)
    sizes = {"vgg16": 15_253_578, "preresnet110": 1_146_842, "preresnet164": 1_704_154}  # of the papers' networks
    widths = {"vgg16": 64}
    for name, count in sizes.items():
        model = models.MODELS[name].build(3, 10, widths.get(name, 16))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.02), name
        if name != "preresnet164":
            assert model(x).shape == (2, 10)
    with pytest.raises(ValueError, match="PreResNet: depth must be 6n \\+ 2, got 21"):
        models.PreResNet(21, 3, 10)
    with pytest.raises(SystemExit, match="curves: --model must be one of preresnet110, .*got lenet5"):
        models.recipe({"preresnet": 1}, "lenet5", "curves")


def test_regularised_loss_is_that_of_the_weights_at_a_point(tmp_path):
    def procedure(setting):
        data = setting.load_data()
        a, b = setting.build(data, 1), setting.build(data, 2)
        live = setting.build(data, 3)
        loader = {"train": setting.test_batches(data, train=True)}
        measure = lambda loss_fn: lsf.line(live, a, b, loader, points=3, loss_fn=loss_fn, progress=False).values
        plain = measure(nn.functional.cross_entropy)["train_loss"]
        l2 = [sum(p.square().sum().item() for p in m.parameters()) for m in (a, b)]
        found = measure(trainer.RegularisedLoss(live, 0.1))["train_loss"] - plain
        assert found[0] == pytest.approx(0.05 * l2[0], rel=1e-4)
        assert found[2] == pytest.approx(0.05 * l2[1], rel=1e-4)

    run(procedure, tmp_path)


def test_comparison_fits_80_columns():
    columns = ("SGD", "SWA 1", "SWA 1.25", "SWA 1.5")
    text = report.comparison(
        "title", columns, {"preresnet110": [1.0, None, 99.999, 3.0]}, {"preresnet110": ["78.49±0.36", 1, None, 2.5]},
        data="cifar100-coarse", source="someone",
    )  # fmt: skip
    assert max(map(len, text.splitlines())) <= 80
    assert "100.00" in text
    assert "78.49±0.36" in text
    assert text.count(" - ") + text.count(" -\n") >= 2


def test_the_list_of_experiments_is_complete(capsys):
    listing.main()
    assert experiments.__doc__ in capsys.readouterr().out
    for path in Path(experiments.__file__).parent.glob("*.py"):
        if "\nmain = " in path.read_text():
            assert f"python -m experiments.{path.stem} " in experiments.__doc__
