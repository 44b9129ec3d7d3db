"""What users write: every form of it, and what is wrong with it in words that name the line."""

import math
from pathlib import Path

import numpy as np
import pytest

from tasks.common.errors import ConfigError
from tasks.points import query_points
from tasks.points.query_points import (
    check_points,
    grid_points,
    model_queries,
    parse_clicks,
    read_points,
)

FPS = 25.0


def points_file(folder: Path, content: str | bytes) -> Path:
    path = folder / "points.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_columns_come_in_any_order_and_names_are_kept(tmp_path: Path) -> None:
    points = read_points(points_file(tmp_path, "ID , y,x,T\n a b ,2.5,1,0\n\nc,4,3.25, 7\n"), FPS)
    np.testing.assert_array_equal(points.query_txy, [[0, 1, 2.5], [7, 3.25, 4]])
    assert points.names == ("a b", "c")
    assert points.named
    assert points.origins[1].endswith("points.csv, line 4")
    plain = read_points(points_file(tmp_path, "x,y,t\r\n1,2,3\r\n"), FPS)
    assert (plain.names, plain.named) == (("0",), False)


def test_times_are_those_of_the_frame_on_the_screen(tmp_path: Path) -> None:
    times = [0, 0.0399, 0.04, 0.05, 0.08, 1.0, 3 / 25, 0.1199999]
    lines = "".join(f"1,1,{time!r}\n" for time in times)
    points = read_points(points_file(tmp_path, "x,y,time\n" + lines), FPS)
    assert points.query_txy[:, 0].tolist() == [0, 0, 1, 1, 2, 25, 3, 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty; needed: a line 'x,y,t' and a line per point"),
        ("x,y,t\n", "no points in it, only a header: there is nothing to track"),
        ("x;y;t\n1;2;3\n", "its header is 'x;y;t': columns must be separated by commas"),
        ("x,y\n1,2\n", "its columns are x, y; needed: x, y and one of t .frame. and time .seconds."),
        ("x,y,t,time\n1,2,3,4\n", "its columns are x, y, t, time; needed"),
        ("x,y,t,id,name\n1,2,3,4,5\n", "its columns are x, y, t, id, name; needed"),
        ("x,y,frame\n1,2,3\n", "unknown column 'frame' in the first line; needed: x, y and one of t"),
        ("1,2,3\n4,5,6\n", "unknown column '1' in the first line; needed"),
        ("x,y,t\n1,2\n", "line 2: 2 values; the header has 3 columns"),
        ("x,y,t\n1,2,3\n1,b,3\n", "line 3: y = 'b': must be a number"),
        ("x,y,t\n1,,3\n", "line 2: y = '': must be a number"),
        (
            "x,y,t,id\n1,2,3,a\n1,2,3,a\n",
            "line 3: the name 'a' is there twice: every point needs a name",
        ),
        ("x,y,t,id\n1,2,3,\n", "line 2: the name is missing"),
        (b"x,y,t\n\xff\xfe1,2,3\n", "cannot be read as a CSV file in UTF-8"),
        (b'x,y,t\n"1,2,3' + b"1" * 200_000, "cannot be read as a CSV file in UTF-8: field larger than"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = points_file(tmp_path, content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_points(path, FPS)
    assert str(caught.value).startswith(f"--points={path}")


def test_files_are_read_within_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_points, "MOST_POINTS", 3)
    path = points_file(tmp_path, "x,y,t\n" + "1,2,3\n" * 4)
    with pytest.raises(ConfigError, match="more than 3 points"):
        read_points(path, FPS)
    monkeypatch.setattr(query_points, "_MOST_BYTES", 10)
    with pytest.raises(ConfigError, match="30 bytes; the limit is 10"):
        read_points(path, FPS)
    with pytest.raises(ConfigError, match="is no file"):
        read_points(tmp_path, FPS)


def test_clicks_are_x_y_and_the_frame() -> None:
    points = parse_clicks(["10.5,20,3", "1, 2"])
    np.testing.assert_array_equal(points.query_txy, [[3, 10.5, 20], [0, 1, 2]])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_numbers_must_be_finite(tmp_path: Path, value: str, column: int) -> None:
    cells = ["1", "2", "3"]
    cells[column] = value
    for header in ("x,y,t", "x,y,time"):
        points = read_points(points_file(tmp_path, f"{header}\n{','.join(cells)}\n"), FPS)
        with pytest.raises(ConfigError, match=f"line 2: {'xyt'[column]} = {value}: must be a finite number"):
            check_points(points, 100, 200, 50)


def test_the_edges_of_the_picture_belong_to_it() -> None:
    check_points(parse_clicks(["0,0,0", "200,100,49"]), 100, 200, 50)
    for outside in ("200.01,0,0", "0,100.01,0", "-0.01,0,0", "0,-0.01,0", "5,5,50", "5,5,-1"):
        with pytest.raises(ConfigError, match="is outside of the video"):
            check_points(parse_clicks([outside]), 100, 200, 50)
    check_points(parse_clicks(["5,5,500"]), 100, 200, None)


def test_the_order_that_would_fit_all_is_named() -> None:
    wrong = parse_clicks(["50,150,0", "20,160,3", "20,30,3"])  # y, x, t
    with pytest.raises(ConfigError, match="2 of 3 points are wrong; read as y, x, t instead of x, y, t"):
        check_points(wrong, 100, 200, 50)
    mixed = parse_clicks(["50,150,0", "150,50,0"])  # no order fits both
    with pytest.raises(ConfigError, match=r"1 of 2 points are wrong$"):
        check_points(mixed, 100, 200, 50)
    fractions = parse_clicks(["3,150.5,60.5"])  # t, x, y: no whole frame
    with pytest.raises(ConfigError, match=r"t = 60\.5: must be a whole number.*read as t, x, y instead"):
        check_points(fractions, 100, 200, 50)


def test_shares_of_the_sides_are_not_taken_for_pixels() -> None:
    with pytest.raises(ConfigError, match="all 2 points lie in the first pixel: x and y are in pixels"):
        check_points(parse_clicks(["0.25,0.5", "0.75,0.5"]), 100, 200, 50)
    check_points(parse_clicks(["0.25,0.5"]), 100, 200, 50)


def test_a_grid_lies_in_the_middles_of_equal_cells() -> None:
    points = grid_points(2, 100, 200, 7)
    np.testing.assert_array_equal(points.query_txy, [[7, 50, 25], [7, 150, 25], [7, 50, 75], [7, 150, 75]])
    assert len(grid_points(141, 100, 200).names) == 141**2
    for count in (0, -3, 142):
        with pytest.raises(ConfigError, match=f"--grid={count}: must be from 1 to 141"):
            grid_points(count, 100, 200)


def test_the_model_gets_its_own_pixels() -> None:
    points = parse_clicks(["200,100,9", "100,25,0"])
    queries = model_queries(points, 100, 200, (256, 64))
    np.testing.assert_allclose(queries, [[9, 256, 64], [0, 64, 32]])
    assert queries.dtype == np.float32
    assert math.isclose(queries[1, 1], 25 * 256 / 100)
