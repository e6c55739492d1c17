"""The example runs through its own main(), tiny; nothing here reads the network."""

import importlib
import json
import socket
import sys

import pytest
import torch

import losssurf_fast as lsf
from benchmarks.eager import EagerLayer, eager_kl, with_eager_layers
from benchmarks.timing import Step
from examples.gpt import __main__ as gpt
from examples.gpt.corpus import Corpus, documentation
from examples.gpt.model import GPT
from examples.gpt.training import kl_weight, objectives, stochastic

TINY = ["--layers", "1", "--width", "32", "--context", "16", "--batch", "4", "--rounds", "1", "--device", "cpu"]


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the example opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
def test_gpt_trains_and_reports(parameterization, tmp_path, capsys, offline):
    out = tmp_path / "report.json"
    options = ["--steps", "25", "--no-compile", "--parameterization", parameterization, "--out", str(out)]
    assert gpt.main([*TINY, *options]) == 0
    report = json.loads(out.read_text())
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    assert 5 < before[0] < 7  # chance is log(256) = 5.5
    assert after[0] < before[0] - 0.3 and after[1] < before[1] - 0.3
    assert len(report["losses"]) == 25 and all(torch.tensor(report["losses"]).isfinite())
    costs = report["eager"]
    assert costs.keys() == {"plain", "eager", "ours"} and all(cost["step_ms"] > 0 for cost in costs.values())
    assert costs["plain"]["saved_mib"] < costs["ours"]["saved_mib"] < costs["eager"]["saved_mib"]
    assert all(cost["peak_mib"] > cost["saved_mib"] for cost in costs.values())
    assert report["compiled"] is None and report["sample"].startswith("The layer ")
    assert "not compiled: not asked for" in capsys.readouterr().out


def test_gpt_converts_whole_but_for_what_shares_the_embedding():
    model = stochastic(GPT(2, 32, 8), "additive")
    report = lsf.conversion_report(model)
    layers = ("attention.qkv", "attention.proj", "expand", "reduce")
    assert set(report.converted) == {f"blocks.{i}.{layer}" for i in range(2) for layer in layers}
    assert set(report.left) == {"head", "embedding", "positions"}
    assert model.head.weight is model.embedding.weight


def step_inputs(batch=4, time=64):
    tokens, targets = torch.randint(256, (2, batch, time))
    return tokens, targets, kl_weight(1.0, torch.device("cpu"))


def test_gpt_step_keeps_at_most_three_fifths_of_the_plain_formulas_memory():
    plain, ours = GPT(2, 64, 64), stochastic(GPT(2, 64, 64), "additive")
    inputs = step_inputs()
    saved = {name: Step(step, inputs, "full").saved_mib() for name, step in objectives(plain, ours, 1000).items()}
    assert saved["plain"] < saved["ours"] <= 0.6 * saved["eager"]


def test_gpt_objective_is_that_of_the_plain_formula_without_noise():
    model = GPT(1, 32, 16)
    ours = lsf.to_lrt(GPT(1, 32, 16), include="blocks.*", init_log_sigma2=-40.0)
    ours.load_state_dict(model.state_dict(), strict=False)
    tokens, targets, _ = step_inputs(time=16)
    steps = objectives(model, ours, 10)
    losses = {name: step(tokens, targets, torch.tensor(0.0)) for name, step in steps.items()}
    torch.testing.assert_close(losses["ours"], losses["plain"], atol=2e-2, rtol=0)
    torch.testing.assert_close(losses["eager"], losses["plain"], atol=2e-2, rtol=0)


def test_gpt_objective_compiles_to_one_graph_in_bf16():
    ours = stochastic(GPT(1, 32, 16), "additive")
    step = objectives(GPT(1, 32, 16), ours, 1000)["ours"]
    inputs = step_inputs(time=16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for run in (step, compiled):
        torch.manual_seed(3)
        loss = run(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(ours.parameters()))))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, atol=2e-3, rtol=2e-2)


def test_documentation_is_read_from_the_checkout(tmp_path):
    text = documentation()
    assert len(text) > 50_000 and b"local reparameterization" in text
    assert documentation(tmp_path) == b""


def test_windows_are_shifted_by_one_byte():
    corpus = Corpus(bytes(range(200)), 8, torch.device("cpu"))
    inputs, targets = corpus.windows(corpus.held_out, 5, torch.Generator().manual_seed(0))
    assert inputs.shape == (5, 8) and torch.equal(targets, inputs + 1)
    assert inputs.min() >= len(corpus.train)


def test_bad_input():
    with pytest.raises(ValueError, match="Corpus: a context of 64 bytes needs at least 1300 bytes of text, got 0"):
        Corpus(b"", 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="GPT: width must be a multiple of 32, got 33"):
        GPT(1, 33, 8)
    with pytest.raises(NotImplementedError, match="EagerLayer: layer must be additive or variance, got 'neuron'"):
        EagerLayer(lsf.nn.LRTLinear(3, 2, parameterization="neuron"))
    with pytest.raises(NotImplementedError, match="LRTLinear or LRTConv2d with zeros around"):
        EagerLayer(lsf.nn.LRTConv2d(1, 2, 3, padding=1, padding_mode="circular"))


def test_gpt_without_compile_needs_nothing_private_of_torch(monkeypatch):
    for name in ("cpp_builder", "exc"):
        monkeypatch.setitem(sys.modules, f"torch._inductor.{name}", None)  # importing it fails
    importlib.reload(gpt)
    assert gpt.why_not_compiled(gpt.parse(["--no-compile"])) == "not asked for"


@pytest.mark.parametrize(
    "options,message",
    [
        (["--width", "40"], "--width must be a multiple of 32, got 40"),
        (["--steps", "0"], "must be a positive whole number, got '0'"),
        (["--device", "tpu"], "must be cpu or cuda, got 'tpu'"),
        (["--learning-rate", "nan"], "--learning-rate must be positive, got nan"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit):
        gpt.parse(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("parameterization", ["additive", "variance"])
def test_eager_layers_draw_what_ours_draw(parameterization):
    """Mean and variance of many draws of the plain formula are those of our layers."""
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.nn.Flatten())
    ours = lsf.to_lrt(model, parameterization, init_log_sigma2=-2.0)
    eager = with_eager_layers(ours)
    x = torch.randn(1, 2, 5, 5)
    with torch.no_grad():
        a, b = (net(x.expand(4000, -1, -1, -1)) for net in (ours, eager))
    error = (a.var(0) + b.var(0)).div(4000).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 6 * error).all()
    torch.testing.assert_close(a.std(0), b.std(0), rtol=0.1, atol=0)
    kl = lsf.kl_divergence(ours, exact=False)
    torch.testing.assert_close(torch.as_tensor(eager_kl(eager)), kl, rtol=1e-3, atol=1e-3)
