"""Lists and official layouts: every form that is in use, and what is wrong with one that is not."""

import json
from pathlib import Path

import numpy as np
import pytest

from tasks.video.data import VideoDataConfig, VideoDataError, open_video_data
from tasks.video.data.layouts import kinetics_listings, ssv2_listing
from tasks.video.data.lists import classes_of, folder_listing, read_entries, resolve, split_by_name


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"video")
    return root


WANTED = [("a/one.mp4", "run"), ("b two.mp4", "jump high"), ("c.mp4", "run")]
LISTS = {
    "comma.csv": "a/one.mp4,run\nb two.mp4,jump high\nc.mp4,run\n",
    "quoted.csv": 'path,label\n"a/one.mp4","run"\n"b two.mp4",jump high\nc.mp4, run\n',
    "order.csv": "label,id,video_path\nrun,1,a/one.mp4\njump high,2,b two.mp4\nrun,3,c.mp4\n",
    "tab.txt": "a/one.mp4\trun\nb two.mp4\tjump high\nc.mp4\trun\n",
    "dicts.json": json.dumps([{"path": p, "label": c} for p, c in WANTED]),
    "other_names.json": json.dumps([{"class": c, "File": p, "fps": 3} for p, c in WANTED]),
    "pairs.json": json.dumps(WANTED),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_in_every_form(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\ufeff" + LISTS[name])
    assert read_entries(tmp_path / name) == WANTED
    touch(tmp_path, *(p for p, _ in WANTED))
    classes = classes_of(WANTED)
    listing = resolve(WANTED, classes, tmp_path, tmp_path / name)
    assert listing.classes == ("jump high", "run")
    assert listing.labels.tolist() == [1, 0, 1]
    assert listing.labels.dtype == np.int32
    assert listing.paths[1] == tmp_path / "b two.mp4"


def test_space_separated_lists_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("path label\na/one.mp4 3\nmy clip.mp4 0\n\n/absolute/clip.mp4 1\n")
    entries = read_entries(path)
    assert entries == [("a/one.mp4", "3"), ("my clip.mp4", "0"), ("/absolute/clip.mp4", "1")]
    assert classes_of(entries) == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "a.mp4,run\nb.mp4\n",
            r"a\.csv, line 2: 'b\.mp4': expected a path and a label, separated by a com",
        ),
        ("a.csv", "a.mp4 1\nb.mp4\n", r"line 2: 'b\.mp4': expected a path and a label, separated by a space"),
        ("a.csv", "\n\n", r"a\.csv: names no videos"),
        ("a.json", "{}", r"a\.json: a dict; expected a list of"),
        ("a.json", '[{"path": "x"}]', r'a\.json, entry 0: \{"path": "x"\}: expected a list of'),
        ("a.json", '[["x", 1.5]]', r"a\.json, entry 0"),
        ("a.json", '[["x", 1', r"a\.json: not JSON \(.* cut off\?\)"),
        ("a.json", "[" * 100_000, r"a\.json: n(ested too deep|ot JSON)"),
    ],
)
def test_bad_lists_name_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(VideoDataError, match=message):
        read_entries(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VideoDataError, match="not UTF-8 at byte 0"):
        read_entries(tmp_path / name)
    with pytest.raises(VideoDataError, match=r"none\.csv: no such file; expected a CSV or JSON list"):
        read_entries(tmp_path / "none.csv")


def test_unknown_classes_are_errors_and_missing_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4")
    where = tmp_path / "train.csv"
    entries = [("a.mp4", "run"), ("gone.mp4", "run"), ("lost.mp4", "jump")]
    listing = resolve(entries, ("jump", "run"), tmp_path, where)
    assert (len(listing), listing.missing) == (1, ("gone.mp4", "lost.mp4"))
    with pytest.raises(
        VideoDataError, match=r"train\.csv: 2 of 3 videos are not in .*: gone\.mp4, lost\.mp4$"
    ):
        resolve(entries, ("jump", "run"), tmp_path, where, missing="fail")
    with pytest.raises(VideoDataError, match=r"1 of 1 videos are not in"):
        resolve(entries[1:2], ("run",), tmp_path, where)
    with pytest.raises(
        VideoDataError, match=r"unknown class 'runn' of a\.mp4: there are 2 classes; did you mean 'run'"
    ):
        resolve([("a.mp4", "runn")], ("jump", "run"), tmp_path, where)
    for label in ("2", "-1", "99999999999999999999"):
        with pytest.raises(VideoDataError, match=f"unknown class '{label}'"):
            resolve([("a.mp4", label)], ("jump", "run"), tmp_path, where)
    with pytest.raises(VideoDataError, match=r"'\.\./a\.mp4' leads out of"):
        resolve([("../a.mp4", "run")], ("run",), tmp_path, where)
    with pytest.raises(VideoDataError, match="label 1000000000: class numbers run from 0"):
        classes_of([("a", "1000000000")])


def test_a_folder_per_class(tmp_path: Path) -> None:
    touch(tmp_path, "run/1.mp4", "run/deep/2.webm", "jump/3.MOV", "jump/notes.txt", "jump/.4.mp4", "5.mp4")
    listing = folder_listing(tmp_path)
    assert listing.classes == ("jump", "run")
    assert [(p.name, int(c)) for p, c in zip(listing.paths, listing.labels, strict=True)] == [
        ("3.MOV", 0), ("1.mp4", 1), ("2.webm", 1),
    ]  # fmt: skip
    with pytest.raises(
        VideoDataError, match=r"no lists \(train\.csv, train\.json\) and no folders of videos"
    ):
        folder_listing(touch(tmp_path / "flat", "1.mp4"))


def test_the_split_goes_by_name_and_does_not_move(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a/{i}.mp4" for i in range(100)))
    train, held = split_by_name(folder_listing(tmp_path), tmp_path, 0.2)
    assert 8 < len(held) < 35
    assert not set(train.paths) & set(held.paths)
    touch(tmp_path, *(f"a/new{i}.mp4" for i in range(50)))
    assert set(held.paths) <= set(split_by_name(folder_listing(tmp_path), tmp_path, 0.2)[1].paths)
    with pytest.raises(VideoDataError, match="all 1 videos fall into the validation split"):
        split_by_name(train.take([0]), tmp_path, 0.01)


def test_configured_lists_and_classes(tmp_path: Path) -> None:
    touch(tmp_path, "v/1.mp4", "v/2.mp4")
    (tmp_path / "tr.txt").write_text("v/1.mp4 1\n")
    (tmp_path / "va.json").write_text('[["v/2.mp4", "run"]]')
    (tmp_path / "names.txt").write_text("jump\nrun\nfall\n")
    config = VideoDataConfig(source="folder", path=str(tmp_path), train_list="tr.txt",
                             validation_list=str(tmp_path / "va.json"), class_list="names.txt")  # fmt: skip
    data = open_video_data(config, num_classes=3)
    assert data.classes == ("jump", "run", "fall")
    assert (data.train_videos.labels.tolist(), data.eval_videos.labels.tolist()) == ([1], [1])
    with pytest.raises(VideoDataError, match=r"model\.num_classes=2 is smaller than the 3 classes"):
        open_video_data(config, num_classes=2)
    (tmp_path / "names.txt").write_text("jump\njump\n")
    with pytest.raises(VideoDataError, match="the class 'jump' is there twice"):
        open_video_data(config)


# Something-Something v2


def make_ssv2(root: Path, *, prefix: str = "", folder: str = "labels/") -> Path:
    labels = {
        "Moving something up": "1",
        "Holding something": "0",
        "Pushing something from left to right": "2",
    }
    entries = [
        {
            "id": "78687",
            "label": "moving cup up",
            "template": "Moving [something] up",
            "placeholders": ["cup"],
        },
        {
            "id": "42326",
            "label": "x",
            "template": "Pushing [something] from left to right",
            "placeholders": ["x"],
        },
        {"id": "7", "label": "holding y", "template": "Holding [something]", "placeholders": ["y"]},
    ]
    (root / folder).mkdir(parents=True, exist_ok=True)
    contents = {
        "labels.json": labels,
        "train.json": entries,
        "validation.json": entries[:1],
        "test.json": [{"id": "1420"}],
    }
    for name, content in contents.items():
        (root / folder / f"{prefix}{name}").write_text(json.dumps(content))
    return touch(root, *(f"20bn-something-something-v2/{i}.webm" for i in (78687, 42326, 1420)))


@pytest.mark.parametrize(("prefix", "folder"), [("", "labels/"), ("something-something-v2-", "")])
def test_something_something(tmp_path: Path, prefix: str, folder: str) -> None:
    root = make_ssv2(tmp_path, prefix=prefix, folder=folder)
    train = ssv2_listing(root, "train")
    assert train.classes == (
        "Holding something", "Moving something up", "Pushing something from left to right",
    )  # fmt: skip
    assert [p.name for p in train.paths] == ["78687.webm", "42326.webm"]
    assert train.labels.tolist() == [1, 2]
    assert train.missing == ("7.webm",)
    assert ssv2_listing(root, "validation").labels.tolist() == [1]
    with pytest.raises(VideoDataError, match=r"1 of 3 videos are not in .*: 7\.webm"):
        ssv2_listing(root, "train", missing="fail")
    with pytest.raises(VideoDataError, match=r"test videos have labels only in test-answers\.csv"):
        ssv2_listing(root, "test")
    (root / folder / "test-answers.csv").write_text("1420;Holding something\n")
    assert ssv2_listing(root, "test").labels.tolist() == [0]
    (root / folder / "test-answers.csv").write_text("1421;Holding something\n")
    with pytest.raises(VideoDataError, match=r"entry 0: is not in test-answers\.csv: \{'id': '1420'\}"):
        ssv2_listing(root, "test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.json", {"Holding something": "one"}, r"class 'Holding something' has the number 'one'"),
        ("labels.json", {"Holding something": "4"}, r"1 classes must be numbered 0 to 0, each once"),
        ("labels.json", [], r"expected a table"),
        ("train.json", [{"id": "1"}], r"train\.json, entry 0: has no id and template"),
        ("train.json", [{"id": "../1", "template": "x"}], r"train\.json, entry 0: has no id and template"),
        (
            "train.json",
            [{"id": "7", "template": "Moving [something] upp"}],
            r"unknown class 'Moving something upp' of video 7: did you mean 'Moving something up'",
        ),
    ],
)
def test_what_is_not_something_something_is_named(tmp_path: Path, name: str, content, message: str) -> None:
    root = make_ssv2(tmp_path)
    (root / "labels" / name).write_text(json.dumps(content))
    with pytest.raises(VideoDataError, match=message):
        ssv2_listing(root, "train")


# Kinetics

HEADER = "label,youtube_id,time_start,time_end,split\n"


def make_kinetics(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "train.csv").write_text(
        HEADER + "playing guitar,-abc_DEF-01,20,30,train\nabseiling,xyz,5,15,train\ngolf,gone,1,11,train\n"
    )
    (root / "val.csv").write_text(HEADER + 'abseiling,val1,0,10,val\n"golf",val2,7.0,17.0,val\n')
    return touch(
        root,
        "train/playing guitar/-abc_DEF-01_000020_000030.mp4",
        "train/xyz_000005_000015.mkv",
        "old/xyz_000005_000015.mp4",
        "val/abseiling/val1_000000_000010.mp4",
        "val/val2.webm",
    )


def test_kinetics(tmp_path: Path) -> None:
    found = kinetics_listings(make_kinetics(tmp_path))
    train = found["train"]
    assert train.classes == ("abseiling", "golf", "playing guitar")
    assert [p.relative_to(tmp_path).as_posix() for p in train.paths] == [
        "train/playing guitar/-abc_DEF-01_000020_000030.mp4",
        "train/xyz_000005_000015.mkv",
    ]
    assert train.labels.tolist() == [2, 0]
    assert train.missing == ("gone_000001_000011.mp4",)
    assert found["validation"].labels.tolist() == [0, 1]
    assert [p.name for p in found["validation"].paths] == ["val1_000000_000010.mp4", "val2.webm"]
    (tmp_path / "val.csv").rename(tmp_path / "kinetics_400_validate.csv")
    assert len(kinetics_listings(tmp_path)["validation"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,youtube_id\na,b\n", r"val\.csv: no column 'time_start': expected the official header"),
        (HEADER + "golf,val2,x,17,val\n", r"val\.csv, line 2: times 'x', '17': expected seconds"),
        (HEADER + "golf,val2,,17,val\n", r"val\.csv, line 2: a value is missing"),
        (HEADER + "gulf,val2,7,17,val\n", r"line 2: unknown class 'gulf': did you mean 'golf'"),
    ],
)
def test_what_is_not_kinetics_is_named(tmp_path: Path, content: str, message: str) -> None:
    root = make_kinetics(tmp_path)
    (root / "val.csv").write_text(content)
    with pytest.raises(VideoDataError, match=message):
        kinetics_listings(root)
    (root / "val.csv").unlink()
    with pytest.raises(
        VideoDataError, match=r"no Kinetics list for the split validation \(looked for validation"
    ):
        kinetics_listings(root)
