"""Curve: from modules, wrapped ones and state_dicts; what is refused, with the tensor's name."""

import copy
import functools
import math

import pytest
import torch
from averaging import Net
from torch import nn
from torch.nn.parallel import DataParallel
from torch.nn.utils import parametrizations

import losssurf_fast as lsf


def net(width=5, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), activation(), nn.Linear(width, 2))


def pair(factory=net, seed=0):
    torch.manual_seed(seed)
    return [factory(), factory()]


def assert_same(actual, expected):
    assert list(actual.state_dict()) == list(expected.state_dict())
    for name, value in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], value), name


def test_inner_bends_start_on_the_segment():
    models = pair()
    curve = lsf.Curve(models, num_bends=5)
    first, last = (dict(m.named_parameters()) for m in models)
    for j, tree in enumerate(curve.bends):
        for name, p in tree.named_parameters():
            torch.testing.assert_close(p, first[name] + (last[name] - first[name]) * j / 4)
            assert p.requires_grad == (0 < j < 4) and p.is_leaf and isinstance(p, nn.Parameter)
    assert torch.equal(
        curve.bends[0][0].weight if False else curve.bends[0].get_parameter("0.weight"), first["0.weight"]
    )
    free = lsf.Curve(models, fix_start=False, fix_end=False)
    assert all(p.requires_grad for p in free.parameters())


def test_all_bends_given():
    torch.manual_seed(0)
    models = [net() for _ in range(4)]
    curve = lsf.Curve(models, kind="polychain", num_bends=4)
    for model, tree in zip(models, curve.bends, strict=True):
        for name, p in model.named_parameters():
            assert torch.equal(tree.get_parameter(name), p)
    loop = lsf.Curve([models[0], models[1], models[0]])
    assert torch.equal(loop.weights(0)["0.bias"], loop.weights(1)["0.bias"])


def test_state_dicts_and_wrappers():
    models = pair()
    expected = lsf.Curve(models)
    states = [m.state_dict() for m in models]
    prefixed = [{f"module._orig_mod.{k}": v for k, v in s.items()} for s in states]
    compiled = [DataParallel(torch.compile(m, backend="eager")) for m in models]
    parameters = [dict(m.named_parameters()) for m in models]
    shuffled = [dict(reversed(s.items())) for s in states]
    for ends in (states, prefixed, compiled, shuffled, [models[0], states[1]], [states[0], models[1]]):
        assert_same(lsf.Curve(ends, model=models[0]), expected)
    assert_same(lsf.Curve(parameters, model=models[0]), expected)
    assert_same(lsf.Curve(compiled), expected)
    template = net()
    template[1].running_mean.fill_(3)
    assert torch.equal(lsf.Curve(states, model=template).module[1].running_mean, states[0]["1.running_mean"])
    assert torch.equal(lsf.Curve(parameters, model=template).module[1].running_mean, torch.full((5,), 3.0))
    assert torch.equal(lsf.Curve(models, model=template).module[1].running_mean, torch.full((5,), 3.0))
    extra = [{**s, "1._extra_state": {"a": 1}} for s in states]
    assert_same(lsf.Curve(extra, model=models[0]), expected)


def test_every_kind_of_tensor():
    torch.manual_seed(0)
    models = [Net(), Net()]
    curve = lsf.Curve(models)
    assert [n for n, p in curve.bends[1].named_parameters() if not p.requires_grad] == ["frozen"]
    assert curve.bends[1].empty.shape == (0, 4)
    buffers = dict(curve.module.named_buffers())
    assert "cache" in buffers and torch.equal(buffers["cache"], models[0].cache)
    assert "module.cache" not in curve.state_dict() and "module.mask" in curve.state_dict()
    states = [m.state_dict() for m in models]
    assert_same(lsf.Curve(states, model=models[0]), curve)
    untied = {**states[1], "tied.weight": states[1]["tied.weight"] + 1}
    with pytest.raises(ValueError, match=r"models\[1\]: tied.weight and last.weight are one tensor of the model"):
        lsf.Curve([states[0], untied], model=models[0])


def test_values_are_cast_to_the_network():
    models = pair()
    curve = lsf.Curve([models[0], copy.deepcopy(models[1]).double()])
    assert {p.dtype for p in curve.parameters()} == {torch.float32}
    half = lsf.Curve([m.state_dict() for m in models], model=net().bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.bends[0].get_parameter("0.weight"), models[0][0].weight.bfloat16())
    mixed = [net(), net()]
    for m in mixed:
        m[3].half()
    weights = lsf.Curve(mixed).weights(0.5)
    assert weights["3.weight"].dtype == torch.float16 and weights["0.weight"].dtype == torch.float32
    transposed = pair(lambda: nn.Linear(3, 4))
    for m in transposed:
        m.weight.data = m.weight.data.t().contiguous().t()
    assert torch.equal(lsf.Curve(transposed).weights(0)["weight"], transposed[0].weight)
    with torch.inference_mode():
        inference = lsf.Curve(pair(lambda: nn.Linear(3, 4)))
    inference(torch.randn(2, 3)).sum().backward()


def test_strides_are_the_networks():
    """Of channels-last weights: torch would rearrange others in every forward."""
    conv = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    models = pair(conv)
    contiguous = [copy.deepcopy(m).to(memory_format=torch.contiguous_format) for m in models]
    expected, x = lsf.Curve(contiguous), torch.randn(2, 3, 5, 5)
    for ends in (models, [models[0], contiguous[1]], [m.state_dict() for m in contiguous]):
        curve = lsf.Curve(ends, model=models[0])
        for weight in [bend.get_parameter("0.weight") for bend in curve.bends] + [curve.weights(0.3)["0.weight"]]:
            assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        torch.testing.assert_close(curve(x, t=0.3), expected(x, t=0.3))
    curve(x, t=0.3).square().sum().backward(), expected(x, t=0.3).square().sum().backward()
    pairs = zip(curve.bends[1].parameters(), expected.bends[1].parameters(), strict=True)
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.stride() == p.stride()
    torch.testing.assert_close(curve.length(), expected.length())


def test_the_same_layers_behind_wrappers():
    """A layer's name is that of the one inside; one layer in two places is like two layers."""
    models = pair()
    models[1][2] = torch.compile(models[1][2], backend="eager")
    lsf.Curve(models)
    shared = nn.ReLU()
    one = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    lsf.Curve([one, nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())])


def test_models_are_not_touched():
    models = pair()
    flags = [(p, p.requires_grad, p.data_ptr()) for m in models for p in m.parameters()]
    lsf.Curve(models)(torch.randn(3, 4)).sum().backward()
    for p, requires_grad, pointer in flags:
        assert p.requires_grad == requires_grad and p.data_ptr() == pointer and p.grad is None
    assert all(isinstance(m[0]._parameters["weight"], nn.Parameter) for m in models)


class Holder:
    pass


class Hides(nn.Module):
    """Keeps what ``keep`` makes of it where a curve's weights do not come."""

    def __init__(self, keep):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.kept = keep(self)

    def forward(self, x):
        return self.layer(x)


def in_object(model):
    holder = Holder()
    holder.weight = model.layer.weight
    return holder


def wrapped(model):
    inner = lambda x: model.layer(x)
    return {"call": lambda x: inner(x)}


def hidden():
    past = "Curve: the network holds layer.weight past its modules' own parameters"
    own = "Curve: Hides.kept refers to the model's own parameters or modules"
    cases = [
        (past, lambda m: [m.layer.weight]),
        (past, lambda m: {"a": [(m.layer.weight,)]}),
        (past, in_object),
        (past, lambda m: functools.partial(torch.matmul, m.layer.weight)),
        (own, lambda m: lambda x: x @ m.layer.weight.T),
        (own, wrapped),
        (own, lambda m: m.layer.weight.T),
    ]
    return [(NotImplementedError, message, [Hides(keep), Hides(keep)], {}) for message, keep in cases]


class Constant(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = nn.Parameter(torch.tensor(order), requires_grad=False)
        self.layer = nn.Linear(2, 2)


class OnlyIntegers(nn.Module):
    def __init__(self):
        super().__init__()
        self.order = nn.Parameter(torch.tensor([0, 1]), requires_grad=False)


def other_dtype():
    model = net()
    model[0].weight = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))
    return model


def broken(model, value):
    model = copy.deepcopy(model)
    model[3].bias.data[1] = value
    return model


def other_layer(model):
    model = copy.deepcopy(model)
    model[2] = nn.ReLU()
    return model


def refusals():
    a, b = pair()
    s = a.state_dict()
    less = {k: v for k, v in s.items() if k != "3.bias"}
    other = lambda k, value: {**s, k: value}
    meta, more = copy.deepcopy(a).to("meta"), net().append(nn.Linear(2, 2))
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), *net()[1:])
    eight = nn.Linear(2, 2)
    eight.weight = nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    lazy = nn.LazyLinear(2)
    given = lambda i, message: rf"Curve: models\[{i}\]:? {message}"
    equal = "Curve: models must differ, got {} with equal weights"
    return [
        (TypeError, "Curve: models must be a sequence of modules or state_dicts, got Sequential", a, {}),
        (TypeError, "Curve: models must be a sequence of modules or state_dicts, got OrderedDict", s, {}),
        (TypeError, given(1, "must be a model, an average .*, got NoneType"), [a, None], {}),
        (TypeError, given(0, "must be a model, an average .*, got str"), ["a.pt", a], {}),
        (ValueError, "Curve: models must be the two end points or all 3 bends, got 1", [a], {}),
        (ValueError, "Curve: models must be the two end points or all 4 bends, got 3", [a, b, a], {"num_bends": 4}),
        (ValueError, "Curve: models must be the two end points, got 3", [a, b, a], {"num_bends": 2}),
        (ValueError, "Curve: num_bends counts the two ends and must be at least 2, got 1", [a, b], {"num_bends": 1}),
        (TypeError, "Curve: num_bends must be an int, got float", [a, b], {"num_bends": 3.0}),
        (ValueError, r"Curve: kind must be one of \('bezier', 'polychain'\), got 'line'", [a, b], {"kind": "line"}),
        (ValueError, "Curve: init must be 'linear', got 'random'", [a, b], {"init": "random"}),
        (ValueError, r"Curve: t_per_rank must be one of .*, got 'own'", [a, b], {"t_per_rank": "own"}),
        (TypeError, "Curve: fix_start must be a bool, got int", [a, b], {"fix_start": 1}),
        (TypeError, "Curve: fix_end must be a bool, got NoneType", [a, b], {"fix_end": None}),
        (TypeError, "Curve: state_dicts need the module that they are of", [s, s], {}),
        (TypeError, "Curve: model must be a module, got dict", [a, b], {"model": {}}),
        (ValueError, given(1, r"0.weight must have shape \(5, 4\), got \(6, 4\)"), [a, net(6)], {}),
        (ValueError, given(1, "must have the tensors of the curve; it lacks 3.bias$"), [a, less], {}),
        (
            ValueError,
            given(0, "must have .*; it has 9.bias besides"),
            [other("9.bias", s["3.bias"]), b],
            {},
        ),
        (ValueError, given(1, "must have .* it has 4.weight, 4.bias besides"), [a, more], {}),
        (ValueError, given(1, "must have .* it lacks 0.weight and has 0.param"), [a, normed], {}),
        (ValueError, given(1, "2 must be Tanh like the curve's, got ReLU"), [a, other_layer(b)], {}),
        (
            ValueError,
            given(1, "4 must be absent like the curve's, got ReLU"),
            [a, copy.deepcopy(b).append(nn.ReLU())],
            {},
        ),
        (
            ValueError,
            given(1, "4 must be ReLU like the curve's, got none"),
            [copy.deepcopy(a).append(nn.ReLU()), b],
            {},
        ),
        (ValueError, given(1, ".* must be finite, got NaN or inf in 3.bias"), [a, broken(b, math.nan)], {}),
        (ValueError, given(0, ".* must be finite, got NaN or inf in 3.bias"), [broken(a, -math.inf), s], {}),
        (TypeError, given(1, "0.weight must be like torch.float32, got torch.complex64"), [a, other_dtype()], {}),
        (
            ValueError,
            given(0, r"1.running_mean must have .*, got \(4,\)"),
            [other("1.running_mean", torch.ones(4)), b],
            {},
        ),
        (ValueError, equal.format(2), [a, copy.deepcopy(a)], {}),
        (ValueError, equal.format(3), [a, a, a], {}),
        (ValueError, equal.format(2), [a, other("1.running_mean", torch.ones(5))], {}),  # buffers are no distance
        (
            ValueError,
            given(1, "the model's weights must be finite, got NaN or inf in 0.weight"),
            [a.state_dict(), other("0.weight", s["0.weight"] + 1e6)],
            {"model": net().half()},
        ),
        (ValueError, "Curve: weight is lazy; run the model once", [lazy, lazy], {}),
        (ValueError, given(1, "weight must hold values, got a lazy tensor"), [nn.Linear(2, 2), lazy], {}),
        (ValueError, "Curve: 0.weight must hold values, got a tensor on the meta", [meta, b], {}),
        (ValueError, "Curve: 0.weight must hold values, got a tensor on the meta", [s, b], {"model": meta}),
        (ValueError, given(1, "0.weight must hold values, got one on the meta"), [a, meta], {}),
        (ValueError, "Curve: ReLU has no floating parameters to combine", [nn.ReLU(), nn.ReLU()], {}),
        (ValueError, "Curve: OnlyIntegers has no floating parameters", [OnlyIntegers(), OnlyIntegers()], {}),
        (
            ValueError,
            given(1, "order is of torch.int64, which stays constant"),
            [Constant([0, 1]), Constant([1, 0])],
            {},
        ),
        (TypeError, "Curve: weight must have a dtype of .*, got torch.float8_e4m3fn", [eight, eight], {}),
        *hidden(),
    ]


@pytest.mark.parametrize("case", refusals(), ids=lambda case: case[1][:60])
def test_refusals(case):
    error, message, models, kwargs = case
    with pytest.raises(error, match=message):
        lsf.Curve(models, **kwargs)


def test_repr_and_shapes_without_a_forward():
    curve = lsf.Curve(pair(), num_bends=4, fix_end=False)
    assert "kind='bezier', num_bends=4, fixed=[0], t_per_rank='same'" in repr(curve)
    assert curve.module[0].weight.is_meta and curve.module[0].weight.shape == (5, 4)
    with pytest.raises((RuntimeError, NotImplementedError)):
        curve.module(torch.randn(3, 4))  # not with wrong weights


class Scaled(nn.Linear):
    def forward(self, x, t=None):
        return super().forward(x) * (1 if t is None else t)


def test_an_argument_t_of_the_networks_own_is_warned_of():
    with pytest.warns(UserWarning, match="Curve: Scaled.forward has an argument t, .* pass the network's by position"):
        curve = lsf.Curve([Scaled(3, 2), Scaled(3, 2)])
    x = torch.randn(4, 3)
    torch.testing.assert_close(curve(x, 2.0, t=0.5), 2 * curve.module_at(0.5)(x))
