import functools
from types import SimpleNamespace

import pytest
import torch
from common import F64, CountReads
from distributed import run_ranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import losssurf_fast as lsf
from losssurf_fast.evaluation import Evaluation, evaluate


class Classifier(nn.Sequential):
    def __init__(self, bn=False):
        super().__init__(nn.Linear(3, 6), *([nn.BatchNorm1d(6)] if bn else []), nn.Dropout(0.5), nn.Linear(6, 4))


class Named(Classifier):
    """Called by keywords, as models of dicts are."""

    def forward(self, pixels, scale):
        return super().forward(pixels) * scale


def batches(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=g), torch.randint(4, (n,), generator=g)) for n in sizes]


def top2(outputs, targets):
    return (outputs.topk(2, 1).indices == targets[:, None]).any(1).double().mean()


def whole(data):
    return tuple(torch.cat(part) for part in zip(*data, strict=True))


def test_evaluate_weighs_by_samples():
    model, data = Classifier().double(), [(x.double(), y) for x, y in batches(7, 5, 1)]
    x, y = whole(data)
    found = evaluate("f", model, data, metrics={"top2": top2}, device="cpu")
    with torch.no_grad():
        outputs = model.eval()(x)
    assert found["loss"] == pytest.approx(F.cross_entropy(outputs, y).item(), rel=1e-14)
    assert found["error"] == pytest.approx((outputs.argmax(1) != y).double().mean().item(), rel=1e-14)
    assert found["top2"] == pytest.approx(top2(outputs, y).item(), rel=1e-14)
    assert list(found) == ["loss", "error", "top2"]


def test_evaluate_sums_in_double():
    data = [(torch.full((1, 1), 1e8), torch.zeros(1, 1))] + [(torch.ones(1, 1), torch.zeros(1, 1))] * 999
    found = evaluate("f", nn.Identity(), data, lambda outputs, targets: (outputs - targets).mean())
    assert found == {"loss": (1e8 + 999) / 1000}


def test_evaluate_does_not_wait_for_the_device():
    """.item(), float() and tolist() of a tensor per batch would; only one read, at the end, is there."""
    model = Classifier()
    with CountReads() as short:
        evaluate("f", model, batches(3), metrics={"top2": top2})
    with CountReads() as long:
        evaluate("f", model, batches(3, 3, 3, 3), metrics={"top2": top2})
    assert long.reads == short.reads


@pytest.mark.parametrize("key", ["labels", "targets", "target", "label"])
def test_evaluate_takes_dicts(key):
    model, pairs = Named(), batches(4, 3)
    dicts = [{"pixels": x, key: y, "scale": torch.tensor(2.0)} for x, y in pairs]
    x, y = whole(pairs)
    with torch.no_grad():
        wanted = F.cross_entropy(model.eval()(x, 2.0), y).item()
    assert evaluate("f", model, dicts)["loss"] == pytest.approx(wanted, rel=1e-6)
    assert key in dicts[0]
    pairs = [({"pixels": x, "scale": torch.tensor(2.0)}, y) for x, y in pairs]
    assert evaluate("f", model, pairs, device="cpu")["loss"] == pytest.approx(wanted, rel=1e-6)


def test_evaluation_recalibrates_by_dicts_without_targets():
    class Model(Classifier):
        def forward(self, pixels):  # would refuse labels
            return super().forward(pixels)

    model, pairs = Model(bn=True), batches(8, 5)
    dicts = [{"pixels": x, "labels": y} for x, y in pairs]
    found = Evaluation("f", dicts, bn_loader=dicts)(model)
    fractions = Evaluation("f", dicts, bn_loader=dicts, subset=0.5)(model)
    assert fractions != found
    lsf.update_bn(pairs, model)
    assert evaluate("f", model, pairs) == found
    lsf.update_bn(pairs[:1], model)
    assert evaluate("f", model, pairs) == fractions


@pytest.mark.parametrize(
    "outputs, targets, error",
    [
        (torch.eye(4), torch.tensor([0, 1, 2, 0]), 0.25),
        (torch.eye(4), torch.tensor([0, -100, -100, 0]), 0.5),  # cross_entropy ignores -100
        (torch.eye(3)[None, :, :, None].expand(2, 3, 3, 5), torch.zeros(2, 3, 5, dtype=torch.int32), 2 / 3),
        (torch.eye(4), torch.eye(4), None),  # probabilities
        (torch.eye(4)[:, :1], torch.tensor([0, 0, 0, 0]), None),  # one logit, no classes
        (torch.ones(4), torch.tensor([0, 1, 1, 0]), None),
        (torch.ones(4, 2), torch.tensor([True, True, True, False]), None),
        (torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.int64), None),  # classes are last
    ],
)
def test_evaluate_error_is_of_class_labels(outputs, targets, error):
    found = evaluate("f", nn.Identity(), [(outputs, targets)], lambda o, t: o.float().mean())
    assert found.get("error") == (None if error is None else pytest.approx(error))


@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_evaluate_error_where_classes_may_be_second_or_last(loss_fn):
    """A language model's [N, T, C] with T = C: its loss alone knows where the classes are."""
    outputs = torch.randn(4, 5, 5)
    targets = outputs.argmax(-1)
    flat = lambda o, t: loss_fn(o.flatten(0, 1), t.flatten())
    assert list(evaluate("f", nn.Identity(), [(outputs, targets)], flat)) == ["loss"]
    partial = functools.partial(loss_fn)
    for second in (loss_fn, partial):
        found = evaluate("f", nn.Identity(), [(outputs.mT, targets)], second)
        assert found["error"] == 0 and found["loss"] == pytest.approx(flat(outputs, targets).item())


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x, "hidden": 0}, lambda x: SimpleNamespace(logits=x, loss=None)])
@pytest.mark.parametrize("loss_fn", [F.cross_entropy, nn.CrossEntropyLoss(), functools.partial(F.cross_entropy)])
def test_evaluate_measures_the_logits_in_outputs(wrap, loss_fn):
    class Wrapped(Classifier):
        def forward(self, x):
            return wrap(super().forward(x))

    plain, model = Classifier(), Wrapped()
    model.load_state_dict(plain.state_dict())
    assert evaluate("f", model, batches(4, 3), loss_fn) == evaluate("f", plain, batches(4, 3))
    own = evaluate("f", model, batches(4, 3), lambda o, t: o["logits"].sum() if isinstance(o, dict) else o.logits.sum())
    assert own["error"] == evaluate("f", plain, batches(4, 3))["error"]
    x = batches(4)[0][0]
    expected = plain.eval()(x).softmax(-1)
    torch.testing.assert_close(lsf.predict(model, x, "deterministic"), expected)
    model.train()
    curve = lsf.Curve([model, Wrapped()])
    torch.testing.assert_close(curve.predict(x, [0.0]), expected, check_dtype=False)


def test_evaluate_lets_a_metric_replace_the_error():
    error = lambda outputs, targets: outputs.new_tensor(0.5)
    assert evaluate("f", Classifier(), batches(4), metrics={"error": error})["error"] == 0.5


def test_evaluate_nan_is_a_result():
    bad = Classifier()
    bad[0].weight.data.fill_(torch.nan)
    assert torch.isnan(torch.tensor(evaluate("f", bad, batches(4, 3))["loss"]))


def test_evaluate_empty_batches_count_nothing():
    model = Classifier()
    assert evaluate("f", model, batches(4, 0, 3)) == evaluate("f", model, batches(4, 3))


def test_evaluate_restores_modes():
    model = Classifier(bn=True)
    model[2].eval()
    before = [m.training for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    evaluate("f", model, batches(4))

    def fails(outputs, targets):
        assert not model.training
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        evaluate("f", model, batches(4), fails)
    assert [m.training for m in model.modules()] == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


X, Y = batches(4)[0]


@pytest.mark.parametrize(
    "loader, options, error, match",
    [
        ([], {}, ValueError, "f: loader must yield at least one sample, got none"),
        (batches(0), {}, ValueError, "at least one sample"),
        (3, {}, TypeError, "f: loader must be a loader of batches, got int"),
        ([X], {}, TypeError, r"must yield \(inputs, targets\) or dicts, got Tensor"),
        ([(X, Y, Y)], {}, ValueError, "or dicts, got 3 items"),
        ([(X,)], {}, ValueError, "or dicts, got 1 items"),
        ([{"pixels": X}], {}, ValueError, r"one of the keys .* got \['pixels'\]"),
        ([{"pixels": X, "label": Y, "labels": Y}], {}, ValueError, "one of the keys"),
        ([(X, [1, 2, 3, 4])], {}, TypeError, "targets must be a tensor or hold one, got list"),
        ([(X, Y)], {"loss_fn": lambda o, t: F.cross_entropy(o, t, reduction="none")}, ValueError, r"scalar.*\(4,\)"),
        ([(X, Y)], {"loss_fn": lambda o, t: 0.5}, TypeError, r"loss must be a tensor .*\(not its item\(\).*got 0.5"),
        ([(X, Y)], {"loss_fn": lambda o, t: o.sum() * 1j}, TypeError, "loss must be real, got torch.complex"),
        ([(X, Y)], {"loss_fn": lambda o, t: None}, TypeError, "loss must be a tensor.*got None"),
        ([(X, Y)], {"loss_fn": "ce"}, TypeError, "loss_fn must be a function"),
        ([(X, Y)], {"metrics": {"top2": 3}}, TypeError, "top2 must be a function"),
        ([(X, Y)], {"metrics": [top2]}, TypeError, "metrics must be a mapping"),
        ([(X, Y)], {"metrics": {"loss": top2}}, ValueError, "must not be named 'loss'"),
        ([(X, Y)], {"metrics": {"row": lambda o, t: o[0]}}, ValueError, r"row must be a scalar.*\(4,\)"),
        ([(X, Y), (X, F.one_hot(Y, 4).float())], {}, ValueError, r"must have the metrics \['loss', 'error'\]"),
    ],
)
def test_evaluate_refuses(loader, options, error, match):
    model = Classifier()
    with pytest.raises(error, match=match):
        evaluate("f", model, loader, **options)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(
    "loaders, options, error, match",
    [
        (iter(batches(4)), {}, ValueError, "f: loader is read once for every point, got a list_iterator"),
        ({"train": (b for b in batches(4))}, {}, ValueError, r"loader\['train'\] is read once .* got a generator"),
        (batches(4), {"bn_loader": map(str, [])}, ValueError, "bn_loader is read once for every point, got a map"),
        ({}, {}, ValueError, "at least one loader"),
        ({"train": 3}, {}, TypeError, r"loader\['train'\] must be a loader of batches, got int"),
        (batches(4), {"loss_fn": 1}, TypeError, "loss_fn must be a function"),
        (batches(4), {"process_group": "x"}, TypeError, "process_group must be a ProcessGroup, None or False, got str"),
        (batches(4), {"process_group": 0}, TypeError, "process_group must be a ProcessGroup, None or False, got int"),
    ],
)
def test_evaluation_refuses(loaders, options, error, match):
    with pytest.raises(error, match=match):
        Evaluation("f", loaders, **options)


def test_evaluation_names_and_generator():
    model, data = Classifier(), TensorDataset(*whole(batches(9)))
    train, test = DataLoader(data, batch_size=4, shuffle=True), batches(5)
    first_batch_only = lambda loader: [next(iter(loader))]
    torch.manual_seed(3)
    expected = evaluate("f", model, first_batch_only(train))
    torch.manual_seed(3)

    class First:  # what is seen depends on the order
        def __iter__(self):
            return iter(first_batch_only(train))

    evaluation = Evaluation("f", {"train": First(), "test": test}, metrics={"top2": top2})
    before = torch.get_rng_state()
    found = evaluation(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert evaluation(model) == found  # the same order again
    assert found["train_loss"] == expected["loss"]
    assert list(found) == [f"{name}_{m}" for name in ("train", "test") for m in ("loss", "error", "top2")]
    assert found["test_loss"] == Evaluation("f", test)(model)["loss"]


def _ranks(rank):
    torch.manual_seed(0)
    model, data = Classifier().to(F64), [(x.double(), y) for x, y in batches(7, 5, 1)]
    share = [data[1:], data[:1]][rank]
    whole_set = evaluate("f", model, data, process_group=False)
    assert evaluate("f", model, share) == pytest.approx(whole_set, rel=1e-13)
    assert evaluate("f", model, [[], data][rank]) == pytest.approx(whole_set, rel=1e-13)  # one rank has nothing
    assert evaluate("f", model, data) == pytest.approx(whole_set, rel=1e-13)  # all ranks have all
    if rank == 0:
        alone = evaluate("f", model, share, process_group=False)
        assert alone != pytest.approx(whole_set, rel=1e-3)

    def fails(outputs, targets):
        raise ZeroDivisionError

    error, match = (ZeroDivisionError, "") if rank == 1 else (RuntimeError, "f: 1 other ranks failed")
    with pytest.raises(error, match=match):
        evaluate("f", model, share, fails if rank == 1 else F.cross_entropy)
    with pytest.raises(ValueError, match="at least one sample"):
        evaluate("f", model, [])


def test_evaluate_sums_over_ranks():
    run_ranks(_ranks)
