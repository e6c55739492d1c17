from typing import NamedTuple

import pytest
import torch
from common import CountReads
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import losssurf_fast as lsf

LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def batches_of(data, size=16):
    return list(data.split(size))


def assert_statistics(layer, data, batches):
    data = data.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), data.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(layer.running_var.double(), data.var(1), rtol=1e-6, atol=0)
    assert int(layer.num_batches_tracked) == batches


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_update_bn_is_exact_with_a_short_last_batch(dims):
    data = torch.randn(37, 5, *(3, 2, 4)[:dims]) * torch.arange(37).view(-1, *[1] * (dims + 1))
    layer = LAYERS[max(dims, 1)](5)
    lsf.update_bn(batches_of(data, 10), layer)
    assert_statistics(layer, data, 4)


def test_update_bn_far_from_zero():
    data = 1e4 + 0.1 * torch.randn(300, 3)
    layer = nn.BatchNorm1d(3)
    lsf.update_bn(batches_of(data, 100), layer)
    torch.testing.assert_close(layer.running_var.double(), data.double().var(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_update_bn_dtypes(dtype):
    data = (3 + torch.randn(64, 5)).to(dtype)
    layer = nn.BatchNorm1d(5, dtype=dtype)
    lsf.update_bn(batches_of(data), layer)
    torch.testing.assert_close(layer.running_mean, data.double().mean(0).to(dtype))
    torch.testing.assert_close(layer.running_var, data.double().var(0).to(dtype))


def test_update_bn_second_layer_sees_batch_normalised_inputs():
    data = torch.randn(48, 4)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3))
    lsf.update_bn(batches_of(data), model)
    first = nn.BatchNorm1d(4).train()
    inputs = torch.cat([model[2](model[1](first(b))) for b in batches_of(data)]).detach()
    assert_statistics(model[0], data, 3)
    assert_statistics(model[3], inputs, 3)


def test_update_bn_has_no_noise_of_dropout_nor_lrt():
    data = torch.randn(4000, 8) + 1.5
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8), lsf.nn.LRTLinear(8, 3), nn.BatchNorm1d(3))
    with lsf.prediction(model, "stochastic"):
        lsf.update_bn(batches_of(data, 1000), model.train())
        assert model[2].prediction_scheme == "stochastic"
    assert model[2].prediction_scheme is None
    assert_statistics(model[1], data, 4)
    before = model[3].running_var.clone()
    lsf.update_bn(batches_of(data, 1000), model)
    assert torch.equal(before, model[3].running_var)


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x, shift=0.0, labels=None):
        return self.bn(input=x + shift)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda b: b,
        lambda b: (b, torch.zeros(len(b))),
        lambda b: [b, "label"],
        lambda b: {"x": b, "labels": None},
        lambda b: ({"x": b}, 3),
    ],
    ids=["tensor", "tuple", "list", "dict", "dict-in-tuple"],
)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_update_bn_batches(wrap, device):
    data, model = torch.randn(20, 3), Keyword()
    lsf.update_bn((wrap(b) for b in batches_of(data, 7)), model, device, forward_kwargs={"shift": 2.0})
    assert_statistics(model.bn, data + 2, 3)


def test_update_bn_moves_tensors_inside_batches():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3, device="meta")

        def forward(self, x):
            (a, b), more = x
            assert isinstance(x, tuple) and more == {"text": "kept", "list": [a.shape[0]]}
            return self.bn(a + b)

    model, data = Nested(), torch.randn(6, 3)
    lsf.update_bn([(((data, data), {"text": "kept", "list": [6]}), 0)] * 2, model, "meta")
    assert model.bn.running_var.is_meta


def state_of(model):
    flags = [(m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0)) for m in model.modules()]
    return (
        flags,
        {k: v.clone() for k, v in model.state_dict().items()},
        [len(m._forward_pre_hooks) for m in model.modules()],
    )


@pytest.mark.parametrize("mode", [True, False])
def test_update_bn_restores_modes_and_momenta(mode):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Dropout(), nn.BatchNorm1d(3, momentum=0.3)).train(mode)
    model[1].train(not mode)
    before = state_of(model)
    lsf.update_bn(batches_of(torch.randn(20, 3)), model)
    after = state_of(model)
    assert after[0] == before[0] and after[2] == before[2]


class Broken(nn.Module):
    calls = 0

    def forward(self, x):
        Broken.calls += 1
        if Broken.calls % 3 == 0:
            raise KeyError("third batch")
        return x


@pytest.mark.parametrize(
    "loader, error, match",
    [
        (batches_of(torch.randn(60, 3)), KeyError, "third batch"),
        ([], ValueError, "at least one batch"),
        (
            [torch.randn(4, 3), torch.randn(1, 3)],
            ValueError,
            "layer '0' at least 2 values per channel, got an input .1, 3",
        ),
        ([()], ValueError, "empty"),
        ([torch.randn(4, 5)], RuntimeError, "running_mean|size|shape|weight"),
    ],
)
def test_update_bn_leaves_all_as_it_was_on_errors(loader, error, match):
    Broken.calls = 0
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), Broken(), nn.BatchNorm1d(3).eval())
    model[0](torch.randn(8, 3))
    before = state_of(model)
    with pytest.raises(error, match=match):
        lsf.update_bn(loader, model)
    after = state_of(model)
    assert after[0] == before[0] and after[2] == before[2]
    assert all(torch.equal(v, before[1][k]) for k, v in after[1].items())


@pytest.mark.parametrize("subset, batches", [(0.5, 4), (1.0, 7), (1e-3, 1), (3, 3), (1, 1), (100, 7)])
def test_update_bn_subset_reads_no_more(subset, batches):
    read = []

    class Loader:
        def __len__(self):
            return 7

        def __iter__(self):
            for i in range(7):
                read.append(i)
                yield torch.randn(4, 3)

    layer = nn.BatchNorm1d(3)
    lsf.update_bn(Loader(), layer, subset=subset)
    assert len(read) == batches == int(layer.num_batches_tracked)


def test_update_bn_subset_of_exact_product():
    layer = nn.BatchNorm1d(3)
    lsf.update_bn([torch.randn(2, 3)] * 100, layer, subset=0.07)  # 0.07 * 100 > 7
    assert int(layer.num_batches_tracked) == 7


@pytest.mark.parametrize(
    "subset, error, match",
    [
        (0.0, ValueError, "fraction"),
        (1.5, ValueError, "fraction"),
        (float("nan"), ValueError, "fraction"),
        (0, ValueError, "at least one batch"),
        (True, TypeError, "subset must be"),
        ("all", TypeError, "subset must be"),
        (0.5, TypeError, "needs a loader with a length, got generator"),
    ],
)
def test_update_bn_refuses_subsets(subset, error, match):
    with pytest.raises(error, match=match):
        lsf.update_bn((torch.randn(4, 3) for _ in range(3)), nn.BatchNorm1d(3), subset=subset)


def test_update_bn_refuses_arguments_of_other_types():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        lsf.update_bn([], 3)
    with pytest.raises(TypeError, match="update_bn: loader must be an iterable of batches, got int"):
        lsf.update_bn(3, nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="update_bn: forward_kwargs must be a mapping, got list"):
        lsf.update_bn([], nn.BatchNorm1d(3), forward_kwargs=[1])


def test_update_bn_does_not_read_for_models_without_batch_norm():
    def loader():
        raise AssertionError("read")
        yield

    lsf.update_bn(loader(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)))


def test_update_bn_leaves_layers_that_do_not_track_or_are_not_reached():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3)
            self.unused = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.b(self.a(x))

    model, data = Skips(), torch.randn(20, 3)
    model.unused.running_mean.fill_(7)
    lsf.update_bn(batches_of(data, 10), model)
    assert model.unused.running_mean.eq(7).all() and int(model.unused.num_batches_tracked) == 0
    assert model.a.running_mean is None and int(model.b.num_batches_tracked) == 2


def test_update_bn_lazy_and_shared_layers():
    model, data = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(2)), torch.randn(30, 3)
    lsf.update_bn(batches_of(data), model)
    assert_statistics(model[0], data, 2)
    layer = nn.BatchNorm1d(3, affine=False)
    lsf.update_bn(batches_of(data), nn.Sequential(layer, layer))
    outputs = [nn.BatchNorm1d(3, affine=False)(b) for b in batches_of(data)]
    assert_statistics(layer, torch.cat([data, *outputs]), 2)


def test_update_bn_of_compiled_models():
    data, model = torch.randn(30, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend="eager")
    model[1].compile(backend="eager")
    compiled(data)
    lsf.update_bn(batches_of(data), compiled)
    assert_statistics(model[1], model[0](data).detach(), 2)


def test_update_bn_equals_torch_for_equal_batches_of_equal_statistics():
    batch = torch.randn(64, 3)
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    lsf.update_bn([(batch, 0)] * 4, ours, "cpu")
    torch.optim.swa_utils.update_bn([(batch, 0)] * 4, theirs, "cpu")
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var * (255 / 256), theirs.running_var * (63 / 64))
    assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)


def test_update_bn_reads_nothing_on_the_host():
    """A layer's ``momentum=None`` would read its count in every batch."""
    layer = nn.BatchNorm1d(3, momentum=None)
    with CountReads() as count:
        float(torch.ones(()))
        lsf.update_bn(batches_of(torch.randn(40, 3)), layer)
    assert count.reads == 1  # the test's own


class Point(NamedTuple):
    x: torch.Tensor
    label: int


class Attributes(dict):
    __getattr__ = dict.__getitem__


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, inputs):
        packed, point, named = inputs
        assert isinstance(packed, PackedSequence) and packed.data.device.type == "cpu"
        return self.bn(packed.data + point.x + named.shift[0])


def test_update_bn_moves_containers_without_changing_them():
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    inputs = (packed, Point(torch.ones(3), 1), Attributes(shift=[torch.ones(3)]))
    plain, moved = Nested(), Nested()
    lsf.update_bn([(inputs, 0)], plain)
    lsf.update_bn([(inputs, 0)], moved, "cpu")
    assert_statistics(moved.bn, packed.data + 2, 1)
    assert torch.equal(moved.bn.running_mean, plain.bn.running_mean)
    assert type(inputs[2]) is Attributes and inputs[2].shift[0] is not None


def test_update_bn_asks_no_private_names_of_models():
    model = nn.Linear(2, 2)
    model._sharded = True
    lsf.update_bn([torch.randn(2, 2)], model)
