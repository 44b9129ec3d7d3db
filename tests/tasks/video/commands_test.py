"""What `tasks.video.train` and `tasks.video.eval` refuse, in a line that names it; and what they print."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from models import trecvit
from tasks.common.checkpoint import CheckpointError
from tasks.common.config import make_parser, parse_command_line, save_resolved, to_json
from tasks.common.errors import ConfigError
from tasks.common.writer import FILE_NAME
from tasks.video import eval as evaluation
from tasks.video import train, trained
from tasks.video.config import SCHEMA, VideoConfig, freeze_all
from tasks.video.evaluators import class_names
from tasks.video.reconstruction import _to_frames
from tasks.video.reports import final_figures, print_figures, print_summary
from tasks.video.trained import initial_params, open_model, read_classes, write_classes
from tests.tasks.common.video.video_files import numbered_frames, write_video

SMALL = (
    "--config.model.width=32",
    "--config.model.depth=1",
    "--config.model.mlp_size=64",
    "--config.model.num_heads=2",
    "--config.model.rep_size=32",
    "--config.train.steps=2",
    "--config.log.progress=false",
)

CHANGE = ("--config.mae.target=change", "--config.mae.normalize=false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training videos of two classes, two held out."""
    root = tmp_path_factory.mktemp("set")
    for name in ("0", "1", "2", "3", "v0", "v1"):
        write_video(root / f"{name}.mp4", numbered_frames(8), codec="mpeg4")
    (root / "train.csv").write_text("0.mp4,jump\n1.mp4,run\n2.mp4,jump\n3.mp4,run\n")
    (root / "validation.csv").write_text("v0.mp4,jump\nv1.mp4,run\n")
    return root


def words(folder: Path | str, *options: str, args: str = "") -> list[str]:
    config = (
        f"configs/trecvit.py:data=folder,path={folder},classes=2,videos=4,recipe=small,size=mini,image=32,"
        f"frames=8,batch=4{',' if args else ''}{args}"
    )
    return [f"--config={config}", *SMALL, *options]


def frozen(folder: Path, *options: str, args: str = "") -> VideoConfig:
    line = parse_command_line(make_parser(""), words(folder, *options, args=args), schema=SCHEMA)
    return freeze_all(line.config)


def refused(tmp_path: Path, *command: str, match: str) -> None:
    """The training command fails by a ConfigError, before anything was trained."""
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match=match):
        train.main([*command, f"--workdir={workdir}"])
    assert not list(workdir.glob("checkpoints/*"))
    assert not (workdir / FILE_NAME).exists() or not (workdir / FILE_NAME).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--config.augment.size=16x16"],
            r"augment\.size = \(16, 16\), model\.image_size = \(32, 32\): the model must see frames",
        ),
        (
            ["--config.model.frames_per_clip=2", "--config.data.frames=7"],
            r"data\.frames = 7 make 3 clips of model\.frames_per_clip = 2, and do not divide into them",
        ),
        (["--config.model.num_classes=1"], r"model\.num_classes=1 is smaller than the 2 classes of the data"),
        (["--config.model.head=dense"], r"model\.head = 'dense': clips are classified by 'classes' or"),
        (["--config.model.num_heads=3"], r"config section 'model': num_heads = 3"),
        (["--config.train.objective=mae", "--config.train.trained=head"], "has no head"),
        (
            ["--config.train.objective=mae", "--config.augment.mixup_alpha=1"],
            r"mixup_alpha = 1\.0: must be 0",
        ),
        (["--config.train.objective=mae", "--config.mae.mask_ratio=1"], "section 'mae': mask_ratio = 1"),
        (["--config.train.objective=mae", "--config.mae.target=motion"], "valid: change, pixels"),
        (
            ["--config.train.objective=mae", "--config.mae.target=change"],
            r"mae\.normalize = true, mae\.target = 'change': a change is not standardised",
        ),
        (
            ["--config.train.objective=mae", *CHANGE, "--config.data.frames=1"],
            r"data\.frames = 1: mae\.target = 'change' needs at least 2",
        ),
        (["--config.train.objective=video"], r"did you mean|valid: classes, mae"),
        (["--config.train.prefetch=0"], r"train\.prefetch = 0"),
        (["--config.eval.clips=0"], r"eval\.clips = 0: must be at least 1"),
        (
            ["--config.train.init_from=/nowhere.npz"],
            r"train\.init_from: /nowhere\.npz: no such file or folder",
        ),
        (["--config.data.frame=4"], r"unknown config key 'data\.frame': did you mean 'data\.frames'"),
        (["--config.data.fit=stretch", "--config.data.eval_crops=3"], r"set data\.eval_crops=1"),
        (["--config.train.batch_size=3", "--config.train.accum=2"], "is not divisible by train.accum"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    refused(tmp_path, *words(folder, *options), match=message)


def test_lists_with_faults_are_refused(folder: Path, tmp_path: Path) -> None:
    """An unknown class names the line's video; files that are missing are counted, or refused."""
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.csv").write_text("0.mp4,jump\n1.mp4,run\ngone.mp4,run\n")
    (lists / "unknown.csv").write_text("v0.mp4,jumping\n")
    train_list = f"--config.data.train_list={lists / 'train.csv'}"
    unknown = f"--config.data.validation_list={lists / 'unknown.csv'}"
    refused(
        tmp_path,
        *words(folder, train_list, unknown),
        match=r"unknown class 'jumping' of v0\.mp4: there are 2",
    )
    refused(
        tmp_path, *words(folder, train_list, "--config.data.missing=fail"),
        match=r"train\.csv: 1 of 3 videos are not in .*: gone\.mp4",
    )  # fmt: skip
    refused(tmp_path, *words(tmp_path / "nowhere"), match="no such folder of videos")


def test_missing_files_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.csv").write_text("0.mp4,jump\n1.mp4,run\ngone.mp4,run\n")
    data = train.open_data(frozen(folder, f"--config.data.train_list={tmp_path / 'train.csv'}"))
    assert (len(data.train_videos), data.train_videos.missing) == (2, ("gone.mp4",))
    assert capsys.readouterr().out == (
        "videos: folder, 2 for training, 2 held out, 2 classes; 1 listed files are missing\n"
    )


def zeros(config: trecvit.TRecViTConfig) -> dict:
    shapes = jax.eval_shape(lambda key: trecvit.init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def save_zeros(path: Path, config: trecvit.TRecViTConfig) -> Path:
    """An official file of a model without any weights."""
    trecvit.convert.save_official(path, zeros(config), config)
    return path


def test_files_to_start_from_that_are_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a file of another size serve: the differences are listed."""
    monkeypatch.setattr(trained, "_fresh", lambda model, seed: zeros(model))  # drawing it takes seconds
    save_zeros(tmp_path / "wide.npz", dataclasses.replace(frozen(folder).model, width=48, pool="tok"))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.safetensors").write_text("text")
    np.savez(tmp_path / "other.npz", x=np.ones(3, np.float32))
    for name, message in (
        ("text.npz", r"not a readable \.npz file"),
        ("text.safetensors", r"not a readable \.safetensors file"),
        ("other.npz", "not the weights of an image ViT"),
        ("wide.npz", r"not the encoder of this TRecViTConfig:\n(.*\n)*.*tokenizer/pos_embedding"),
    ):
        with pytest.raises(ConfigError, match=rf"train\.init_from: .*{name}: .*{message}"):
            initial_params(frozen(folder, f"--config.train.init_from={tmp_path / name}"))


# Evaluation


def evaluate(*command: str) -> None:
    evaluation.main([str(word) for word in command])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "give one of --workdir=DIR"),
        (["--checkpoint=x.npz"], "--checkpoint needs --config=FILE"),
        (["--workdir=/nowhere"], "/nowhere is not the workdir of a run"),
        (["--workdir=/nowhere", "--checkpoint=x.npz"], "give one of --workdir=DIR"),
        (
            ["--checkpoint=x.npz", "--config=configs/trecvit.py", "--views=4*3"],
            r"--views=4\*3: expected clips x",
        ),
        (
            ["--checkpoint=x.npz", "--config=configs/trecvit.py", "--views=0x3"],
            "--views=0x3: data.eval_clips",
        ),
        (
            ["--checkpoint=x.npz", "--config=configs/trecvit.py", "--names=a,b"],
            "1 different names are needed",
        ),
        (["--checkpoint=x.npz", "--config=configs/trecvit.py", "--batch=0"], "eval.batch_size = 0"),
        (
            ["--checkpoint=/nowhere.npz", "--config=configs/trecvit.py"],
            "/nowhere.npz: no such file or folder",
        ),
        (["--compare=/nowhere", "--checkpoint=x.npz", "--config=configs/trecvit.py"], "/nowhere"),
        (["--view=4x3"], "unknown option '--view': did you mean '--views'"),
    ],
)
def test_wrong_options_of_the_evaluation_are_named(command: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(*command, f"--output={tmp_path}")


def test_what_cannot_be_evaluated_is_named(folder: Path, tmp_path: Path) -> None:
    """No checkpoint, an auto-encoder, nothing held out, or frames that are not the model's."""
    run, cfg = tmp_path / "run", frozen(folder)
    run.mkdir()
    save_resolved(run, to_json(dict(zip(cfg._fields, cfg, strict=True))))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        evaluate(f"--workdir={run}")
    with pytest.raises(CheckpointError, match="no checkpoint of step 7 in"):
        evaluate(f"--workdir={run}", "--step=7")
    mae = tmp_path / "mae"
    mae.mkdir()
    cfg = frozen(folder, args="objective=mae")
    save_resolved(mae, to_json(dict(zip(cfg._fields, cfg, strict=True))))
    with pytest.raises(ConfigError, match="holds an auto-encoder, which has no classes"):
        open_model(mae)
    official = f"--checkpoint={save_zeros(tmp_path / 'official.npz', frozen(folder).model)}"
    with pytest.raises(ConfigError, match="no videos are held out"):
        evaluate(
            official, *words(folder, "--config.data.validation_fraction=0", "--config.data.eval_split=test"),
            f"--output={tmp_path}",
        )  # fmt: skip
    sizes = (
        "--config.model.image_size=36x36",
        "--config.augment.size=36x36",
        "--config.model.patch_size=6x6",
    )
    with pytest.raises(ConfigError, match=r"official\.npz: .*\(36, 36\)"):
        evaluate(official, *words(folder, *sizes), f"--output={tmp_path}")


# Reports


def test_names_of_classes(tmp_path: Path) -> None:
    assert class_names(("a", "b"), 4) == ("a", "b", "class 2", "class 3")
    assert class_names(None, 1) == ("class 0",)
    assert class_names(("a", "b"), 1) == ("a",)
    assert read_classes(tmp_path) is None
    names = ("Holding something", "Drücken, ziehen", "x")
    write_classes(tmp_path, names)
    assert read_classes(tmp_path) == names


def test_figures_of_a_finished_run(tmp_path: Path) -> None:
    """The last of `held_out`; figures under way have names of their own."""
    records = [
        {"kind": "eval", "step": 5, "validation/top1": 0.1, "validation/count/clips": 3},
        {"kind": "train", "step": 5, "loss": 1.0},
        {
            "kind": "eval",
            "step": 9,
            "held_out/top1": 0.25,
            "held_out/top5": 1.0,
            "held_out/count/clips": 1200.0,
        },
    ]
    assert final_figures(tmp_path) == {}
    (tmp_path / FILE_NAME).write_text("".join(json.dumps(record) + "\n" for record in records))
    figures = final_figures(tmp_path)
    assert figures == {"top1": 0.25, "top5": 1.0, "count/clips": 1200.0}
    (tmp_path / "training.png").touch()
    console = Console(width=200)
    with console.capture() as shown:
        print_summary(tmp_path, console)
        print_figures({"other": {"loss": 0.5, "views": 12}}, console)
    text = shown.get()
    assert f"{tmp_path / 'training.png'}\n" in text
    assert "confusion" not in text
    for cell in ("top-1 %", "25.0", "100.0", "1,200", "0.5000", "12"):
        assert cell in text


def test_painted_patches_become_frames_again() -> None:
    config = dataclasses.replace(
        trecvit.TRecViTConfig(head="none"), image_size=(16, 24), patch_size=(8, 4), width=32, num_heads=2
    )
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 24, 3)).astype(np.uint8)
    patches = trecvit.pixel_targets(jnp.asarray(frames), config.patch_size, False)
    assert patches.shape == (2, 3, 12, 96)
    np.testing.assert_array_equal(_to_frames(config, patches), frames)
