import copy
import math

import pytest
import torch
from averaging import Net, assert_states, step
from common import BF16, F16, F32, F64
from torch import nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import losssurf_fast as lsf

TORCH = {
    "swa": ({}, {}),
    "ema": ({"average": "ema", "decay": 0.9}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}),
    "avg_fn": ({"avg_fn": swa_utils.get_ema_avg_fn(0.7)},) * 2,
    "multi_avg_fn": ({"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},) * 2,
}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("case", TORCH)
def test_equals_torch(case, use_buffers):
    model = Net()
    ours, theirs = TORCH[case]
    averaged = lsf.AveragedModel(model, use_buffers=use_buffers, **ours)
    reference = swa_utils.AveragedModel(model, use_buffers=use_buffers, **theirs)
    if use_buffers:  # torch averages integers and bools as well, or fails at it
        floating = [b for b in reference.module.buffers() if b.is_floating_point()]
        reference.module.buffers = lambda: iter(floating)
        model.buffers = lambda: (b for b in nn.Module.buffers(model) if b.is_floating_point())
    for _ in range(6):
        step(model)
        averaged.update_parameters(model)
        reference.update_parameters(model)
    state, expected = averaged.state_dict(), reference.state_dict()
    if use_buffers:
        expected["module.mask"], expected["module.norm.num_batches_tracked"] = (
            model.mask,
            model.norm.num_batches_tracked,
        )
    assert_states(state, expected)
    assert averaged.n_averaged == 6 and averaged.n_averaged.dtype == torch.int64
    torch.testing.assert_close(averaged.module.cache, reference.module.cache)


def test_first_update_copies_also_over_nan():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(math.nan)
    averaged = lsf.AveragedModel(model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.weight, model.weight)


def test_include_start_is_the_mean_with_the_start():
    model = nn.Linear(3, 2)
    averaged, seen = lsf.AveragedModel(model, include_start=True), [model.weight.detach().clone()]
    assert averaged.n_averaged == 1
    for _ in range(4):
        step(model)
        averaged.update_parameters(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(averaged.module.weight, torch.stack(seen).mean(0))
    assert averaged.n_averaged == 5


def test_update_every_takes_every_kth_call():
    model = nn.Linear(3, 2)
    averaged, expected = lsf.AveragedModel(model, update_every=3), swa_utils.AveragedModel(model)
    for i in range(1, 11):
        step(model)
        averaged.update_parameters(model)
        if i % 3 == 0:
            expected.update_parameters(model)
    assert_states(averaged.state_dict(), expected.state_dict())
    assert averaged.n_averaged == 3


def test_ema_warmup():
    model, value = nn.Linear(1, 1, bias=False), None
    averaged = lsf.AveragedModel(model, average="ema", decay=0.5, ema_warmup=True)
    for n in range(20):
        step(model, 1.0)
        averaged.update_parameters(model)
        decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
        value = model.weight.item() if n == 0 else decay * value + (1 - decay) * model.weight.item()
        assert averaged.module.weight.item() == pytest.approx(value, rel=1e-5)


def test_ema_of_a_bf16_model_moves():
    model = nn.Linear(1, 1, bias=False).to(BF16)
    nn.init.constant_(model.weight, 1.0)
    averaged = lsf.AveragedModel(model, average="ema", decay=0.9999, include_start=True)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(10_000):
        averaged.update_parameters(model)
    assert averaged.module.weight.item() == pytest.approx(1.632139, abs=2e-5)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_swa_of_half_precision_weights_is_exact(dtype):
    model = nn.Linear(16, 1, bias=False).to(dtype)
    averaged, total = lsf.AveragedModel(model), torch.zeros(1, 16, dtype=F64)
    for i in range(1000):
        with torch.no_grad():
            model.weight.fill_(1.0).add_(torch.randn(1, 16).to(dtype) * 0.1 + i / 1000)
        averaged.update_parameters(model)
        total += model.weight.double()
    assert averaged.module.weight.dtype == F32
    assert ((averaged.module.weight - total / 1000).abs() / (total / 1000)).max() < 1e-5


def test_forward_casts_to_the_models_dtypes():
    model = Net().to(BF16)
    averaged, x = lsf.AveragedModel(model), torch.randn(6, 5, dtype=BF16)
    assert torch.equal(averaged(x), model(x))  # training mode: both move their running statistics
    torch.testing.assert_close(averaged.module.norm.running_mean, model.norm.running_mean.float())
    assert averaged.module.norm.num_batches_tracked == 1
    averaged.module.norm.running_mean.fill_(1 / 3)
    averaged.eval()(x)
    assert (averaged.module.norm.running_mean == torch.tensor(1 / 3)).all()  # nothing is rounded in evaluation
    assert averaged.module(x.float()).dtype == F32
    assert averaged.module.tied.weight is averaged.module.last.weight
    assert lsf.AveragedModel(Net())(torch.randn(6, 5)).requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_through_checkpointing_within_a_bf16_model(reentrant):
    class Checkpointed(nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model, x = nn.Sequential(Checkpointed(3, 2), nn.Tanh()).to(BF16), torch.randn(4, 3, dtype=BF16, requires_grad=True)
    averaged = lsf.AveragedModel(model)
    with pytest.raises(RuntimeError, match="dtype"):  # and no gradient that is wrong
        averaged(x).sum().backward()
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    averaged.update_parameters(model)
    step(model)
    with lsf.averaged_weights(model, averaged):
        model(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_repr():
    model = nn.Linear(2, 2)
    averaged = lsf.AveragedModel(model)
    averaged.update_parameters(model)
    assert repr(averaged).splitlines()[1] == "  average='swa', n_averaged=1"
    averaged.load_state_dict(averaged.state_dict() | {"n_averaged": torch.tensor(7)})
    assert averaged.extra_repr() == "average='swa', n_averaged=7"
    options = {"average_dtype": torch.int8, "update_every": 2, "offload": "cpu"}
    averaged = lsf.AveragedModel(model, average="ema", decay=0.9, ema_warmup=True, **options)
    shown = "decay=0.9, ema_warmup=True, average_dtype=torch.int8, update_every=2, offload=cpu, n_averaged=0"
    assert averaged.extra_repr() == f"average='ema', {shown}"


def test_average_dtype():
    model = Net().to(F64)
    assert lsf.AveragedModel(model).module.first.weight.dtype == F64
    narrow = lsf.AveragedModel(model, average_dtype=BF16)
    assert narrow.module.first.weight.dtype == BF16 and narrow.module.norm.running_mean.dtype == F64
    wide = lsf.AveragedModel(Net().to(BF16), average_dtype=F64, use_buffers=True)
    assert {t.dtype for t in (*wide.module.parameters(), wide.module.cache)} == {F64}
    assert wide(torch.randn(4, 5, dtype=BF16)).dtype == BF16


def test_complex_and_integer_parameters():
    model = nn.Module()
    model.wave = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    model.index = nn.Parameter(torch.arange(3), requires_grad=False)
    averaged, seen = lsf.AveragedModel(model), []
    for _ in range(3):
        with torch.no_grad():
            model.wave.copy_(torch.randn(3, dtype=torch.complex64))
            model.index.add_(1)
        averaged.update_parameters(model)
        seen.append(model.wave.detach().clone())
    torch.testing.assert_close(averaged.module.wave.detach(), torch.stack(seen).mean(0))
    assert averaged.module.index.tolist() == [3, 4, 5]


def test_tied_weights_are_averaged_once_and_stay_tied():
    model = Net()
    averaged = lsf.AveragedModel(model, average="ema", decay=0.5, include_start=True)
    start = model.last.weight.detach().clone()
    step(model, 1.0)
    averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module.tied.weight, (start + model.last.weight) / 2)
    state = averaged.state_dict()
    assert state["module.tied.weight"].data_ptr() == state["module.last.weight"].data_ptr()


def test_a_count_that_someone_else_changed_is_read_again():
    model = nn.Linear(2, 2)
    averaged = lsf.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.n_averaged.zero_()
    step(model)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.weight, model.weight) and averaged.n_averaged == 1


BAD_MODELS = {
    "lacks": (lambda m: delattr(m, "scale"), r"the model must have the tensors of the average; it lacks scale"),
    "has": (lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))), "has more besides"),
    "untied": (lambda m: setattr(m.tied, "weight", nn.Parameter(torch.ones(5, 7))), "has tied.weight besides"),
    "shape": (lambda m: setattr(m, "scale", nn.Parameter(torch.ones(2))), r"scale must have shape \(\), got \(2,\)"),
    "buffer": (lambda m: m.register_buffer("mask", torch.ones(3)), r"mask must have shape \(2,\), got \(3,\)"),
    "meta": (lambda m: m.first.to("meta"), "first.weight must hold values, got a tensor on the meta device"),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_update_refuses_another_model_and_changes_nothing(case, warm):
    averaged, model = lsf.AveragedModel(Net()), Net()
    if warm:
        averaged.update_parameters(model)
    before = copy.deepcopy(averaged.state_dict())
    damage, message = BAD_MODELS[case]
    damage(model)
    with pytest.raises(ValueError, match=f"AveragedModel.update_parameters: .*{message}"):
        averaged.update_parameters(model)
    assert_states(averaged.state_dict(), before, exact=True)


@pytest.mark.parametrize(
    "name, message",
    [
        ("weight", r"lerp_: .*shape \(1,\), got \(3,\)"),
        ("running_var", r"running_var must have shape \(3,\), got \(1,\)"),
    ],
)
def test_a_tensor_that_changed_its_shape_in_place_is_refused(name, message):
    model = nn.BatchNorm1d(3)
    averaged = lsf.AveragedModel(model)
    averaged.update_parameters(model)
    step(model)
    before = copy.deepcopy(averaged.state_dict())
    getattr(model, name).data = torch.ones(1)
    with pytest.raises(ValueError, match=message):
        averaged.update_parameters(model)
    assert_states(averaged.state_dict(), before, exact=True)


def test_update_wants_a_module():
    with pytest.raises(TypeError, match="update_parameters: model must be a torch.nn.Module, got dict"):
        lsf.AveragedModel(Net()).update_parameters({})


def test_nan_is_averaged_or_refused():
    model = Net()
    trusting, careful = lsf.AveragedModel(model), lsf.AveragedModel(model, check_finite=True, update_every=2)
    trusting.update_parameters(model)
    careful.update_parameters(model)
    for value in (math.nan, math.inf, -math.inf):
        before = copy.deepcopy(careful.state_dict())
        with torch.no_grad():
            model.first.weight[1, 2], model.frozen[0] = value, value
        for _ in range(2):  # a refused call does not count
            with pytest.raises(ValueError, match="weights must be finite, got NaN or inf in frozen, first.weight"):
                careful.update_parameters(model)
        assert_states(careful.state_dict(), before, exact=True)
    trusting.update_parameters(model)
    assert not trusting.module.first.weight[1, 2].isfinite() and trusting.module.first.weight[0].isfinite().all()
    with torch.no_grad():
        model.first.weight[1, 2], model.frozen[0] = 1, torch.finfo(F32).max
        model.norm.running_mean.fill_(math.inf)  # a buffer that is copied
    careful.update_parameters(model)
    assert careful.n_averaged == 1


def test_version_counters_go_up_and_no_gradient_flows():
    model = nn.Linear(3, 3)
    averaged = lsf.AveragedModel(model)
    for _ in range(2):  # the copy and the average
        loss = averaged(torch.randn(2, 3, requires_grad=True)).sum()
        averaged.update_parameters(model)
        assert averaged.module.weight.is_leaf and model.weight.grad is None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inference_mode_and_compile():
    model = Net()
    averaged, expected = lsf.AveragedModel(model), lsf.AveragedModel(model)
    averaged.update_parameters(model)
    expected.update_parameters(model)
    step(model)
    with torch.inference_mode():
        averaged.update_parameters(model)
    expected.update_parameters(model)
    assert_states(averaged.state_dict(), expected.state_dict(), exact=True)
    x = torch.randn(4, 5)
    averaged.eval()
    assert torch.equal(torch.compile(averaged, backend="aot_eager", fullgraph=True)(x), averaged(x))


@pytest.mark.parametrize("make", [lsf.AveragedModel, lsf.SWAG])
def test_made_in_inference_mode(make):
    model = nn.Linear(3, 2)
    with torch.inference_mode():
        average = make(model)
        update = average.collect_model if make is lsf.SWAG else average.update_parameters
        update(model)
    first = model.weight.detach().clone()
    step(model)
    update(model)
    torch.testing.assert_close(average.averages()["weight"], (first + model.weight.detach()) / 2)


@pytest.mark.parametrize("result", [torch.zeros(1), None, torch.zeros(2, 3, 1)])
def test_avg_fn_returns_a_tensor_of_the_shape(result):
    model = nn.Linear(3, 2)
    averaged = lsf.AveragedModel(model, avg_fn=lambda average, weight, n: result)
    averaged.update_parameters(model)
    with pytest.raises(ValueError, match=r"AveragedModel: avg_fn must return a tensor of shape \(2, 3\), got"):
        averaged.update_parameters(model)
    assert averaged.n_averaged == 1 and torch.equal(averaged.module.weight, model.weight)


def test_moving_the_model_or_the_average():
    model = nn.Linear(3, 2)
    averaged = lsf.AveragedModel(model, device="cpu")
    averaged.update_parameters(model)
    averaged.double()
    step(model)
    averaged.update_parameters(model)
    assert averaged.module.weight.dtype == F64
    model.half()
    averaged.update_parameters(model)
    assert averaged.n_averaged == 3


BAD_ARGUMENTS = [
    ({"model": torch.ones(1)}, TypeError, "model must be a torch.nn.Module, got Tensor"),
    ({"use_buffers": 1}, TypeError, "use_buffers must be a bool, got int"),
    ({"ema_warmup": None}, TypeError, "ema_warmup must be a bool"),
    ({"avg_fn": 3}, TypeError, "avg_fn must be callable, got int"),
    ({"avg_fn": abs, "multi_avg_fn": abs}, ValueError, "only one of avg_fn and multi_avg_fn"),
    ({"average": "mean"}, ValueError, "average must be 'swa' or 'ema', got 'mean'"),
    ({"average": "ema", "avg_fn": abs}, ValueError, "average='ema' and a function .* exclude each other"),
    ({"ema_warmup": True}, ValueError, "ema_warmup needs average='ema'"),
    ({"decay": "0.9"}, TypeError, "decay must be a number, got str"),
    ({"decay": -0.1}, ValueError, r"decay must lie in \[0, 1\], got -0.1"),
    ({"decay": 1.5}, ValueError, r"decay must lie in \[0, 1\], got 1.5"),
    ({"decay": math.nan}, ValueError, r"decay must lie in \[0, 1\], got nan"),
    ({"average_dtype": torch.int32}, ValueError, "average_dtype must be None, torch.int8 or one of"),
    ({"update_every": 2.0}, TypeError, "update_every must be an int, got float"),
    ({"update_every": 0}, ValueError, "update_every must be at least 1, got 0"),
    ({"offload": "disk"}, ValueError, "offload must be None or 'cpu', got 'disk'"),
    ({"offload": "cpu", "device": "cuda"}, ValueError, "offload='cpu' holds the averages on the CPU, got device=cuda"),
    ({"model": nn.Linear(2, 2, device="meta")}, ValueError, "weight must hold values, got a tensor on the meta device"),
    ({"model": nn.LazyLinear(2)}, ValueError, "weight is lazy"),
    ({"model": torch.jit.trace(nn.Linear(2, 2), torch.ones(2))}, TypeError, "model must not be scripted or traced"),
    (
        {"model": nn.ParameterList([nn.Parameter(torch.ones(2).to(torch.float8_e5m2), requires_grad=False)])},
        TypeError,
        "0 must have a dtype of",
    ),
]


@pytest.mark.parametrize("arguments, error, message", BAD_ARGUMENTS)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"AveragedModel: {message}"):
        lsf.AveragedModel(**{"model": nn.Linear(2, 2), **arguments})


@pytest.mark.parametrize("dtype, kwargs", [(F32, {}), (F32, {"average_dtype": torch.int8}), (BF16, {})], ids=str)
def test_forward_in_a_dtype_the_average_was_moved_to(dtype, kwargs):
    model = nn.Linear(4, 3).to(dtype)
    averaged = lsf.AveragedModel(model, **kwargs)
    averaged.update_parameters(model)
    for moved in (BF16, F64):
        assert averaged.to(moved)(torch.ones(2, 4, dtype=moved)).dtype == moved
