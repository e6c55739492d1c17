"""Curve under torch.compile, whole or in parts."""

import pytest
import torch
from curve_networks import Blocks, curve_of, gradients
from torch import nn

import losssurf_fast as lsf


@pytest.mark.parametrize("factory", [Blocks, lambda: Blocks(False), lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0)])
def test_compile_is_one_graph_for_all_t(factory):
    curve = curve_of(factory, double=False)
    x = torch.randn(3, 4) if not isinstance(curve.module, nn.TransformerEncoderLayer) else torch.randn(3, 2, 4)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: curve(x, t=t), backend=backend, fullgraph=True)
    for t in (0.0, 0.3, 0.9):
        t = torch.tensor(t, requires_grad=True)
        expected = gradients(curve, curve(x, t=t).square().sum(), t)
        actual = gradients(curve, compiled(x, t).square().sum(), t)
        torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1 and curve._places.installed is None
    sampling = torch.compile(curve, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        output = sampling(x)
        loss = output.sum() + curve.l2()
        actual = gradients(curve, loss)
        torch.manual_seed(seed)
        torch.testing.assert_close(curve(x), output)
        torch.testing.assert_close(actual, gradients(curve, curve(x, t=curve.last_t).sum() + curve.l2()))


def test_compiled_layers_inside():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(2)]
    expected = lsf.Curve(models)
    for model in models:
        model[0] = torch.compile(model[0], backend="aot_eager")
    curve = lsf.Curve(models)
    assert set(dict(curve.named_parameters())) == set(dict(expected.named_parameters()))
    x = torch.randn(3, 4)
    for t in (0.2, 0.7):
        actual = gradients(curve, curve(x, t=t).square().sum())
        torch.testing.assert_close(actual, gradients(expected, expected(x, t=t).square().sum()))
