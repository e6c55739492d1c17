"""Curve: networks of every kind against an independent formula, through functional_call, in float64."""

import copy
import io
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from common import F64
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

import losssurf_fast as lsf


class Direct(nn.Module):
    """Parameters of its own, in lists and dicts, frozen and empty ones."""

    def __init__(self):
        super().__init__()
        self.scale, self.empty = nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(0, 3))
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.list = nn.ParameterList([torch.randn(4, 4), torch.randn(4)])
        self.dict = nn.ParameterDict({"a": torch.randn(4), "b": torch.randn(4, 1)})

    def forward(self, x):
        x = x @ self.list[0] + self.list[1] * self.dict["a"] + self.frozen
        return x * self.scale + (x @ self.dict["b"]) + self.empty.sum()


class Tied(nn.Module):
    """A weight of two layers, and a layer in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.shared = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.last.weight, self.again = self.first.weight, self.shared

    def forward(self, x):
        return self.last(self.again(self.shared(self.first(x)).tanh()))


class Recurrent(nn.Module):
    def __init__(self, kind, **kwargs):
        super().__init__()
        self.rnn = kind(4, 5, num_layers=2, bidirectional=True, batch_first=True, **kwargs)

    def forward(self, x):
        return self.rnn(x)[0]


class Attention(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **kwargs)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class AsksForParameters(nn.Module):
    """As many networks find their device and dtype."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        first = next(self.parameters())
        assert [n for n, _ in self.named_parameters()] == ["layer.weight", "layer.bias"]
        return self.layer(x.to(first.device, first.dtype))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(torch.fft.ifft(torch.fft.fft(x) * self.filter).real)


class Integers(nn.Module):
    """A parameter of integers, which a curve does not combine."""

    def __init__(self):
        super().__init__()
        self.order = nn.Parameter(torch.tensor([2, 0, 3, 1]), requires_grad=False)
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x[..., self.order])


def convolutional():
    return nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.GELU(), nn.Conv1d(6, 2, 2, bias=False))


def normalised():
    layers = parametrizations.weight_norm(nn.Linear(4, 4)), parametrizations.orthogonal(nn.Linear(4, 4))
    return nn.Sequential(*layers, nn.LayerNorm(4), nn.utils.weight_norm(nn.Linear(4, 3)))


def pruned():
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.Tanh())


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(self.table((x.abs() * 3).long().clamp(max=6)))


MODELS = {
    "linear": lambda: nn.Linear(4, 3),
    "convolutional": convolutional,
    "direct": Direct,
    "tied": Tied,
    "lstm": lambda: Recurrent(nn.LSTM, proj_size=3),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "cross attention": lambda: Attention(kdim=4, vdim=4, add_bias_kv=True),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), 2, enable_nested_tensor=False
    ),
    "asks for parameters": AsksForParameters,
    "normalised": normalised,
    "pruned": pruned,
    "complex": Complex,
    "integers": Integers,
    "embedded": Embedded,
}


def two(name, seed=0, double=True):
    torch.manual_seed(seed)
    models = [MODELS[name]() for _ in range(2)]
    for model in models:
        model.double() if double else model.float()  # which leave complex and integer parameters as they are
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    return models, torch.randn(5, 3, 4, dtype=F64 if double else torch.float32)


def formula(bends, t, kind):
    """Weights by name, independent of the library's code."""
    last = len(bends) - 1
    if kind == "bezier":
        c = [math.comb(last, j) * t**j * (1 - t) ** (last - j) for j in range(last + 1)]
    else:
        c = [max(0.0, 1 - abs(t * last - j)) for j in range(last + 1)]
    return {name: sum(cj * bend[name] for cj, bend in zip(c, bends, strict=True)) for name in bends[0]}


def leaves(curve):
    return [
        {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in b.named_parameters()} for b in curve.bends
    ]


def assert_equals_formula(curve, expected_module, x, t):
    """Output, buffers and the gradient of every bend and of the input."""
    bends = leaves(curve)
    expected_module.train(curve.training)
    expected_module.load_state_dict(dict(curve.module.named_buffers()), strict=False)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = functional_call(expected_module, formula(bends, t, curve.kind), (theirs,))
    actual = curve(ours, t=t)
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    curve.zero_grad()
    actual.backward(direction)
    expected.backward(direction)
    torch.testing.assert_close(ours.grad, theirs.grad)
    for bend, tree in zip(bends, curve.bends, strict=True):
        for name, p in tree.named_parameters():
            assert p.requires_grad == bend[name].requires_grad
            assert (p.grad is None) == (not p.requires_grad), name
            if p.requires_grad:
                wanted = torch.zeros_like(p) if bend[name].grad is None else bend[name].grad
                torch.testing.assert_close(p.grad, wanted, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(dict(curve.module.named_buffers()), dict(expected_module.named_buffers()))


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_gradients_equal_the_formula(name):
    models, x = two(name)
    other = two(name)[0][0]
    for kind, num_bends, fixed in (("bezier", 3, True), ("polychain", 4, False), ("bezier", 2, False)):
        curve = lsf.Curve(models, kind=kind, num_bends=num_bends, fix_start=fixed, fix_end=True)
        frozen = {n for n, p in models[0].named_parameters() if not p.requires_grad}
        for j, tree in enumerate(curve.bends):  # off the straight line
            for n, p in tree.named_parameters():
                assert p.requires_grad == (n not in frozen and j < num_bends - 1 and not (fixed and j == 0))
                p.data.add_(torch.randn_like(p), alpha=0.1) if 0 < j < num_bends - 1 else None
        for training in (True, False):
            curve.train(training)
            for t in (0.0, 0.3, 0.5, 1.0):
                assert_equals_formula(curve, other, x, t)


@pytest.mark.parametrize("name", MODELS)
def test_ends_are_the_models_bit_for_bit(name):
    models, x = two(name, double=name == "complex")
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in models]
    curve = lsf.Curve(models).eval()
    for model in models:  # torch takes other kernels for some layers where a parameter requires a gradient
        model.requires_grad_(False)
    with torch.no_grad():
        for t, model in zip((0, 1), models, strict=True):
            model.eval()
            curve.module.load_state_dict(dict(model.named_buffers()), strict=False)
            expected = model(x)
            assert torch.equal(curve(x, t=t), expected)
            with curve.at(t) as module:
                assert torch.equal(module(x), expected)
                assert {n for n, _ in module.named_parameters()} == {n for n, _ in model.named_parameters()}
            assert torch.equal(curve.module_at(t).requires_grad_(False)(x), expected)
    curve(x, t=0.5).sum().backward()
    for model, state in zip(models, before, strict=True):
        for n, v in model.state_dict().items():
            assert torch.equal(v, state[n]) and not v.requires_grad
    ours = {p.untyped_storage().data_ptr() for p in (*curve.parameters(), *curve.buffers()) if p.numel()}
    assert not ours & {t.untyped_storage().data_ptr() for m in models for t in m.state_dict().values()}


def test_names_and_state_dict():
    models, x = two("tied")
    curve = lsf.Curve(models, num_bends=4)
    names = [n for n, _ in models[0].named_parameters()]
    assert {n for n, _ in curve.named_parameters()} == {f"bends.{j}.{n}" for j in range(4) for n in names}
    assert set(curve.state_dict()) == {n for n, _ in curve.named_parameters()} | {"_extra_state"}
    models, x = two("convolutional")
    curve, other = lsf.Curve(models), lsf.Curve(models[::-1])
    curve(x).sum().backward()
    assert {k for k in curve.state_dict() if k.startswith("module.")} == {
        f"module.{n}" for n, _ in models[0].named_buffers()
    }
    other.load_state_dict(curve.state_dict())
    curve.eval(), other.eval()
    assert torch.equal(curve(x, t=0.4), other(x, t=0.4))
    other.load_state_dict({k: v.clone() for k, v in lsf.Curve(models).state_dict().items()}, assign=True)
    assert torch.equal(other(x, t=0.4), lsf.Curve(models).eval()(x, t=0.4))
    with pytest.raises(RuntimeError, match="bends.1.0.weight"):
        other.load_state_dict({k: v for k, v in curve.state_dict().items() if k != "bends.1.0.weight"})


def test_a_state_dict_of_another_kind_is_refused():
    (a, b), x = two("linear")
    chain, bezier = lsf.Curve([a, b], kind="polychain"), lsf.Curve([b, a])
    before = copy.deepcopy(bezier.state_dict())
    with pytest.raises(ValueError, match="Curve: the state_dict must be of kind 'bezier', it is of 'polychain'"):
        bezier.load_state_dict(chain.state_dict())
    for name, value in before.items():
        assert torch.equal(bezier.state_dict()[name], value)
    file = io.BytesIO()
    torch.save(chain.state_dict(), file)
    file.seek(0)
    other = lsf.Curve([b, a], kind="polychain")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x, t=0.4), chain(x, t=0.4))


def test_gradient_to_t_and_gradcheck():
    models, x = two("linear")
    curve = lsf.Curve(models, num_bends=4)
    for p in curve.bends[1].parameters():
        p.data.normal_()
    t = torch.tensor(0.3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: curve(x, t=t), t)
    (grad,) = torch.autograd.grad(curve(x, t=t).sum(), t)
    assert grad != 0
    assert torch.autograd.gradcheck(lambda t: curve.l2(t), t)
    assert torch.autograd.gradcheck(lambda t: curve.weights(t)["weight"], t)


def test_module_at_is_a_model_of_its_own():
    models, x = two("convolutional")
    models[0][0].weight.requires_grad_(False)
    curve = lsf.Curve(models)
    loss = curve(x).sum()
    model = curve.module_at(0.25)
    loss.backward()  # is not disturbed by it
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in models[0].named_parameters()
    ]
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
    assert model.state_dict().keys() == models[0].state_dict().keys()
    before = {n: v.clone() for n, v in curve.state_dict().items()}
    torch.optim.SGD(model.parameters(), lr=1.0)
    model(x).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for b in model.buffers():
            b.zero_()
    for n, v in curve.state_dict().items():
        assert torch.equal(v, before[n])
    tied = lsf.Curve(two("tied")[0]).module_at(0.5)
    assert tied.first.weight is tied.last.weight and tied.shared is tied.again


def test_l2_is_the_sum_of_squares():
    models, x = two("direct")
    curve = lsf.Curve(models)
    with pytest.raises(RuntimeError, match="l2: without t it is that of the last forward, and there was none"):
        curve.l2()
    for forward in (lambda: curve(x), lambda: curve(x, t=0.7)):
        forward()
        bends = leaves(curve)
        expected = sum((w**2).sum() for w in formula(bends, float(curve.last_t), "bezier").values())
        for actual in (curve.l2(), curve.l2(curve.last_t)):
            curve.zero_grad()
            torch.testing.assert_close(actual, expected)
            actual.backward(retain_graph=True)
            wanted = torch.autograd.grad(expected, list(bends[1].values())[:2], retain_graph=True)
            for p, g in zip(list(curve.bends[1].parameters())[:2], wanted, strict=True):
                torch.testing.assert_close(p.grad, g)
    with torch.no_grad():
        curve(x, t=0.1)
    torch.testing.assert_close(curve.l2(), curve.l2(0.1))  # of the last forward, which kept nothing
    zeros = lsf.Curve([nn.Linear(2, 2).double(), nn.Linear(2, 2).double()])
    for p in zeros.parameters():
        p.data.zero_()
    zeros.l2(0.5).backward()
    assert all(p.grad.eq(0).all() for p in zeros.bends[1].parameters())
    half = lsf.Curve([nn.Linear(64, 64).half(), nn.Linear(64, 64).half()])
    for p in half.parameters():
        p.data.fill_(30)
    assert half.l2(0.5) == 900 * 65 * 64  # beyond half precision
    curve = lsf.Curve(two("complex")[0])
    assert torch.autograd.gradcheck(lambda t: curve.l2(t), torch.tensor(0.3, dtype=F64, requires_grad=True))
    torch.testing.assert_close(curve.l2(0.0), sum(p.abs().square().sum() for p in curve.bends[0].parameters()))


def test_t_is_drawn_from_the_default_generator():
    models, x = two("linear")
    curve = lsf.Curve(models)
    torch.manual_seed(3)
    curve(x)
    expected = curve.last_t
    torch.manual_seed(3)
    assert torch.rand(()) == expected
    curve(x)
    second = curve.last_t
    assert second != expected
    torch.manual_seed(3)
    curve.sample_t()
    with torch.random.fork_rng():
        curve(x), curve(x)
    curve(x, t=0.5)  # draws nothing
    curve(x)
    assert curve.last_t == second
    ts = torch.stack([curve.sample_t() for _ in range(2000)])
    assert ts.min() >= 0 and ts.max() < 1 and abs(ts.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5


def test_t_given_as_number_or_tensor():
    models, x = two("linear")
    curve = lsf.Curve(models)
    assert torch.equal(curve(x, t=0.3), curve(x, t=torch.tensor(0.3, dtype=F64)))
    assert torch.equal(curve(x, t=0.5), curve(x, t=torch.tensor([0.5])))  # as dnn-mode-connectivity gives it
    for t in (np.float32(0.25), np.float64(0.25), np.int64(1), Fraction(1, 4)):
        assert torch.equal(curve(x, t=t), curve(x, t=float(t)))
    for t, error, message in (
        (1.5, ValueError, r"Curve: t must lie in \[0, 1\], got 1.5"),
        (torch.tensor(-0.5), ValueError, r"Curve: t must lie in \[0, 1\], got -0.5"),
        (math.nan, ValueError, "Curve: t must lie in"),
        (torch.tensor([0.1, 0.2]), ValueError, r"Curve: t must be a number or a tensor of one, got shape \(2,\)"),
        (torch.tensor(1), TypeError, "Curve: t must have a floating dtype"),
        ("half", TypeError, "Curve: t must be a number or a tensor, got str"),
        (0.5j, TypeError, "Curve: t must be a number or a tensor, got complex"),
        (np.float32(1.5), ValueError, r"Curve: t must lie in \[0, 1\], got 1.5"),
        (True, TypeError, "Curve: t must be a number or a tensor, got bool"),
    ):
        for call in (lambda t=t: curve(x, t=t), lambda t=t: curve.weights(t), lambda t=t: curve.module_at(t)):
            with pytest.raises(error, match=message):
                call()
        with pytest.raises(error, match=message), curve.at(t):
            pass
