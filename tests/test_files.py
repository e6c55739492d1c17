"""What is written is whole, where it was asked for, or refused; what is read is that, or named as something else."""

import os
import stat

import numpy as np
import pytest
import torch
from surface_models import Quadratic, mean_loss, quadratic_loader

import losssurf_fast as lsf
from losssurf_fast.files import load_arrays, load_state, save_arrays, save_state
from losssurf_fast.neb import NEBReport
from losssurf_fast.surface import Line, Rays


def line():
    return lsf.line(
        Quadratic(), Quadratic(1), Quadratic(2), quadratic_loader(), points=3, loss_fn=mean_loss, progress=False
    )


def report():
    values = {"train": {"loss": np.ones(2), "nll": np.ones(2)}}
    return lsf.CurveReport(np.array([0.0, 1]), np.array([0.0, 1]), np.ones(2), values, 0.0)


@pytest.mark.parametrize("name", ["picture", "run_lr0.5", ".png", "picture.pngg", "picture.", "png"])
def test_pictures_without_a_format_are_refused_before_anything_is_written(name, tmp_path):
    for plotted in (line(), report()):
        with pytest.raises(ValueError, match=rf"plot: path must end in .* \.png, .*got '.*{name}'"):
            plotted.plot(tmp_path / name)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["picture.png", "run_lr0.5.PNG", "a b.pdf"])
def test_pictures_lie_where_they_were_asked_for(name, tmp_path):
    line().plot(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    "write", [lambda path: line().plot(path), lambda path: line().save(path), lambda path: save_state({}, path)]
)
def test_errors_name_the_path_that_was_given(write, tmp_path):
    for path, error in ((tmp_path / "no" / "x.png", FileNotFoundError), (tmp_path / "d.png", IsADirectoryError)):
        (tmp_path / "d.png").mkdir(exist_ok=True)
        with pytest.raises(error) as found:
            write(path)
        assert found.value.filename == str(path) and found.value.filename2 is None
        assert str(path) in str(found.value)
    assert [p.name for p in tmp_path.iterdir()] == ["d.png"]


def test_a_full_disk_is_an_error_that_names_the_path(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*x\.npz'"):
        save_arrays({"a": np.ones(3)}, tmp_path / "x.npz")
    assert not [*tmp_path.iterdir()]


def test_rights_of_the_older_file_are_kept(tmp_path):
    path = tmp_path / "x.npz"
    line().save(path)
    os.chmod(path, 0o640)
    line().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def foreign(path, kind):
    if kind == "text":
        path.write_text("not an array\n")
    elif kind == "npy":
        path.write_bytes(b"")
        np.save(path.with_suffix(".npy"), np.ones(3))
        path.with_suffix(".npy").rename(path)
    elif kind == "npz":
        np.savez(path, a=np.ones(3))
    else:
        torch.save(Quadratic(), path)


LOADERS = {
    "Surface.load": lsf.Surface.load,
    "Line.load": Line.load,
    "Rays.load": Rays.load,
    "CurveReport.load": lsf.CurveReport.load,
    "NEBReport.load": NEBReport.load,
    "MinimaGraph.load": lambda path: lsf.MinimaGraph.load(path, Quadratic()),
}


@pytest.mark.parametrize("kind", ["text", "npy", "npz", "pickled"])
@pytest.mark.parametrize("caller", LOADERS)
def test_foreign_files_get_one_clear_message(caller, kind, tmp_path):
    path = tmp_path / "x.npz"
    foreign(path, kind)
    with pytest.raises(ValueError, match=rf"^{caller}: .*x\.npz") as found:
        LOADERS[caller](path)
    message = str(found.value)
    assert "\n" not in message and "no such file" not in message and len(message) < len(str(path)) + 120
    for error in (found.value, found.value.__cause__):
        assert "allow_pickle" not in str(error) and "weights_only" not in str(error)


def test_a_report_without_a_column_is_refused(tmp_path):
    path = tmp_path / "curve.npz"
    report().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    for column in ("tr_nll", "tr_loss"):
        np.savez(path, **{name: a for name, a in arrays.items() if name != column})
        with pytest.raises(ValueError, match=rf"CurveReport.load: .*curve.npz is no file of .* lacks {column}"):
            lsf.CurveReport.load(path)


def test_a_state_with_code_is_not_read(tmp_path):
    torch.save({"a": print}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="X.load: .*x.pt is damaged or no file of X$"):
        load_state("X.load", tmp_path / "x.pt")


def test_a_number_is_no_path(tmp_path):
    """open takes it for the number of an open file, and closes that."""
    with open(tmp_path / "file", "w") as file:
        for load in (load_state, load_arrays):
            with pytest.raises(TypeError, match="X.load: path must be a str or os.PathLike, got int"):
                load("X.load", file.fileno())
        file.write("still open")
