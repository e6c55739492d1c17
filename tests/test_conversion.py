import copy
import logging
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import losssurf_fast as lsf


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnName(nn.Linear):
    pass


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("parameterization", ["layer", "neuron", "weight", "additive", "variance"])
def test_everything_is_kept(parameterization):
    model = mlp().to(torch.bfloat16).eval()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    before = dict(model.named_parameters())
    modules = list(model)
    assert lsf.to_lrt(model, parameterization) is model
    assert list(model) == modules
    for layer in (model[0], model[2]):
        assert isinstance(layer, lsf.nn.LRTLinear)
        assert layer.parameterization == parameterization
        assert layer.scale.dtype == torch.float32
        assert not layer.training
    after = dict(model.named_parameters())
    gone = {"0.weight", "2.weight"} if parameterization == "variance" else set()
    assert before.keys() - after.keys() == gone
    assert all(after[name] is p for name, p in before.items() if name not in gone)
    assert model[0].scale.requires_grad
    assert not model[2].scale.requires_grad
    model(torch.randn(2, 6, dtype=torch.bfloat16))
    assert calls == ["hook"]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(lsf.to_lrt(mlp(), parameterization)))):
        assert str(lsf.conversion_report(twin)).startswith("converted 2 layers, left 0")


def test_variance_starts_from_the_squared_weights():
    linear = nn.Linear(6, 4)
    square = linear.weight.detach().square()
    torch.testing.assert_close(lsf.to_lrt(linear, "variance").log_sigma2.exp(), square)


def test_bare_layer():
    linear = nn.Linear(6, 4)
    weight = linear.weight
    layer = lsf.to_lrt(linear)
    assert isinstance(layer, lsf.nn.LRTLinear)
    assert layer.weight is weight
    assert lsf.conversion_report(layer).converted == {"": "additive"}


def test_meta_model():
    with torch.device("meta"):
        model = mlp()
    lsf.to_lrt(model, "additive").to_empty(device="cpu")
    model[0].reset_parameters()
    assert torch.isfinite(model[0].log_sigma2).all()


@pytest.mark.parametrize("calls", [[None], ["0", "1"]])
def test_tied_weights_share_their_noise(calls):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    for include in calls:
        lsf.to_lrt(model, "additive", include=include)
    assert model[1].weight is model[0].weight
    assert model[1].log_sigma2 is model[0].log_sigma2
    torch.testing.assert_close(lsf.kl_divergence(model), model[0].kl())


def test_shared_module_is_converted_everywhere():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    lsf.to_lrt(model)
    assert model[0] is model[2]
    assert lsf.conversion_report(model).converted == {"0": "additive"}


def test_report_of_what_was_left(caplog):
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "named": OwnName(4, 4),
            "complex": nn.Linear(4, 4, dtype=torch.complex64),
            "own": OwnForward(4, 4),
            "lazy": nn.LazyLinear(4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "pruned": nn.utils.prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5),
            "conv": nn.Conv2d(3, 3, 3),
            "deconv": nn.ConvTranspose2d(3, 3, 3),
            "embedding": nn.Embedding(3, 3),
            "bag": nn.EmbeddingBag(3, 3),
            "bilinear": nn.Bilinear(3, 3, 3),
            "lazy_norm": nn.LazyBatchNorm1d(),
            "recurrent": nn.GRU(4, 4),
            "quantised": torch.ao.nn.quantized.Linear(4, 4),
            "skipped": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
        }
    )
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    model["patched"] = patched
    with caplog.at_level(logging.INFO, logger="losssurf_fast"):
        lsf.to_lrt(model, "layer", exclude="skipped")
    report = lsf.conversion_report(model)
    assert report.converted == {"plain": "layer", "conv": "layer", "deconv": "layer"}
    left = report.left
    assert left.pop("skipped") == "not selected by include and exclude"
    assert left.pop("own") == "OwnForward has a forward of its own"
    assert left.pop("named") == "OwnName is a subclass of nn.Linear, whose class and methods would be lost"
    assert left.pop("complex") == "Linear: there is no noise in torch.complex64"
    assert left.pop("patched") == "Linear has a forward of its own"
    assert left.pop("embedding").startswith("an nn.Embedding is converted where include matches it")
    assert left.pop("bag") == "EmbeddingBag: there is no stochastic layer for it"
    assert left.pop("bilinear") == "Bilinear: there is no stochastic layer for it"
    assert left.pop("quantised") == "Linear: quantised, and there is no stochastic layer for it"
    assert left.pop("lazy") == "LazyLinear: its sizes are unknown until a first forward"
    assert left.pop("normed").endswith("its weight is computed (parametrized, pruned or normalised)")
    assert left.pop("pruned").endswith("its weight is computed (parametrized, pruned or normalised)")
    assert left.pop("recurrent") == "GRU: there is no stochastic layer for it"
    assert all(name.startswith("normed.") for name in left)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "own: OwnForward has a forward of its own" in warnings[0]
    assert "skipped" not in warnings[0] and "embedding:" not in warnings[0]
    assert type(model["own"]) is OwnForward
    assert type(model["named"]) is OwnName


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: nn.utils.parametrizations.weight_norm(linear, "bias", dim=None),
        lambda linear: nn.utils.prune.random_unstructured(linear, "bias", 0.5),
    ],
)
def test_computed_bias_is_left(change):
    model, x = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = model.eval()(x)
    lsf.to_lrt(model)
    assert lsf.conversion_report(model).converted == {"1": "additive"}
    reason = lsf.conversion_report(model).left["0"]
    assert reason.endswith("Linear: its bias is computed (parametrized, pruned or normalised)")
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("a", TypeError, "to_lrt: init_log_alpha must be a real number, got str"),
        (True, TypeError, "to_lrt: init_log_alpha must be a real number, got bool"),
        (1j, TypeError, "to_lrt: init_log_alpha must be a real number, got complex"),
        (float("nan"), ValueError, "to_lrt: init_log_alpha must be a finite float32 number, got nan"),
        (float("-inf"), ValueError, "to_lrt: init_log_alpha must be a finite float32 number, got -inf"),
        (1e39, ValueError, "to_lrt: init_log_alpha must be a finite float32 number, got 1e"),
    ],
)
@pytest.mark.parametrize("parameterization", ["layer", "additive"])
def test_bad_initial_value_leaves_the_model_alone(parameterization, value, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        lsf.to_lrt(model, parameterization, init_log_alpha=value)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]


def test_failure_on_the_way_leaves_the_model_alone(monkeypatch):
    starts = iter([torch.zeros(1)])  # the second layer finds none
    monkeypatch.setattr("losssurf_fast.conversion.stochastic.initial_scale", lambda *arguments: next(starts))
    model = mlp()
    with pytest.raises(StopIteration):
        lsf.to_lrt(model, "layer")
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    with pytest.raises(ValueError, match="to_lrt was not called"):
        lsf.conversion_report(model)


def test_patterns():
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(4, 2)})
    lsf.to_lrt(model, "variance", include="body.*", exclude=["body.2"])
    assert lsf.conversion_report(model).converted == {"body.0": "variance"}
    lsf.to_lrt(model, "layer", include="head")
    report = lsf.conversion_report(model)
    assert report.converted == {"body.0": "variance", "head": "layer"}
    assert report.left == {"body.2": "not selected by include and exclude"}
    lsf.to_lrt(model, "neuron")
    assert lsf.conversion_report(model).converted == {"body.0": "variance", "head": "layer", "body.2": "neuron"}


def test_report_through_a_wrapper():
    model = lsf.to_lrt(mlp())
    assert lsf.conversion_report(torch.compile(model)) is lsf.conversion_report(model)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lsf.to_lrt(mlp(), "fancy"), ValueError, "to_lrt: parameterization must be one of"),
        (lambda: lsf.to_lrt(mlp(), "layer", init_log_sigma2=1.0), ValueError, "to_lrt: init_log_sigma2 is for"),
        (lambda: lsf.to_lrt(mlp(), include=3), TypeError, "to_lrt: include must be a pattern or several, got int"),
        (
            lambda: lsf.conversion_report(None),
            TypeError,
            "conversion_report: model must be a torch.nn.Module, got None",
        ),
        (lambda: lsf.to_lrt([nn.Linear(2, 2)]), TypeError, "to_lrt: model must be a torch.nn.Module, got list"),
        (
            lambda: lsf.to_lrt(mlp(), include="fc*"),
            ValueError,
            r"pattern 'fc\*' matches no layer; the model has 0, 2",
        ),
        (lambda: lsf.to_lrt(mlp(), exclude=[nn.Linear]), TypeError, "exclude must hold names or patterns, got type"),
        (lambda: lsf.to_lrt(nn.Sequential(nn.Embedding(1, 1))), ValueError, "has no layer to convert"),
        (lambda: lsf.to_lrt(lsf.to_lrt(mlp())), ValueError, "already an LRTLinear"),
        (lambda: lsf.conversion_report(mlp()), ValueError, "to_lrt was not called on this Sequential"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- modules that read their children's weights past forward ---------------------------------------------------------


def encoder(layers=2):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


@pytest.mark.parametrize("parameterization", ["layer", "additive", "variance"])
def test_transformer_encoder_draws_noise(parameterization):
    model, x = encoder(), torch.randn(3, 5, 8)
    lsf.to_lrt(model, parameterization, init_log_sigma2=None)
    report = lsf.conversion_report(model)
    names = ("linear1", "linear2", "self_attn", "self_attn.out_proj")
    assert set(report.converted) == {f"layers.{i}.{name}" for i in (0, 1) for name in names}
    assert report.left == {}
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    model.eval()
    with torch.no_grad(), lsf.prediction(model, "stochastic"):
        for arguments in ({}, {"src_key_padding_mask": padding}):
            assert not torch.equal(model(x, **arguments), model(x, **arguments))
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def test_transformer_encoder_deterministic_is_the_plain_one():
    model, x = encoder().eval(), torch.randn(3, 5, 8)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(lsf.to_lrt(model)(x), expected)


def test_attention_that_stays_keeps_its_output_plain():
    attention = nn.MultiheadAttention(8, 2)
    attention.forward = attention.forward
    model = nn.ModuleDict({"attention": attention, "head": nn.Linear(8, 2)})
    lsf.to_lrt(model)
    assert not isinstance(attention.out_proj, lsf.nn.LRTLinear)
    left = lsf.conversion_report(model).left
    assert left["attention"] == "MultiheadAttention has a forward of its own"
    assert "without calling it" in left["attention.out_proj"]
    with pytest.raises(ValueError, match="reads its weight without calling it"):
        lsf.to_lrt(nn.MultiheadAttention(8, 2), include="out_proj")


def test_noise_that_would_be_lost_is_an_error():
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = lsf.nn.LRTLinear(8, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.linear1 = lsf.nn.LRTLinear(8, 16)
    fast = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    fast.self_attn = lsf.nn.LRTMultiheadAttention(8, 2, batch_first=True)
    for model, message in ((attention, "out_proj is a stochastic layer"), (layer, "fast path"), (fast, "fast path")):
        for call in (lsf.kl_divergence, lambda m: lsf.predict(m, torch.zeros(1, 1, 8))):
            with pytest.raises(RuntimeError, match=message):
                call(model)
