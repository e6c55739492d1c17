import math

import pytest
import torch
from swag_models import Net, walk
from torch import nn
from torch.distributions import MultivariateNormal

import losssurf_fast as lsf
from losssurf_fast.averaging import swag_density


def covariances(swag, names, scale, cov):
    """The dense covariance of the parameters ``names``, flattened one after the other."""
    state, n = swag.state_dict(), swag.n_models
    var = torch.cat([state[f"base.{x}_m2"].flatten() for x in names]).double() / n
    dense = torch.diag(var)
    held = 0 if swag.no_cov_mat else min(n, swag.max_num_models)
    if cov and held > 1:
        d = torch.cat([state[f"base.{x}_deviations"][:held].view(held, -1) for x in names], 1).double()
        dense = dense + d.T @ d / (held - 1)
    return scale * dense


def flat(tensors, names):
    return torch.cat([tensors[x].detach().flatten() for x in names]).double()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("cov, block", [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize("no_cov_mat", [False, True])
def test_swag_log_prob_equals_multivariate_normal(steps, cov, block, no_cov_mat):
    model, scale = Net(), 0.7
    swag = lsf.SWAG(model, max_num_models=4, no_cov_mat=no_cov_mat)
    walk(model, steps, swag)
    floor = 0.3 if steps == 1 else 1e-30
    if steps == 1:
        swag._m2 = {name: torch.full_like(m2, floor) for name, m2 in swag._m2.items()}
    names, drawn = list(swag.averages()), swag.sample(seed=1)
    groups = [[x] for x in names] if block else [names]
    log_prob = logdet = 0
    for group in groups:
        dense = covariances(swag, group, scale, cov)
        log_prob += MultivariateNormal(flat(swag.averages(), group), dense).log_prob(flat(drawn, group))
        logdet += torch.linalg.slogdet(dense)[1]
    options = {"scale": scale, "cov": cov, "block": block, "var_floor": floor}
    torch.testing.assert_close(swag.log_prob(**options), log_prob, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(swag.logdet(**options), logdet, rtol=1e-8, atol=1e-8)


def test_swag_log_prob_takes_models_and_dicts():
    model = Net()
    swag = lsf.SWAG(model, max_num_models=4)
    walk(model, 5, swag)
    drawn = swag.sample(seed=1)
    ours = swag.log_prob()
    assert ours.dtype == torch.float64 and ours.dim() == 0 and not ours.requires_grad
    assert swag.log_prob(swag.module) == swag.log_prob(drawn) == ours
    assert swag.log_prob(torch.compile(swag.module, backend="eager")) == ours
    assert swag.log_prob({**drawn, "bn.running_mean": model.bn.running_mean}) == ours
    assert swag.log_prob(model) != ours
    assert swag.log_prob(swag.averages()) > ours


def test_swag_log_prob_does_not_depend_on_chunks(monkeypatch):
    model = nn.Linear(7, 9)
    swag = lsf.SWAG(model, max_num_models=3, deviations_dtype=torch.bfloat16)
    walk(model, 5, swag)
    whole = swag.log_prob(model)
    monkeypatch.setattr(swag_density, "CHUNK", 10)
    torch.testing.assert_close(swag.log_prob(model), whole, rtol=1e-12, atol=0)


def test_swag_log_prob_widens_chunks_alone(monkeypatch):
    """The float64 copies are of a chunk, not of [K, numel]."""
    widths = []
    monkeypatch.setattr(swag_density, "CHUNK", 100)
    sums = swag_density._sums

    class Observed(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
                widths.append(out.numel())
            return out

    model = nn.Linear(50, 40)
    swag = lsf.SWAG(model, max_num_models=5)
    walk(model, 6, swag)
    with Observed():
        swag.log_prob(model)
    assert sums is swag_density._sums and 500 <= max(widths) <= 600


def test_swag_log_prob_floor_of_weights_that_never_move():
    model = nn.Linear(3, 2)
    swag = lsf.SWAG(model, max_num_models=4)
    still = model.bias.detach().clone()
    for _ in range(5):
        nn.init.normal_(model.weight)
        swag.collect_model(model)
    assert torch.equal(swag.samples(2, seed=0)["bias"], still.expand(2, 2))
    here, moved = swag.log_prob(model, var_floor=1e-4), nn.Linear(3, 2)
    moved.load_state_dict({"weight": model.weight, "bias": still + 0.1})
    offset = (moved.bias.double() - still.double()).square().sum() / (2 * 0.5 * 1e-4)
    torch.testing.assert_close(here - swag.log_prob(moved, var_floor=1e-4), offset, rtol=1e-8, atol=0)
    assert swag.log_prob(model).isfinite()


def test_swag_log_prob_integrates_to_one():
    model = nn.Linear(1, 1, bias=False)
    swag = lsf.SWAG(model)
    walk(model, 6, swag)
    mean, std = swag.averages()["weight"].item(), math.exp(swag.logdet() / 2)
    grid = torch.linspace(-8, 8, 401, dtype=torch.float64) * std + mean
    density = torch.stack([swag.log_prob({"weight": w.view(1, 1)}).exp() for w in grid])
    assert abs(torch.trapezoid(density, grid) - 1) < 1e-4


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"scale": True}, TypeError, "scale must be a number"),
        ({"var_floor": 0.0}, ValueError, "var_floor must be positive"),
        ({"var_floor": math.inf}, ValueError, "var_floor must be positive and finite"),
        ({"cov": 1}, TypeError, "cov must be a bool"),
        ({"block": None}, TypeError, "block must be a bool"),
    ],
)
def test_swag_log_prob_refuses_options(options, error, match):
    model = nn.Linear(2, 2)
    swag = lsf.SWAG(model)
    walk(model, 2, swag)
    with pytest.raises(error, match=f"log_prob: {match}"):
        swag.log_prob(model, **options)
    with pytest.raises(error, match=f"logdet: {match}"):
        swag.logdet(**options)


def test_swag_log_prob_refuses_weights():
    model = nn.Linear(2, 2)
    swag = lsf.SWAG(model)
    walk(model, 2, swag)
    with pytest.raises(ValueError, match="log_prob: .*lacks bias"):
        swag.log_prob({"weight": model.weight})
    with pytest.raises(ValueError, match="log_prob: weight must have shape .2, 2., got .2, 3."):
        swag.log_prob(nn.Linear(3, 2))
    with pytest.raises(TypeError, match="log_prob: weights must be a module or tensors by name, got list"):
        swag.log_prob([model.weight])
    with pytest.raises(RuntimeError, match="log_prob: nothing has been drawn"):
        swag.log_prob()
