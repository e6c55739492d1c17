"""One pass over a loader, against predictions that are kept."""

import pytest
import torch
from common import F64, CountReads
from distributed import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import losssurf_fast as lsf


def net(stochastic=True):
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 4)).double()
    return lsf.to_lrt(model, init_log_sigma2=-1.0) if stochastic else model


def batches(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 3, generator=g, dtype=F64), torch.randint(4, (n,), generator=g)) for n in sizes]


def measure(model, data, **options):
    return lsf.evaluate_uncertainty(model, data, **{"num_samples": 5, "seed": 3, "progress": False, **options})


RESULTS = ("accuracy", "nll", "brier", "ece", "predictive_entropy", "mutual_information")


def results(report):
    return {name: getattr(report, name) for name in RESULTS}


def by_hand(model, data, scheme="ensemble", num_samples=5, seed=3):
    """The same draws, kept."""
    metrics, modes = lsf.UncertaintyMetrics(), [m.training for m in model.modules()]
    torch.manual_seed(seed)
    model.eval()
    with torch.no_grad(), lsf.prediction(model, "deterministic" if scheme == "deterministic" else "stochastic"):
        for x, y in data:
            members = torch.stack([model(x) for _ in range(num_samples if scheme == "ensemble" else 1)])
            ensemble = lsf.OnlineEnsemble()
            ensemble.update(members, stacked=True)
            metrics.update(ensemble, y)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return results(metrics.compute(False))


@pytest.mark.parametrize("scheme", ["ensemble", "stochastic", "deterministic"])
def test_evaluate_uncertainty_is_that_of_the_draws(scheme):
    model, data = net(), batches(7, 5, 1)
    report = measure(model, data, scheme=scheme)
    assert results(report) == pytest.approx(by_hand(model, data, scheme), rel=1e-13)
    assert report.num_samples == 13
    assert (report.mutual_information > 0.01) == (scheme == "ensemble")
    assert all(m.training for m in model.modules())


def test_models_without_noise_are_evaluated_deterministically():
    model, data = net(stochastic=False), batches(7, 5)
    report = measure(model, data, scheme="deterministic")
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    model.eval()
    assert report.nll == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-13)
    assert report.mutual_information == 0
    with pytest.raises(ValueError, match="Sequential has no stochastic layers"):
        measure(model, data)


def test_data_loaders_dicts_and_outputs_with_logits():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, pixels):
            return {"logits": self.net(pixels)}

    data, model = batches(6, 6), Named()
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    wanted = results(measure(model.net, data, device="cpu"))
    assert results(measure(model, [{"pixels": x, "labels": y} for x, y in data])) == wanted
    loader = DataLoader(TensorDataset(x, y), batch_size=6)  # which draws from the generator of the noise
    wanted = results(measure(model.net, data, scheme="deterministic"))
    assert results(measure(model.net, loader, scheme="deterministic")) == wanted
    shuffled = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True)
    assert results(measure(model.net, shuffled)) == results(measure(model.net, shuffled))


def test_dense_outputs_in_the_order_of_cross_entropy():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = lsf.nn.LRTLinear(3, 4, init_log_sigma2=-1.0)

        def forward(self, x):  # [N, H, 3] -> [N, 4, H]
            return self.layer(x).movedim(-1, 1)

    model, (x, y) = Pixels(), (torch.randn(2, 5, 3), torch.randint(4, (2, 5)))
    y[0, 0] = 255
    report = measure(model, [(x, y)], class_dim=1, scheme="deterministic", ignore_index=255)
    wanted = nn.functional.cross_entropy(model.eval()(x), y, ignore_index=255)
    assert report.nll == pytest.approx(wanted.item(), rel=1e-6) and report.num_samples == 9


def test_seed_leaves_the_generator_and_its_lack_does_not():
    model, data, state = net(), batches(6, 6), torch.random.get_rng_state()
    first = results(measure(model, data))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert results(measure(model, data)) == first != results(measure(model, data, seed=4))
    assert results(measure(model, data, seed=None)) != results(measure(model, data, seed=None))


def test_nothing_is_read_before_the_end():
    with CountReads() as short:
        measure(net(), batches(6))
    with CountReads() as long:
        measure(net(), batches(6, 6, 6, 6))
    assert long.reads == short.reads


def test_progress_is_shown(capsys):
    measure(net(), batches(6, 6), progress=True)
    assert "evaluate_uncertainty" in capsys.readouterr().err
    measure(net(), batches(6, 6))
    assert capsys.readouterr().err == ""


def test_predictions_of_swag_are_measured():
    model, data = net(stochastic=False), batches(6, 6)
    swag = lsf.SWAG(model)
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        swag.collect_model(model)
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    probs, metrics = swag.predict(x, 4, seed=1, recalibrate=False), lsf.UncertaintyMetrics()
    metrics.update(probs.log(), y)
    assert metrics.compute().nll == pytest.approx(nn.functional.nll_loss(probs.log(), y).item(), rel=1e-12)


def test_a_failure_restores_the_model():
    model, state = net(), torch.random.get_rng_state()
    with pytest.raises(ValueError, match="lrt_linear: x must be"):
        measure(model, [(torch.zeros(5, 2, dtype=F64), torch.zeros(5, dtype=torch.int64))])
    assert all(m.training for m in model.modules()) and model[0].prediction_scheme is None
    assert torch.equal(torch.random.get_rng_state(), state)


def _ranks(rank):
    model, data = net(), batches(7, 5, 6)
    share = data[:1] if rank else data[1:]
    alone = measure(model, data, scheme="deterministic", process_group=False)
    assert results(measure(model, share, scheme="deterministic")) == pytest.approx(results(alone), rel=1e-13)
    assert results(measure(model, data if rank else [], scheme="deterministic")) == pytest.approx(results(alone))
    noisy = measure(model, share)  # rank 1 draws with seed 4
    parts = [by_hand(model, data[1:], seed=3), by_hand(model, data[:1], seed=4)]
    assert noisy.nll == pytest.approx((11 * parts[0]["nll"] + 7 * parts[1]["nll"]) / 18, rel=1e-13)
    assert noisy.num_samples == 18
    bad = [(1, 2, 3)] if rank else share
    with pytest.raises(ValueError if rank else RuntimeError, match="got 3 items" if rank else "1 other ranks failed"):
        measure(model, bad)
    with pytest.raises(ValueError, match="at least one sample"):
        measure(model, [])


def test_ranks_add_up():
    run_ranks(_ranks)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"model": len}, TypeError, "evaluate_uncertainty: model must be a torch.nn.Module, got builtin"),
        ({"data": 3}, TypeError, "evaluate_uncertainty: loader must be a loader of batches, got int"),
        ({"data": []}, ValueError, "at least one sample that is not ignored, got none"),
        ({"data": [torch.zeros(3)]}, TypeError, "evaluate_uncertainty: loader must yield .* got Tensor"),
        ({"data": [{"x": torch.zeros(3)}]}, ValueError, "a dict from loader must have one of the keys"),
        ({"scheme": "mean"}, ValueError, "evaluate_uncertainty: scheme must be one of .* got 'mean'"),
        ({"num_samples": 0}, ValueError, "evaluate_uncertainty: num_samples must be a positive int, got 0"),
        ({"seed": 1.5}, TypeError, "evaluate_uncertainty: seed must be an int or None, got float"),
        ({"num_bins": 0}, ValueError, "num_bins must be at least 1"),
        ({"class_dim": 2}, ValueError, r"class_dim must lie in \[-2, 2\), got 2"),
        ({"class_dim": "last"}, TypeError, "class_dim must be an int, got str"),
        ({"process_group": 3}, TypeError, "process_group must be a ProcessGroup"),
        ({"data": [(torch.zeros(5, 3, dtype=F64), torch.zeros(4, dtype=torch.int64))]}, ValueError, r"and \(4,\)"),
        ({"data": [(torch.zeros(5, 3, dtype=F64), torch.full((5,), 9))]}, ValueError, "got 5 others"),
    ],
)
def test_errors(options, error, message):
    options = dict(options)
    model, data = options.pop("model", None) or net(), options.pop("data", batches(5))
    with pytest.raises(error, match=message):
        measure(model, data, **options)
