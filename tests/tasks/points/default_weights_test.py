"""The weights that ship: what they are said to be, and that they track what they never saw."""

import json

import numpy as np

from models import tapnext
from tasks.points.controls import static
from tasks.points.data import PointsDataConfig, open_points_data
from tasks.points.export import MOST_MB
from tasks.points.held_out import judge_predictor, shown_means
from tasks.points.model_predictor import ModelPredictor
from tasks.points.weight_files import DEFAULT, checksum, default_weights, load_weights


def test_the_files_agree():
    record = json.loads(DEFAULT.with_suffix(".json").read_text())
    weights = load_weights(default_weights())
    assert record["sha256"] == checksum(DEFAULT)
    assert record["size"] == DEFAULT.stat().st_size <= MOST_MB * 1e6
    assert record["parameters"] == tapnext.count_params(weights.config)
    card = DEFAULT.with_suffix(".md").read_text()
    assert record["sha256"] in card
    assert f"{record['parameters']:,}" in card


def test_they_track_clips_they_never_saw():
    """On textures that were held out, too: those of this repository's embedded generator."""
    weights = load_weights(default_weights())
    height, width = weights.config.image_size
    clips = open_points_data(
        PointsDataConfig(height=height, width=width, frames=12, tracks=24, generated_held_out=4)
    ).held_out
    model = ModelPredictor(weights.config, tapnext.TAPNextRuntime(), weights.params, backward=False)
    found, control = (shown_means(judge_predictor(predict, clips)) for predict in (model, static))
    assert np.isfinite(list(found.values())[:3]).all()
    assert found["delta_avg"] > control["delta_avg"] + 0.25
    assert found["average_jaccard"] > control["average_jaccard"] + 0.25
