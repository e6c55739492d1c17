import copy
import os
import stat

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import losssurf_fast as lsf


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3))


def data(batches=12, size=9):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    return [(draw(size, 5), torch.randint(3, (size,), generator=generator)) for _ in range(batches)]


def train(model, fge, sgd, batches):
    for x, y in batches:
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
        fge.step()


def trained(batches=12):
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=9.0, momentum=0.9)
    fge = lsf.FGE(model, sgd, cycle=4, lr_1=0.1, lr_2=0.01)
    train(model, fge, sgd, data(batches))
    return model, sgd, fge


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_members_are_the_weights_after_the_steps_at_the_lowest_rate():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    fge = lsf.FGE(model, sgd, cycle=4, lr_1=0.1, lr_2=0.01)
    expected = []
    for step, batch in enumerate(data()):
        before = len(fge.members)
        train(model, fge, sgd, [batch])
        if step % 4 == 2:
            expected.append(bits(model))
        assert len(fge.members) - before == (step % 4 == 2)
    assert len(fge.members) == 3
    for member, weights in zip(fge.members, expected, strict=True):
        assert_same(member, weights)


def test_predict_is_the_mean_of_the_members_softmaxes():
    model, _, fge = trained()
    before, x = bits(model), torch.randn(4, 5)
    model.train()
    model[2].eval()
    expected = []
    for member in fge.members:
        other = network()
        other.load_state_dict(member)
        expected.append(other.eval()(x).softmax(-1))
    torch.testing.assert_close(fge.predict(x), torch.stack(expected).mean(0))
    assert_same(bits(model), before)
    assert [m.training for m in model] == [True, True, False, True]


def test_recalibrated_members():
    model, _, fge = trained()
    loader, x, before = [x for x, _ in data(5)], torch.randn(4, 5), bits(model)
    expected = []
    for member in fge.members:
        other = network()
        other.load_state_dict(member)
        lsf.update_bn(loader, other)
        expected.append(other.eval()(x).softmax(-1))
    expected = torch.stack(expected).mean(0)
    plain = fge.predict(x)
    torch.testing.assert_close(fge.predict(x, bn_loader=loader), expected)
    torch.testing.assert_close(fge.predict(x), plain)  # only for that call
    fge.update_bn(loader)
    torch.testing.assert_close(fge.predict(x), expected)
    assert (expected - plain).abs().max() > 1e-3
    assert_same(bits(model), before)


def test_model_is_restored_after_an_exception():
    model, _, fge = trained()
    model[0].weight.data[0, 0] = float("nan")
    before = bits(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fge.predict(torch.randn(4, 6))
    with pytest.raises(ValueError, match="update_bn: loader"):
        fge.update_bn([])
    after = bits(model)
    assert all(torch.equal(after[n].view(torch.uint8), t.view(torch.uint8)) for n, t in before.items() if t.dim())


def test_resume_gives_the_same_members(tmp_path):
    _, _, whole = trained(batches=12)
    model, sgd, fge = trained(batches=5)
    fge.save(tmp_path / "fge.pt")
    resumed = copy.deepcopy(model)
    resumed_sgd = torch.optim.SGD(resumed.parameters(), lr=9.0, momentum=0.9)
    again = lsf.FGE(resumed, resumed_sgd, cycle=4, lr_1=0.1, lr_2=0.01)
    again.load(tmp_path / "fge.pt")
    resumed_sgd.load_state_dict(copy.deepcopy(sgd.state_dict()))
    torch.manual_seed(3)
    train(model, fge, sgd, data()[5:])
    torch.manual_seed(3)
    train(resumed, again, resumed_sgd, data()[5:])
    assert len(again.members) == len(whole.members) == 3
    for a, b in zip(fge.members, again.members, strict=True):
        assert_same(a, b)
    predictions = lsf.FGE(network())  # without an optimizer: only the members
    predictions.load(tmp_path / "fge.pt")
    assert_same(predictions.members[0], again.members[0])


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_rights_of_other_new_files(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        trained(batches=4)[2].save(tmp_path / "fge.pt")
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["fge.pt"]
    assert stat.S_IMODE((tmp_path / "fge.pt").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_file_that_is_written_over_keeps_its_rights(mode, tmp_path):
    fge, path = trained(batches=4)[2], tmp_path / "fge.pt"
    fge.save(path)
    path.chmod(mode)
    fge.collect_model()
    fge.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    fge.load(path)
    assert len(fge.members) == 2


def test_tied_weights_other_model_and_half_precision():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
            self.b = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model, other = Tied(), Tied()
    fge = lsf.FGE(model, device=None)
    fge.collect_model(torch.compile(other))
    assert [(n, t.dtype) for n, t in fge.members[0].items()] == [("a.weight", torch.bfloat16)]
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    assert fge.predict(x).dtype == torch.float32
    torch.testing.assert_close(fge.predict(x), other(x).detach().float().softmax(-1))


def test_bad_input(tmp_path):
    model, sgd, fge = trained(batches=4)
    empty = lsf.FGE(model)
    for call in (lambda: empty.predict(torch.zeros(1, 5)), lambda: empty.update_bn(data())):
        with pytest.raises(RuntimeError, match="FGE.*: there are no members yet"):
            call()
    with pytest.raises(RuntimeError, match="FGE.step: there is no schedule"):
        empty.step()
    with pytest.raises(TypeError, match="FGE: model must be a torch.nn.Module, got int"):
        lsf.FGE(3)
    with pytest.raises(ValueError, match="FGE: cycle=4 needs the optimizer"):
        lsf.FGE(model, cycle=4)
    with pytest.raises(ValueError, match="cycle must be a positive int, got None"):
        lsf.FGE(model, sgd)
    with pytest.raises(ValueError, match="FGE.collect_model: the model must have the tensors of the average"):
        fge.collect_model(nn.Linear(5, 3))
    with pytest.raises(TypeError, match="FGE.collect_model: model must be a torch.nn.Module, got int"):
        fge.collect_model(3)
    with pytest.raises(ValueError, match="FGE.load_state_dict: state must have the keys"):
        fge.load_state_dict({"members": []})
    with pytest.raises(ValueError, match="FGE.load_state_dict: state was saved without a schedule"):
        fge.load_state_dict(empty.state_dict())
    for members in (3, [3], [{"0.weight": 3}]):
        with pytest.raises(ValueError, match="FGE.load_state_dict: state.'members'. must be a list of dicts"):
            fge.load_state_dict({**fge.state_dict(), "members": members})
    schedule, before = fge.schedule.state_dict(), fge.state_dict()
    spoiled = {
        "lacks cycle, last_epoch": (
            ValueError,
            {k: v for k, v in schedule.items() if k not in ("cycle", "last_epoch")},
        ),
        "last_epoch must be an int of at least 0, got 'x'": (ValueError, schedule | {"last_epoch": "x"}),
        "cycle must be even, got 3": (ValueError, schedule | {"cycle": 3}),
        "lr_1 must be one number or 1, one for each group, got 2": (ValueError, schedule | {"lrs_1": [0.1, 0.1]}),
        "lr_2 must be a number, got NoneType": (TypeError, schedule | {"lrs_2": [None]}),
    }
    for message, (error, state) in spoiled.items():
        with pytest.raises(error, match=f"FGETriangleLR.load_state_dict: .*{message}"):
            fge.load_state_dict({"members": before["members"] * 2, "schedule": state})
        assert len(fge.members) == 1 and fge.state_dict()["schedule"] == before["schedule"]
    wide = lsf.FGE(nn.Sequential(nn.Linear(6, 7), *network()[1:]))
    with pytest.raises(ValueError, match=r"FGE.load_state_dict: 0.weight must have shape \(7, 6\), got \(7, 5\)"):
        wide.load_state_dict(fge.state_dict())
    path = tmp_path / "fge.pt"
    fge.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="FGE.load: .*fge.pt is damaged or no file of FGE"):
        fge.load(path)
    with pytest.raises(FileNotFoundError):
        fge.load(tmp_path / "none.pt")
    assert len(fge.members) == 1
    assert wide.members == ()
