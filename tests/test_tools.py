"""What the tools that measure networks have in common: arguments, names, bars, and documentation of all of it."""

import inspect
import re

import numpy as np
import pytest
import torch
from distributed import run_ranks
from surface_models import Quadratic, mean_loss, quadratic_loader
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf
from losssurf_fast.evaluation import Evaluation, evaluate

LOADER = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))]


def net(seed, bn=False):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), *([nn.BatchNorm1d(5)] if bn else []), nn.Linear(5, 3))


def curve(bn=False):
    return lsf.Curve([net(0, bn), net(1, bn)])


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loader", "metrics", "name"),
    [
        ({"x": LOADER, "x_y": LOADER}, {"y_loss": F.cross_entropy}, "x_y_loss"),
        ({"x_y": LOADER, "x": LOADER}, {"y_error": F.cross_entropy}, "x_y_error"),
    ],
)
def test_two_results_of_one_name_are_refused(loader, metrics, name):
    with pytest.raises(ValueError, match=f"line: two results would be called '{name}'; rename"):
        lsf.line(net(2), net(0), net(1), loader, metrics=metrics, progress=False)
    with pytest.raises(ValueError, match=f"f: two results would be called '{name}'"):
        Evaluation("f", loader, metrics=metrics)


def test_a_metric_may_replace_the_error():
    found = Evaluation("f", {"x": LOADER}, metrics={"error": F.cross_entropy})(net(0))
    assert found["x_error"] == found["x_loss"]


def test_names_are_strings():
    with pytest.raises(TypeError, match="f: loaders and metrics must have strings as names, got 3, 'loss'"):
        Evaluation("f", {3: LOADER})
    with pytest.raises(TypeError, match="f: loaders and metrics must have strings as names, got 'data', 3"):
        Evaluation("f", LOADER, metrics={3: F.cross_entropy})


def test_a_loader_without_a_name_is_called_data_where_results_are_by_loader():
    assert list(Evaluation("f", LOADER).by_loader(net(0))) == ["data"]
    assert list(lsf.evaluate_curve(curve(), loader=LOADER, num_points=2).values) == ["data"]
    assert list(Evaluation("f", LOADER)(net(0))) == ["loss", "error"]
    assert list(Evaluation("f", {"": LOADER})(net(0))) == ["_loss", "_error"]


# ---- the error ------------------------------------------------------------------------------------------------------


def counted(*targets):
    """Batches of logits that say class 0, and these targets."""
    return [(torch.eye(3)[:1].expand(len(t), 3), torch.tensor(t)) for t in targets]


def test_error_is_the_fraction_of_the_targets_that_count():
    data = counted([1, -100, -100, -100], [0, 0, 0, 0])  # one of five is wrong
    assert evaluate("f", nn.Identity(), data)["error"] == pytest.approx(0.2)
    data = counted([-100, -100], [0, 1, 1, 0])
    assert evaluate("f", nn.Identity(), data, lambda o, t: o.mean())["error"] == 0.5
    words = [(torch.eye(2)[None, :, :1].expand(2, 2, 3), torch.tensor([[0, 1, -1], [-1, -1, -1]]))]
    assert evaluate("f", nn.Identity(), words, lambda o, t: o.mean())["error"] == 0.5
    assert np.isnan(evaluate("f", nn.Identity(), counted([-1]), lambda o, t: o.mean())["error"])


def test_results_keep_their_order_and_weights_beside_the_error():
    data = counted([1, -100, -100], [0])
    metrics = {"a": lambda o, t: t.double().mean(), "b": lambda o, t: torch.tensor(float(len(t)))}
    found = evaluate("f", nn.Identity(), data, lambda o, t: o.mean(), metrics)
    assert list(found) == ["loss", "error", "a", "b"]
    assert found["a"] == pytest.approx(-199 / 4) and found["b"] == pytest.approx((3 * 3 + 1) / 4)
    assert found["error"] == 0.5


def _error_ranks(rank):
    data = counted([1, -100, -100, -100], [0, 0, 0, 0])
    assert evaluate("f", nn.Identity(), data[rank : rank + 1])["error"] == pytest.approx(0.2)


# ---- bars -----------------------------------------------------------------------------------------------------------


def walks(progress):
    a, b = Quadratic(1), Quadratic(2)
    options = {"loss_fn": mean_loss, "progress": progress}
    lsf.line(Quadratic(), a, b, quadratic_loader(), points=2, **options)
    lsf.evaluate_curve(lsf.Curve([a, b]), quadratic_loader(), num_points=2, **options)


def test_bars_can_be_turned_off(capsys):
    walks(False)
    assert capsys.readouterr().err == ""
    walks(True)
    shown = capsys.readouterr().err
    assert "line:" in shown and "evaluate_curve:" in shown


def _bar_ranks(rank):
    import contextlib
    import io

    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        walks(True)
    assert all((f"{name}:" in written.getvalue()) == (rank == 0) for name in ("line", "evaluate_curve"))


def _ranks(rank):
    _error_ranks(rank)
    _bar_ranks(rank)


def test_ranks():
    run_ranks(_ranks)


# ---- messages -------------------------------------------------------------------------------------------------------


def test_an_empty_loader_for_statistics_is_told_by_the_tool():
    held = curve(bn=True)
    with pytest.raises(ValueError, match="^evaluate_curve: BatchNorm statistics: loader must yield at least one batch"):
        lsf.evaluate_curve(held, {"train": [], "test": LOADER}, num_points=2, progress=False)

    def broken():
        raise ValueError("mine")

    class Broken(list):
        def __iter__(self):
            return broken()

    with pytest.raises(ValueError, match="^mine$"):
        lsf.evaluate_curve(held, LOADER, num_points=2, bn_loader=Broken(), progress=False)


def test_a_file_of_save_is_no_run_to_go_on_with(tmp_path):
    call = lambda **options: lsf.line(
        Quadratic(), Quadratic(1), Quadratic(2), quadratic_loader(), points=3, loss_fn=mean_loss, progress=False,
        **options,
    )  # fmt: skip
    call().save(tmp_path / "line.npz")
    with pytest.raises(ValueError, match=r"line: path .*line.npz holds what save\(\) wrote of a call without path"):
        call(path=tmp_path / "line.npz")


# ---- rays -----------------------------------------------------------------------------------------------------------


def test_rays_are_as_long_as_the_weights_unless_told():
    model = Quadratic(1)
    found = lsf.rays(model, model, quadratic_loader(), num_rays=2, points=3, loss_fn=mean_loss, progress=False)
    size = torch.cat([p.detach().flatten() for p in model.parameters()]).norm().item()
    np.testing.assert_allclose(found.distances, [0, size / 2, size], rtol=1e-12)
    with pytest.raises(ValueError, match="rays: max_distance must be given for weights that are all 0"):
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        lsf.rays(model, zeros, quadratic_loader(), loss_fn=mean_loss, progress=False)


# ---- documentation --------------------------------------------------------------------------------------------------

TOOLS = [
    "evaluate_curve", "line", "rays", "auto_neb", "Plane.through", "Plane.random", "Plane.along", "Plane.pca",
    "Plane.evaluate", "Plane.trajectory", "Plane.project", "MinimaGraph.explore", "MinimaGraph.measure", "Line.plot",
    "Rays.plot", "Surface.plot", "CurveReport.plot",
]  # fmt: skip


def public(name):
    found = lsf
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", TOOLS)
def test_every_argument_is_explained_or_refers_to_a_public_name_that_does(name):
    function = public(name)
    text = inspect.getdoc(function)
    arguments = re.split(r"\n(?:Returns|Raises):", text)[0]
    references = re.findall(r":(?:func|meth|class):`(?:losssurf_fast\.)?([\w.]+)`", arguments)
    owner = name.rpartition(".")[0]
    names = [r if hasattr(lsf, r.partition(".")[0]) else f"{owner}.{r}" for r in references]
    documents = [text, *(inspect.getdoc(public(n)) for n in names)]  # a name that is not public fails here
    for argument in inspect.signature(function).parameters:
        if argument not in ("self", "cls"):
            assert any(re.search(rf"\b{argument}\b", document) for document in documents), argument
