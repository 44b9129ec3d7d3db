"""Every way of training a video model through the real command, and every kind of weights to start from."""

import csv
import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from models import trecvit
from models.common.params import flatten_names
from tasks.common import loop
from tasks.common.checkpoint import load_params
from tasks.common.config import make_parser, parse_command_line
from tasks.common.errors import ConfigError, Stopped
from tasks.common.video.sheet import write_sheet
from tasks.video import eval as evaluation
from tasks.video import train
from tasks.video.config import SCHEMA, VideoConfig, freeze_all
from tasks.video.trained import initial_params
from tests.integration.video_runs import (
    BATCH,
    CLASSES,
    FRAMES,
    HELD_OUT,
    MODEL,
    SIDE,
    SMALL,
    STEPS,
    TRAIN,
    Written,
    check_evaluation,
    check_run,
    config,
    cut,
    evaluate,
    figures_by_hand,
    held_out,
    logits_of,
    losses,
    run,
    scores_by_hand,
    softmax,
    write_folder,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("programs")]
LABELS = [label for _, label in HELD_OUT]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_folder(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def plain(films: Written, tmp_path_factory: pytest.TempPathFactory, programs: None) -> Path:
    """A run without any augmentation, judged half way by 2 x 3 views."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    views = ("--config.eval.clips=2", "--config.eval.crops=3")
    run(workdir, "--config.train.eval_every=10", "--config.checkpoint.every=10", *views, args=films.args)
    return workdir


def records_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def same_arrays(tree: Any, other: Any) -> bool:
    """Whether two trees are equal bit by bit."""
    one, two = flatten_names(tree), flatten_names(other)
    return one.keys() == two.keys() and all(np.array_equal(one[n], two[n]) for n in one)


# Evaluation


def test_figures_under_way_and_at_the_end(films: Written, plain: Path) -> None:
    """At step 10 by the views of `eval`, at the end by those of `data`; the command, step by step as well."""
    records = records_of(plain)
    half = load_params(plain, 10)
    expected = figures_by_hand(scores_by_hand(half, films, 2, 3), LABELS)
    found = held_out(records, "validation")
    assert {name: found[name] for name in expected} == expected
    assert found["count/views"] == 6
    assert [r["step"] for r in records if "validation/top1" in r] == [10]
    assert [r["step"] for r in records if "held_out/top1" in r] == [STEPS]
    check_run(plain, records, films)
    check_evaluation(plain, evaluate(plain, "--step=10"), scores_by_hand(half, films), films, 1)


def test_options_of_the_evaluation(films: Written, plain: Path) -> None:
    """Averaged logits; longer clips than the model's; some of the videos; other numbers of matmuls."""
    params = load_params(plain)
    views = np.concatenate([cut(frames, 2, 3) for _, frames, _ in films.held_out])
    logits = logits_of(params, views).reshape(len(LABELS), 6, -1).mean(axis=1)
    check_evaluation(plain, evaluate(plain, "--views=2x3", "--average=logits"), logits, films, 6)
    # 16 frames are two of the model's clips: their probabilities are averaged.
    long = np.concatenate([cut(frames, 1, 1, 2 * FRAMES) for _, frames, _ in films.held_out])
    halves = [softmax(logits_of(params, long[:, part])) for part in (slice(FRAMES), slice(FRAMES, None))]
    summary = evaluate(plain, f"--config.data.frames={2 * FRAMES}", "--batch=4")
    check_evaluation(plain, summary, (halves[0] + halves[1]) / 2, films, 1)
    # Frames of 16 x 16: their middle, and positions of the same place.
    small, resized = trecvit.resize_params(jax.tree.map(jnp.asarray, params), MODEL, (16, 16))
    middle = np.concatenate([cut(frames, 1, 1) for _, frames, _ in films.held_out])[:, :, 8:24, 8:24]
    summary = evaluate(plain, "--config.model.image_size=16x16", "--config.augment.size=16x16")
    check_evaluation(plain, summary, softmax(logits_of(resized, middle, small)), films, 1)
    some = evaluate(plain, "--videos=3")
    assert some["clips"] == 3
    with (plain / "evaluated" / "predictions.csv").open() as file:
        assert {row["video"] for row in csv.DictReader(file)} < {name for name, _, _ in films.held_out}
    assert evaluate(plain, "--dtype=bfloat16")["clips"] == len(LABELS)


def test_an_official_file_is_trained_and_evaluated(films: Written, plain: Path, tmp_path: Path) -> None:
    """It evaluates to what the run it came from does, and training starts there."""
    path = tmp_path / "official.npz"
    params = load_params(plain)
    trecvit.convert.save_official(path, params, MODEL)
    evaluation.main(
        [f"--checkpoint={path}", f"--config={config(films.args)}", *SMALL, f"--output={tmp_path}/evaluated"]
    )
    summary = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    scores = scores_by_hand(params, films)
    check_evaluation(tmp_path, summary, scores, films, 1)
    options = ("--config.train.steps=2", "--config.train.eval_at_start=true")
    records = run(tmp_path / "run", *options, args=f"{films.args},init={path}")
    start = next(r for r in records if r["kind"] == "eval" and r["step"] == 0)
    for name, value in figures_by_hand(scores, LABELS).items():
        assert start[f"validation/{name}"] == value
    assert losses(records)[0] < losses(records_of(plain))[0] - 0.3


# Augmentation

AUGMENTED = {
    "mixup": ("--config.augment.mixup_alpha=0.8",),
    "cutmix": ("--config.augment.cutmix_alpha=1.0",),
    "randaugment": (
        "--config.augment.randaugment_layers=2",
        "--config.augment.randaugment_magnitude=20",
        "--config.augment.randaugment_full=10",
    ),
    "colour_jitter": ("--config.augment.color_probability=1", "--config.augment.gray_probability=0.5"),
    "label_smoothing": ("--config.augment.label_smoothing=0.3",),
    "repeats_of_the_loader": ("--config.data.repeats=2",),
    "repeats_on_the_device": ("--config.augment.repeats=2", "--config.augment.mixup_alpha=0.8"),
}


@pytest.mark.parametrize("name", AUGMENTED)
def test_augmentation_trains(name: str, films: Written, plain: Path, tmp_path: Path) -> None:
    """Finite losses, other ones than without it from the first step on, and an evaluation."""
    records = run(tmp_path / "run", *AUGMENTED[name], "--config.train.steps=4", args=films.args)
    found = losses(records)
    assert len(found) == 4
    assert all(map(math.isfinite, found))
    assert abs(found[0] - losses(records_of(plain))[0]) > 1e-5
    scores = scores_by_hand(load_params(tmp_path / "run"), films)
    assert held_out(records)["top1"] == figures_by_hand(scores, LABELS)["top1"]


Rows = list[tuple[str, np.ndarray]]


def draw(path: Path, monkeypatch: pytest.MonkeyPatch, *options: str, args: str) -> Rows:
    """`--sheet`: the rows that are drawn, once the picture has been found to show them."""
    drawn: list[Rows] = []

    def spy(path: Path, rows: Rows) -> None:
        drawn.append(rows)
        write_sheet(path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_sheet", spy)
        train.main([f"--config={config(args)}", f"--sheet={path}", *SMALL, *options])
    ((rows,), picture) = drawn, np.asarray(Image.open(path))
    assert picture.shape == (len(rows) * (SIDE + 16) + 2, FRAMES * (SIDE + 2) + 2, 3)
    for number, (_, frames) in enumerate(rows):
        top = number * (SIDE + 16) + 2
        assert picture[top : top + 14].min() < 128  # a title
        for column, frame in enumerate(frames):
            left = column * (SIDE + 2) + 2
            np.testing.assert_array_equal(picture[top + 14 :, left:][:SIDE, :SIDE], frame)
    return rows


def shares_of(title: str) -> dict[str, float]:
    """Class -> share, of a title."""
    return {name: int(share) / 100 for share, name in re.findall(r"(\d+) % ([A-Za-z ]+)", title)}


def test_the_sheet_without_augmentation_shows_the_clips(
    films: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draw(tmp_path / "sheet.png", monkeypatch, args=films.args)
    assert len(rows) == BATCH
    for title, frames in rows:
        (name,) = shares_of(title)
        assert title == f"100 % {name}"
        # What is shown is the class's colour.
        shown = np.median(frames.reshape(-1, 3), axis=0)
        colours = [np.median(clip.reshape(-1, 3), axis=0) for _, clip, _ in films.held_out[: len(CLASSES)]]
        assert CLASSES[int(np.argmin([np.abs(shown - colour).sum() for colour in colours]))] == name


def test_the_sheet_shows_what_the_first_step_trains_on(
    films: Written, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixup: pictures are mixed as titles say, and known weights have the loss of these rows at step 0."""
    official = tmp_path / "official.npz"
    params = load_params(plain)
    params["head"]["classes"] = {n: 4 * x for n, x in params["head"]["classes"].items()}  # far from uniform
    trecvit.convert.save_official(official, params, MODEL)
    args = f"{films.args},init={official}"
    clips = dict(enumerate(draw(tmp_path / "plain.png", monkeypatch, args=args)))
    rows = draw(tmp_path / "mixed.png", monkeypatch, *AUGMENTED["mixup"], args=args)
    mixed = 0
    for number, (title, frames) in enumerate(rows):
        shares = shares_of(title)
        assert 0.94 < sum(shares.values()) < 1.02
        own, own_frames = next(iter(shares_of(clips[number][0]))), clips[number][1].astype(float)
        if shares.keys() == {own}:
            continue
        mixed += 1
        share = shares.get(own, 0.0)
        others = [clip.astype(float) for title, clip in clips.values() if own not in title]
        misfits = [np.abs(share * own_frames + (1 - share) * other - frames).max() for other in others]
        assert min(misfits) < 0.006 * 255 + 1  # titles are whole percents
        assert np.abs(frames.astype(int) - clips[number][1]).max() > 5
    assert mixed >= 1
    targets = np.array([[shares_of(title).get(name, 0.0) for name in CLASSES] for title, _ in rows])
    targets /= targets.sum(axis=1, keepdims=True)
    logs = np.log(softmax(logits_of(params, np.stack([frames for _, frames in rows]))))
    expected = -(targets * logs).sum(axis=1).mean()
    found = losses(run(tmp_path / "run", *AUGMENTED["mixup"], "--config.train.steps=1", args=args))
    assert found == pytest.approx([expected], abs=0.03)
    unmixed = run(tmp_path / "unmixed", "--config.train.steps=1", args=args)
    assert abs(losses(unmixed)[0] - expected) > 0.1


@pytest.mark.parametrize("name", ["cutmix", "randaugment", "colour_jitter", "repeats_on_the_device"])
def test_sheets_of_augmentation(
    name: str, films: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = draw(tmp_path / "plain.png", monkeypatch, args=films.args)
    rows = draw(tmp_path / "sheet.png", monkeypatch, *AUGMENTED[name], args=films.args)
    repeats = 2 if "repeats" in name else 1
    assert len(rows) == BATCH * repeats
    changed = [
        np.abs(frames.astype(int) - clips[number // repeats][1]).max() > 5
        for number, (_, frames) in enumerate(rows)
    ]
    assert any(changed)
    if name in ("randaugment", "colour_jitter"):  # which leave the classes alone
        assert [title for title, _ in rows] == [title for title, _ in clips]


def test_a_sheet_of_a_masked_auto_encoder_names_the_videos(
    films: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no classes; copies of a clip stand side by side under its name."""
    args = f"{films.args},objective=mae"
    rows = draw(tmp_path / "sheet.png", monkeypatch, "--config.augment.repeats=2", args=args)
    titles = [title for title, _ in rows]
    assert len(rows) == 2 * BATCH
    assert titles[::2] == titles[1::2]
    assert len(set(titles)) == BATCH
    for title, frames in rows:
        (seen,) = [seen for i, (seen, _) in enumerate(TRAIN) if title.endswith(f"/train/{i}.mp4")]
        shown = np.median(frames.reshape(-1, 3), axis=0)
        held = np.median(films.held_out[seen][1].reshape(-1, 3), axis=0)
        assert np.abs(shown - held).max() < 12, title


# Weights


def test_averaged_weights_are_evaluated(films: Written, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    records = run(workdir, "--config.train.ema=0.8", args=films.args)
    raw = scores_by_hand(load_params(workdir, averaged=False), films)
    assert np.abs(raw - scores_by_hand(load_params(workdir), films)).max() > 5e-3
    check_run(workdir, records, films)


MAE = ("--config.mae.mask_ratio=0.75", "--config.mae.decoder_depth=1")


@pytest.fixture(scope="module")
def encoder(films: Written, tmp_path_factory: pytest.TempPathFactory, programs: None) -> Path:
    """A masked auto-encoder, judged in batches of 3 that the 8 held-out videos do not fill."""
    workdir = tmp_path_factory.mktemp("mae") / "run"
    options = ("--config.eval.batch_size=3", "--config.train.eval_every=10")
    run(workdir, *MAE, *options, args=f"{films.args},objective=mae")
    return workdir


def test_masked_auto_encoding(films: Written, encoder: Path) -> None:
    """The held-out loss by hand: of the hidden patches, standardised; and a picture of what is painted."""
    records = records_of(encoder)
    found = losses(records)
    assert len(found) == STEPS
    assert sum(found[-3:]) / 3 < found[0] - 0.05
    mae = trecvit.MAEConfig(dataclasses.replace(MODEL, head="none"), 0.75, decoder_depth=1)
    params = jax.tree.map(jnp.asarray, load_params(encoder))
    paint = jax.jit(lambda *args: trecvit.apply_mae(mae, trecvit.TRecViTRuntime(), params, *args)[0])
    errors = []
    for number, (_, frames, _) in enumerate(films.held_out):
        clip = cut(frames, 1, 1).astype(np.float32) / 255
        key = jax.random.fold_in(jax.random.key(0), number)
        kept = trecvit.draw_kept_tubes(mae, key, 1)
        assert kept.shape == (1, 4)
        painted = paint(jnp.asarray(clip), kept)
        patches = clip.reshape(FRAMES, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(FRAMES, 16, 64, 3)
        spread = patches.std(axis=2, ddof=1, keepdims=True)
        wanted = (patches - patches.mean(axis=2, keepdims=True)) / (spread + 1e-6)
        error = np.square(np.asarray(painted)[0].reshape(wanted.shape) - wanted).mean(axis=(2, 3))
        errors.append(error[:, [p for p in range(16) if p not in kept[0].tolist()]])
    assert held_out(records)["loss"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert [r["step"] for r in records if "held_out/loss" in r] == [10, STEPS]
    for step in (10, STEPS):
        with Image.open(encoder / "reconstructions" / f"step_{step:08d}.png") as picture:
            assert picture.size == (8 * (SIDE + 2) + 2, 3 * 3 * (SIDE + 16) + 2)
    with pytest.raises(ConfigError, match="auto-encoder, which has no classes"):
        evaluate(encoder)


def test_a_probe_trains_its_head_alone(films: Written, encoder: Path, tmp_path: Path) -> None:
    """Of an auto-encoder's features, and of random ones: the encoder does not change in a bit."""
    given = load_params(encoder)["encoder"]
    for name, init in (("probe", f",init={encoder}"), ("random", "")):
        workdir = tmp_path / name
        records = run(
            workdir, "--config.checkpoint.every=5", args=f"{films.args},objective=probe{init}"
        )  # fmt: skip
        found = losses(records)
        assert sum(found[-5:]) < sum(found[:5])
        early, late = load_params(workdir, 15), load_params(workdir, STEPS)
        body = [{n: x for n, x in params.items() if n != "head"} for params in (early, late)]
        assert same_arrays(*body)
        assert same_arrays(body[0], given) == (name == "probe")
        heads = [flatten_names(params["head"]) for params in (early, late)]
        # A bias of keys shifts all logits of the attention alike.
        still = [n for n in heads[0] if np.array_equal(heads[0][n], heads[1][n]) and "k_proj/bias" not in n]
        assert not still
        model = dataclasses.replace(MODEL, head="readout")
        scores = scores_by_hand(late, films, model=model)
        check_evaluation(workdir, evaluate(workdir), scores, films, 1)
        assert held_out(records)["top1"] == figures_by_hand(scores, LABELS)["top1"]


def frozen(args: str, *options: str) -> VideoConfig:
    """A configuration as the command reads it."""
    words = [f"--config={config(args)}", *SMALL, *options]
    return freeze_all(parse_command_line(make_parser(""), words, schema=SCHEMA).config)


def test_a_run_of_other_classes_or_another_resolution_gives_its_encoder(films: Written, plain: Path) -> None:
    given = load_params(plain)
    body = {n: x for n, x in given.items() if n != "head"}
    args = f"{films.args},init={plain}"
    assert same_arrays(initial_params(frozen(args)), given)

    other = initial_params(frozen(args, "--config.model.num_classes=9"))
    assert same_arrays({n: x for n, x in other.items() if n != "head"}, body)
    assert other["head"]["classes"]["kernel"].shape == (32, 9)
    assert not np.array_equal(other["head"]["pre_logits"]["kernel"], given["head"]["pre_logits"]["kernel"])

    large = initial_params(
        frozen(args, "--config.model.image_size=64x48", "--config.augment.size=64x48")
    )  # fmt: skip
    positions = large["tokenizer"]["positions"]
    assert positions.shape == (8 * 6, 32)
    table = np.asarray(given["tokenizer"]["positions"]).reshape(4, 4, 32)
    resized = jax.image.resize(table, (8, 6, 32), "bicubic").reshape(48, 32)
    np.testing.assert_allclose(positions, resized, atol=1e-5)
    del large["tokenizer"]["positions"]
    assert same_arrays(
        large, given | {"tokenizer": {n: x for n, x in given["tokenizer"].items() if n != "positions"}}
    )


def test_a_run_of_other_classes_trains_on(films: Written, plain: Path, tmp_path: Path) -> None:
    """Three classes of six, by the command."""
    root = tmp_path / "three"
    root.mkdir()
    origin = Path(films.args.split("path=")[1].split(",")[0])
    for kind in ("train", "validation"):
        lines = (origin / f"{kind}.csv").read_text().splitlines()
        (root / f"{kind}.csv").write_text(
            "\n".join([lines[0], *(f"{origin}/{line}" for line in lines[1:] if line.endswith(CLASSES[:3]))])
        )
    records = run(tmp_path / "run", args=f"data=folder,path={root},classes=3,videos=6,init={plain}")
    assert losses(records)[0] == pytest.approx(math.log(3), abs=0.5)
    rows = [row for row in films.held_out if row[2] < 3]
    scores = scores_by_hand(
        load_params(tmp_path / "run"),
        films._replace(held_out=rows),
        model=dataclasses.replace(MODEL, num_classes=3),
    )
    assert held_out(records)["top1"] == figures_by_hand(scores, [label for _, _, label in rows])["top1"]


def test_weights_of_another_model_are_refused_with_the_differences(
    films: Written, plain: Path, tmp_path: Path
) -> None:
    options = ("--config.model.width=16", "--config.model.mlp_size=48")
    with pytest.raises(ConfigError, match=r"another model than config\.model:\n(.*\n)*.*width: 32 -> 16"):
        run(tmp_path / "run", *options, args=f"{films.args},init={plain}")
    trecvit.convert.save_official(tmp_path / "official.npz", load_params(plain), MODEL)
    with pytest.raises(
        ConfigError, match=r"official\.npz: .*not the encoder of this TRecViTConfig:\nwrong shape"
    ):
        run(tmp_path / "run", *options, args=f"{films.args},init={tmp_path / 'official.npz'}")


# ImageNet

CLS_MODEL = dataclasses.replace(MODEL, pool="tok")


def image_vit(seed: int) -> dict[str, np.ndarray]:
    """Random weights of an image ViT by big_vision's names, trained on 2 x 2 patches of 8 pixels."""
    rng = np.random.default_rng(seed)
    block, width, heads, hidden = "Transformer/encoderblock_0", 32, 2, 64
    attention, mlp = f"{block}/MultiHeadDotProductAttention_0", f"{block}/MlpBlock_0"
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, width),
        "pos_embedding": (1, 4, width),
        "embedding/kernel": (8, 8, 3, width),
        "embedding/bias": (width,),
        f"{attention}/out/kernel": (heads, width // heads, width),
        f"{attention}/out/bias": (width,),
        f"{mlp}/Dense_0/kernel": (width, hidden),
        f"{mlp}/Dense_0/bias": (hidden,),
        f"{mlp}/Dense_1/kernel": (hidden, width),
        f"{mlp}/Dense_1/bias": (width,),
        "head/kernel": (width, 10),
        "head/bias": (10,),
    }
    for norm in (f"{block}/LayerNorm_0", f"{block}/LayerNorm_1", "Transformer/encoder_norm"):
        shapes |= {f"{norm}/{leaf}": (width,) for leaf in ("scale", "bias")}
    for part in ("query", "key", "value"):
        shapes[f"{attention}/{part}/kernel"] = (width, heads, width // heads)
        shapes[f"{attention}/{part}/bias"] = (heads, width // heads)
    return {name: 0.1 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def as_timm(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same ViT by timm's names, in PyTorch's layouts, with a position of the class token."""
    block = "Transformer/encoderblock_0"
    attention, mlp = f"{block}/MultiHeadDotProductAttention_0", f"{block}/MlpBlock_0"
    qkv = [flat[f"{attention}/{part}/kernel"].reshape(32, 32).T for part in ("query", "key", "value")]
    biases = [flat[f"{attention}/{part}/bias"].reshape(32) for part in ("query", "key", "value")]
    positions = np.concatenate([np.full((1, 1, 32), 9, np.float32), flat["pos_embedding"]], axis=1)
    timm = {
        "cls_token": flat["cls"],
        "pos_embed": positions,
        "patch_embed.proj.weight": flat["embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": flat["embedding/bias"],
        "norm.weight": flat["Transformer/encoder_norm/scale"],
        "norm.bias": flat["Transformer/encoder_norm/bias"],
        "head.weight": flat["head/kernel"].T,
        "head.bias": flat["head/bias"],
        "blocks.0.norm1.weight": flat[f"{block}/LayerNorm_0/scale"],
        "blocks.0.norm1.bias": flat[f"{block}/LayerNorm_0/bias"],
        "blocks.0.norm2.weight": flat[f"{block}/LayerNorm_1/scale"],
        "blocks.0.norm2.bias": flat[f"{block}/LayerNorm_1/bias"],
        "blocks.0.attn.qkv.weight": np.concatenate(qkv),
        "blocks.0.attn.qkv.bias": np.concatenate(biases),
        "blocks.0.attn.proj.weight": flat[f"{attention}/out/kernel"].reshape(32, 32).T,
        "blocks.0.attn.proj.bias": flat[f"{attention}/out/bias"],
        "blocks.0.mlp.fc1.weight": flat[f"{mlp}/Dense_0/kernel"].T,
        "blocks.0.mlp.fc1.bias": flat[f"{mlp}/Dense_0/bias"],
        "blocks.0.mlp.fc2.weight": flat[f"{mlp}/Dense_1/kernel"].T,
        "blocks.0.mlp.fc2.bias": flat[f"{mlp}/Dense_1/bias"],
    }
    return {name: np.ascontiguousarray(array) for name, array in timm.items()}


def test_an_image_vit_gives_its_spatial_half(films: Written, tmp_path: Path) -> None:
    """big_vision's and timm's names give the same; the rest is what another seed-equal run starts from."""
    flat = image_vit(5)
    np.savez(tmp_path / "vit.npz", **{f"params/{name}": array for name, array in flat.items()})
    save_file(as_timm(flat), tmp_path / "vit.safetensors")
    token = "--config.model.pool=tok"
    params = initial_params(frozen(f"{films.args},init={tmp_path / 'vit.npz'}", token))
    twin = initial_params(frozen(f"{films.args},init={tmp_path / 'vit.safetensors'}", token))
    # The bias of the patches is a sum, over another layout.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, twin)
    other = tmp_path / "other.npz"
    np.savez(other, **image_vit(6))
    fresh = initial_params(frozen(f"{films.args},init={other}", token))
    assert same_arrays(params["head"], fresh["head"])
    layer, given = params["layers"]["0"], fresh["layers"]["0"]
    kept = [name for name in layer if same_arrays({"x": layer[name]}, {"x": given[name]})]
    assert set(layer) - set(kept) == {"attn", "attn_norm", "mlp", "mlp_norm"}
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
    np.testing.assert_array_equal(
        layer["attn"]["v_proj"]["kernel"], flat[f"{attention}/value/kernel"].reshape(32, 32)
    )
    # Pixels in [-1, 1] there are in [0, 1] here: W (2 x - 1) + b.
    kernel = flat["embedding/kernel"]
    np.testing.assert_allclose(
        params["tokenizer"]["patch"]["kernel"].reshape(kernel.shape), 2 * kernel, rtol=1e-6
    )
    bias = flat["embedding/bias"] - kernel.sum(axis=(0, 1, 2))
    np.testing.assert_allclose(params["tokenizer"]["patch"]["bias"], bias, atol=1e-5)
    as_it_is = initial_params(
        frozen(f"{films.args},init={tmp_path / 'vit.npz'}", token, "--config.train.zero_centred=false")
    )
    np.testing.assert_array_equal(as_it_is["tokenizer"]["patch"]["bias"], flat["embedding/bias"])
    # And it trains.
    workdir = tmp_path / "run"
    records = run(workdir, token, args=f"{films.args},init={tmp_path / 'vit.safetensors'}")
    found = losses(records)
    assert sum(found[-5:]) / 5 < found[0]
    scores = scores_by_hand(load_params(workdir), films, model=CLS_MODEL)
    assert held_out(records)["top1"] == figures_by_hand(scores, LABELS)["top1"]


# Stops and faults


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    films: Written, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while the ninth step is under way; the rest is read by a process of its own."""
    options = ("--config.train.eval_every=10", "--config.checkpoint.every=10")
    put, calls = loop.put_batch, []

    def put_and_stop(*args: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", put_and_stop)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 8"):
            run(tmp_path / "run", *options, args=films.args)
    assert len(losses(records_of(tmp_path / "run"))) == 9
    views = ("--config.eval.clips=1", "--config.eval.crops=1", "--config.train.num_workers=1")
    resumed = run(tmp_path / "run", *options, *views, args=films.args)
    assert losses(resumed) == losses(records_of(plain))
    assert same_arrays(load_params(tmp_path / "run"), load_params(plain))
    assert held_out(resumed) == held_out(records_of(plain))


def test_videos_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    films = write_folder(tmp_path / "films")
    damaged = [tmp_path / "films" / name for name in ("train/3.mp4", "held out/2.mp4")]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "films" / "train" / "5.mp4").unlink()
    workdir = tmp_path / "run"
    records = run(workdir, args=films.args)
    assert len(losses(records)) == STEPS
    report = [json.loads(line) for line in (workdir / "unreadable.jsonl").read_text().splitlines()]
    assert {entry["name"] for entry in report} == {str(path) for path in damaged}
    readable = films._replace(held_out=[row for i, row in enumerate(films.held_out) if i != 2])
    check_run(workdir, records, readable)
    (entry,) = [*map(json.loads, (workdir / "evaluated" / "unreadable.jsonl").read_text().splitlines())]
    assert (entry["name"], bool(entry["reason"])) == (str(damaged[1]), True)


def test_runs_side_by_side(films: Written, plain: Path, tmp_path: Path) -> None:
    """--compare: tables of each run, and a picture of both."""
    run(tmp_path / "short", "--config.train.steps=2", args=films.args)
    evaluation.main(
        [f"--workdir={plain}", f"--compare={tmp_path / 'short'}", "--names=long,short",
         f"--output={tmp_path / 'both'}"]
    )  # fmt: skip
    for name, workdir in (("long", plain), ("short", tmp_path / "short")):
        summary = json.loads((tmp_path / "both" / name / "summary.json").read_text())
        assert summary["top1"] == held_out(records_of(workdir))["top1"]
    assert (tmp_path / "both" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
