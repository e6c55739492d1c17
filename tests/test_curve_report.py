import copy

import numpy as np
import pytest
import torch
from common import F64
from distributed import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import losssurf_fast as lsf
from losssurf_fast.evaluation import evaluate


def model_of(bn=True, dtype=F64):
    norm = [nn.BatchNorm1d(6)] if bn else []
    return nn.Sequential(nn.Linear(3, 6), *norm, nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4)).to(dtype)


def curve_of(bn=True, dtype=F64, **options):
    torch.manual_seed(0)
    curve = lsf.Curve([model_of(bn, dtype), model_of(bn, dtype)], **options)
    with torch.no_grad():
        for p in curve.parameters():
            p.add_(0.3 * torch.randn_like(p))  # bent
    return curve


def batches(*sizes, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, 3, generator=g, dtype=F64).to(dtype)
    return [(draw(n), torch.randint(4, (n,), generator=g)) for n in sizes]


def top2(outputs, targets):
    return (outputs.topk(2, 1).indices == targets[:, None]).any(1).double().mean()


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
def test_evaluate_curve_equals_models_at_its_points(kind):
    curve, train, test = curve_of(kind=kind, num_bends=4), batches(8, 7), batches(5, seed=1)
    report = lsf.evaluate_curve(
        curve, {"train": train, "test": test}, num_points=5, weight_decay=0.3, metrics={"top2": top2}, device="cpu"
    )
    vectors = []
    for i, t in enumerate(torch.linspace(0, 1, 5, dtype=F64)):
        model = curve.module_at(t)
        lsf.update_bn(train, model)
        vectors.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        for name, loader in (("train", train), ("test", test)):
            found = evaluate("f", model, loader, metrics={"top2": top2})
            got = {metric: values[i] for metric, values in report.values[name].items()}
            assert got["nll"] == pytest.approx(found["loss"], rel=1e-12)
            assert got["loss"] == pytest.approx(found["loss"] + 0.15 * vectors[-1].square().sum().item(), rel=1e-12)
            assert got["error"] == found["error"] and got["top2"] == found["top2"]
        assert report.norms[i] == pytest.approx(vectors[-1].norm().item(), rel=1e-12)
    distances = torch.stack(vectors).diff(dim=0).norm(dim=1).numpy()
    np.testing.assert_allclose(report.dl, [0, *distances], rtol=1e-12)
    np.testing.assert_array_equal(report.ts, np.linspace(0, 1, 5))
    assert report.length == pytest.approx(distances.sum()) == pytest.approx(curve.length(5).item())
    assert list(report.values["test"]) == ["loss", "nll", "error", "top2"]


def test_evaluate_curve_statistics():
    report = lsf.CurveReport(
        ts=np.array([0, 0.2, 1.0]), dl=np.array([0, 1.0, 3.0]), norms=np.ones(3), weight_decay=0.0,
        values={"train": {"loss": np.array([1.0, 4.0, 2.0]), "nll": np.array([1.0, np.nan, 2.0])}},
    )  # fmt: skip
    loss = report["train"]["loss"]
    assert (loss.min, loss.max, loss.mean, loss.barrier) == (1, 4, 7 / 3, 2)
    assert loss.integral == (2.5 * 1 + 3 * 3) / 4
    assert np.isnan([getattr(report["train"]["nll"], s) for s in ("min", "max", "mean", "integral", "barrier")]).all()
    with pytest.raises(KeyError):
        report["test"]


def test_evaluate_curve_at_given_ts():
    curve, data = curve_of(bn=False), batches(9)
    whole = lsf.evaluate_curve(curve, data, num_points=5)
    part = lsf.evaluate_curve(curve, {"data": data}, ts=[0.25, 1.0])
    assert list(part.values) == list(whole.values) == ["data"]
    np.testing.assert_allclose(part.values["data"]["loss"], whole.values["data"]["loss"][[1, 4]], rtol=1e-12)
    t = torch.tensor([0.25, 1.0], dtype=torch.float32)
    np.testing.assert_array_equal(lsf.evaluate_curve(curve, data, ts=t).dl, part.dl)


def state_of(curve):
    tensors = copy.deepcopy([*curve.state_dict().values(), *curve.module.buffers(), torch.get_rng_state()])
    return tensors, [m.training for m in curve.modules()], [p.grad for p in curve.parameters()]


def assert_same_state(curve, before):
    tensors, *rest = state_of(curve)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True)) and rest == list(before[1:])


def test_evaluate_curve_leaves_no_trace():
    curve, data = curve_of(), batches(8, 7)
    loader = DataLoader(TensorDataset(*(torch.cat(x) for x in zip(*data, strict=True))), batch_size=4, shuffle=True)
    curve.module[3].eval()
    before = state_of(curve)
    report = lsf.evaluate_curve(curve, {"train": loader}, num_points=3)
    assert_same_state(curve, before)
    again = lsf.evaluate_curve(curve, {"train": loader}, num_points=3)
    np.testing.assert_array_equal(report.values["train"]["loss"], again.values["train"]["loss"])
    calls = []

    def fails(outputs, targets):
        calls.append(0)
        if len(calls) > 5:
            raise ZeroDivisionError("mine")
        return F.cross_entropy(outputs, targets)

    with pytest.raises(ZeroDivisionError, match="mine"):
        lsf.evaluate_curve(curve, {"train": loader}, num_points=3, loss_fn=fails)
    assert_same_state(curve, before)


def test_evaluate_curve_between_forward_and_backward():
    curve, data = curve_of(bn=False).eval(), batches(8)
    bend = curve.bends[1].get_parameter("0.weight")
    (wanted,) = torch.autograd.grad(curve(data[0][0], t=0.3).sum(), [bend])
    outputs = curve(data[0][0], t=0.3)
    lsf.evaluate_curve(torch.compile(curve), {"train": data}, num_points=3)
    curve.predict(data[0][0], [0.1, 0.9])
    torch.testing.assert_close(torch.autograd.grad(outputs.sum(), [bend])[0], wanted)
    assert curve.l2().item() == pytest.approx(curve.l2(0.3).item())  # still that of the last forward


def test_evaluate_curve_recalibrates():
    curve, train, test = curve_of(), batches(8, 7), batches(5, seed=1)
    loss = lambda **options: lsf.evaluate_curve(curve, {"test": test}, num_points=3, **options).values["test"]["loss"]
    whole = loss(bn_loader=train)
    named = lsf.evaluate_curve(curve, {"test": test, "train": train}, num_points=3)
    np.testing.assert_array_equal(named.values["test"]["loss"], whole)
    np.testing.assert_array_equal(loss(bn_loader=train, subset=1), loss(bn_loader=train[:1]))
    assert not np.allclose(loss(bn_loader=train, subset=0.5), whole)
    assert not np.allclose(loss(recalibrate=False), whole)
    no_bn = curve_of(bn=False)
    never = [(0, 0)]  # is not read
    lsf.evaluate_curve(no_bn, {"test": test}, num_points=3, bn_loader=never)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"curve": nn.Linear(3, 4)}, TypeError, "evaluate_curve: curve must be a Curve, got Linear"),
        ({"num_points": 1}, ValueError, "num_points must be at least 2, got 1"),
        ({"num_points": 3.0}, TypeError, "num_points must be an int"),
        ({"ts": [0.5]}, ValueError, "at least two numbers that increase"),
        ({"ts": [0.5, 0.2]}, ValueError, "at least two numbers that increase"),
        ({"ts": [0.5, 1.2]}, ValueError, r"ts must lie in \[0, 1\]"),
        ({"ts": [0.5, float("nan")]}, ValueError, r"ts must lie in \[0, 1\]"),
        ({"ts": []}, ValueError, "ts must be a list of numbers"),
        ({"ts": "a"}, TypeError, "ts must be numbers"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be finite, at least 0, got -1"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite, at least 0, got nan"),
        ({"recalibrate": "no"}, TypeError, "recalibrate must be a bool, got str"),
        ({"weight_decay": "1"}, TypeError, "weight_decay must be a number, got str"),
        ({"loader": {}}, ValueError, "at least one loader"),
        ({"loader": iter(batches(3))}, ValueError, "is read once for every point"),
        ({"loader": 5}, TypeError, "must be a loader of batches, got int"),
        ({"loader": {"test": batches(3)}}, ValueError, "training data as bn_loader= .*recalibrate=False"),
        ({"bn_loader": batches(3), "recalibrate": False}, ValueError, "exclude each other"),
        ({"loader": {"test": batches(3)}, "bn_loader": iter([])}, ValueError, "bn_loader is read once"),
        (
            {"loader": {"train": []}},
            ValueError,
            "evaluate_curve: BatchNorm statistics: loader must yield at least one batch",
        ),
        ({"loader": {"train": batches(3), "test": []}}, ValueError, "evaluate_curve: loader must yield at least one"),
        ({"loader": {3: batches(3)}}, TypeError, "must have strings as names, got 3"),
        ({"loader": {"train": batches(3), "tr": batches(3)}}, ValueError, "two results would be called 'tr_"),
        ({"metrics": {"nll": top2}}, ValueError, "two results would be called 'tr_nll"),
        ({"metrics": {"loss_min": top2}}, ValueError, "two results would be called 'tr_loss_min'"),
        ({"loss_fn": lambda o, t: F.cross_entropy(o, t, reduction="none")}, ValueError, "loss must be a scalar"),
        ({"loss_fn": lambda o, t: 1.0}, TypeError, "loss must be a tensor"),
    ],
)
def test_evaluate_curve_refuses(change, error, match):
    arguments = {"curve": curve_of(), "loader": {"train": batches(4, 3)}, "num_points": 3} | change
    before = state_of(arguments["curve"]) if isinstance(arguments["curve"], lsf.Curve) else None
    with pytest.raises(error, match=match):
        lsf.evaluate_curve(**arguments)
    if before is not None:
        assert_same_state(arguments["curve"], before)


def test_evaluate_curve_refuses_a_curve_without_length():
    curve = curve_of()
    with torch.no_grad():
        for bend in list(curve.bends)[1:]:
            for p, first in zip(bend.parameters(), curve.bends[0].parameters(), strict=True):
                p.copy_(first)
    with pytest.raises(ValueError, match="must have a length"):
        lsf.evaluate_curve(curve, {"train": batches(4)})


def test_evaluate_curve_nan_is_a_result(tmp_path):
    curve = curve_of(bn=False)
    with torch.no_grad():
        curve.bends[1].get_parameter("0.bias").fill_(torch.nan)
    report = lsf.evaluate_curve(curve, {"test": batches(4)}, num_points=3)
    assert np.isnan(report.values["test"]["nll"][1]) and np.isnan(report.values["test"]["loss"][1])
    assert np.isnan(report["test"]["nll"].max) and "nan" in str(report)
    report.plot(tmp_path / "nan.png")


# ---- files, tables, pictures -----------------------------------------------------------------------------------------


def report_of(**options):
    loaders = {"train": batches(8, 7), "test": batches(5, seed=1), "other_set": [(x, x) for x, _ in batches(4)]}
    loss = lambda outputs, targets: F.cross_entropy(outputs, targets) if targets.dim() == 1 else outputs.square().mean()
    metrics = {"mean": lambda outputs, targets: outputs.mean()}
    return lsf.evaluate_curve(curve_of(), loaders, num_points=4, metrics=metrics, loss_fn=loss, **options)


def assert_equal_reports(a, b):
    for name in ("ts", "dl", "norms"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.weight_decay == b.weight_decay
    assert {k: list(v) for k, v in a.values.items()} == {k: list(v) for k, v in b.values.items()}
    for loader, found in a.values.items():
        for metric, values in found.items():
            np.testing.assert_allclose(b.values[loader][metric], values, rtol=1e-15 * (metric == "error") * 2)


def test_curve_report_file(tmp_path):
    report = report_of(weight_decay=0.1)
    path = tmp_path / "curve.npz"
    report.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["curve.npz"]
    loaded = lsf.CurveReport.load(path)
    assert_equal_reports(report, loaded)
    assert str(loaded) == str(report)
    assert "error" not in report.values["other_set"]
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    test = report["test"]
    np.testing.assert_allclose(arrays["te_err"], 100 * test["error"].values)
    np.testing.assert_allclose(arrays["te_acc"], 100 - arrays["te_err"])
    np.testing.assert_allclose(arrays["te_err_int"], 100 * test["error"].integral)
    for field, value in (("tr_loss_min", "min"), ("tr_loss_max", "max"), ("tr_loss_avg", "mean")):
        assert arrays[field] == getattr(report["train"]["loss"], value)
    assert arrays["other_set_mean_int"] == report["other_set"]["mean"].integral


def test_curve_report_reads_the_peers_file(tmp_path):
    """The fields of eval_curve.py in dnn-mode-connectivity, all of which ours has, too."""
    ts, dl = np.linspace(0, 1, 4), np.array([0.0, 1, 2, 1])
    arrays = {"ts": ts, "dl": dl}
    for number, prefix in enumerate(("tr", "te")):
        for metric in ("loss", "nll", "err"):
            values = np.arange(4.0) + number
            arrays[f"{prefix}_{metric}"] = values
            arrays |= {f"{prefix}_{metric}_{s}": np.array(0.0) for s in ("min", "max", "avg", "int")}
        arrays[f"{prefix}_acc"] = 100 - values
    np.savez(tmp_path / "peer.npz", **arrays)
    report = lsf.CurveReport.load(tmp_path / "peer.npz")
    assert report["test"]["error"].max == 0.04 and report["train"]["nll"].integral == (0.5 * 1 + 1.5 * 2 + 2.5 * 1) / 4
    assert "nan" not in str(report) and "error (%)" in str(report)
    report.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as file:
        assert set(arrays) <= set(file.files)


def test_an_accuracy_of_ones_own_keeps_its_unit_in_the_file(tmp_path):
    accuracy = lambda outputs, targets: (outputs.argmax(1) == targets).double().mean()
    report = lsf.evaluate_curve(curve_of(False), {"test": batches(9)}, num_points=3, metrics={"acc": accuracy})
    np.testing.assert_allclose(report["test"]["acc"].values, 1 - report["test"]["error"].values)
    report.save(tmp_path / "curve.npz")
    assert_equal_reports(report, lsf.CurveReport.load(tmp_path / "curve.npz"))
    with np.load(tmp_path / "curve.npz") as file:
        np.testing.assert_array_equal(file["te_acc"], report["test"]["acc"].values)
        assert file["te_acc_max"] == report["test"]["acc"].max


def test_curve_report_refuses_damaged_files(tmp_path):
    report, path = report_of(), tmp_path / "curve.npz"
    report.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="CurveReport.load: .*curve.npz is damaged"):
        lsf.CurveReport.load(path)
    np.savez(path, ts=np.array([None, {}], dtype=object))
    with pytest.raises(ValueError, match="CurveReport.load"):
        lsf.CurveReport.load(path)
    for arrays in ({"ts": np.ones(3)}, {"dl": np.ones(3)}, {"ts": np.ones(3), "dl": np.ones(2)}, {"ts": np.array("a")}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match="no file of a CurveReport"):
            lsf.CurveReport.load(path)
    np.savez(path, ts=np.ones(3), dl=np.ones(3), tr_loss=np.ones(2))
    with pytest.raises(ValueError, match="its tr_loss is not"):
        lsf.CurveReport.load(path)
    whole = {"ts": np.ones(3), "dl": np.ones(3)}
    for name, value in (("loaders", 3.0), ("metrics", [1.0]), ("weight_decay", "a"), ("norms", [1.0])):
        np.savez(path, **whole, **{name: np.array(value)})
        with pytest.raises(ValueError, match=f"no file of a CurveReport: its {name} is"):
            lsf.CurveReport.load(path)
    with pytest.raises(FileNotFoundError):
        lsf.CurveReport.load(tmp_path / "none.npz")


def test_curve_report_table():
    report = report_of()
    lines = str(report).splitlines()
    assert lines[0].startswith(f"4 points on a path of length {report.length:.4g}, |w| from ")
    names = [line[:22].strip() for line in lines[2:]]
    assert names == [
        "train loss", "train error (%)", "train mean", "test loss", "test error (%)", "test mean", "other_set loss",
        "other_set mean",
    ]  # fmt: skip
    assert f"{100 * report['test']['error'].max:.4g}" in lines[6].split()
    assert {"train loss", "train nll"} <= {line[:22].strip() for line in str(report_of(weight_decay=0.1)).splitlines()}


def test_curve_report_plot(tmp_path):
    report = report_of(weight_decay=0.1)
    figure = report.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["loss with the L2 term", "error (%)"]
    line = panels[1].get_lines()[0]
    np.testing.assert_allclose(line.get_ydata(), 100 * report.values["train"]["error"])
    np.testing.assert_array_equal(line.get_xdata(), report.ts)
    figure = report.plot(tmp_path / "curve.pdf", along="length", metrics=["mean"])
    np.testing.assert_allclose(figure.axes[0].get_lines()[0].get_xdata(), np.cumsum(report.dl))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.pdf", "curve.png"]
    with pytest.raises(ValueError, match="CurveReport.plot: along must be"):
        report.plot(along="x")
    for metrics in (["top5"], "loss", []):
        with pytest.raises((ValueError, TypeError), match="CurveReport.plot: metrics must be"):
            report.plot(metrics=metrics)


def profile_picture(values):
    ones = np.ones(len(values))
    report = lsf.CurveReport(np.linspace(0, 1, len(values)), ones, ones, {"test": {"loss": values}}, 0.0)
    (axes,) = report.plot().axes
    return axes


def test_curve_report_plot_keeps_labels_off_the_axis_and_says_what_is_not_there():
    t = np.linspace(0, 1, 41)
    label = lambda axes: {text.get_text(): text.get_ha() for text in axes.texts}
    assert label(profile_picture((t - 0.05) ** 2 + 3)) == {"3": "left", "3.9": "right"}
    assert label(profile_picture((t - 0.5) ** 2 + 3)) == {"3": "center", "3.25": "left"}
    for nothing in (np.nan, np.inf, -np.inf):
        assert label(profile_picture(np.full(41, nothing))) == {"no finite values": "center"}
    values = np.where(t == 0.5, np.inf, np.where(t == 0.25, -np.inf, 1 + t))
    assert label(profile_picture(values)) == {"1": "left", "2": "right"}


def _ranks(rank):
    curve, data = curve_of(), batches(8, 7, 9)
    alone = lsf.evaluate_curve(curve, {"train": data}, num_points=3, process_group=False)
    share = {"train": data[2 * rank : 2 * rank + 2]}
    fully = fully_shard(curve_of(t_sampling="arc_length"))
    fully(data[0][0]).sum().backward()  # leaves the bends gathered
    assert fully.module[1].num_batches_tracked == 1
    for found in (lsf.evaluate_curve(c, share, num_points=3) for c in (curve, curve_of().shard_(), fully)):
        np.testing.assert_allclose(found.dl, alone.dl, rtol=1e-12)
        np.testing.assert_allclose(found.norms, alone.norms, rtol=1e-12)
        for metric, values in alone.values["train"].items():
            np.testing.assert_allclose(found.values["train"][metric], values, rtol=1e-12)


def test_evaluate_curve_over_ranks():
    run_ranks(_ranks)
