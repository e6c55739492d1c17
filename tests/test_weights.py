"""What networks may be given as: one reader for curves, surfaces and bands."""

import math

import pytest
import torch
from surface_models import Classifier, classifier_loaders
from torch import nn
from torch.nn.parallel import DataParallel

import losssurf_fast as lsf
from losssurf_fast.averaging import tensors
from losssurf_fast.weights import network_of, tensors_of, weights_of

TorchAveragedModel = torch.optim.swa_utils.AveragedModel


def swag(model):
    found = lsf.SWAG(model, max_num_models=2)
    found.collect_model(model)
    return found


FORMS = {
    "model": lambda m: m,
    "DataParallel": DataParallel,
    "compiled": torch.compile,
    "AveragedModel": lsf.AveragedModel,
    "torch's": TorchAveragedModel,
    "of DataParallel": lambda m: TorchAveragedModel(DataParallel(m)),
    "SWAG": swag,
    "state_dict": lambda m: m.state_dict(),
    "of its wrapper": lambda m: DataParallel(m).state_dict(),
    "of the wrapper's average": lambda m: TorchAveragedModel(DataParallel(m)).state_dict(),
    "of compiled": lambda m: torch.compile(DataParallel(m)).state_dict(),
    "of AveragedModel": lambda m: lsf.AveragedModel(m).state_dict(),
    "of SWAG": lambda m: swag(m).state_dict(),
    "tensors": lambda m: dict(m.named_parameters()),
    "extra state": lambda m: m.state_dict() | {"norm._extra_state": {"a": 1}},
}


def pair():
    a, b = Classifier(0), Classifier(1)
    b.frozen = a.frozen  # which a band wants
    return a, b


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_network_for_every_tool(form):
    a, b = pair()
    sources, model = [FORMS[form](m) for m in (a, b)], Classifier(2)
    wanted = tensors.named_parameters(a)
    for source, origin in zip(sources, (a, b), strict=True):
        found = weights_of("test", "w", source, model, tensors.named_parameters(model))
        assert list(found) == list(wanted)
        assert all(torch.equal(found[n], p) for n, p in tensors.named_parameters(origin).items())

    curve, expected = lsf.Curve(sources, model=model), lsf.Curve([a, b])
    pairs = zip(curve.named_parameters(), expected.named_parameters(), strict=True)
    assert all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)

    loader = classifier_loaders()["train"]
    ours, theirs = (lsf.line(Classifier(2), *s, loader, points=3, bn_loader=loader) for s in (sources, (a, b)))
    assert (ours.values["loss"] == theirs.values["loss"]).all()

    cycles = [{"steps": 0, "count": 1, "subsample": 0}]
    ours, theirs = (lsf.auto_neb(Classifier(2), *s, loader, cycles=cycles).report for s in (sources, (a, b)))
    assert ours.points == theirs.points


@pytest.mark.parametrize("form", ["AveragedModel", "torch's", "of DataParallel", "SWAG", "DataParallel", "compiled"])
def test_a_curve_between_wrapped_networks_is_around_the_network(form):
    sources = [FORMS[form](m) for m in pair()]
    curve = lsf.Curve(sources)
    assert type(curve.module) is Classifier and network_of(sources[0]) is not sources[0]
    assert list(curve.state_dict()) == list(lsf.Curve(pair()).state_dict())


def test_a_model_whose_names_are_a_wrappers_keeps_them():
    inner = nn.ModuleDict({"module": nn.Linear(2, 2)})
    found = tensors_of("test", "w", inner.state_dict(), inner)
    assert list(found) == ["module.weight", "module.bias"]
    inner.register_buffer("n_averaged", torch.tensor(3))
    assert "n_averaged" in tensors_of("test", "w", inner.state_dict(), inner)


def tools(sources):
    model, loader = Classifier(2), classifier_loaders()["train"]
    cycles = [{"steps": 1, "count": 1, "subsample": 0}]
    return {
        "Curve: models[1]": lambda: lsf.Curve(sources, model=model),
        "line: w_b": lambda: lsf.line(model, *sources, loader, points=2, bn_loader=loader),
        "auto_neb: end": lambda: lsf.auto_neb(model, *sources, loader, cycles=cycles),
    }


def broken(change):
    a, b = (m.state_dict() for m in pair())
    return [a, change(b)]


@pytest.mark.parametrize("tool", ["Curve: models[1]", "line: w_b", "auto_neb: end"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s | {"again.weight": s["again.weight"] + 1}, ValueError,
         ": again.weight and middle.weight are one tensor of the model, got unequal ones"),
        (lambda s: s | {"last.bias": torch.full((3,), math.nan)}, ValueError, ": .*finite, got NaN or inf in last"),
        (lambda s: s | {"scale": torch.tensor(math.inf)}, ValueError, ": .*finite, got NaN or inf in scale"),
        (lambda s: s | {"more": torch.ones(1)}, ValueError, " must have the tensors of the .*; it has more besides"),
        (lambda s: {n: t for n, t in s.items() if n != "scale"}, ValueError, " must have .*; it lacks scale"),
        (lambda s: s | {"scale": torch.ones(2)}, ValueError, r": scale must have shape \(\), got \(2,\)"),
        (lambda s: s | {"scale": torch.ones((), dtype=torch.int64)}, TypeError, ": scale must be like torch.float32"),
        (lambda s: s | {"scale": torch.ones((), device="meta")}, ValueError, ": scale must hold values, got one on"),
        (lambda s: {"model_state": s, "epoch": 3}, TypeError, " must map names to tensors, got a OrderedDict under"),
    ],
)  # fmt: skip
def test_every_tool_refuses_the_same(tool, change, error, message):
    with pytest.raises(error, match=tool.replace("[", r"\[").replace("]", r"\]") + message):
        tools(broken(change))[tool]()


def test_a_curve_is_no_point():
    a, b = pair()
    for tool, message in (("auto_neb: end", "auto_neb: end"), ("Curve: models[1]", r"Curve: models\[1\]")):
        with pytest.raises(TypeError, match=f"{message} must be one point; of a Curve give its weights"):
            tools([a, lsf.Curve([a, b])])[tool]()
