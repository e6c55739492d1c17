"""Networks whose convolutions, embeddings and attention have Gaussian weights in the tools: averages, curves..."""

import copy

import pytest
import torch
import torch.distributed as dist
from conversion_models import GPT, INDEX
from torch import nn
from torch.distributed.fsdp import fully_shard

import losssurf_fast as lsf

LOADER = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(3)]
X = LOADER[0][0]


def network(parameterization="additive"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 3, stride=2),
        nn.Flatten(),
        nn.Linear(2 * 13 * 13, 3),
    )
    return lsf.to_lrt(model, parameterization)


def train(model, seed=1):
    torch.manual_seed(seed)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 1e-3), lsf.ELBOLoss(model, 24)
    for x, y in LOADER:
        optimizer.zero_grad()
        loss_fn(model(x), y, kl_weight=0.1).backward()
        optimizer.step()
    return model


parameterizations = pytest.mark.parametrize("parameterization", ["layer", "neuron", "weight", "additive", "variance"])


@parameterizations
def test_training_prediction_and_kl(parameterization):
    model = train(network(parameterization)).eval()
    plain = lsf.from_lrt(copy.deepcopy(model))
    expected = plain(X).softmax(-1)
    torch.testing.assert_close(lsf.predict(model, X, "deterministic"), expected.detach())
    draws = [lsf.predict(model, X, num_samples=3, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    stacked = lsf.predict(model, X, num_samples=3, draws_per_call=3, seed=1)
    assert stacked.shape == draws[0].shape
    total = sum(layer.kl("normal") for layer in model if isinstance(layer, lsf.nn.LRTLayer))
    torch.testing.assert_close(lsf.kl_divergence(model, "normal"), total)


def test_update_bn_switches_the_noise_off():
    model = network()
    lsf.update_bn(LOADER, model)
    first = model[1].running_var.clone()
    lsf.update_bn(LOADER, model)
    assert torch.equal(model[1].running_var, first)
    plain = lsf.from_lrt(copy.deepcopy(model))
    lsf.update_bn(LOADER, plain)
    torch.testing.assert_close(plain[1].running_var, first)


@parameterizations
def test_averages(parameterization):
    model = network(parameterization)
    swa, swag = lsf.AveragedModel(model), lsf.SWAG(model, max_num_models=3)
    for seed in range(3):
        train(model, seed)
        swa.update_parameters(model)
        swag.collect_model(model)
    lsf.update_bn(LOADER, swa)
    assert swa.eval()(X).shape == (8, 3)
    assert len(swa.state_dict()) == len(model.state_dict()) + 1
    swag.sample(scale=0.5, seed=1)
    assert torch.isfinite(lsf.predict(swag.module, X, num_samples=2)).all()
    with lsf.averaged_weights(model, swa):
        assert torch.equal(model[0].scale, swa.module[0].scale)


@parameterizations
def test_curve(parameterization):
    ends = [train(network(parameterization), seed) for seed in (1, 2)]
    curve = lsf.Curve(ends, num_bends=3)
    loss = curve(X, t=0.5).square().sum()
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in curve.parameters())
    curve.eval()
    with curve.at(0.0):
        torch.testing.assert_close(curve.module[0](X), ends[0].eval()[0](X))
    with curve.at(0.3):
        assert torch.isfinite(lsf.kl_divergence(curve.module, "normal"))


@pytest.mark.parametrize("parameterization", ["layer", "variance"])
def test_language_models_in_the_tools(parameterization):
    models = [lsf.to_lrt(GPT(), parameterization, include="*") for _ in range(2)]
    swa, swag = lsf.AveragedModel(models[0], use_buffers=True), lsf.SWAG(models[0], max_num_models=2)
    for model in models:
        swa.update_parameters(model)
        swag.collect_model(model)
    with lsf.averaged_weights(models[1], swa):
        torch.testing.assert_close(models[1].eval()(INDEX), swa.eval()(INDEX))
    swag.sample(seed=1)
    curve = lsf.Curve(models, num_bends=3)
    for outputs in (swag.module(INDEX), curve(INDEX, t=0.3), curve.module_at(0.3)(INDEX)):
        assert outputs.shape == (3, 5, 11) and torch.isfinite(outputs).all()
    torch.testing.assert_close(curve.eval()(INDEX, t=0.0), models[0].eval()(INDEX))
    assert lsf.predict(models[0], INDEX, num_samples=2).shape == (3, 5, 11)


@pytest.mark.parametrize("parameterization", ["layer", "neuron", "variance"])
def test_data_parallel_gradients_and_sharding(parameterization, tmp_path):
    model, plain = network(parameterization), network(parameterization)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        fully_shard(model)
        outputs = []
        for one in (plain, ddp, model):
            torch.manual_seed(3)
            out = one(X)
            out.square().sum().backward()
            outputs.append(out)
        for out in outputs[1:]:
            torch.testing.assert_close(out, outputs[0])
        for a, b, c in zip(plain.parameters(), ddp.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
            torch.testing.assert_close(c.grad.full_tensor(), a.grad)
    finally:
        dist.destroy_process_group()
