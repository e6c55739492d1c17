import copy
import io
import pickle

import pytest
import torch
from averaging import Net, assert_states, step
from torch import nn
from torch.optim import swa_utils

import losssurf_fast as lsf


def test_wrapped_models():
    class Wrapped(nn.Module):  # DataParallel without a GPU
        def __init__(self, model):
            super().__init__()
            self.module = model

    model = Net()
    compiled = torch.compile(model, backend="eager")
    averaged = lsf.AveragedModel(compiled)
    averaged.update_parameters(model)
    averaged.update_parameters(compiled)
    averaged.update_parameters(nn.DataParallel(model))
    plain = averaged.state_dict()
    assert list(plain) == list(lsf.AveragedModel(model).state_dict())
    wrappers = [Wrapped, lambda m: torch.compile(m, backend="eager"), lambda m: Wrapped(Wrapped(m))]
    wrappers += [lambda m: torch.compile(Wrapped(m), backend="eager"), nn.DataParallel]
    for wrap in wrappers:
        source = swa_utils.AveragedModel(wrap(Net()))
        averaged.load_state_dict(source.state_dict())
        unwrapped = lsf.AveragedModel(Net())
        unwrapped.load_state_dict(copy.deepcopy(source.state_dict()))
        assert torch.equal(averaged.module.first.weight, unwrapped.module.first.weight)
        names = {name.replace("_orig_mod.", "").replace("module.", ""): p for name, p in source.named_parameters()}
        for name, p in averaged.module.named_parameters():
            assert torch.equal(p, names[name]), name


def test_a_child_called_module_is_no_wrapper():
    model = nn.Module()
    model.module, model.weight = nn.Linear(2, 3), nn.Parameter(torch.randn(1))
    only = nn.Module()
    only.module = nn.Linear(2, 3)
    for m in (model, only):
        averaged = lsf.AveragedModel(copy.deepcopy(m))
        averaged.load_state_dict(swa_utils.AveragedModel(m).state_dict())
        assert_states(averaged.state_dict(), swa_utils.AveragedModel(m).state_dict(), exact=True)


def test_state_dict_goes_to_torch_and_back():
    model = Net()
    ours, theirs = lsf.AveragedModel(model), swa_utils.AveragedModel(model)
    for _ in range(3):
        step(model)
        ours.update_parameters(model)
    theirs.load_state_dict(ours.state_dict())
    again = lsf.AveragedModel(Net())
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert_states(again.state_dict(), ours.state_dict(), exact=True)
    for average in (ours, theirs, again):
        torch.manual_seed(1)
        average.module.cache.zero_()  # not in the state_dict
        average.update_parameters(model)
    assert_states(again.state_dict(), ours.state_dict(), exact=True)
    assert_states(theirs.state_dict(), ours.state_dict())
    assert again.n_averaged == 4


def test_loading_as_a_part_of_another_module():
    outer = nn.ModuleDict({"swa": lsf.AveragedModel(Net()), "model": nn.Linear(2, 2)})
    source = nn.ModuleDict({"swa": swa_utils.AveragedModel(nn.DataParallel(Net())), "model": nn.Linear(2, 2)})
    outer.load_state_dict(source.state_dict())
    assert torch.equal(outer["swa"].module.first.weight, source["swa"].module.module.first.weight)
    before = copy.deepcopy(outer["swa"].state_dict())
    other = nn.ModuleDict({"swa": swa_utils.AveragedModel(nn.DataParallel(Net())), "model": nn.Linear(2, 2)})
    outer["swa"].update_every, model = 2, Net()
    outer["swa"].update_parameters(model)
    for damage in ({"swa.n_averaged": torch.tensor(-1)}, {"swa.module.module.scale": torch.ones(2)}):
        message = r"ModuleDict:\s+swa.load_state_dict: (n_averaged must not be neg|module.scale must have shape)[^\n]*$"
        with pytest.raises(RuntimeError, match=message):
            outer.load_state_dict({**other.state_dict(), **damage})
        assert_states(outer["swa"].state_dict(), before, exact=True)
    outer["swa"].update_parameters(model)
    assert outer["swa"].n_averaged == 1  # it was the second call


BAD_STATES = {
    "missing": (lambda s: s.pop("module.last.weight"), r"AveragedModel.load_state_dict: module.last.weight is missing"),
    "count": (lambda s: s.pop("n_averaged"), "n_averaged is missing"),
    "unexpected": (lambda s: s.update({"module.other": torch.ones(1)}), "module.other is not of this model"),
    "shape": (lambda s: s.update({"module.scale": torch.ones(2)}), r"module.scale must have shape \(\), got \(2,\)"),
    "type": (lambda s: s.update({"module.scale": 1.0}), "module.scale must be a tensor, got float"),
    "meta": (lambda s: s.update({"module.scale": torch.ones((), device="meta")}), "module.scale must hold values"),
    "complex": (
        lambda s: s.update({"module.scale": torch.tensor(1j)}),
        "scale must have a dtype like torch.float32, got torch.com",
    ),
    "integer": (lambda s: s.update({"module.frozen": torch.arange(3)}), "like torch.float32, got torch.int64"),
    "fraction": (
        lambda s: s.update(n_averaged=torch.tensor(2.7)),
        "n_averaged must have a dtype like torch.int64, got",
    ),
    "bool": (lambda s: s.update(n_averaged=torch.tensor(True)), "n_averaged must have a dtype like torch.int64, got"),
    "negative": (lambda s: s.update(n_averaged=torch.tensor(-1)), "n_averaged must not be negative, got -1"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_load_state_dict_refuses_and_changes_nothing(case):
    averaged = lsf.AveragedModel(Net())
    before, state = copy.deepcopy(averaged.state_dict()), lsf.AveragedModel(Net()).state_dict()
    damage, message = BAD_STATES[case]
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        averaged.load_state_dict(state)
    assert_states(averaged.state_dict(), before, exact=True)


def test_load_state_dict_of_another_architecture_or_type():
    averaged = lsf.AveragedModel(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match="module.bias is missing; .* is not of this model"):
        averaged.load_state_dict(
            lsf.AveragedModel(nn.Bilinear(3, 2, 2, bias=False)).state_dict() | {"x": torch.ones(1)}
        )
    with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
        averaged.load_state_dict([])
    assert averaged.load_state_dict({}, strict=False).missing_keys


def test_copies_and_pickles():
    model = Net()
    averaged = lsf.AveragedModel(model, average="ema", decay=0.5)
    averaged.update_parameters(model)
    file = io.BytesIO()
    torch.save(averaged, file)
    file.seek(0)
    copies = [copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged)), torch.load(file, weights_only=False)]
    step(model)
    averaged.update_parameters(model)
    for other in copies:
        assert other.n_averaged == 1
        other.update_parameters(model)
        assert_states(other.state_dict(), averaged.state_dict(), exact=True)
