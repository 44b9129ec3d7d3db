"""Point-tracking configurations: what the arguments of configs/tapnext.py mean, and what is refused."""

import pytest

from tasks.common.config import load_config, with_defaults
from tasks.common.errors import ConfigError
from tasks.points.config import SCHEMA, PointsConfig, freeze_all
from tests.integration.points_runs import MODEL, frozen


def recipe(args: str) -> PointsConfig:
    """A configuration at full size."""
    return freeze_all(with_defaults(load_config(f"configs/tapnext.py:{args}"), SCHEMA))


def test_the_small_model_of_these_tests() -> None:
    cfg = frozen("")
    assert cfg.model == MODEL
    assert (cfg.data.frames, cfg.data.tracks, cfg.data.height, cfg.data.width) == (6, 8, 32, 32)
    assert (cfg.train.batch_size, cfg.train.steps, cfg.data.source) == (4, 20, "generated")


def test_recipes() -> None:
    """Generated clips are for two cores; others for the paper's settings; fine-tuning takes a tenth of the
    rate; the teacher is an average."""
    small, paper, tuned = (recipe(a) for a in ("", "data=npz,path=x", "data=npz,path=x,init=y.npz"))
    assert (small.model.width, small.model.patch_size, small.data.height) == (128, (4, 4), 64)
    assert (small.train.initial, small.data.generated_wash, small.loss.layers) == ("matching", 0.85, 0.3)
    other = recipe("recipe=small,data=npz,path=x,size=mu")
    assert (other.train.initial, other.data.generated_wash, other.loss.layers) == ("official", 0.0, 1.0)
    assert (paper.train.initial, recipe("recipe=gpu").data.generated_wash) == ("official", 0.0)
    assert (paper.model.width, paper.data.height, paper.data.frames, paper.data.tracks) == (768, 256, 48, 256)
    assert (paper.train.batch_size, paper.train.steps, tuned.train.steps) == (256, 300_000, 1_500)
    assert tuned.optim.peak_lr == pytest.approx(paper.optim.peak_lr / 10)
    assert (tuned.train.init_from, tuned.train.ema, tuned.selftraining.path) == ("y.npz", 0, "")
    taught = recipe("data=npz,path=x,init=y.npz,unlabelled=films")
    assert taught.selftraining.path == "films"
    assert taught.train.ema > 0.99
    long = recipe("recipe=long,data=records,path=x,time=8")
    assert (long.data.frames, long.mesh.time, long.loss.occluded) == (1024, 8, 0.2)
    assert (long.data.augment_roll, long.data.augment_homography) == (0.8, 0.8)
    assert (long.runtime.scan_layers, long.runtime.remat) == (True, "full")
    assert recipe("numerics=torch").model.numerics == "torch"
    assert recipe("workers=3,seed=5").train.num_workers == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("size=huge", r"config argument size='huge': choose one of \"\", mini, half, mu, Ti, S, M, B, L"),
        ("data=kubric", r"config argument data='kubric': choose one of generated, folder, npz, pointodyssey"),
        ("recipe=big", r"config argument recipe='big': choose one of \"\", small, gpu, paper, long"),
        ("frame=8", r"unknown config argument 'frame': did you mean 'frames'"),
        ("numerics=tf", r"config key model\.numerics = 'tf': .*jax.*torch"),
        ("data=folder", r"config section 'data': data\.source='folder' needs data\.path"),
        ("path=here", r"data\.source='generated' reads no files: data\.path has no meaning"),
        ("image=62", r"config section 'model': image_size = \(62, 62\): .*4"),
        ("time=5", r"data\.frames = 8, mesh\.time = 5: the frames of a clip must divide"),
        ("time=0", r"mesh\.time = 0: must be at least 1"),
    ],
)
def test_arguments_that_are_refused(args: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(args)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "data.height=64",
            r"data\.height, data\.width = \(64, 32\), model\.image_size = \(32, 32\): clips are trained on "
            "at the model's native size",
        ),
        ("model.image_size=32x64", r"data\.height, data\.width = \(32, 32\), model\.image_size = \(32, 64\)"),
        ("mesh.time=4", r"data\.frames = 6, mesh\.time = 4: the frames of a clip must divide"),
        (
            "selftraining.path=films",
            r"selftraining\.path is set, train\.ema = 0: the teacher is the averaged",
        ),
        ("selftraining.tracks=0", r"config section 'selftraining': tracks = 0: must be at least 1"),
        ("loss.layer_weights=1+2+3", r"config section 'loss': 3 layer_weights for a model of 2 blocks"),
        ("loss.occluded=-1", r"config section 'loss': occluded = -1\.0: must be a finite number from 0 on"),
        ("loss.occluding=1", r"unknown config key 'loss\.occluding': did you mean 'loss\.occluded'"),
        ("model.num_heads=3", r"config section 'model': width = 32; it must be a multiple of num_heads = 3"),
        ("train.prefetch=0", r"train\.prefetch = 0, train\.num_workers = 0: must be at least 1"),
        ("train.num_workers=-1", r"train\.num_workers = -1: must be at least 1, and at least 0"),
        ("eval.batch_size=0", r"eval\.batch_size = 0: must be at least 1"),
        ("eval.clips=-1", r"eval\.clips = -1: must be at least 0"),
        ("eval.pictures=-1", r"eval\.pictures = -1: must be at least 0"),
        ("data.augment_roll=2", r"config section 'data': augment\.roll = 2\.0: a share is between 0 and 1"),
    ],
)
def test_settings_that_are_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        frozen("", f"--config.{option}")
