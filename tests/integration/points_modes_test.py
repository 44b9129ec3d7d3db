"""Every way of training a point tracker through the real command, and every kind of weights to start from."""

import contextlib
import dataclasses
import io
import os
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from models import tapnext
from models.common.params import flatten_names
from tasks.common import loop
from tasks.common.checkpoint import load_params
from tasks.common.errors import ConfigError, Stopped
from tasks.common.writer import read_records
from tasks.points import train
from tasks.points.data.sheet import draw_tracks
from tests.integration.points_runs import (
    BATCH,
    FRAMES,
    MODEL,
    SIDE,
    SMALL,
    STEPS,
    TRACKS,
    check_run,
    config,
    equal,
    evaluated,
    film,
    held_out_examples,
    loss_by_hand,
    losses,
    means,
    outputs_of,
    run,
    scores_by_hand,
    training_batch,
    write_films,
)
from tests.models.common import torch_writer
from tests.tasks.common.video.video_files import write_video

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]
SHORT = ("--config.eval.lucas_kanade=false", "--config.eval.pictures=0")


class Plain(NamedTuple):
    """A run without any option, judged half way on three clips; and what it printed."""

    workdir: Path
    args: str
    printed: str


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, programs: None) -> Plain:
    folder, printed = tmp_path_factory.mktemp("plain"), io.StringIO()
    args = write_films(folder / "clips")
    options = ("--config.train.eval_every=10", "--config.checkpoint.every=10", "--config.eval.clips=3")
    with contextlib.redirect_stdout(printed):
        run(folder / "run", *options, args=args)
    return Plain(folder / "run", args, printed.getvalue())


def same_arrays(tree: Any, other: Any) -> bool:
    """Whether two trees are equal bit by bit."""
    one, two = flatten_names(tree), flatten_names(other)
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


# Evaluation


def test_figures_under_way_and_at_the_end(plain: Plain) -> None:
    """Three clips at step 10, all of them at the end beside the controls, in the log, on disk and printed."""
    records, examples = read_records(plain.workdir), held_out_examples(plain.args)
    half = scores_by_hand(load_params(plain.workdir, 10), examples[:3])
    assert equal(evaluated(records, "validation"), means(half))
    assert [r["step"] for r in records if "validation/delta_avg" in r] == [10]
    for name in ("held_out", "static", "lucas_kanade"):
        assert [r["step"] for r in records if f"{name}/delta_avg" in r] == [STEPS]
    check_run(plain.workdir, records, examples)
    for name, title in (("held_out", "model"), ("static", "points do not move"), ("lucas_kanade", "Lucas-")):
        (line,) = re.findall(rf"^│ {title}.*$", plain.printed, re.MULTILINE)
        shown = [float(cell) for cell in re.findall(r"│\s+([0-9.]+)(?=\s)", line)]
        assert shown == [round(100 * value, 1) for value in evaluated(records, name).values()]
    for file in ("training.png", "evaluation/per_clip.csv", "evaluation/clips.png", "metrics.jsonl"):
        assert f"  {plain.workdir / file}\n" in plain.printed
    # Four clips, truth above prediction, each frame enlarged to 192 pixels.
    picture = np.asarray(Image.open(plain.workdir / "evaluation" / "clips.png"))
    assert picture.shape[1] == FRAMES * (192 + 2) + 2
    assert picture.shape[0] // (192 + 16) == 8


def test_the_sheet_shows_what_the_first_step_learns_from(plain: Plain, tmp_path: Path) -> None:
    """--sheet draws the first batch and its tracks, and trains nothing."""
    options = ("--config.data.augment_flip_horizontal=1", f"--workdir={tmp_path / 'run'}")
    sheet = tmp_path / "sheet.png"
    train.main([f"--config={config(plain.args)}", f"--sheet={sheet}", *SMALL, *options])
    assert not (tmp_path / "run").exists()
    batch, picture = training_batch(0, plain.args, options[0]), np.asarray(Image.open(sheet))
    assert picture.shape[0] // (192 + 16) == BATCH
    for row in range(BATCH):
        used = batch["valid"][row]
        video, tracks, visible, query = (
            batch["video"][row], *(batch[n][row][used] for n in ("tracks_yx", "visible", "query_tyx")),
        )  # fmt: skip
        drawn = draw_tracks(video, tracks, visible, query[:, 0].astype(int).tolist())
        top = row * (192 + 16) + 16
        for t, frame in enumerate(drawn):
            np.testing.assert_array_equal(picture[top:, 2 + t * 194 :][:192, :192], frame)


# Stops


def stopped_and_resumed(workdir: Path, *options: str, args: str) -> list[dict]:
    """SIGTERM while the ninth step is under way, then the same command again."""
    put, calls = loop.put_batch, []

    def put_and_stop(*args: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "put_batch", put_and_stop)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 8"):
            run(workdir, *options, args=args)
    assert len(losses(read_records(workdir))) == 9
    return run(workdir, *options, args=args)


METRICS = ("loss", "grad_norm", "update_norm", "param_norm", "coordinate", "huber", "visibility", "lr")


def test_a_stopped_run_goes_on_as_if_it_had_not_been(plain: Plain, tmp_path: Path) -> None:
    """The rest of its clips are read by a process of its own."""
    options = ("--config.checkpoint.every=10", "--config.train.num_workers=1")
    resumed = stopped_and_resumed(tmp_path / "run", *options, args=plain.args)
    whole = read_records(plain.workdir)
    for name in METRICS:
        assert losses(resumed, name) == losses(whole, name), name
    assert same_arrays(load_params(tmp_path / "run"), load_params(plain.workdir))
    for name in ("held_out", "static", "lucas_kanade"):
        assert evaluated(resumed, name) == evaluated(whole, name)


# Weights to start from


@pytest.mark.parametrize("kind", ["run", "npz", "pt"])
def test_fine_tuning_starts_at_the_checkpoints_evaluated_loss(
    kind: str, plain: Plain, tmp_path: Path
) -> None:
    """Figures before the first step are the checkpoint's, and the loss of the first batches at rate 0 its
    loss on them; PyTorch's weights are run by PyTorch's numerics."""
    params, model = load_params(plain.workdir), MODEL
    path = {"run": plain.workdir}.get(kind, tmp_path / f"official.{kind}")
    args = f"{plain.args},init={path}"
    if kind == "npz":
        tapnext.convert.save_official(path, params, MODEL)
    if kind == "pt":
        torch_writer.save(path, tapnext.convert.to_official(params, MODEL, layout="torch"))
        model, args = dataclasses.replace(MODEL, numerics="torch"), f"{args},numerics=torch"
    options = ("--config.optim.peak_lr=0", "--config.train.eval_at_start=true", "--config.train.steps=2")
    records = run(tmp_path / "run", *options, *SHORT, args=args)
    found = scores_by_hand(params, held_out_examples(args), model)
    assert [r["step"] for r in records if "validation/delta_avg" in r] == [0]
    assert equal(evaluated(records, "validation"), means(found))
    if model == MODEL:
        assert equal(evaluated(records, "validation"), evaluated(read_records(plain.workdir)))
    batches = [training_batch(step, args) for step in range(2)]
    expected = [loss_by_hand(outputs_of(params, batch, model), batch) for batch in batches]
    assert losses(records) == pytest.approx(expected, rel=1e-5)
    assert expected[0] < losses(read_records(plain.workdir))[0] - 1
    assert same_arrays(load_params(tmp_path / "run"), params)


def test_weights_of_another_model_are_refused_with_the_differences(plain: Plain, tmp_path: Path) -> None:
    other = ("--config.model.width=16", "--config.model.mlp_size=64")
    expected = r"another model than config\.model:\n(.*\n)*.*mlp_size: 48 -> 64\n(.*\n)*  width: 32 -> 16"
    with pytest.raises(ConfigError, match=expected):
        run(tmp_path / "run", *other, args=f"{plain.args},init={plain.workdir}")
    params = load_params(plain.workdir)
    tapnext.convert.save_official(tmp_path / "official.npz", params, MODEL)
    with pytest.raises(ConfigError, match=rf"official\.npz holds {expected}"):
        run(tmp_path / "run", *other, args=f"{plain.args},init={tmp_path / 'official.npz'}")
    torch_writer.save(tmp_path / "x.pt", tapnext.convert.to_official(params, MODEL, layout="torch"))
    with pytest.raises(ConfigError, match=r"x\.pt holds .*:\n  numerics: 'torch' -> 'jax'$"):
        run(tmp_path / "run", args=f"{plain.args},init={tmp_path / 'x.pt'}")
    del params["points"]["mask"]
    np.savez(tmp_path / "part.npz", **flatten_names(params))
    with pytest.raises(ConfigError, match=r"part\.npz: .*not a TAPNext checkpoint"):
        run(tmp_path / "run", args=f"{plain.args},init={tmp_path / 'part.npz'}")
    with pytest.raises(ConfigError, match=r"nowhere: no such file or folder"):
        run(tmp_path / "run", args=f"{plain.args},init={tmp_path / 'nowhere'}")


# What is learnt


def test_without_deep_supervision_averaged_weights_are_evaluated(plain: Plain, tmp_path: Path) -> None:
    """Only the last read-out counts; figures are those of the moving average."""
    workdir, args = tmp_path / "run", f"{plain.args},init={plain.workdir}"
    options = ("--config.loss.layers=0", "--config.train.ema=0.8", "--config.optim.schedule=constant")
    records = run(workdir, *options, args=args)
    batch = training_batch(0, args)
    expected = loss_by_hand(outputs_of(load_params(plain.workdir), batch), batch, layers=(0, 0))
    assert losses(records)[0] == pytest.approx(expected, rel=1e-5)
    assert not any("layers" in r for r in records if r["kind"] == "train")
    examples = held_out_examples(args)
    raw = means(scores_by_hand(load_params(workdir, averaged=False), examples))
    assert not equal(raw, evaluated(records))
    check_run(workdir, records, examples)


def test_hidden_points_and_augmentations_of_long_sequences(plain: Plain, tmp_path: Path) -> None:
    """TAPNext++'s options: hidden points at 0.2, roll and homography; and a weight for each read-out."""
    augmented = ("--config.data.augment_roll=0.8", "--config.data.augment_homography=0.8")
    weighted = ("--config.loss.final=0.5", "--config.loss.layer_weights=0.25+2.0")
    options = (*augmented, *weighted, "--config.loss.occluded=0.2", "--config.train.steps=4")
    args = f"{plain.args},init={plain.workdir}"
    records = run(tmp_path / "run", *options, *SHORT, args=args)
    batch, before = training_batch(0, args, *augmented), training_batch(0, args)
    assert (batch["video"] != before["video"]).any(axis=(1, 2, 3, 4)).sum() >= 2
    output = outputs_of(load_params(plain.workdir), batch)
    weights = {"final": 0.5, "layers": (0.25, 2.0)}
    assert losses(records)[0] == pytest.approx(loss_by_hand(output, batch, **weights, occluded=0.2), rel=1e-5)
    assert losses(records)[0] != pytest.approx(loss_by_hand(output, batch, **weights), rel=1e-3)
    assert np.isfinite(losses(records)).all()
    # What is held out is not augmented.
    expected = scores_by_hand(load_params(tmp_path / "run"), held_out_examples(args))
    assert equal(evaluated(records), means(expected))


def test_recomputed_and_scanned_layers_change_nothing(plain: Plain, tmp_path: Path) -> None:
    options = ("--config.runtime.remat=full", "--config.runtime.scan_layers=true", "--config.train.steps=4")
    records, before = run(tmp_path / "run", *options, *SHORT, args=plain.args), read_records(plain.workdir)
    for name in ("loss", "grad_norm", "layers", "huber", "coordinate", "visibility"):
        assert losses(records, name) == pytest.approx(losses(before, name)[:4], rel=2e-5), name


# Self-training

CYCLE = 0.4  # of 32 pixels: the model is a beginner
TEACHING = (
    "--config.train.ema=0.9",
    f"--config.selftraining.tracks={TRACKS}",
    f"--config.selftraining.cycle={CYCLE}",
    "--config.checkpoint.every=10",
)


def own_batch(teacher: Any, batch: dict[str, np.ndarray], key: jax.Array) -> dict[str, np.ndarray]:
    """What the student is asked and to answer, by hand, as a batch of labelled clips."""
    video, first = batch["real_video"], batch["real_query_tyx"]
    at, frames = first[..., :1].astype(int), np.arange(FRAMES)
    forward = outputs_of(teacher, {"video": video, "query_tyx": first})
    turned = np.concatenate([FRAMES - 1 - first[..., :1], first[..., 1:]], axis=-1)
    backward = outputs_of(teacher, {"video": video[:, ::-1], "query_tyx": turned})
    later = frames >= at
    tracks = np.where(later[..., None], forward.tracks_yx, backward.tracks_yx[:, :, ::-1])
    seen = np.where(later, forward.visible_logits, backward.visible_logits[:, :, ::-1]) > 0

    def pick(values: np.ndarray, frame: np.ndarray) -> np.ndarray:
        index = frame.reshape(*frame.shape[:2], 1, *[1] * (values.ndim - 3))
        return np.take_along_axis(values, index, axis=2)[:, :, 0]

    noise = np.asarray(jax.random.uniform(key, seen.shape))
    candidates = seen & (frames <= at)
    second = np.where(candidates, noise, -1).argmax(axis=-1)
    asked = np.concatenate([second[..., None], pick(tracks, second)], axis=-1).astype(np.float32)
    again = outputs_of(teacher, {"video": video, "query_tyx": asked})
    back = np.linalg.norm(pick(again.tracks_yx, at) - first[..., 1:], axis=-1)
    counts = candidates.any(axis=-1) & (back <= CYCLE * SIDE) & (pick(again.visible_logits, at) > 0)
    affine = batch["student_affine"][:, None].astype(np.float64)
    moved = (affine[..., :2] @ tracks[..., None])[..., 0] + affine[..., 2]
    inside = ((moved >= 0) & (moved <= SIDE)).all(axis=-1)
    place = pick(moved, second)
    return {
        "video": batch["student_video"],
        "query_tyx": np.concatenate([asked[..., :1], place], axis=-1).astype(np.float32),
        "tracks_yx": moved,
        "visible": seen & inside,
        "valid": counts & pick(inside, second),
    }


def test_a_round_of_self_training(plain: Plain, tmp_path: Path) -> None:
    """Films without tracks beside the labelled clips. Half way, the losses are those of a student taught by
    the average; a round that is stopped goes on as if it had not been."""
    for seed in range(3):
        write_video(tmp_path / "films" / f"{seed}.mp4", film(seed, frames=14, height=40, width=48).video)
    workdir, args = tmp_path / "run", f"{plain.args},init={plain.workdir},unlabelled={tmp_path / 'films'}"
    records = run(workdir, *TEACHING, args=args)
    assert len(losses(records)) == STEPS
    assert np.isfinite(losses(records, "own_coordinate")).all()
    assert 0.1 < np.mean(losses(records, "consistent")) < 0.9
    assert sum(losses(records)[-5:]) < sum(losses(records)[:5])

    student, teacher = (load_params(workdir, 10, averaged=average) for average in (False, True))
    assert not same_arrays(student, teacher)
    batch = training_batch(10, args, *TEACHING)
    key = jax.random.fold_in(jax.random.key(0), 10)
    own = own_batch(teacher, batch, key)
    assert losses(records, "consistent")[10] == pytest.approx(own["valid"].mean(), abs=1e-6)
    output = outputs_of(student, own)
    place = loss_by_hand(output, own, layers=(0, 0), weights=(0, 1, 0))
    assert losses(records, "own_coordinate")[10] == pytest.approx(place, rel=1e-4)
    expected = loss_by_hand(outputs_of(student, batch), batch) + loss_by_hand(output, own)
    assert losses(records)[10] == pytest.approx(expected, rel=1e-4)
    # The average is what is evaluated.
    check_run(workdir, records, held_out_examples(args, *TEACHING))

    resumed = stopped_and_resumed(tmp_path / "stopped", *TEACHING, args=args)
    for name in (*METRICS, "own_coordinate", "consistent"):
        assert losses(resumed, name) == losses(records, name), name
    for average in (False, True):
        ends = [load_params(folder, averaged=average) for folder in (workdir, tmp_path / "stopped")]
        assert same_arrays(*ends)
    assert evaluated(resumed) == evaluated(records)
