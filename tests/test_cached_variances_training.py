"""lsf.cached_variances around training: no step of an optimizer goes unseen."""

import pytest
import torch
from test_cached_variances import SEED, layer
from torch import nn

import losssurf_fast as lsf


def optimizers(parameters):
    yield torch.optim.SGD(parameters, 0.1, momentum=0.9)
    yield torch.optim.SGD(parameters, 0.1, fused=True)  # whose writes autograd does not count
    yield torch.optim.AdamW(parameters, 0.1, fused=True)
    yield torch.optim.Adam(parameters, 0.1, foreach=True)


def local(linear, x):
    return linear(x, SEED).square().sum()


def divergence(linear, x):
    return lsf.kl_divergence(linear)


def drawn_weights(linear, x):
    with lsf.sample_weights(linear, seed=SEED):
        return linear(x).square().sum()


def mean_weights(linear, x):
    with lsf.prediction(linear, "deterministic"):
        return linear(x).square().sum()


@pytest.mark.parametrize("loss", [local, divergence, drawn_weights, mean_weights])
@pytest.mark.parametrize("number", range(4))
def test_training_between_predictions_is_seen(number, loss):
    linear, x = layer("weight"), torch.randn(3, 6)
    optimizer = list(optimizers([*linear.parameters()]))[number]
    with lsf.cached_variances(linear):
        for _ in range(3):
            optimizer.zero_grad()
            loss(linear, x).backward()
            with torch.no_grad():
                linear(x, SEED)
            optimizer.step()
            with torch.no_grad():
                cached = linear(x, SEED)
            assert torch.equal(cached, linear(x, SEED))


def test_what_runs_inside_a_step_sees_it():
    linear, x, found = layer(), torch.randn(3, 6), []
    optimizer = torch.optim.AdamW(linear.parameters(), 0.1, fused=True)

    @torch.no_grad()
    def look(*_):
        cached = linear(x, SEED)
        linear.variances.clear()
        found.append(torch.equal(cached, linear(x, SEED)))

    optimizer.register_step_post_hook(look)
    with lsf.cached_variances(linear):
        lsf.kl_divergence(linear).backward()
        with torch.no_grad():
            linear(x, SEED)
        optimizer.step()
    assert found == [True]


def test_a_closure_that_predicts_is_seen():
    linear, x = layer(), torch.randn(3, 6)
    optimizer = torch.optim.SGD(linear.parameters(), 0.1, fused=True)

    def closure():
        optimizer.zero_grad()
        divergence(linear, x).backward()
        with torch.no_grad():
            linear(x, SEED)  # before the weights are written

    with lsf.cached_variances(linear):
        optimizer.step(closure)
        with torch.no_grad():
            cached = linear(x, SEED)
        assert torch.equal(cached, linear(x, SEED))


def test_a_step_that_fails_half_way_is_seen():
    linear, x, other = layer(), torch.randn(3, 6), nn.Parameter(torch.zeros(2))
    groups = [{"params": list(linear.parameters())}, {"params": [other]}]
    optimizer = torch.optim.SGD(groups, 0.1, fused=True)
    with lsf.cached_variances(linear):
        (lsf.kl_divergence(linear) + other.sum()).backward()
        with torch.no_grad():
            before = linear(x, SEED)
            optimizer.param_groups[1]["lr"] = "none"
            with pytest.raises(TypeError):
                optimizer.step()
            cached = linear(x, SEED)
            linear.variances.clear()
            assert torch.equal(cached, linear(x, SEED)) and not torch.equal(cached, before)


def test_a_compiled_step_is_seen():
    linear, x = layer(), torch.randn(3, 6)
    optimizer = torch.optim.SGD(linear.parameters(), 0.1)
    step = torch.compile(optimizer.step, backend="aot_eager")
    with lsf.cached_variances(linear):
        for _ in range(2):
            local(linear, x).backward()
            with torch.no_grad():
                before = linear(x, SEED)
                step()
                cached = linear(x, SEED)
            assert torch.equal(cached, linear(x, SEED)) and not torch.equal(cached, before)
