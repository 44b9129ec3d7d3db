"""TAPNext: tracking any point in a video as prediction of the next token of each point."""

from models.common.params import decay_mask
from models.tapnext import convert
from models.tapnext.clips import Frames, Tracks, track_clip, track_stream
from models.tapnext.config import SIZES, TAPNextConfig, TAPNextRuntime
from models.tapnext.convert import load_official
from models.tapnext.heads import Readout, certainty, decode_tracks, is_visible, read_out
from models.tapnext.inference import prepare_params
from models.tapnext.matching_init import init_matching_params
from models.tapnext.model import PointFeatures, TAPNext, TAPNextOutput, apply, key_mask, point_features
from models.tapnext.parameters import (
    cast_params,
    count_params,
    flops_per_clip,
    init_params,
    param_axes,
    param_specs,
)
from models.tapnext.queries import NEVER, Queries, check_queries, make_queries
from models.tapnext.slots import SlotState, advance, edit_slots, init_slots
from models.tapnext.state import TAPNextState, init_state
from models.tapnext.tracker import SlotTracker, SlotTracks

__all__ = [
    "NEVER",
    "SIZES",
    "Frames",
    "PointFeatures",
    "Queries",
    "Readout",
    "SlotState",
    "SlotTracker",
    "SlotTracks",
    "TAPNext",
    "TAPNextConfig",
    "TAPNextOutput",
    "TAPNextRuntime",
    "TAPNextState",
    "Tracks",
    "advance",
    "apply",
    "cast_params",
    "certainty",
    "check_queries",
    "convert",
    "count_params",
    "decay_mask",
    "decode_tracks",
    "edit_slots",
    "flops_per_clip",
    "init_matching_params",
    "init_params",
    "init_slots",
    "init_state",
    "is_visible",
    "key_mask",
    "load_official",
    "make_queries",
    "param_axes",
    "param_specs",
    "point_features",
    "prepare_params",
    "read_out",
    "track_clip",
    "track_stream",
]
