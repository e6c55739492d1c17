"""The layer CurveLinear."""

import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

import losssurf_fast as lsf

KINDS = ("bezier", "polychain")


def expected(layer, x, t):
    """F.linear with the layer's weight at the number t, written out for three bends."""
    c = [(1 - t) ** 2, 2 * t * (1 - t), t**2]
    if layer.kind == "polychain":
        c = [max(0, 1 - 2 * t), 1 - abs(2 * t - 1), max(0, 2 * t - 1)]
    at = lambda bends: sum(a * b for a, b in zip(c, bends, strict=True))
    return F.linear(x, at(layer.weights), None if layer.biases is None else at(layer.biases))


def test_parameters_have_the_names_of_the_original():
    layer = lsf.nn.CurveLinear(7, 5, num_bends=4)
    assert list(layer.state_dict()) == [f"{name}_{j}" for j in range(4) for name in ("weight", "bias")]
    shapes = {"weight": (5, 7), "bias": (5,)}
    assert all(tuple(p.shape) == shapes[name[:-2]] for name, p in layer.named_parameters())
    assert list(lsf.nn.CurveLinear(7, 5, bias=False).state_dict()) == ["weight_0", "weight_1", "weight_2"]
    assert "num_bends=4, kind='bezier'" in repr(layer)


def test_ends_are_frozen_by_choice():
    for start, end in itertools.product((False, True), repeat=2):
        layer = lsf.nn.CurveLinear(7, 5, fix_start=start, fix_end=end)
        trains = [w.requires_grad for w in layer.weights]
        assert trains == [not start, True, not end] == [b.requires_grad for b in layer.biases]
    assert [w.requires_grad for w in lsf.nn.CurveLinear(3, 2, num_bends=2, fix_end=False).weights] == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_the_weight_at_t(kind):
    layer = lsf.nn.CurveLinear(7, 5, kind=kind, fix_start=False)
    x = torch.randn(2, 3, 7)
    for t in (0.0, 0.25, 1.0, 1):
        torch.testing.assert_close(layer(x, t), expected(layer, x, t))
        torch.testing.assert_close(layer(x, torch.tensor(float(t))), expected(layer, x, t))
    torch.testing.assert_close(layer(x, t=0.0), F.linear(x, layer.weight_0, layer.bias_0))
    places = torch.rand(2, 3)
    y = layer(x, places)
    torch.testing.assert_close(y[1, 2], expected(layer, x, places[1, 2].item())[1, 2])
    assert lsf.nn.CurveLinear(7, 5, bias=False)(x[0, 0], 0.5).shape == (5,)


def test_t_is_drawn_from_the_default_generator():
    layer = lsf.nn.CurveLinear(7, 5)
    x = torch.randn(4, 7)
    for mode in (True, False):
        layer.train(mode)
        torch.manual_seed(3)
        t, y = torch.rand(()), None
        torch.manual_seed(3)
        y = layer(x)
        torch.testing.assert_close(y, layer(x, t))
        assert not torch.equal(y, layer(x))
    per_sample = lsf.nn.CurveLinear(7, 5, per_sample=True)
    torch.manual_seed(3)
    places = torch.rand(4)
    torch.manual_seed(3)
    torch.testing.assert_close(per_sample(x), per_sample(x, places))


def test_a_t_for_each_row_estimates_the_same_loss_with_less_variance():
    """Over 4000 draws the means agree within 5 standard errors, and the variance falls with the rows."""
    one, own = (lsf.nn.CurveLinear(3, 2, per_sample=p).double() for p in (False, True))
    own.load_state_dict(one.state_dict())
    x = torch.randn(8, 3, dtype=torch.float64).expand(4000, 8, 3)
    with torch.no_grad():
        shared = torch.stack([one(x[0]).square().mean() for _ in range(4000)])
        rows = own(x).square().mean((1, 2))
    error = (shared.var() / 4000 + rows.var() / 4000).sqrt()
    assert (shared.mean() - rows.mean()).abs() < 5 * error
    assert rows.var() < shared.var() / 2


def test_training_moves_the_free_bends_alone():
    layer = lsf.nn.CurveLinear(7, 5)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, 7)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"weight_1", "bias_1"}
    assert layer.weight_0.grad is None


def test_init_linear():
    layer = lsf.nn.CurveLinear(7, 5, num_bends=4)
    layer.init_linear()
    torch.testing.assert_close(layer.weight_1, layer.weight_0 + (layer.weight_3 - layer.weight_0) / 3)
    torch.testing.assert_close(layer.bias_2, layer.bias_0 + (layer.bias_3 - layer.bias_0) * 2 / 3)
    x = torch.randn(4, 7)
    straight = torch.lerp(layer(x, 0.0), layer(x, 1.0), 0.3)
    torch.testing.assert_close(layer(x, 0.3), straight)


def test_dtypes_and_devices():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = lsf.nn.CurveLinear(7, 5, dtype=dtype)
        assert layer(torch.randn(4, 7).to(dtype)).dtype == dtype
    layer = lsf.nn.CurveLinear(7, 5)
    assert layer(torch.randn(4, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16
    meta = lsf.nn.CurveLinear(7, 5, device="meta")
    assert meta(torch.randn(4, 7, device="meta")).shape == (4, 5)
    meta.to_empty(device="cpu").reset_parameters()
    assert meta(torch.randn(4, 7)).isfinite().all()


def test_compile():
    torch._dynamo.reset()
    layer = lsf.nn.CurveLinear(7, 5)
    x, t = torch.randn(4, 7), torch.tensor(0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), layer(x, t))
    assert compiled(x).shape == (4, 5)


def test_refusals():
    with pytest.raises(ValueError, match="CurveLinear: num_bends counts the two ends and must be at least 2, got 1"):
        lsf.nn.CurveLinear(3, 2, num_bends=1)
    with pytest.raises(ValueError, match="CurveLinear: kind must be one of .* got 'spline'"):
        lsf.nn.CurveLinear(3, 2, kind="spline")
    layer, x = lsf.nn.CurveLinear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\], got 1.5"):
        layer(x, 1.5)
    with pytest.raises(ValueError, match=r"CurveLinear: t must be a number, a 0-d tensor or \(4,\) .* got \(3,\)"):
        layer(x, torch.rand(3))
