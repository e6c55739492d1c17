import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf

ALL = ("layer", "neuron", "weight", "additive", "variance")


def net(parameterization):
    return lsf.to_lrt(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), parameterization)


def log_alpha_of(layer):
    """log_alpha of every weight [O, I], written out."""
    if layer.parameterization == "additive":
        return layer.log_sigma2 - layer.weight.square().log()
    if layer.parameterization == "neuron":
        return layer.log_alpha.unsqueeze(1).expand(layer.weight.shape)
    return layer.log_alpha.expand(layer.weight.shape)


@pytest.mark.parametrize("parameterization", ALL[:-1])
@pytest.mark.parametrize("prior", ["ard", "log_uniform", "normal"])
def test_kl_divergence_value_and_gradient(parameterization, prior):
    model = net(parameterization).double()
    twin = copy.deepcopy(model)
    kl = lsf.kl_divergence(model, prior, exact=False, prior_std=0.3)
    expected = 0
    for layer in (twin[0], twin[2]):
        log_alpha, weight = log_alpha_of(layer), layer.weight
        if prior == "normal":
            sigma2 = log_alpha.exp() * weight.square()
            posterior = torch.distributions.Normal(weight, sigma2.sqrt())
            normal = torch.distributions.Normal(torch.zeros_like(weight), 0.3)  # a float64 0, lest 0.3 be float32
            expected += torch.distributions.kl_divergence(posterior, normal).sum()
        else:
            expected += 0.5 * F.softplus(-log_alpha).sum()
            if prior == "log_uniform":
                expected += 0.63576 * torch.sigmoid(-1.8732 - 1.48695 * log_alpha).sum()
    torch.testing.assert_close(kl, expected)
    kl.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_exact_kl_is_near_its_approximation():
    model = net("weight")
    exact, near = (lsf.kl_divergence(model, exact=e) / 80 for e in (True, False))
    assert 0 < abs(exact - near) < 0.01


def test_variance_layers_have_no_kl():
    model = net("variance")
    for prior in ("log_uniform", "ard"):
        assert lsf.kl_divergence(model, prior).item() == 0
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(0.0, (0.5 * layer.log_sigma2).exp()), torch.distributions.Normal(0.0, 0.5)
        ).sum()
        for layer in (model[0], model[2])
    )
    torch.testing.assert_close(lsf.kl_divergence(model, "normal", prior_std=0.5), expected)


def test_mixed_parameterizations_add_up():
    model = nn.Sequential(*(lsf.nn.LRTLinear(5, 5, parameterization=name) for name in ALL), nn.Linear(5, 5))
    for prior in ("log_uniform", "ard", "normal"):
        total = sum(layer.kl(prior) for layer in list(model)[:-1])
        torch.testing.assert_close(lsf.kl_divergence(model, prior), total)


def test_tied_layers_count_once():
    layer = lsf.nn.LRTLinear(5, 5)
    torch.testing.assert_close(lsf.kl_divergence(nn.Sequential(layer, nn.ReLU(), layer)), layer.kl())


def test_zero_additive_weight_has_finite_kl():
    layer = lsf.nn.LRTLinear(5, 5)
    nn.init.zeros_(layer.weight)
    kl = layer.kl()
    kl.backward()
    assert kl.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in (layer.weight, layer.log_sigma2))


@pytest.mark.parametrize("parameterization", ALL)
def test_elbo_loss(parameterization):
    model = net(parameterization)
    loss_fn = lsf.ELBOLoss(model, num_data=1000)
    assert list(loss_fn.parameters()) == []
    assert loss_fn.state_dict() == {}
    x, y = torch.randn(9, 6), torch.randint(4, (9,))
    logits = model(x)
    for kl_weight in (1.0, 0.25, 0.0):
        expected = 1000 * F.cross_entropy(logits, y) + kl_weight * lsf.kl_divergence(model)
        torch.testing.assert_close(loss_fn(logits, y, kl_weight=kl_weight), expected)
    loss_fn(logits, y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_elbo_loss_half_precision_logits():
    model = net("additive")
    logits, y = 10 * torch.randn(9, 4), torch.randint(4, (9,))
    loss = lsf.ELBOLoss(model, 60000)(logits.bfloat16(), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, lsf.ELBOLoss(model, 60000)(logits.bfloat16().float(), y))


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
def test_elbo_loss_compiles(parameterization):
    model = net(parameterization)
    loss_fn = lsf.ELBOLoss(model, num_data=1000)
    x, y = torch.randn(9, 6), torch.randint(4, (9,))

    def step(x, y):
        with lsf.prediction(model, "deterministic"):
            return loss_fn(model(x), y, 0.5)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), step(x, y))


def test_elbo_loss_lets_a_network_learn():
    model = nn.Sequential(lsf.nn.LRTLinear(6, 64, parameterization="variance"), nn.ReLU(), nn.Linear(64, 4))
    loss_fn, optimizer = lsf.ELBOLoss(model, 100), torch.optim.Adam(model.parameters(), 0.05)
    x = torch.randn(100, 6)
    y = x.abs()[:, :4].argmax(1)
    losses = []
    for _ in range(200):
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lsf.kl_divergence(nn.Linear(2, 2)), ValueError, "Linear has no stochastic layers"),
        (lambda: lsf.kl_divergence(net("layer"), "cauchy"), ValueError, "prior must be one of .* got 'cauchy'"),
        (
            lambda: lsf.kl_divergence(net("layer"), "normal", prior_std=0),
            ValueError,
            "prior_std must be positive, got 0",
        ),
        (lambda: lsf.kl_divergence(None), TypeError, "kl_divergence: model must be a torch.nn.Module, got NoneType"),
        (
            lambda: lsf.kl_divergence(net("layer"), prior_std="a"),
            TypeError,
            "kl_divergence: prior_std must be a number, got str",
        ),
        (lambda: lsf.ELBOLoss(net("layer"), "a"), TypeError, "ELBOLoss: num_data must be a number, got str"),
        (lambda: lsf.ELBOLoss(net("layer"), True), TypeError, "ELBOLoss: num_data must be a number, got bool"),
        (lambda: lsf.ELBOLoss(net("layer"), 0), ValueError, "num_data must be a positive number, got 0"),
        (lambda: lsf.ELBOLoss(net("layer"), math.inf), ValueError, "num_data must be a positive number, got inf"),
        (lambda: lsf.ELBOLoss(nn.ReLU(), 10), ValueError, "ReLU has no stochastic layers"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_parameters_without_values_are_refused():
    """A curve's module outside of its blocks: the divergence would be a tensor without a value."""
    curve = lsf.Curve([net("additive"), net("additive")])
    with curve.at(0.3) as module:
        inside = lsf.kl_divergence(module)
    torch.testing.assert_close(inside, lsf.kl_divergence(curve.module_at(0.3)).detach())
    for model in (curve.module, net("neuron").to("meta"), net("variance").to("meta")):
        for prior in ("log_uniform", "normal"):
            with pytest.raises(ValueError, match="kl_divergence: Sequential must hold values, got tensors on the meta"):
                lsf.kl_divergence(model, prior)
