"""How pictures end: with two sides, in a file that is whole."""

from losssurf_fast.figures import finish, new_figure


def sides(figure):
    return [axes.spines[side].get_visible() for axes in figure.axes for side in ("left", "bottom", "top", "right")]


def test_finish_takes_two_sides_off_every_panel_and_saves(tmp_path):
    figure = new_figure(3, 2)
    figure.subplots(1, 2)
    assert finish(figure) is figure and not list(tmp_path.iterdir())
    assert sides(figure) == [True, True, False, False] * 2
    assert finish(figure, tmp_path / "a.png") is figure
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


def test_a_framed_figure_keeps_its_sides():
    figure = new_figure(3, 2)
    figure.add_subplot()
    assert sides(finish(figure, framed=True)) == [True] * 4
