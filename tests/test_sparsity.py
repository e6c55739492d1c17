"""Sparse variational dropout: what a threshold prunes, and that it stays pruned."""

import copy
import math

import pytest
import torch
from common import BF16, F64
from torch import nn

import losssurf_fast as lsf
from losssurf_fast.sparsity import NO_NOISE

WITH_MEANS = ("layer", "neuron", "weight", "additive")


def net(parameterization="additive", dtype=None):
    """Where some log_alpha lie above 3 and some below, but for a "layer" one, which is above in the first layer."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    lsf.to_lrt(model, parameterization)
    with torch.no_grad():
        for layer, shift in ((model[0], 6.0), (model[2], 4.0)):
            layer.scale.add_(shift + 4 * torch.randn_like(layer.scale))
            if parameterization == "layer":
                layer.scale.fill_(shift - 2)
    return model


def log_alpha(layer):
    """Per weight, in float64."""
    weight, scale = layer.weight.detach().double(), layer.scale.detach().double()
    if layer.parameterization == "additive":
        return scale - weight.square().log()
    return (scale.view(-1, 1) if layer.parameterization == "neuron" else scale).expand_as(weight)


def draws(model, x, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad(), lsf.prediction(model, "stochastic"):
        return model(x)


@pytest.mark.parametrize("threshold", [3.0, 0, -20.0, 50.0])
@pytest.mark.parametrize("parameterization", WITH_MEANS)
def test_masks_are_the_formula(parameterization, threshold):
    model = net(parameterization)
    before = copy.deepcopy(model.state_dict())
    masks = lsf.pruning_masks(model, threshold)
    assert list(masks) == ["0.weight", "2.weight"]
    for index, layer in ((0, model[0]), (2, model[2])):
        mask = masks[f"{index}.weight"]
        assert mask.dtype == torch.bool and torch.equal(mask, log_alpha(layer) <= threshold)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if threshold in (-20.0, 50.0):
        assert all(mask.all() == (threshold > 0) == mask.any() for mask in masks.values())
    elif threshold == 3.0:
        assert not masks["0.weight"].all() and masks["2.weight"].any()


def test_a_weight_on_the_threshold_is_kept_and_one_of_zero_is_not():
    layer = lsf.nn.LRTLinear(3, 1, parameterization="weight")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0, 0.0]]))
        layer.log_alpha.copy_(torch.tensor([[3.0, 3.0001, -5.0]]))
    assert lsf.pruning_masks(layer)["weight"].tolist() == [[True, False, False]]
    layer = lsf.nn.LRTLinear(2, 1, parameterization="additive")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0]]))
        layer.log_sigma2.copy_(torch.tensor([[-200.0, 3.0]]))
    assert lsf.pruning_masks(layer)["weight"].tolist() == [[False, True]]


@pytest.mark.parametrize("parameterization", WITH_MEANS)
def test_report_counts_the_masks(parameterization):
    model = net(parameterization)
    report, masks = lsf.sparsity_report(model), lsf.pruning_masks(model)
    assert list(report.layers) == list(masks) and report.left == {} and report.threshold == 3.0
    for name, mask in masks.items():
        layer, kept = report.layers[name], int(mask.sum())
        assert (layer.weights, layer.pruned) == (mask.numel(), mask.numel() - kept)
        assert layer.fraction == pytest.approx(1 - kept / mask.numel())
        assert layer.compression == (pytest.approx(mask.numel() / kept) if kept else math.inf)
        assert (layer.outputs, layer.dead_outputs) == (mask.shape[0], int((~mask).all(1).sum()))
        assert (layer.inputs, layer.dead_inputs) == (mask.shape[1], int((~mask).all(0).sum()))
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert (report.weights, report.pruned) == (80, 80 - kept)
    assert report.fraction == pytest.approx(1 - kept / 80) and report.compression == pytest.approx(80 / kept)


def test_report_counts_dead_features():
    layer = lsf.nn.LRTLinear(3, 4, parameterization="weight", init_log_alpha=-5.0)
    with torch.no_grad():
        layer.log_alpha[1:3] = layer.log_alpha[:, 2] = 10.0
        layer.log_alpha[0, 0] = 10.0
    report = lsf.sparsity_report(layer).layers["weight"]
    assert (report.dead_outputs, report.dead_inputs, report.pruned) == (2, 1, 9)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_report_counts_dead_channels_of_grouped_convolutions(dims):
    """Two groups of 3 outputs and 2 inputs each: input 2 + j is column j of the outputs 3, 4 and 5."""
    kind = (lsf.nn.LRTConv1d, lsf.nn.LRTConv2d, lsf.nn.LRTConv3d)[dims - 1]
    layer = kind(4, 6, 3, groups=2, parameterization="weight", init_log_alpha=-5.0)
    with torch.no_grad():
        layer.log_alpha[0] = layer.log_alpha[3:, 1] = 10.0
        layer.log_alpha[5, 0].view(-1)[1:] = 10.0  # one weight is left
        layer.log_alpha[:3, 0].view(3, -1)[:, 0] = 10.0
    report = lsf.sparsity_report(layer).layers["weight"]
    assert (report.outputs, report.dead_outputs, report.inputs, report.dead_inputs) == (6, 1, 4, 1)
    kernel = 3**dims
    assert report.pruned == 2 * kernel + 3 * kernel + (kernel - 1) + 2


def test_report_counts_dead_channels_of_transposed_convolutions():
    """Their weight is [inputs, outputs / groups, ...]: rows are inputs."""
    layer = lsf.nn.LRTConvTranspose2d(4, 6, 3, groups=2, parameterization="weight", init_log_alpha=-5.0)
    with torch.no_grad():
        layer.log_alpha[0] = layer.log_alpha[2:, 1:] = 10.0  # input 0; outputs 4 and 5
    report = lsf.sparsity_report(layer).layers["weight"]
    assert (report.outputs, report.dead_outputs, report.inputs, report.dead_inputs) == (6, 2, 4, 1)


@pytest.mark.parametrize("parameterization", WITH_MEANS)
def test_pruned_convolutions_are_those_with_zeros(parameterization):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2))
    lsf.to_lrt(model, parameterization)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.scale.add_(8 + (4 if layer.scale.numel() > 1 else 1) * torch.randn_like(layer.scale).abs())
    weight, (first, last) = model[0].weight.detach().clone(), lsf.pruning_masks(model).values()
    x, plain = torch.randn(2, 3, 9, 9), nn.Conv2d(3, 4, 3)
    plain.load_state_dict({"weight": weight * first, "bias": model[0].bias})
    lsf.prune(model)
    assert (~first).any() and first.shape == (4, 3, 3, 3) and last.shape == (4, 2, 3, 3)
    torch.testing.assert_close(lsf.sparsity_report(model).pruned, int((~first).sum() + (~last).sum()))
    with lsf.prediction(model, "deterministic"):
        torch.testing.assert_close(model[0](x), plain(x))
    dead = ~first.flatten(1).any(1)
    torch.testing.assert_close(draws(model[0], x)[:, dead], plain(x)[:, dead])


def test_report_prints_in_72_columns():
    model = nn.Sequential(nn.ModuleDict({"a_block_with_a_long_name": nn.Linear(300, 200)}), lsf.nn.LRTLinear(200, 3))
    lsf.to_lrt(model, include="0.*")
    model.append(lsf.nn.LRTLinear(3, 2, parameterization="variance"))
    lines = str(lsf.sparsity_report(model, -20)).splitlines()
    assert max(map(len, lines)) <= 72 and lines[0] == "log_alpha > -20 is pruned"
    assert lines[2].split() == ["..._long_name.weight", "60000", "100.0", "inf", "200/200", "300/300"]
    assert lines[4].split() == ["all", "60600", "100.0", "inf"]
    assert lines[5] == "2.weight: left, a variance layer has no means"


@pytest.mark.parametrize("parameterization", WITH_MEANS)
def test_pruned_weights_are_zero_and_draw_no_noise(parameterization):
    model, x = net(parameterization), torch.randn(50, 6)
    masks, weights = lsf.pruning_masks(model), [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    scales = [model[0].scale.detach().clone(), model[2].scale.detach().clone()]
    assert lsf.prune(model) is model
    for layer, mask, weight, scale in zip((model[0], model[2]), masks.values(), weights, scales, strict=True):
        assert torch.equal(layer.weight, weight * mask)
        kept = layer.scale if layer.scale.shape != mask.shape else layer.scale[mask]
        assert torch.equal(kept, scale if scale.shape != mask.shape else scale[mask])
    report = lsf.sparsity_report(model)
    assert report.pruned == sum(int((~mask).sum()) for mask in masks.values())
    alone = copy.deepcopy(model[0])
    with torch.no_grad():
        alone.bias.zero_()
    dead = (~masks["0.weight"]).all(1)
    assert (draws(alone, x)[:, dead].abs() < 1e-7).all()  # the 1e-16 inside the square root
    one_hot = torch.eye(6)  # row i: the noise of the weights of input i
    pruned = ~masks["0.weight"].T
    assert (draws(alone, one_hot)[pruned].abs() < 1e-7).all()
    assert (draws(alone, one_hot)[~pruned] != alone.weight.T[~pruned]).all()


@pytest.mark.parametrize("prior", ["log_uniform", "ard"])
@pytest.mark.parametrize("parameterization", WITH_MEANS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_pruned_weights_stay_zero_in_training(parameterization, prior, optimizer):
    """Also with an optimizer made before, whose momentum would move them."""
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    model, x = net(parameterization), torch.randn(20, 6)
    step_by = optimizer(model.parameters(), lr=0.01, weight_decay=0.1, **options)

    def step():
        step_by.zero_grad()
        (model(x).square().mean() + 1e-3 * lsf.kl_divergence(model, prior)).backward()
        step_by.step()

    step()
    masks = lsf.pruning_masks(model)
    lsf.prune(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(5):
        step()
    for name, layer in (("0.weight", model[0]), ("2.weight", model[2])):
        mask = masks[name]
        assert (layer.weight[~mask] == 0).all() and (layer.weight[mask] != 0).all()
        if parameterization == "additive":
            assert (layer.log_sigma2[~mask].exp() == 0).all()
        grad = layer.parametrizations.weight.original.grad
        assert (grad[~mask] == 0).all() and grad[mask].any() == mask.any()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("prior", ["log_uniform", "ard"])
def test_pruned_additive_weights_have_no_kl(prior):
    model = net()
    masks = lsf.pruning_masks(model)
    layers = (model[0], model[2])
    kept = [(layer.log_sigma2[mask], layer.weight[mask]) for layer, mask in zip(layers, masks.values(), strict=True)]
    function = lsf.ops.kl_log_uniform if prior == "log_uniform" else lsf.ops.kl_ard
    wanted = function([s for s, _ in kept], weight=[w for _, w in kept])
    torch.testing.assert_close(lsf.kl_divergence(lsf.prune(model), prior), wanted)


def test_pruning_survives_copies_and_state_dicts():
    model, x = lsf.prune(net()), torch.randn(5, 6)
    wanted = draws(model, x)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone[0].parametrizations.weight.original.add_(1.0)
    masks = lsf.pruning_masks(model)
    assert (clone[0].weight[~masks["0.weight"]] == 0).all() and torch.equal(draws(model, x), wanted)
    fresh = lsf.prune(lsf.to_lrt(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))))  # prunes nothing yet
    assert lsf.sparsity_report(fresh).pruned == 0
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(draws(fresh, x), wanted) and lsf.sparsity_report(fresh) == lsf.sparsity_report(model)
    assert "0.parametrizations.weight.0.kept" in model.state_dict()


def test_baking_gives_plain_parameters_with_zeros(tmp_path):
    model, x = net(), torch.randn(5, 6)
    weight, names = model[0].weight, list(model.state_dict())
    lsf.prune(model)
    wanted, report = draws(model, x), lsf.sparsity_report(model)
    assert lsf.bake_pruning(model) is model
    assert type(model[0]) is lsf.nn.LRTLinear and model[0].weight is weight
    assert sorted(model.state_dict()) == sorted(names)
    assert torch.equal(draws(model, x), wanted) and lsf.sparsity_report(model) == report
    torch.save(model, tmp_path / "model.pt")
    assert lsf.bake_pruning(nn.ReLU()) is not None  # nothing to do


def test_pruning_again_only_adds():
    model = net()
    lsf.prune(model, 6.0)
    first = lsf.pruning_masks(model, 6.0)
    lsf.prune(model, 0.0)
    second = lsf.pruning_masks(model, 100.0)  # what is zero already
    assert all((second[name] <= first[name]).all() for name in first)
    assert 0 < sum(int(m.sum()) for m in second.values()) < sum(int(m.sum()) for m in first.values())
    lsf.prune(model, 100.0)
    assert all(torch.equal(mask, second[name]) for name, mask in lsf.pruning_masks(model, 100.0).items())
    assert len(model[0].parametrizations.weight) == 1


def test_tied_layers_count_once_and_are_pruned_twice():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    lsf.to_lrt(model, "weight", init_log_alpha=10.0)
    with torch.no_grad():
        model[0].log_alpha[0] = -5
    report = lsf.sparsity_report(model)
    assert list(report.layers) == ["0.weight"] and report.pruned == 30
    lsf.prune(model)
    assert all((layer.weight[1:] == 0).all() and (layer.weight[0] != 0).all() for layer in model)
    assert model[0].parametrizations.weight.original is model[1].parametrizations.weight.original
    kl = lsf.kl_divergence(model)
    torch.testing.assert_close(kl, lsf.ops.kl_log_uniform(model[0].log_alpha))


def test_variance_layers_stay_whole():
    model = net()
    model.append(lsf.nn.LRTLinear(4, 3, parameterization="variance"))
    scale = model[3].log_sigma2.detach().clone()
    report = lsf.sparsity_report(model)
    assert report.left == {"3.weight": "a variance layer has no means"}
    assert "3.weight: left, a variance layer has no means" in str(report)
    assert list(lsf.pruning_masks(model)) == ["0.weight", "2.weight"]
    lsf.prune(model)
    assert torch.equal(model[3].log_sigma2, scale) and model[3].weight is None
    alone = lsf.sparsity_report(model[3])
    assert (alone.layers, alone.weights, alone.fraction, alone.compression) == ({}, 0, 0.0, math.inf)


@pytest.mark.parametrize("dtype", [BF16, F64])
@pytest.mark.parametrize("parameterization", ["weight", "additive"])
def test_pruning_other_dtypes(parameterization, dtype):
    model = net(parameterization, dtype)
    masks = lsf.pruning_masks(model)
    lsf.prune(model)
    assert model[0].weight.dtype == dtype and model[0].scale.dtype == (F64 if dtype == F64 else torch.float32)
    assert (model[0].weight[~masks["0.weight"]] == 0).all()
    assert torch.isfinite(draws(model, torch.randn(5, 6, dtype=dtype))).all()
    lsf.kl_divergence(model).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model[0].posteriors()[0].scale.requires_grad
    model.float()
    assert model[0].weight.dtype == torch.float32 and lsf.sparsity_report(model).pruned > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_brings_no_noise_back(optimizer):
    """log_sigma2 of -1000 decays towards 0 like any parameter; what the layer sees of it does not."""
    model = lsf.prune(net())
    kept, step = lsf.pruning_masks(model)["0.weight"], optimizer(model.parameters(), lr=0.5, weight_decay=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(60):
        step.step()
    assert (~kept).any() and (model[0].log_sigma2[~kept] == NO_NOISE).all()
    drawn = [lsf.sample_weights(model, seed).weights["0.weight"][~kept] for seed in (1, 2)]
    assert (drawn[0] == 0).all() and (drawn[1] == 0).all()


def test_half_precision_keeps_pruned_scales_wide():
    model = lsf.prune(net())
    model.bfloat16()
    assert model[0].weight.dtype == BF16 and model[0].log_sigma2.dtype == torch.float32


def test_pruned_models_compile():
    model, x = lsf.prune(net()), torch.randn(5, 6)
    model.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(
        lsf.predict(compiled, x, num_samples=2, seed=1), lsf.predict(model, x, "ensemble", 2, seed=1)
    )


def test_prune_leaves_a_model_with_a_parametrized_weight_as_it_was():
    model = net()
    nn.utils.parametrizations.weight_norm(model[2])
    scale = model[0].log_sigma2.detach().clone()
    with pytest.raises(ValueError, match="prune: 2.weight must be a plain parameter, but it is parametrized"):
        lsf.prune(model)
    assert type(model[0]) is lsf.nn.LRTLinear and torch.equal(model[0].log_sigma2, scale)


def test_frozen_weights_are_pruned_too():
    model = net().requires_grad_(False)
    pruned = lsf.sparsity_report(model).pruned
    assert lsf.sparsity_report(lsf.prune(model)).pruned == pruned > 0
    assert not any(p.requires_grad for p in model.parameters())
    assert (model[0].log_sigma2[model[0].weight == 0] == NO_NOISE).all()


def test_empty_layers():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(lsf.nn.LRTLinear(3, 0), lsf.nn.LRTLinear(0, 2))
    report = lsf.sparsity_report(lsf.prune(model))
    assert report.weights == 0 and report.fraction == 0 and report.layers["1.weight"].dead_outputs == 2


def nan_layer(name):
    layer = lsf.nn.LRTLinear(3, 4)
    with torch.no_grad():
        getattr(layer, name)[0, 0] = math.nan
    return layer


@pytest.mark.parametrize("function", [lsf.sparsity_report, lsf.pruning_masks, lsf.prune])
@pytest.mark.parametrize(
    "model, threshold, error, message",
    [
        (len, 3.0, TypeError, "model must be a torch.nn.Module, got builtin"),
        (nn.Linear(3, 4), 3.0, ValueError, "Linear has no stochastic layers"),
        (lsf.nn.LRTLinear(3, 4), "3", TypeError, "threshold must be a number, got str"),
        (lsf.nn.LRTLinear(3, 4), math.nan, ValueError, "threshold must be finite, got nan"),
        (nan_layer("log_sigma2"), 3.0, ValueError, "weight must have numbers .* got NaN"),
        (nan_layer("weight"), 3.0, ValueError, "weight must have numbers .* got NaN"),
    ],
)
def test_errors(function, model, threshold, error, message):
    with pytest.raises(error, match=f"{function.__name__}: .*{message}|{function.__name__}: {message}"):
        function(model, threshold)


@pytest.mark.parametrize("function", [lsf.pruning_masks, lsf.prune])
def test_variance_layers_alone_are_refused(function):
    with pytest.raises(ValueError, match=f"{function.__name__}: LRTLinear has only 'variance' layers"):
        function(lsf.nn.LRTLinear(3, 4, parameterization="variance"))


def test_bake_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="bake_pruning: model must be a torch.nn.Module"):
        lsf.bake_pruning(3)
