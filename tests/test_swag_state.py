import pytest
import torch
from swag_models import Net, assert_same_state, state_of, walk
from torch import nn

import losssurf_fast as lsf


@pytest.mark.parametrize("no_cov_mat", [False, True])
def test_swag_state_dict_round_trip(no_cov_mat, tmp_path):
    model = Net()
    make = lambda: lsf.SWAG(model, max_num_models=3, no_cov_mat=no_cov_mat)
    swag, other = make(), make()
    shapes = {k: v.shape for k, v in swag.state_dict().items()}
    walk(model, 5, swag)
    assert {k: v.shape for k, v in swag.state_dict().items()} == shapes
    assert any("deviations" in k for k in shapes) != no_cov_mat
    torch.save(swag.state_dict(), tmp_path / "swag.pt")
    other.load_state_dict(torch.load(tmp_path / "swag.pt", weights_only=True))
    assert other.n_models == 5
    assert_same_state(other, state_of(swag))
    walk(model, 2, swag, other)
    assert_same_state(other, state_of(swag))
    assert all(torch.equal(a, other.samples(2, seed=1)[n]) for n, a in swag.samples(2, seed=1).items())


@pytest.mark.parametrize(
    "spoil, error, match",
    [
        (lambda s: s.pop("base.head.bias_m2"), ValueError, "missing keys .'base.head.bias_m2'. of 1"),
        (lambda s: s.update(more=torch.zeros(1)), ValueError, "unexpected keys .'more'. of 1"),
        (lambda s: s.update({"base.scale_mean": torch.zeros(2)}), ValueError, "base.scale_mean must have shape"),
        (lambda s: s.update({"base.scale_mean": 3}), TypeError, "must be a tensor, got int"),
        (lambda s: s.update(n_models=torch.tensor(0.5)), TypeError, "n_models must be like torch.int64"),
        (lambda s: s.update(n_models=torch.tensor(-1)), ValueError, "n_models must not be negative"),
    ],
)
def test_swag_refuses_checkpoints(spoil, error, match):
    model = Net()
    swag, other = lsf.SWAG(model), lsf.SWAG(model)
    walk(model, 3, swag)
    walk(model, 2, other)
    state, before = dict(other.state_dict()), state_of(swag)
    spoil(state)
    with pytest.raises(error, match=match):
        swag.load_state_dict(state)
    assert_same_state(swag, before)


def test_swag_refuses_foreign_checkpoints():
    swag = lsf.SWAG(Net())
    with pytest.raises(ValueError, match="missing keys"):
        swag.load_state_dict(Net().state_dict())
    with pytest.raises(ValueError, match="no_cov_mat=False"):
        swag.load_state_dict(lsf.SWAG(Net(), no_cov_mat=True).state_dict())
    with pytest.raises(ValueError, match="deviations must have shape .20, 1, 3., got .5, 1, 3."):
        swag.load_state_dict(lsf.SWAG(Net(), max_num_models=5).state_dict())
    with pytest.raises(TypeError, match="mapping"):
        swag.load_state_dict(None)


@pytest.mark.parametrize("steps, columns", [(2, 4), (4, 4), (7, 4), (9, 4)])
def test_swag_to_and_from_swa_gaussian(steps, columns):
    model = Net()
    swag = lsf.SWAG(model, max_num_models=columns)
    seen = walk(model, steps, swag)
    theirs = swag.to_swa_gaussian()
    held = min(steps, columns)
    assert theirs["n_models"].tolist() == [steps] and theirs["base.bn.running_var"].shape == (5,)
    for name, w in seen.items():
        columns_of = theirs[f"base.{name}_cov_mat_sqrt"]
        assert columns_of.shape == (held, w[0].numel())
        torch.testing.assert_close(columns_of[-1], (w[-1] - w.mean(0)).flatten())
        oldest = steps - held
        torch.testing.assert_close(columns_of[0], (w[oldest] - w[: oldest + 1].mean(0)).flatten())
        torch.testing.assert_close(theirs[f"base.{name}_sq_mean"], w.square().mean(0))
    back = lsf.SWAG.from_swa_gaussian(theirs, model, max_num_models=columns)
    assert back.n_models == steps
    for key, value in swag.state_dict().items():
        tolerance = {"rtol": 1e-3, "atol": 1e-5} if key.endswith("_m2") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(back.state_dict()[key], value, **tolerance)
    fewer = lsf.SWAG.from_swa_gaussian(theirs, model, max_num_models=2).state_dict()["base.head.weight_deviations"]
    newest = theirs["base.head.weight_cov_mat_sqrt"][-2:].view(2, 3, 5)
    assert torch.equal(fewer[(steps - 1) % 2], newest[1]) and torch.equal(fewer[steps % 2], newest[0])
    assert lsf.SWAG.from_swa_gaussian(theirs, model).max_num_models == (20 if steps <= columns else columns)


def test_swag_refuses_swa_gaussian_states():
    model = nn.Linear(2, 2)
    swag = lsf.SWAG(model, max_num_models=3)
    walk(model, 5, swag)
    good = swag.to_swa_gaussian()
    convert = lambda change, **options: lsf.SWAG.from_swa_gaussian({**good, **change}, model, **options)
    cases = [
        ({"n_models": torch.tensor([2])}, {}, ValueError, "one r <= n_models, got n_models 2 and rows .3."),
        ({"base.bias_cov_mat_sqrt": torch.zeros(2, 2)}, {}, ValueError, "rows .2, 3."),
        ({"base.bias_cov_mat_sqrt": torch.zeros(3, 9)}, {}, ValueError, "bias_cov_mat_sqrt must have shape .3, 2."),
        ({"base.bias_mean": torch.zeros(9)}, {}, ValueError, "bias_mean must have shape .2,., got .9,."),
        ({"base.more": torch.zeros(9)}, {}, ValueError, "unexpected keys .'base.more'."),
        ({"base.bias_mean": None}, {}, TypeError, "must be a tensor, got NoneType"),
        ({}, {"max_num_models": 4}, ValueError, "at most the 3 deviations"),
    ]
    for change, options, error, match in cases:
        with pytest.raises(error, match=match):
            convert(change, **options)
    with pytest.raises(ValueError, match="n_models"):
        lsf.SWAG.from_swa_gaussian({}, model)
    truncated = {k: v for k, v in good.items() if k != "base.bias_sq_mean"}
    with pytest.raises(ValueError, match="missing keys .'base.bias_sq_mean'."):
        lsf.SWAG.from_swa_gaussian(truncated, model)
    diagonal = {k: v for k, v in good.items() if "cov" not in k}
    assert lsf.SWAG.from_swa_gaussian(diagonal, model).no_cov_mat
    none_kept = {k: v[:0] if "cov" in k else v for k, v in good.items()}
    assert lsf.SWAG.from_swa_gaussian(none_kept, model).no_cov_mat


class Parent(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.net, self.head = Net(), nn.Linear(2, 2)
        self.swag = lsf.SWAG(self.net, max_num_models=3, **options)


@pytest.mark.parametrize("assign", [False, True])
def test_swag_as_a_part_of_another_module(assign, tmp_path):
    parent, other, empty = Parent(), Parent(), Parent()
    walk(parent.net, 5, parent.swag)
    parent.swag.sample(seed=1)
    other.swag.collect_model(other.net)
    other.swag.sample(seed=2)
    drawn = {name: (p, p.clone()) for name, p in other.swag.module.named_parameters()}
    assert {k: v.shape for k, v in parent.state_dict().items()} == {k: v.shape for k, v in empty.state_dict().items()}
    ours = {k.removeprefix("swag."): v for k, v in parent.state_dict().items() if k.startswith("swag.")}
    assert ours.keys() == parent.swag.state_dict().keys()
    torch.save(parent.state_dict(), tmp_path / "parent.pt")
    other.load_state_dict(torch.load(tmp_path / "parent.pt", weights_only=True), assign=assign)
    assert_same_state(other.swag, state_of(parent.swag))
    assert torch.equal(other.head.weight, parent.head.weight) and other.swag.n_models == 5
    for name, p in other.swag.module.named_parameters():
        assert p is drawn[name][0] and torch.equal(p, drawn[name][1])
    walk(parent.net, 2, parent.swag, other.swag)
    assert_same_state(other.swag, state_of(parent.swag))
    assert all(torch.equal(p, parent.swag.sample(seed=3)[name]) for name, p in other.swag.sample(seed=3).items())


def test_swag_in_another_module_refuses_checkpoints():
    parent, other = Parent(), Parent()
    walk(parent.net, 3, parent.swag)
    walk(other.net, 2, other.swag)
    before = state_of(other.swag)
    cases = {
        r"Missing key.*swag.base.scale_m2": lambda s: s.pop("swag.base.scale_m2"),
        r"Unexpected key.*swag.more": lambda s: s.update({"swag.more": torch.zeros(1)}),
        r"Unexpected key.*swag.module.scale": lambda s: s.update({"swag.module.scale": torch.zeros(())}),
        r"swag.load_state_dict: base.scale_mean must have": lambda s: s.update(
            {"swag.base.scale_mean": torch.zeros(2)}
        ),
        r"swag.load_state_dict: n_models must not": lambda s: s.update({"swag.n_models": torch.tensor(-1)}),
        r"swag.state_dict's base.scale_mean must be a tensor": lambda s: s.update({"swag.base.scale_mean": 3}),
    }
    for message, spoil in cases.items():
        state = dict(parent.state_dict())
        spoil(state)
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(state)
        if "Unexpected" in message:
            other.swag.load_state_dict(before)
        assert_same_state(other.swag, before)
    with pytest.raises(RuntimeError, match="Unexpected key.*swag.base.token_deviations"):
        Parent(no_cov_mat=True).load_state_dict(parent.state_dict())
    state = {k: v for k, v in parent.state_dict().items() if k != "swag.n_models"}
    assert other.load_state_dict(state, strict=False).missing_keys == ["swag.n_models"]
    assert_same_state(other.swag, before)
    without = {k: v for k, v in parent.swag.state_dict().items() if k != "n_models"}
    assert other.swag.load_state_dict(without, strict=False).missing_keys == ["n_models"]
    assert_same_state(other.swag, before)
    other.swag.load_state_dict(parent.swag.state_dict() | {"more": torch.zeros(1)}, strict=False)
    assert_same_state(other.swag, state_of(parent.swag))
