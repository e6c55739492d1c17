import pytest
import torch
from torch import nn

import losssurf_fast as lsf


def net(parameterization="additive", **initial):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
    return lsf.to_lrt(model, parameterization, **initial)


def modes(model):
    return [module.training for module in model.modules()]


def schemes(model):
    return [m.prediction_scheme for m in model.modules() if isinstance(m, lsf.nn.StochasticLayer)]


def test_prediction_is_independent_of_batch_norm():
    model, x = net().eval(), torch.randn(5, 6)
    mean = model[1].running_mean.clone()
    with lsf.prediction(model, "stochastic") as same:
        assert same is model
        assert not torch.equal(model(x), model(x))
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(model(x), model(x))
    model.train()
    layer = model[0]
    with lsf.prediction(layer, "deterministic"):
        assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), layer(x))


def test_prediction_nests_and_restores():
    model = net()
    assert schemes(model) == [None, None]
    with lsf.prediction(model, "stochastic"):
        with lsf.prediction(model[0], "deterministic"):
            assert schemes(model) == ["deterministic", "stochastic"]
        assert schemes(model) == ["stochastic", "stochastic"]
        with pytest.raises(KeyError), lsf.prediction(model, "deterministic"):
            raise KeyError
        assert schemes(model) == ["stochastic", "stochastic"]
    assert schemes(model) == [None, None]


def test_a_layer_of_ones_own_follows():
    class Noise(lsf.nn.StochasticLayer):
        def forward(self, x):
            return x + torch.randn_like(x) if self.draws_noise else x

    layer, x = Noise().eval(), torch.zeros(3)
    assert torch.equal(layer(x), x)
    with lsf.prediction(layer, "stochastic"):
        assert not torch.equal(layer(x), x)


def test_predict_deterministic():
    model, x = net(), torch.randn(5, 6)
    before = modes(model)
    probabilities = lsf.predict(model, x, "deterministic")
    assert modes(model) == before
    assert not probabilities.requires_grad
    model.eval()
    torch.testing.assert_close(probabilities, model(x).softmax(-1))


def test_predict_restores_mixed_modes():
    model = net().train()
    model[1].eval()
    before = modes(model)
    with pytest.raises(RuntimeError):
        lsf.predict(model, torch.randn(5, 7, dtype=torch.int64).to("meta"))
    lsf.predict(model, torch.randn(5, 6), num_samples=2)
    assert modes(model) == before
    assert schemes(model) == [None, None]


def test_predict_ensemble_is_the_mean_of_softmax():
    model, x = net(init_log_sigma2=-1.0), torch.randn(5, 6)
    ensemble = lsf.predict(model, x, num_samples=7, seed=3)
    model.eval()
    torch.manual_seed(3)
    with torch.no_grad(), lsf.prediction(model, "stochastic"):
        expected = torch.stack([model(x).softmax(-1) for _ in range(7)]).mean(0)
    torch.testing.assert_close(ensemble, expected)
    torch.testing.assert_close(ensemble.sum(-1), torch.ones(5))
    one = lsf.predict(model, x, "stochastic", seed=3)
    torch.testing.assert_close(one, lsf.predict(model, x, num_samples=1, seed=3))
    assert not torch.equal(one, lsf.predict(model, x, "stochastic", seed=4))


def test_predict_seed_leaves_generators_of_unused_gpus(monkeypatch):
    seeded = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded.append)
    lsf.predict(net(), torch.randn(5, 6), num_samples=3, seed=1)
    assert seeded == []


def test_predict_seed_leaves_the_generator():
    model, x = net(), torch.randn(5, 6)
    state = torch.random.get_rng_state()
    first = lsf.predict(model, x, num_samples=3, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, lsf.predict(model, x, num_samples=3, seed=1))
    assert not torch.equal(lsf.predict(model, x, num_samples=3), lsf.predict(model, x, num_samples=3))


def test_predict_stacked_draws_agree():
    model, x = net(init_log_sigma2=-1.0), torch.randn(5, 6)
    one = lsf.predict(model, x, num_samples=4000, draws_per_call=1000)
    other = lsf.predict(model, x, num_samples=4001, draws_per_call=500)
    torch.testing.assert_close(one, other, atol=0.02, rtol=0)  # 0.02 is more than 4 standard errors
    assert not torch.equal(one, other)


def test_predict_half_and_double():
    half = lsf.predict(net().bfloat16(), torch.randn(5, 6, dtype=torch.bfloat16), num_samples=3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(-1), torch.ones(5))
    assert lsf.predict(net().double(), torch.randn(5, 6).double(), num_samples=3).dtype == torch.float64


def test_predict_large_logits_stay_finite():
    model, x = lsf.to_lrt(nn.Linear(6, 4)), 1e4 * torch.randn(5, 6)
    assert torch.isfinite(lsf.predict(model, x, num_samples=5)).all()


def test_variance_network_guesses_deterministically():
    model = net("variance")
    probabilities = lsf.predict(model, torch.randn(50, 6), "deterministic")
    assert torch.equal(probabilities, probabilities[:1].expand(50, -1))


def test_predict_compiled_model():
    model, x = net(), torch.randn(5, 6)
    expected = lsf.predict(model, x, num_samples=2, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(lsf.predict(compiled, x, num_samples=2, seed=1), expected)


class TwoOutputs(nn.Sequential):
    def forward(self, x):
        return (super().forward(x),)


class Summed(nn.Sequential):
    def forward(self, x):
        return super().forward(x).sum(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lsf.prediction(net(), "ensemble").__enter__(), ValueError, "call lsf.predict"),
        (lambda: lsf.prediction(net(), "mean").__enter__(), ValueError, "prediction: scheme must be .* got 'mean'"),
        (lambda: lsf.prediction(nn.ReLU(), "stochastic").__enter__(), ValueError, "ReLU has no stochastic layers"),
        (lambda: lsf.prediction("net", "stochastic").__enter__(), TypeError, "prediction: model must be .* got str"),
        (lambda: lsf.predict(net(), torch.ones(1, 6), "mean"), ValueError, "predict: scheme must be one of"),
        (lambda: lsf.predict(net(), torch.ones(1, 6), num_samples=0), ValueError, "num_samples must be a positive int"),
        (
            lambda: lsf.predict(net(), torch.ones(1, 6), draws_per_call=1.5),
            ValueError,
            "draws_per_call must be a positive",
        ),
        (lambda: lsf.predict(net(), torch.ones(1, 6), seed=1.5), TypeError, "seed must be an int or None, got float"),
        (lambda: lsf.predict(net(), torch.ones(1, 6), seed=2**64), ValueError, "predict: seed must fit in 64 bits"),
        (lambda: lsf.predict(net(), [1.0], draws_per_call=2), TypeError, "draws_per_call=2 needs a tensor x, got list"),
        (lambda: lsf.predict(len, torch.ones(1, 6)), TypeError, "predict: model must be a torch.nn.Module"),
        (lambda: lsf.predict(nn.Linear(6, 4), torch.ones(1, 6)), ValueError, "Linear has no stochastic layers"),
        (
            lambda: lsf.predict(TwoOutputs(lsf.nn.LRTLinear(6, 4)), torch.ones(1, 6)),
            TypeError,
            "must return a tensor of logits, or one as .logits, got tuple",
        ),
        (
            lambda: lsf.predict(Summed(lsf.nn.LRTLinear(6, 4)), torch.ones(1, 6), draws_per_call=3),
            ValueError,
            r"draws_per_call=3 needs logits .* got \(4,\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
