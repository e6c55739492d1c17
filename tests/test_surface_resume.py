"""A run with a path that is killed goes on where it was; files that are not its own are refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from surface_models import Quadratic, mean_loss, quadratic_loader
from surface_run import run

import losssurf_fast as lsf
from losssurf_fast.evaluation import Evaluation
from losssurf_fast.surface import Line, Rays

HERE = Path(__file__).parent
KINDS = {"plane": lsf.Surface, "line": Line, "rays": Rays}
POINTS = {"plane": 20, "line": 20, "rays": 1 + 3 * 7}


def assert_same(found, expected):
    assert found.values.keys() == expected.values.keys() == {"train_loss", "train_error", "test_loss", "test_error"}
    for name, values in expected.values.items():
        assert np.array_equal(found.values[name], values), name  # every bit
    assert found.done.all()


@pytest.mark.parametrize("tool", KINDS)
def test_a_killed_run_goes_on_where_it_was(tool, tmp_path):
    path, expected = tmp_path / "run.npz", run(tool)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, str(HERE / "surface_run.py"), tool, str(path), "0.01"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(7):
            assert process.stdout.readline() == "point\n"  # the seventh is being measured
        time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
        later = process.stdout.read().count("point")
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(
        ValueError, match=rf"{KINDS[tool].kind}\.load: .* of {expected.done.size} points; make the same"
    ):
        KINDS[tool].load(path)
    measured = []
    found = run(tool, path, on_point=lambda: measured.append(1))
    begun = 7 + later  # the last of them was lost, or just finished
    assert POINTS[tool] - begun <= len(measured) <= POINTS[tool] - begun + 1
    assert_same(found, expected)
    assert_same(KINDS[tool].load(path), expected)


@pytest.mark.parametrize("tool", KINDS)
def test_runs_interrupted_at_every_point_measure_each_once(tool, tmp_path):
    path, measured = tmp_path / "run.npz", 0

    def interrupt():
        nonlocal measured
        measured += 1
        if measured % 3 == 0:
            raise KeyboardInterrupt

    found = None
    for _ in range(POINTS[tool]):
        try:
            found = run(tool, path, on_point=interrupt)
            break
        except KeyboardInterrupt:
            continue
    assert_same(found, run(tool))
    assert measured - measured // 3 == POINTS[tool]  # every third was interrupted, and measured once more
    assert run(tool, path, on_point=lambda: pytest.fail("a finished run measured a point")).done.all()
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]


def quadratic_plane(path, models=None, live=None, loader=None, **kwargs):
    plane = lsf.Plane.through(*(models or (Quadratic(seed) for seed in (1, 2, 3))), **kwargs.pop("plane", {}))
    kwargs = {"points": 3, "loss_fn": mean_loss, "path": path, "progress": False} | kwargs
    return plane.evaluate(live or Quadratic(), loader or quadratic_loader(), **kwargs)


def other_loss(outputs, targets):
    return 2 * outputs.mean()


def changed_buffer():
    model = Quadratic()
    model.matrix_centre[0, 0] += 1
    return model


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"models": [Quadratic(1), Quadratic(2), Quadratic(4)]}, "weights"),
        ({"points": 4}, "grid"),
        ({"margin": 0.3}, "grid"),
        ({"loss_fn": other_loss}, "loss_fn"),
        ({"metrics": {"twice": other_loss}}, "metrics"),
        ({"loader": quadratic_loader() * 2}, "loader"),
        ({"loader": {"test": quadratic_loader()}}, "loader"),
        ({"live": changed_buffer()}, "the model's buffers"),
    ],
)
def test_the_file_of_another_run_is_refused_and_kept(changes, what, tmp_path):
    path = tmp_path / "plane.npz"
    quadratic_plane(path)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=f"Plane.evaluate: path .*plane.npz holds another run, which differs in {what};"
    ):
        quadratic_plane(path, **changes)
    assert path.read_bytes() == before


def test_labels_and_trajectories_do_not_make_another_run(tmp_path, monkeypatch):
    path = tmp_path / "plane.npz"
    quadratic_plane(path)
    monkeypatch.setattr(Evaluation, "__call__", lambda *args: pytest.fail("measured again"))
    quadratic_plane(path, plane={"labels": ("a", "b", "c")}, trajectories={"list": [Quadratic(5)]})
    loaded = lsf.Surface.load(path)
    assert [*loaded.marks] == ["a", "b", "c"] and [*loaded.trajectories] == ["list"]


def test_the_file_of_another_tool_is_refused(tmp_path):
    path = tmp_path / "line.npz"
    lsf.line(Quadratic(), Quadratic(1), Quadratic(2), quadratic_loader(), points=3, loss_fn=mean_loss, path=path)
    with pytest.raises(ValueError, match=r"Plane.evaluate: .*line.npz must hold a Surface, it holds a Line"):
        quadratic_plane(path)
    with pytest.raises(ValueError, match=r"Surface.load: .*line.npz must hold a Surface, it holds a Line"):
        lsf.Surface.load(path)


def test_damaged_files_are_refused_and_kept(tmp_path):
    path = tmp_path / "plane.npz"
    quadratic_plane(path)
    whole = path.read_bytes()
    torn = [whole[:0], whole[: len(whole) // 2], whole[:-1], b"x" * 100]
    torn.append(bytes(b ^ 0xFF if 300 < i < 340 else b for i, b in enumerate(whole)))
    for damaged in torn:
        path.write_bytes(damaged)
        for call in (lambda: quadratic_plane(path), lambda: lsf.Surface.load(path)):
            with pytest.raises(ValueError, match=r"(Plane.evaluate|Surface.load): .*plane.npz is damaged"):
                call()
        assert path.read_bytes() == damaged


def rewrite(path, **changes):
    with np.load(path) as file:
        arrays = {**{name: file[name] for name in file.files}, **changes}
    np.savez(path, **{name: a for name, a in arrays.items() if a is not None})


@pytest.mark.parametrize(
    "changes",
    [
        {"done": None},
        {"xs": None},
        {"done": np.ones((2, 2), bool)},
        {"values.loss": np.ones(9)},
        {"identity": np.array("{")},
    ],
)
def test_files_with_wrong_contents_are_refused(changes, tmp_path):
    path = tmp_path / "plane.npz"
    quadratic_plane(path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=r"Plane.evaluate: .*plane.npz is damaged"):
        quadratic_plane(path)


def test_files_with_pickled_objects_are_not_opened(tmp_path):
    path = tmp_path / "plane.npz"
    np.savez(path, allow_pickle=True, kind=np.array([print], dtype=object))
    with pytest.raises(ValueError, match=r"Surface.load: .* is damaged, or no npz file of numbers and strings$"):
        lsf.Surface.load(path)


def test_a_path_that_cannot_be_written_fails_before_anything_is_measured(tmp_path):
    fail = lambda outputs, targets: pytest.fail("measured")
    with pytest.raises(FileNotFoundError):
        quadratic_plane(tmp_path / "no" / "plane.npz", loss_fn=fail)
    with pytest.raises(IsADirectoryError):
        quadratic_plane(tmp_path, loss_fn=fail)


def test_load_needs_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        lsf.Surface.load(tmp_path / "plane.npz")


@pytest.mark.parametrize("tool", KINDS)
def test_save_and_load_keep_every_bit(tool, tmp_path):
    path, before = tmp_path / "result.npz", run(tool)
    before.save(path)
    after = KINDS[tool].load(path)
    assert_same(after, before)
    for name, array in before.arrays().items():
        np.testing.assert_array_equal(after.arrays()[name], array)


def test_a_surface_has_the_peers_fields(tmp_path):
    path, surface = tmp_path / "plane.npz", run("plane")
    surface.save(path)
    with np.load(path) as file:
        assert file["grid"].shape == (5, 4, 2)
        np.testing.assert_array_equal(file["grid"][2, 3], [surface.xs[2], surface.ys[3]])
        np.testing.assert_array_equal(file["bend_coordinates"], [*surface.marks.values()])
        np.testing.assert_array_equal(file["tr_loss"], surface.values["train_loss"])
        np.testing.assert_array_equal(file["te_err"], 100 * surface.values["test_error"])
        np.testing.assert_array_equal(file["te_acc"], 100 - 100 * surface.values["test_error"])
