"""Conversion of layers other than nn.Linear, of weights they share, and of whole transformers."""

import copy
import pickle

import pytest
import torch
from conversion_models import GPT, INDEX, LAYERS, call
from torch import nn

import losssurf_fast as lsf

ALL = ("layer", "neuron", "weight", "additive", "variance")
parameterizations = pytest.mark.parametrize("parameterization", ALL)


@pytest.fixture(params=LAYERS)
def case(request):
    layer, x = LAYERS[request.param]
    return copy.deepcopy(layer), x


@parameterizations
def test_everything_is_kept(case, parameterization):
    layer, x = case
    layer.eval()
    expected, plain = call(layer, x), type(layer)
    next(layer.parameters()).requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    before = dict(layer.named_parameters())
    assert lsf.to_lrt(layer, parameterization, include="*") is layer
    assert isinstance(layer, lsf.nn.LRTLayer) and isinstance(layer, plain) and not layer.training
    after = dict(layer.named_parameters())
    for name, parameter in before.items():
        assert after.get(name) is parameter or (parameterization == "variance" and name.endswith("weight"))
    assert not layer.posteriors()[0].scale.requires_grad
    if parameterization != "variance":
        torch.testing.assert_close(call(layer, x), expected)
    assert call(layer, x).shape == expected.shape and calls
    with lsf.prediction(layer, "stochastic"):
        assert not torch.equal(call(layer, x), call(layer, x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(lsf.to_lrt(plain_copy(plain), include="*")))):
        assert set(lsf.conversion_report(twin).converted) <= {"", "out_proj"}


def plain_copy(kind):
    return copy.deepcopy(next(layer for layer, _ in LAYERS.values() if type(layer) is kind))


@parameterizations
def test_converted_equals_constructed(case, parameterization):
    """The layer that to_lrt makes has the noise of one that is constructed with the same weights."""
    layer, x = case
    arguments = {
        name: getattr(layer, name)
        for name in (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups",
            "padding_mode", "num_embeddings", "embedding_dim", "padding_idx", "embed_dim", "num_heads",
        )
        if hasattr(layer, name)
    }  # fmt: skip
    if "padding" in arguments and type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        del arguments["output_padding"]
    if "out_channels" in arguments:
        arguments["bias"] = layer.bias is not None
    if "embed_dim" in arguments:
        arguments["add_bias_kv"] = True
    made = getattr(lsf.nn, f"LRT{type(layer).__name__}")(**arguments, parameterization=parameterization)
    lsf.to_lrt(layer, parameterization, include="*")
    assert repr(made) == repr(layer)
    assert made.load_state_dict(layer.state_dict()).missing_keys == []
    run = lambda one: one(x, x, x, seed=3)[0] if "embed_dim" in arguments else one(x, seed=3)
    assert torch.equal(run(made), run(layer))


def test_half_precision_and_meta_models():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 1, 3)).to(torch.bfloat16)
    lsf.to_lrt(model, "layer")
    assert model[0].scale.dtype == torch.float32
    assert model(torch.randn(1, 1, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.device("meta"):
        model = GPT()
    lsf.to_lrt(model, "additive").to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_plain_state_dict_loads():
    build = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 3))
    plain, model = build().eval(), lsf.to_lrt(build(), "layer").eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["0.log_alpha", "3.log_alpha"], [])
    x = torch.randn(2, 1, 5, 5)
    torch.testing.assert_close(model(x), plain(x))


# ---- embeddings and shared weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", ["layer", "weight", "additive", "variance"])
def test_a_language_model_converts_in_one_line(parameterization):
    model = GPT()
    expected = model.eval()(INDEX)
    lsf.to_lrt(model, parameterization)
    report = lsf.conversion_report(model)
    assert set(report.left) == {"wpe"}
    assert {"wte", "head"} <= set(report.converted)
    assert model.head.weight is model.wte.weight
    assert model.head.scale is model.wte.scale
    with torch.no_grad():
        if parameterization != "variance":
            torch.testing.assert_close(model(INDEX), expected)
        with lsf.prediction(model, "stochastic"):
            assert not torch.equal(model(INDEX), model(INDEX))
    loss = lsf.ELBOLoss(model.train(), 100)(model(INDEX).flatten(0, 1), INDEX.flatten())
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    shared = sum(p.numel() for p in (model.wte.scale,)) if parameterization != "layer" else 1
    scales = {id(p): p.numel() for n, p in model.named_parameters() if "log_" in n}
    assert scales[id(model.wte.scale)] == shared


def test_a_language_model_with_neuron_alphas_keeps_its_embedding_plain():
    model = lsf.to_lrt(GPT(), "neuron")
    assert tuple(model.head.log_alpha.shape) == (11,)
    assert "another dimension" in lsf.conversion_report(model).left["wte"]
    assert model.head.weight is model.wte.weight


def test_embeddings_are_converted_where_they_are_named():
    model = lsf.to_lrt(GPT(tied=False))
    assert set(lsf.conversion_report(model).left) == {"wte", "wpe"}
    lsf.to_lrt(model, include=["wpe"])
    assert isinstance(model.wpe, lsf.nn.LRTEmbedding) and not isinstance(model.wte, lsf.nn.LRTEmbedding)
    whole = lsf.to_lrt(GPT(), include="*")
    assert lsf.conversion_report(whole).left == {}
    assert isinstance(whole.wpe, lsf.nn.LRTEmbedding)


def test_excluded_embedding_stays():
    model = lsf.to_lrt(GPT(), "layer", exclude="wte")
    assert type(model.wte) is nn.Embedding and model.wte.weight is model.head.weight
    with pytest.raises(ValueError, match="head: left, it shares its weight with wte, which stays and needs it"):
        lsf.to_lrt(
            nn.ModuleDict({n: m for n, m in GPT().named_children() if n in ("wte", "head")}), "variance", exclude="wte"
        )


def test_a_weight_has_one_noise():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    lsf.to_lrt(model, "layer", include="0")
    with pytest.raises(ValueError, match="it shares its weight with 0, which has other noise already"):
        lsf.to_lrt(model, "additive", include="1")
    lsf.to_lrt(model, "layer", include="1")
    assert model[0].log_alpha is model[1].log_alpha
    with pytest.raises(ValueError, match="shares its weight with 1, which stays"):
        tied = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        tied[1].weight = tied[0].weight
        lsf.to_lrt(tied, "variance", include="0")


def test_shared_bias_is_no_shared_weight():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].bias = model[0].bias
    lsf.to_lrt(model, "variance", include="0")
    assert model[0].bias is model[1].bias


def test_transposed_convolution_that_shares_a_weight():
    for parameterization in ("layer", "neuron"):
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 3, 3))
        model[1].weight = model[0].weight
        lsf.to_lrt(model, parameterization)
        assert isinstance(model[1], lsf.nn.LRTConvTranspose2d) == (parameterization == "layer")
        lsf.kl_divergence(model).backward()


def test_max_norm_has_no_variance():
    with pytest.raises(ValueError, match="max_norm has no meaning"):
        lsf.to_lrt(nn.Embedding(3, 3, max_norm=1.0), "variance", include="*")
    lsf.to_lrt(nn.Embedding(3, 3, max_norm=1.0), include="*")


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return -super().forward(x)


class OwnAttention(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OwnConv(1, 1, 1), "OwnConv has a forward of its own"),
        (OwnAttention(4, 2), "OwnAttention is a subclass of nn.MultiheadAttention"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)), "its weight is computed"),
        (nn.LazyConv2d(1, 1), "LazyConv2d: its sizes are unknown until a first forward"),
        (nn.Conv2d(1, 1, 1, dtype=torch.complex64), "Conv2d: there is no noise in torch.complex64"),
        (nn.LSTM(3, 3), "LSTM: there is no stochastic layer for it"),
    ],
)
def test_what_cannot_be_converted_is_left_with_the_reason(layer, reason):
    model = nn.ModuleDict({"other": layer, "linear": nn.Linear(2, 2)})
    lsf.to_lrt(model)
    assert reason in lsf.conversion_report(model).left["other"]
    assert not isinstance(model["other"], lsf.nn.LRTLayer)


# ---- transformers ----------------------------------------------------------------------------------------------------


@parameterizations
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_converts_whole(parameterization, norm_first):
    model = nn.Transformer(8, 2, 1, 2, 16, batch_first=True, norm_first=norm_first).eval()
    source, target = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, 3:] = True
    arguments = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(3), "tgt_is_causal": True}
    with torch.no_grad():
        expected = model(source, target, **arguments)
        lsf.to_lrt(model, parameterization)
        report = lsf.conversion_report(model)
        assert report.left == {}
        assert len(report.converted) == (4 + 2 * 6)
        if parameterization != "variance":
            torch.testing.assert_close(model(source, target, **arguments), expected, atol=1e-5, rtol=1e-5)
        with lsf.prediction(model, "stochastic"):
            for options in (arguments, {"src_key_padding_mask": padding}):
                assert not torch.equal(model(source, target, **options), model(source, target, **options))
    lsf.kl_divergence(model, "normal").backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "log_" in n)


def test_attention_alone_turns_the_fast_path_off():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    lsf.to_lrt(layer, include="self_attn*")
    x = torch.randn(2, 3, 8)
    with torch.no_grad(), lsf.prediction(layer, "stochastic"):
        assert not torch.equal(layer(x), layer(x))


def test_compiled_language_model():
    torch._dynamo.reset()
    model = lsf.to_lrt(GPT())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    first = compiled(INDEX)
    assert not torch.equal(compiled(INDEX), first)
    first.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "log_sigma2" in n)
    with lsf.prediction(model, "deterministic"):
        torch.testing.assert_close(compiled(INDEX), model(INDEX))
