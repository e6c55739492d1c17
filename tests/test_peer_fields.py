"""dnn-mode-connectivity's field names, which the files of curves and of planes share."""

import numpy as np
import pytest

import losssurf_fast as lsf
from losssurf_fast import peer_fields
from losssurf_fast.curve import CurveReport


def test_a_metric_has_the_peers_name_and_unit():
    values = np.array([0.25, 1.0])
    found = peer_fields.fields("test", "error", values)
    assert list(found) == ["te_err", "te_acc"]
    np.testing.assert_array_equal(found["te_err"], [25, 100])
    np.testing.assert_array_equal(found["te_acc"], [75, 0])
    assert list(peer_fields.fields("val", "nll", values)) == ["val_nll"]
    assert list(peer_fields.by_name({"train_loss": values, "val_loss": values, "loss": values})) == ["tr_loss"]


@pytest.mark.parametrize("order", [("error", "acc"), ("acc", "error")])
def test_a_metric_that_is_called_accuracy_already_keeps_its_unit(order):
    own = {"error": np.array([0.25]), "acc": np.array([0.75])}
    found = peer_fields.by_name({f"train_{metric}": own[metric] for metric in order})
    assert found == {"tr_err": np.array([25.0]), "tr_acc": np.array([0.75])}


def test_files_of_curves_and_planes_name_the_same_results_alike(tmp_path):
    values = {"loss": np.array([1.0, 2.0]), "error": np.array([0.5, 0.25])}
    by_loader = {loader: {**values, "nll": values["loss"]} for loader in ("train", "test")}
    CurveReport(np.array([0, 1.0]), np.array([0, 1.0]), np.ones(2), by_loader, 0.0).save(tmp_path / "curve.npz")
    surface = lsf.Surface(np.array([0.0]), np.array([0.0, 1.0]))
    surface.done = np.ones((1, 2), dtype=bool)
    surface.values = {f"{loader}_{m}": v[None] for loader in ("train", "test") for m, v in values.items()}
    surface.save(tmp_path / "plane.npz")
    with np.load(tmp_path / "curve.npz") as curve, np.load(tmp_path / "plane.npz") as plane:
        shared = [f"{loader}_{m}" for loader in ("tr", "te") for m in ("loss", "err", "acc")]
        for name in shared:
            np.testing.assert_array_equal(curve[name], plane[name][0])
