import pytest
import torch
from common import F64
from distributed import run_ranks
from test_curve_report import assert_same_state, batches, curve_of, state_of
from torch.utils.data import DataLoader

import losssurf_fast as lsf

TS = [0.0, 0.3, 0.85]


@pytest.mark.parametrize("kind", ["bezier", "polychain"])
def test_curve_predict_is_the_mean_of_softmax(kind):
    curve, x = curve_of(bn=False, kind=kind), torch.randn(7, 3, dtype=F64)
    before = state_of(curve)
    got = curve.predict(x, TS)
    with torch.no_grad():
        points = torch.tensor(TS, dtype=F64)
        wanted = torch.stack([curve.module_at(t).eval()(x).softmax(-1) for t in points]).mean(0)
    torch.testing.assert_close(got, wanted)
    assert got.dtype == F64 and not got.requires_grad
    pairs = [(x[:4], 0), (x[4:], 1)]
    torch.testing.assert_close(curve.predict(pairs, points, device="cpu"), got)
    assert_same_state(curve, before)
    curve(x)  # trains on


def test_curve_predict_recalibrates_at_every_point():
    curve, x, train = curve_of(), torch.randn(7, 3, dtype=F64), batches(9, 5)
    before = state_of(curve)
    got = curve.predict(x, TS, bn_loader=train)
    wanted = []
    for t in torch.tensor(TS, dtype=F64):
        model = curve.module_at(t)
        lsf.update_bn(train, model)
        wanted.append(model.eval()(x).softmax(-1))
    torch.testing.assert_close(got, torch.stack(wanted).mean(0))
    assert not torch.allclose(got, curve.predict(x, TS, bn_loader=train, subset=1))
    assert not torch.allclose(got, curve.predict(x, TS, recalibrate=False))
    assert_same_state(curve, before)


def test_curve_predict_survives_vanishing_probabilities():
    """Where every softmax underflows to 0 in float32 for a class, the mean is 0 and no NaN."""
    curve = curve_of(bn=False, dtype=torch.float32)
    got = curve.predict(1e4 * torch.randn(20, 3), TS)
    assert got.isfinite().all() and got.min() == 0
    torch.testing.assert_close(got.sum(-1), torch.ones(20))


X = torch.randn(7, 3, dtype=F64)


@pytest.mark.parametrize(
    "data, options, error, match",
    [
        (X, {}, ValueError, "bn_loader must yield .*every point"),
        (X, {"bn_loader": iter([X])}, ValueError, "bn_loader is read once for every point"),
        (iter([X]), {"recalibrate": False}, ValueError, "data is read once for every point"),
        (DataLoader(X, shuffle=True), {"recalibrate": False}, ValueError, "shuffle=True"),
        ([], {"recalibrate": False}, ValueError, "at least one batch"),
        (3, {"recalibrate": False}, TypeError, "an input or a loader, got int"),
        (X, {"ts": [], "recalibrate": False}, ValueError, "predict: ts must be a list of numbers"),
        (X, {"ts": 0.5, "recalibrate": False}, ValueError, "predict: ts must be a list of numbers"),
        (X, {"ts": [0.5, -0.1], "recalibrate": False}, ValueError, r"predict: ts must lie in \[0, 1\]"),
        (X, {"ts": None, "recalibrate": False}, TypeError, "predict: ts must be numbers"),
        (X[:, :2], {"recalibrate": False}, RuntimeError, "mat1 and mat2"),  # the model's own
    ],
)
def test_curve_predict_refuses(data, options, error, match):
    curve = curve_of()
    before = state_of(curve)
    with pytest.raises(error, match=match):
        curve.predict(data, **{"ts": TS, **options})
    assert_same_state(curve, before)


def _ranks(rank):
    curve, train = curve_of(), batches(8, 7, 9)
    alone = curve.predict(X, TS, bn_loader=train, process_group=False)
    torch.testing.assert_close(curve.predict(X, TS, bn_loader=train[2 * rank : 2 * rank + 2]), alone)
    with pytest.raises(ValueError if rank else RuntimeError, match="at least one batch" if rank else "other ranks"):
        curve.predict([] if rank else X, TS, bn_loader=train)


def test_curve_predict_over_ranks():
    run_ranks(_ranks)
