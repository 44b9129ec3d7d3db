"""The resolved config of a run, saved in its workdir with what is needed to repeat it, and compared on
resume."""

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tasks.common.errors import ConfigError, writing
from tasks.common.storage import write_json

FILE_NAME = "config.json"
_PACKAGES = (
    "foxtrot", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ml-collections",
    "jax-triton",
)  # fmt: skip

# Keys a resumed run may change: they say where and how fast it runs and how it is watched, not what it
# computes.
FREE_KEYS = (
    "mesh", "log", "checkpoint", "eval", "data.num_workers", "data.prefetch",
    "train.steps", "train.eval_every", "train.eval_at_start", "train.profile_start", "train.profile_steps",
    "train.spike_factor", "train.spike_window", "runtime.scan_layers", "runtime.remat",
    "runtime.attention_implementation", "runtime.tiles",
)  # fmt: skip


class Difference(NamedTuple):
    """One key on which two configs disagree; a side that lacks the key says "(absent)"."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Revision of the source and whether it has changes; None outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def save_resolved(
    workdir: Path | str, config: Mapping[str, Any], *, command: Sequence[str] | None = None
) -> Path:
    """Writes <workdir>/config.json: config, source revision, versions, devices, command line.

    Only process 0 writes. Called before step 0 and again on resume (the newest run's circumstances stay).

    Args:
      workdir: created if missing.
      config: plain JSON values (see `config.to_json`).
      command: words of the command line; None: of this process.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    workdir = Path(workdir)
    devices = jax.devices()
    record = {
        "config": config,
        "git": _git_state(Path(__file__).resolve().parent),
        "versions": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "processes": jax.process_count(),
        "command": list(sys.argv if command is None else command),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if jax.process_index() == 0:
        with writing(workdir, FILE_NAME):
            write_json(workdir / FILE_NAME, record)
    return workdir / FILE_NAME


def load_resolved(workdir: Path | str) -> dict[str, Any]:
    """The record `save_resolved` wrote; its "config" is the resolved config.

    Raises:
      ConfigError: no such file, or not a record of a run.
    """
    path = Path(workdir) / FILE_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent} is not the workdir of a run: it has no {FILE_NAME}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"{path} is not the record of a run: it has no 'config'")
    return record


def provenance(record: Mapping[str, Any], *, command: str = "", commit: str = "") -> dict[str, str]:
    """What a result row says of the run it comes from: command, device, jax, commit, date.

    Args:
      record: what `load_resolved` gives.
      command: instead of the recorded one.
      commit: instead of the recorded one, whose "+" says that the sources had changes.
    """
    git = record["git"] or {"revision": "unknown", "changed": False}
    if commit:
        git = {"revision": commit, "changed": False}
    return {
        "command": command or _as_typed(record["command"]),
        "device": f"{record['device']['count']} x {record['device']['kind']}",
        "jax": record["versions"].get("jax", "unknown"),
        "commit": git["revision"][:12] + ("+" if git["changed"] else ""),
        "date": record["started"][:10],
    }


def _as_typed(words: Sequence[str]) -> str:
    """A recorded command line as one types it: a program's file becomes `python -m`."""
    program = Path(words[0])
    if program.suffix == ".py":
        parts = program.with_suffix("").parts
        starts = [i for i, part in enumerate(parts) if part in ("tasks", "launch")]
        parts = parts[starts[-1] :] if starts else parts[-1:]
        return " ".join(["python -m", ".".join(parts), *words[1:]])
    return " ".join(words)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def diff_configs(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = ()
) -> list[Difference]:
    """Every key on which two configs (plain JSON values) differ, in order.

    Args:
      old, new: resolved configs.
      free: dotted keys or sections to leave out.
    """
    left, right = flatten(old), flatten(new)
    return [
        Difference(key, left.get(key, "(absent)"), right.get(key, "(absent)"))
        for key in sorted(left.keys() | right.keys())
        if left.get(key, "(absent)") != right.get(key, "(absent)")
        and not any(key == f or key.startswith(f + ".") for f in free)
    ]


def describe_differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str] = ()) -> str:
    """`diff_configs` as lines of a message; "" if nothing differs."""
    return "\n".join(f"  {difference}" for difference in diff_configs(old, new, free))


def require_same(
    old: Mapping[str, Any], new: Mapping[str, Any], where: Path | str, free: Sequence[str] = FREE_KEYS
) -> None:
    """Stops when a checkpoint was made by another config.

    Raises:
      ConfigError: names `where` and every differing key with both values.
    """
    if lines := describe_differences(old, new, free):
        raise ConfigError(
            f"the checkpoint in {where} belongs to another config; use another --workdir, or undo:\n{lines}"
        )
