import copy
import math

import pytest
import torch
from swag_models import Net, assert_same_state, state_of, walk
from torch import nn

import losssurf_fast as lsf


def test_swag_golden_values():
    """Weights 0 ... 4 with K = 20: mean 2, variance 2, deviations 0, .5, 1, 1.5, 2."""
    model = nn.Linear(1, 1, bias=False)
    swag = lsf.SWAG(model)
    for w in range(5):
        nn.init.constant_(model.weight, w)
        swag.collect_model(model)
    state = swag.state_dict()
    assert swag.n_models == 5 and state["base.weight_mean"].item() == 2 and state["base.weight_m2"].item() == 10
    assert state["base.weight_deviations"].flatten()[:6].tolist() == [0, 0.5, 1, 1.5, 2, 0]
    for block in (False, True):  # the peer's: 1.094 and .774, by a rank of 20 and a scale squared
        assert abs(math.exp(swag.logdet(block=block) / 2) - 1.392) < 1e-3
    assert abs(math.exp(swag.logdet(cov=False) / 2) - 1) < 1e-6


@pytest.mark.parametrize("block", [False, True])
def test_swag_sample_is_the_formula(block):
    model, held, scale = Net(), 3, 0.7
    swag = lsf.SWAG(model, max_num_models=held)
    walk(model, 5, swag)
    state, count = swag.state_dict(), len(swag.averages())
    drawn = swag.sample(scale, seed=9, block=block, sample=2)
    for row, (name, mean) in enumerate(swag.averages().items()):
        z1 = lsf.ops.philox_normal((1, mean.numel()), 9, row_offset=row, sample=2).view(mean.shape)
        z2 = lsf.ops.philox_normal((1, held), 9, row_offset=count + 1 + row if block else count, sample=2)[0]
        low_rank = torch.tensordot(z2, state[f"base.{name}_deviations"], 1) / math.sqrt(held - 1)
        wanted = mean + math.sqrt(scale) * ((state[f"base.{name}_m2"] / 5).sqrt() * z1 + low_rank)
        torch.testing.assert_close(drawn[name].detach(), wanted)


def test_swag_moments_and_ring_buffer():
    model, columns = Net(), 3
    swag = lsf.SWAG(model, max_num_models=columns)
    seen = walk(model, 7, swag)
    for name, w in seen.items():
        state = swag.state_dict()
        torch.testing.assert_close(state[f"base.{name}_mean"], w.mean(0))
        torch.testing.assert_close(state[f"base.{name}_m2"], 7 * w.var(0, correction=0), rtol=1e-4, atol=1e-6)
        for model_number in (4, 5, 6):
            deviation = w[model_number] - w[: model_number + 1].mean(0)
            torch.testing.assert_close(state[f"base.{name}_deviations"][model_number % columns], deviation)
    assert list(swag.averages()) == list(seen) and "out.weight" not in seen


def test_swag_sample_installs_and_leaves_the_state_alone():
    model = Net()
    swag = lsf.SWAG(model, max_num_models=3)
    walk(model, 4, swag)
    before, x = state_of(swag), torch.randn(6, 3)
    drawn = swag.sample(seed=3)
    assert_same_state(swag, before)
    assert swag.module.out.weight is swag.module.first.weight is drawn["first.weight"]
    batch = swag.samples(4, seed=3)
    for s in range(4):
        swag.sample(seed=3, sample=s)
        for name, p in swag.module.named_parameters():
            assert torch.equal(p, batch[name][s])
    swag.sample(scale=0)
    swag.eval(), model.eval()
    model.load_state_dict(swag.averages(), strict=False)
    torch.testing.assert_close(swag(x), model(x))
    assert all(torch.equal(p, swag.averages()[n]) for n, p in swag.module.named_parameters())


def test_swag_sample_into_and_version_counters():
    model = Net()
    swag = lsf.SWAG(model, max_num_models=3)
    walk(model, 4, swag)
    version = model.head.weight._version
    assert swag.sample(seed=3, into=model)["head.weight"] is model.head.weight
    assert model.head.weight._version > version
    assert torch.equal(model.head.weight, swag.samples(1, seed=3)["head.weight"][0])
    with pytest.raises(RuntimeError, match="nothing has been drawn"):
        swag(torch.randn(2, 3))


def test_swag_sample_seeds():
    model = nn.Linear(3, 3)
    swag = lsf.SWAG(model)
    walk(model, 3, swag)
    torch.manual_seed(5)
    a = swag.samples(1)["weight"]
    torch.manual_seed(5)
    assert torch.equal(a, swag.samples(1)["weight"]) and not torch.equal(a, swag.samples(1)["weight"])
    assert torch.equal(swag.samples(1, seed=7)["weight"], swag.samples(1, seed=torch.tensor(7))["weight"])


@pytest.mark.parametrize("dtype, wide", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("deviations", [torch.float32, torch.bfloat16])
def test_swag_dtypes(dtype, wide, deviations):
    model = nn.Linear(3, 5).to(dtype)
    swag = lsf.SWAG(model, max_num_models=4, deviations_dtype=deviations)
    seen = walk(model, 6, swag)
    state = swag.state_dict()
    assert state["base.weight_mean"].dtype == state["base.weight_m2"].dtype == wide
    assert state["base.weight_deviations"].dtype == (wide if wide == torch.float64 else deviations)
    torch.testing.assert_close(state["base.weight_mean"], seen["weight"].to(wide).mean(0))
    swag.sample(seed=0)
    assert swag.module.weight.dtype == dtype
    assert torch.equal(swag.module.weight, swag.samples(1, seed=0)["weight"][0].to(dtype))
    swag.half()
    assert swag.state_dict()["base.weight_mean"].dtype == wide and swag.module.weight.dtype == torch.float16


def test_swag_memory_formats_and_compiled_models():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).to(memory_format=torch.channels_last)
    plain, other = copy.deepcopy(model).to(memory_format=torch.contiguous_format), torch.compile(model, backend="eager")
    swag, reference = lsf.SWAG(other), lsf.SWAG(plain)
    walk(model, 3, swag)
    for name, t in swag.averages().items():
        assert t.is_contiguous() and "_orig_mod" not in name
    swag.sample(seed=0)
    assert torch.equal(swag.module[0].weight, swag.samples(1, seed=0)["0.weight"][0])
    assert reference.state_dict().keys() == swag.state_dict().keys()


def test_swag_copies_buffers():
    model = Net()
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    swag = lsf.SWAG(model)
    model(torch.randn(9, 3))
    model.cache = torch.zeros(5)
    swag.collect_model(model)
    assert (
        torch.equal(swag.module.bn.running_mean, model.bn.running_mean) and int(swag.module.bn.num_batches_tracked) == 1
    )
    assert "base.cache" not in swag.state_dict()
    swag.sample()
    lsf.update_bn([torch.randn(8, 3)], swag)
    assert torch.equal(swag.state_dict()["base.bn.running_mean"], model.bn.running_mean)
    assert not torch.equal(swag.module.bn.running_mean, model.bn.running_mean)


def test_swag_collect_refuses_other_models():
    model = Net()
    swag = lsf.SWAG(model)
    walk(model, 2, swag)
    before = state_of(swag)
    renamed = Net()
    renamed.more = nn.Linear(2, 2)
    wider = Net()
    wider.head = nn.Linear(5, 4)
    for other, match in (
        (nn.Linear(3, 5), "lacks token"),
        (renamed, "more.weight"),
        (wider, "head.weight must have shape"),
    ):
        with pytest.raises(ValueError, match=f"collect_model: .*{match}"):
            swag.collect_model(other)
    no_buffers = Net()
    no_buffers.bn = nn.BatchNorm1d(5, track_running_stats=False)
    with pytest.raises(ValueError, match="lacks bn.running_mean"):
        swag.collect_model(no_buffers)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        swag.collect_model({})
    assert_same_state(swag, before)


def test_swag_check_finite():
    model = Net()
    swag, plain = lsf.SWAG(model), lsf.SWAG(model)
    walk(model, 2, swag, plain)
    before = state_of(swag)
    with torch.no_grad():
        model.head.bias[1] = math.inf
    with pytest.raises(
        ValueError, match="collect_model: the model's weights must be finite, got NaN or inf in head.bias"
    ):
        swag.collect_model(model, check_finite=True)
    assert_same_state(swag, before)
    plain.collect_model(model)
    assert plain.n_models == 3 and not plain.averages()["head.bias"].isfinite().all()
    nn.init.zeros_(model.head.bias)
    swag.collect_model(model, check_finite=True)
    assert swag.n_models == 3


def test_swag_refuses_before_collecting():
    swag = lsf.SWAG(Net())
    calls = [swag.sample, lambda: swag.samples(3), swag.logdet, lambda: swag.log_prob(Net()), swag.log_prob]
    for call in (*calls, swag.averages):
        with pytest.raises(RuntimeError, match="nothing has been"):
            call()
    with pytest.raises(RuntimeError, match="predict: nothing has been collected"):
        swag.predict(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="SWAG: nothing has been drawn"):
        swag(torch.randn(2, 3))


class Clash(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.register_buffer("w_mean", torch.zeros(2))


@pytest.mark.parametrize("empty", [nn.LazyLinear(2), nn.Linear(3, 2, device="meta")])
def test_swag_and_swaps_refuse_models_without_values(empty):
    model = nn.Linear(3, 2)
    swag = lsf.SWAG(model)
    swag.collect_model(model)
    for call in (
        swag.collect_model,
        lambda m: swag.sample(into=m),
        lambda m: lsf.averaged_weights(m, swag).__enter__(),
    ):
        with pytest.raises(ValueError, match="^(collect_model|sample|averaged_weights): weight must hold values, got"):
            call(empty)
    assert swag.n_models == 1


@pytest.mark.parametrize(
    "model, options, error, match",
    [
        (Net, {}, TypeError, "got the class Net"),
        (3, {}, TypeError, "got int"),
        (Net(), {"max_num_models": 0}, ValueError, "at least 1"),
        (Net(), {"max_num_models": 2.0}, TypeError, "must be an int"),
        (Net(), {"max_num_models": True}, TypeError, "must be an int"),
        (Net(), {"deviations_dtype": torch.float64}, TypeError, "deviations_dtype must be"),
        (nn.Linear(2, 2).to(torch.float8_e4m3fn), {}, TypeError, "weight must have a dtype of"),
        (nn.Linear(2, 2, dtype=torch.complex64), {}, TypeError, "weight must have a floating dtype"),
        (nn.LazyLinear(2), {}, ValueError, "weight is lazy"),
        (nn.Linear(2, 2, device="meta"), {}, ValueError, "weight must hold values"),
        (Clash(), {}, ValueError, "a buffer has the name"),
    ],
)
def test_swag_refuses_arguments(model, options, error, match):
    with pytest.raises(error, match=f"SWAG: .*{match}"):
        lsf.SWAG(model, **options)


def test_swag_of_a_model_without_parameters():
    swag = lsf.SWAG(nn.ReLU())
    swag.collect_model(nn.ReLU())
    assert swag.sample() == {} and swag.log_prob() == 0


def test_swag_takes_expanded_buffers():
    model = Net()
    model.register_buffer("positions", torch.arange(4.0).expand(3, 4))
    swag, other = lsf.SWAG(model), lsf.SWAG(model)
    model.positions[0, 1] = 7.0
    walk(model, 2, swag)
    other.load_state_dict(swag.state_dict())
    for s in (swag, other):
        assert s.n_models == 2 and s.state_dict()["base.positions"].equal(model.positions)
        assert s.module.positions.equal(model.positions) and s.module.positions.stride(0) == 0
