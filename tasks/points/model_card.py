"""The model card of exported weights: what they are, what they were trained on, how good, where they fail."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.points.held_out import OCCLUDED, REAPPEARING, SHOWN
from tasks.points.metrics import AVERAGE_WITHIN
from tasks.points.reports import NAMES

_TITLES = {
    "average_jaccard": "AJ",
    "occlusion_accuracy": "OA",
    OCCLUDED: "delta_avg, of occluded",
    REAPPEARING: "delta_avg, after occlusion",
}
_SOURCES = {
    "generated": "clips of the embedded generator: pieces of photographs, in random shapes, that move, turn "
    "and ripple before each other under a moving camera, with exact tracks",
    "folder": "annotated videos",
    "npz": "clips with tracks (npz files)",
    "pointodyssey": "PointOdyssey",
    "records": "prepared clips with tracks",
}
_PHOTOGRAPHS = "the photographs that the packages scikit-image and matplotlib carry"


class Exported(NamedTuple):
    """Facts of an exported file.

    Attributes:
      file: its name.
      parameters: of the model.
      dtype: of the tensors in it.
      size: bytes.
      sha256: of its content, in hex digits.
      step: of the checkpoint.
      licence: of the weights.
    """

    file: str
    parameters: int
    dtype: str
    size: int
    sha256: str
    step: int
    licence: str


def model_card(exported: Exported, training: Mapping[str, Any], notes: str = "") -> str:
    """The card, Markdown.

    Args:
      exported: the file.
      training: as `tasks.points.export.training_record` gives it; all that is said is read off it.
      notes: more about where the model fails.
    """
    parts = [
        f"# {exported.file.rpartition('.')[0]}",
        _what(exported, training["config"]["model"]),
        "## Trained on",
        _trained_on(training),
        "## How good",
        _figures(exported, training),
        "## Where it fails",
        "\n".join(f"- {line}" for line in _limits(training)) + (f"\n\n{notes}" if notes else ""),
        "## Licence",
        _licence(exported, training["config"]),
    ]
    return "\n\n".join(parts) + "\n"


def _what(exported: Exported, model: Mapping[str, Any]) -> str:
    height, width = model["image_size"]
    rows = {
        "file": f"{exported.file}, {exported.size / 1e6:.2f} MB, {exported.dtype}",
        "sha256": exported.sha256,
        "parameters": f"{exported.parameters:,}",
        "frames": f"{height} x {width} pixels, in patches of {' x '.join(map(str, model['patch_size']))}",
        "size": f"{model['depth']} layers of width {model['width']}, {model['num_heads']} heads, "
        f"MLP {model['mlp_size']}",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    return (
        "A TAPNext (arXiv 2504.05579): it tracks any point in a video, frame by frame. "
        f"`python -m tasks.points.track --video=in.mp4 --checkpoint={exported.file} --grid=16`\n\n{table}"
    )


def _trained_on(training: Mapping[str, Any]) -> str:
    config = training["config"]
    data, train = config["data"], config["train"]
    where = f" ({data['path']})" if data["path"] else ""
    height, width = data["height"], data["width"]
    lines = [
        f"{training['step']:,} steps of {train['batch_size']} clips: {_SOURCES[data['source']]}{where}. "
        f"{data['frames']} frames{_every(data['stride'])} of {height} x {width} pixels, "
        f"{data['tracks']} points.",
    ]
    if data["source"] == "generated":
        photographs = data["generated_photographs"] or _PHOTOGRAPHS
        lines.append(f"Textures: {photographs}; those of the held-out clips are others.")
    if config["selftraining"]["path"]:
        lines.append(f"With self-training on unlabelled videos ({config['selftraining']['path']}).")
    if train["init_from"]:
        lines.append(f"Started from {train['init_from']}.")
    if train["ema"]:
        lines.append(f"The weights are an average over the steps (decay {train['ema']:g}).")
    about = ", ".join(f"{name} {training[name]}" for name in ("commit", "date", "device", "jax"))
    return " ".join(lines) + f"\n\n```\n{training['command']}\n```\n\nSeed {config['seed']}, {about}."


def _every(stride: int) -> str:
    return "" if stride == 1 else f", one of {stride}"


def _figures(exported: Exported, training: Mapping[str, Any]) -> str:
    figures = training["figures"]
    if "held_out" not in figures:
        return "Not measured: the run has no figures of this checkpoint on held-out clips."
    columns = list(SHOWN.values())
    head = ["tracker", *(_TITLES.get(column, column) for column in columns)]
    lines = [head, ["---"] * len(head)]
    for name, title in NAMES.items():
        if name in figures:
            lines.append([title, *(_percent(figures[name].get(column)) for column in columns)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    rounded = "" if exported.dtype == "float32" else f", before the weights were rounded to {exported.dtype}"
    return f"Held-out clips of what it was trained on, queries first, per cent{rounded}:\n\n{table}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _limits(training: Mapping[str, Any]) -> list[str]:
    """What follows from how it was trained, and from its figures."""
    config, figures = training["config"], training["figures"]
    data, model = config["data"], config["model"]
    height, width = model["image_size"]
    lines = [
        f"Clips of {data['frames']} frames were seen in training: errors grow on longer videos.",
        f"Frames are squashed to {height} x {width} pixels: what is small in them is lost, and a pixel of "
        "error there is several of a large video.",
    ]
    if (
        data["source"] == "generated"
        and not config["selftraining"]["path"]
        and not config["train"]["init_from"]
    ):
        lines.append(
            "It has seen no real video: people, animals, water, reflections, shadows and real blur are new "
            "to it."
        )
    own, hidden = figures.get("held_out", {}), figures.get("held_out", {}).get(REAPPEARING)
    if hidden is not None:
        lines.append(
            f"After an occlusion it is within the thresholds {_percent(hidden)} % of the time (delta_avg)."
        )
    exact = SHOWN[AVERAGE_WITHIN]
    control = figures.get("lucas_kanade", {}).get(exact)
    if control is not None and own.get(exact) is not None and control > own[exact]:
        lines.append(
            f"Lucas-Kanade is closer on the held-out clips (delta_avg {_percent(control)} against "
            f"{_percent(own[exact])})."
        )
    return lines


def _licence(exported: Exported, config: Mapping[str, Any]) -> str:
    data = config["data"]
    own = data["source"] == "generated" and not data["generated_photographs"]
    source = _PHOTOGRAPHS if own else "the data it was trained on"
    others = ", and of the weights it started from" if config["train"]["init_from"] else ""
    return f"{exported.licence}. The licences of {source}{others} are their own."
