import copy

import pytest
import torch
import torch.nn.utils.parametrize
from conversion_models import GPT, INDEX, LAYERS, call
from torch import nn

import losssurf_fast as lsf

ALL = ("layer", "neuron", "weight", "additive", "variance")
parameterizations = pytest.mark.parametrize("parameterization", ALL)


@pytest.fixture(params=[*LAYERS, "linear"])
def case(request):
    layer, x = LAYERS.get(request.param, (nn.Linear(4, 3), torch.randn(2, 4)))
    return copy.deepcopy(layer), x


@parameterizations
def test_the_way_back(case, parameterization):
    layer, x = case
    plain, kind = copy.deepcopy(layer).eval(), type(layer)
    attributes, parameters = set(vars(layer)), dict(layer.named_parameters())
    expected = call(plain, x)
    lsf.to_lrt(layer, parameterization, include="*")
    assert lsf.from_lrt(layer) is layer
    assert type(layer) is kind and repr(layer) == repr(plain)
    assert set(vars(layer)) == attributes
    assert [(n, p.shape, p.dtype) for n, p in layer.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in plain.named_parameters()
    ]
    assert list(layer.state_dict()) == list(plain.state_dict())
    kept = dict(layer.named_parameters())
    assert all(kept[n] is p for n, p in parameters.items() if parameterization != "variance" or "weight" not in n)
    layer.eval()
    if parameterization != "variance":
        assert torch.equal(call(layer, x), expected)
    else:
        weights = [p for n, p in layer.named_parameters() if n.endswith("weight")]
        assert all((p == 0).all() and p.requires_grad for p in weights)
    with pytest.raises(ValueError, match="to_lrt was not called"):
        lsf.conversion_report(layer)


@parameterizations
def test_one_draw(case, parameterization):
    layer, x = case
    start = {"init_log_sigma2" if parameterization in ("additive", "variance") else "init_log_alpha": 0.0}
    lsf.to_lrt(layer, parameterization, include="*", **start).eval()
    mean = call(layer, x)
    with lsf.sample_weights(layer, 5):
        expected = call(layer, x)
    twin = lsf.from_lrt(copy.deepcopy(layer), seed=torch.tensor(5))
    lsf.from_lrt(layer, seed=5)
    assert not isinstance(layer, lsf.nn.LRTLayer)
    torch.testing.assert_close(call(layer, x), expected)
    assert torch.equal(call(twin, x), call(layer, x))
    assert not torch.allclose(expected, mean)


def test_draws_differ_between_layers_and_seeds():
    build = lambda: lsf.to_lrt(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), "variance", init_log_sigma2=0.0)
    torch.manual_seed(0)
    a, b = lsf.from_lrt(build(), seed=1), lsf.from_lrt(build(), seed=2)
    assert not torch.equal(a[0].weight, a[1].weight) and not torch.equal(a[0].weight, b[0].weight)
    torch.testing.assert_close(a[0].weight.std().item(), 1.0, atol=0.5, rtol=0)


@parameterizations
@pytest.mark.parametrize("seed", [None, 3])
def test_language_model(parameterization, seed):
    model, plain = GPT().eval(), GPT().eval()
    plain.load_state_dict(model.state_dict())
    lsf.to_lrt(model, parameterization)
    lsf.from_lrt(model, seed=seed)
    assert not any(isinstance(m, lsf.nn.StochasticLayer) for m in model.modules())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.head.weight is model.wte.weight
    assert [m.activation_relu_or_gelu for m in model.blocks.layers] == [1, 1]
    assert list(model.state_dict()) == list(plain.state_dict())
    if seed is None and parameterization != "variance":
        assert torch.equal(model(INDEX), plain(INDEX))


def test_fast_paths_come_back():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    switches = lambda: (model.use_nested_tensor, [m.activation_relu_or_gelu for m in model.layers])
    before, x = switches(), torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = model(x)
        lsf.to_lrt(model, include="*linear1")
        lsf.to_lrt(model)
        assert switches() != before
        lsf.from_lrt(model)
        assert switches() == before
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_dtype_of_weights_that_variance_layers_get(bias):
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=bias), nn.BatchNorm2d(2), nn.Embedding(3, 2)).to(torch.bfloat16)
    lsf.to_lrt(model, "variance", include="*")
    lsf.from_lrt(model)
    assert model[0].weight.dtype == model[2].weight.dtype == torch.bfloat16
    assert lsf.from_lrt(lsf.to_lrt(nn.Linear(2, 2, bias=False).double(), "variance")).weight.dtype == torch.float64


def test_frozen_weights_and_hooks_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight.requires_grad_(False)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    lsf.from_lrt(lsf.to_lrt(model, "variance"))
    assert [m.weight.requires_grad for m in model] == [False, True]
    model(torch.randn(1, 3))
    assert calls == [1]


def test_inside_a_prediction():
    model = lsf.to_lrt(nn.Sequential(nn.Linear(3, 3)))
    with lsf.prediction(model, "stochastic"):
        lsf.from_lrt(model)
        x = torch.randn(1, 3)
        assert torch.equal(model(x), model(x))


class OwnLayer(lsf.nn.LRTLinear):
    pass


def test_errors_leave_the_model_alone():
    with pytest.raises(TypeError, match="from_lrt: model must be a torch.nn.Module, got None"):
        lsf.from_lrt(None)
    with pytest.raises(ValueError, match="from_lrt: Linear has no LRT layers"):
        lsf.from_lrt(nn.Linear(2, 2))
    parametrized = lsf.nn.LRTLinear(2, 2)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    for bad, message in ((OwnLayer(2, 2), "OwnLayer is no layer of lsf.nn"), (parametrized, "call lsf.bake_pruning")):
        model = nn.Sequential(lsf.nn.LRTLinear(2, 2), bad)
        with pytest.raises(ValueError, match=f"from_lrt: .*{message}"):
            lsf.from_lrt(model)
        assert isinstance(model[0], lsf.nn.LRTLinear)
    model = lsf.to_lrt(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="seed"):
        lsf.from_lrt(model, seed=1.5)
    assert isinstance(model, lsf.nn.LRTLinear)


def test_pruned_models():
    model = lsf.to_lrt(GPT(), "weight", include="*").eval()
    with torch.no_grad():
        model.head.log_alpha[:5] = 4.0
        model.blocks.layers[0].self_attn.in_proj_log_alpha[3] = 4.0
    lsf.prune(model)
    expected = model(INDEX)
    lsf.from_lrt(lsf.bake_pruning(model))
    assert type(model.head) is nn.Linear and (model.head.weight[:5] == 0).all()
    torch.testing.assert_close(model(INDEX), expected)


@pytest.mark.parametrize("layer", [nn.Linear(4, 3, bias=False), nn.Conv2d(2, 3, 3, bias=False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_variance_layers_without_bias_get_their_dtype_back(layer, dtype):
    model = nn.Sequential(nn.LayerNorm(4), copy.deepcopy(layer).to(dtype))
    lsf.to_lrt(model, "variance")
    assert "like" not in "".join(model.state_dict())
    assert lsf.from_lrt(model)[1].weight.dtype == dtype and not list(model.buffers())


@pytest.mark.parametrize("embedding_first", [False, True])
def test_padding_rows_are_means_whatever_the_order_of_tied_layers(embedding_first):
    embedding, linear = nn.Embedding(10, 6, padding_idx=2), nn.Linear(6, 10, bias=False)
    linear.weight = embedding.weight
    with torch.no_grad():
        embedding.weight.normal_()
    mean = embedding.weight.detach().clone()
    model = nn.ModuleList([embedding, linear] if embedding_first else [linear, embedding])
    lsf.to_lrt(model, "additive", init_log_sigma2=0.0)
    name = "0.weight"
    expected = lsf.sample_weights(model, 3).weights[name].detach().clone()
    expected[2] = mean[2]
    lsf.from_lrt(model, seed=3)
    assert model[0].weight is model[1].weight
    torch.testing.assert_close(model[0].weight.detach(), expected)
