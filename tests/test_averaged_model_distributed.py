"""AveragedModel and averaged_weights on two ranks, one spawn for all; what they saved is loaded here by one process."""

import copy
import gc
import math
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed import run_ranks
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils

import losssurf_fast as lsf
from losssurf_fast.averaging.tensors import named_parameters


def network():
    """Rows that two ranks share unevenly (5), or not at all (1), tied weights, buffers."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1), nn.Linear(1, 5), nn.Linear(5, 1))
    model[4].weight = model[2].weight
    return model.eval()


def shard(model, **kwargs):
    for layer in (model[0], model[3]):
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def train(model, seed):
    """Equal steps for whole and sharded models: each parameter becomes a function of its name's place and the seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in named_parameters(model).values():
            value = torch.randn(p.shape)
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)
        for b in model.buffers():
            b.copy_(b + 1)


def whole(state):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def ddp(rank):
    model = network()
    wrapped = DistributedDataParallel(model)
    average, reference = lsf.AveragedModel(wrapped), swa_utils.AveragedModel(wrapped)
    for seed in range(3):
        train(model, seed)
        average.update_parameters(wrapped)
        reference.update_parameters(wrapped)
    assert all(k.startswith("module.module.") for k in reference.state_dict() if k != "n_averaged")
    expected = {k.replace("module.module", "module"): v for k, v in reference.state_dict().items()}
    torch.testing.assert_close(dict(average.state_dict()), expected)
    average.load_state_dict(reference.state_dict())
    assert_equal(average.state_dict(), expected)
    x = torch.randn(3, 4)
    with lsf.averaged_weights(wrapped, average):
        assert torch.equal(wrapped(x), average(x))


def fsdp_updates(rank):
    ema = {"average": "ema", "decay": 0.9, "use_buffers": True}
    for kwargs in ({}, ema, {"avg_fn": swa_utils.get_ema_avg_fn(0.7)}):
        plain, sharded = network(), shard(network())
        expected = lsf.AveragedModel(plain, **kwargs)
        average = lsf.AveragedModel(sharded, **kwargs)
        x = torch.randn(3, 4)
        for seed in range(4):
            train(plain, seed)
            train(sharded, seed)
            expected.update_parameters(plain)
            average.update_parameters(sharded)
            with torch.no_grad():
                sharded(x)  # leaves the root's parameters unsharded
        held = {name: tuple(p._local_tensor.shape) for name, p in average.averages().items() if name.endswith("weight")}
        assert held["0.weight"] == (3 - rank, 4) and held["2.weight"] == (1 - rank, 5)
        assert_equal(whole(average.state_dict()), expected.state_dict())
        with pytest.raises(RuntimeError, match="use `with averaged_weights"):
            average(x)
        before = [(p._version, p._local_tensor.clone()) for p in named_parameters(sharded).values()]
        with torch.no_grad(), lsf.averaged_weights(sharded, average):
            torch.testing.assert_close(sharded(x), expected(x), rtol=0, atol=0)
        with torch.no_grad(), pytest.raises(ZeroDivisionError), lsf.averaged_weights(sharded, average):
            sharded(x)
            raise ZeroDivisionError
        for p, (version, value) in zip(named_parameters(sharded).values(), before, strict=True):
            assert torch.equal(p._local_tensor, value) and p._version >= version + 4
        with torch.no_grad():
            torch.testing.assert_close(sharded(x), plain(x), rtol=0, atol=0)
        sharded(x).sum().backward()  # and training goes on
        clone = copy.deepcopy(average)
        average.update_parameters(sharded)
        clone.update_parameters(sharded)
        assert_equal(whole(clone.state_dict()), whole(average.state_dict()))


def fsdp_model_may_die(rank):
    """An average that goes on living keeps neither the sharded model nor its shards."""
    for forward in (False, True):
        sharded = shard(network())
        average = lsf.AveragedModel(sharded)
        average.update_parameters(sharded)
        if forward:
            sharded(torch.ones(3, 4)).sum().backward()
        gone = [weakref.ref(sharded), weakref.ref(named_parameters(sharded)["0.weight"])]
        del sharded
        gc.collect()
        assert [g() for g in gone] == [None, None]


def fsdp_shards_are_replaced(rank):
    """Both give DTensors other local tensors, and loading with ``assign`` other DTensors as well."""
    sharded, plain = (network()[:3] for _ in range(2))  # without tied weights, which loading with assign unties
    fully_shard(sharded[0]), fully_shard(sharded)
    average, expected = (lsf.AveragedModel(m, average="ema", decay=0.5) for m in (sharded, plain))
    for seed in range(4):
        if seed == 1:
            sharded.to_empty(device="cpu")
        if seed == 2:
            sharded.load_state_dict({k: v.clone() for k, v in sharded.state_dict().items()}, assign=True)
        if seed == 3:
            average.load_state_dict({k: v.clone() for k, v in average.state_dict().items()}, assign=True)
        for b in sharded.buffers():  # to_empty has taken their values
            b.fill_(seed)
        for b in plain.buffers():
            b.fill_(seed)
        for m, a in ((sharded, average), (plain, expected)):
            train(m, seed)
            a.update_parameters(m)
        assert_equal(whole(average.state_dict()), expected.state_dict())


def fsdp_half(rank):
    """bf16 shards, fp32 averages; fp32 shards that are gathered in bf16."""
    sharded, plain = shard(network().bfloat16()), network().bfloat16()
    average, expected = lsf.AveragedModel(sharded), lsf.AveragedModel(plain)
    mixed = shard(network(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    masters = lsf.AveragedModel(mixed)
    for seed in range(3):
        for model, a in ((sharded, average), (plain, expected), (mixed, masters)):
            train(model, seed)
            a.update_parameters(model)
    assert_equal(whole(average.state_dict()), expected.state_dict())
    assert {p.dtype for p in masters.module.parameters()} == {torch.float32}
    with torch.no_grad(), lsf.averaged_weights(sharded, average):
        assert torch.equal(sharded(torch.ones(3, 4).bfloat16()), expected(torch.ones(3, 4).bfloat16()))


def fsdp_wrapped_layers(rank):
    """Layers in torch.compile and in activation checkpointing: the names are those without."""
    model = network()
    model[0] = torch.compile(model[0], backend="eager")
    model[3] = checkpoint_wrapper(model[3])
    sharded, plain = shard(model), network()
    average, expected = lsf.AveragedModel(sharded), lsf.AveragedModel(plain)
    for seed in range(2):
        for m, a in ((sharded, average), (plain, expected)):
            train(m, seed)
            a.update_parameters(m)
    assert_equal(whole(average.state_dict()), expected.state_dict())


def fsdp_int8(rank):
    sharded, plain, other = shard(network()), network(), network()
    average, exact = lsf.AveragedModel(sharded, average_dtype=torch.int8), lsf.AveragedModel(plain)
    unsharded = lsf.AveragedModel(other, average_dtype=torch.int8)
    for seed in range(2):
        for m, a in ((sharded, average), (plain, exact), (other, unsharded)):
            train(m, seed)
            a.update_parameters(m)
    held = average._modules["module"].get_submodule("3").weight._local_tensor
    assert held.untyped_storage().nbytes() == 4 and held.shape == (3 - rank, 1)
    state = whole(average.state_dict())
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0.1)
    for name, value in unsharded.state_dict().items():
        assert value.dim() < 2 or torch.equal(state[name], value)  # vectors have an exponent on each rank
    other = lsf.AveragedModel(sharded, average_dtype=torch.int8)
    other.load_state_dict(average.state_dict())
    for a in (average, other):
        a.update_parameters(sharded)
    assert_equal(whole(other.state_dict()), whole(average.state_dict()))
    with torch.no_grad(), lsf.averaged_weights(sharded, average):
        assert torch.equal(sharded[0].weight._local_tensor, average.module.get_submodule("0").weight._local_tensor)


def refusals(rank):
    columns = fully_shard(nn.Linear(4, 5, bias=False), shard_placement_fn=lambda p: Shard(1))
    with pytest.raises(NotImplementedError, match=r"int8 needs shards along the first dimension, got weight placed as"):
        lsf.AveragedModel(columns, average_dtype=torch.int8)
    sharded = shard(network())
    average, careful = lsf.AveragedModel(network()), lsf.AveragedModel(sharded, check_finite=True)
    with pytest.raises(ValueError, match="0.weight must be a plain tensor like the average's, got a DTensor"):
        average.update_parameters(sharded)
    with pytest.raises(RuntimeError, match="module.0.weight must be a DTensor"):
        careful.load_state_dict(average.state_dict())
    state = careful.state_dict()
    state["module.0.weight"] = distribute_tensor(torch.ones(5, 4), state["module.0.weight"].device_mesh, [Replicate()])
    with pytest.raises(RuntimeError, match=r"module.0.weight must be placed as \(.*Shard.*\), got \(.*Replicate"):
        careful.load_state_dict(state)
    careful.update_parameters(sharded)
    before = copy.deepcopy(careful.state_dict())
    if rank == 0:
        with torch.no_grad():
            sharded[2].weight._local_tensor[0, 0] = math.nan  # the other rank's shard of it is empty
    where = "2.weight" if rank == 0 else "other ranks' shards"
    with pytest.raises(ValueError, match=f"got NaN or inf in {where}"):
        careful.update_parameters(sharded)
    assert_equal(whole(careful.state_dict()), whole(before))


def checkpoints(rank, folder):
    sharded = shard(network())
    average = lsf.AveragedModel(sharded)
    for seed in range(3):
        train(sharded, seed)
        average.update_parameters(sharded)
    dcp.save({"swa": average.state_dict()}, checkpoint_id=f"{folder}/dcp")
    other = lsf.AveragedModel(shard(network()))
    state = {"swa": other.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    other.load_state_dict(state["swa"])
    assert_equal(whole(other.state_dict()), whole(average.state_dict()))
    full = get_model_state_dict(average, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(full, f"{folder}/full.pt")
    third = lsf.AveragedModel(shard(network()))
    full = whole(average.state_dict())
    set_model_state_dict(third, dict(full), options=StateDictOptions(full_state_dict=True))
    assert_equal(whole(third.state_dict()), full)
    train(sharded, 3)
    for swa in (average, other, third):
        swa.update_parameters(sharded)
    assert other.n_averaged == third.n_averaged == 4
    assert_equal(whole(other.state_dict()), whole(average.state_dict()))


def rank_main(rank, folder):
    for check in (
        ddp,
        fsdp_updates,
        fsdp_model_may_die,
        fsdp_shards_are_replaced,
        fsdp_half,
        fsdp_wrapped_layers,
        fsdp_int8,
        refusals,
    ):
        check(rank)
    checkpoints(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averages")
    run_ranks(rank_main, str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_save_and_one_process_loads(folder):
    assert not dist.is_initialized()
    model = network()
    expected = lsf.AveragedModel(model)
    for seed in range(3):
        train(model, seed)
        expected.update_parameters(model)
    average = lsf.AveragedModel(network())
    state = {"swa": average.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    average.load_state_dict(state["swa"])
    assert_equal(average.state_dict(), expected.state_dict())
    full = torch.load(folder / "full.pt", weights_only=True)
    for other in (lsf.AveragedModel(network()), swa_utils.AveragedModel(network())):
        other.load_state_dict(full)
        assert_equal(other.state_dict(), expected.state_dict())
