"""Checkpoints: Orbax's CheckpointManager behind one file.

A step folder holds three items that are committed together: `params` and `opt_state` (nested dicts with the
canonical per-layer names) and `manifest` (JSON: fingerprint, shape and dtype of every leaf, the step, and
what the caller adds). Orbax loads flipped bytes silently and takes an emptied folder for the newest step,
so `restore` verifies against the manifest and falls back to the newest step that is good.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tasks.common.errors import CheckpointError, ConfigError, describe_write_failure
from tasks.common.fingerprint import fingerprints
from tasks.common.state import TrainState, from_named, leaf_names, to_named

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
DAMAGED = "damaged_checkpoints"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every: steps between checkpoints (one is always written at the end). keep: newest ones kept, at least 2
    so that a damaged newest one has a predecessor. background: write while training goes on."""

    every: int = 1000
    keep: int = 3
    background: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"checkpoint.every = {self.every}: must be at least 1 step")
        if self.keep < 2:
            raise ConfigError(
                f"checkpoint.keep = {self.keep}: must be at least 2, or a damaged one has no spare"
            )


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: its step, what was asked for, and the caller's extra JSON values."""

    step: int
    state: Any
    extra: dict[str, Any]


class _Damaged(Exception):
    """Why a step cannot be used."""


def _seal(content: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {**content, "sha256": digest}


def _unseal(manifest: Any) -> dict[str, Any]:
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise _Damaged("its manifest is not complete")
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if _seal(content)["sha256"] != manifest["sha256"]:
        raise _Damaged("its manifest was altered")
    return content


def _trees(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint, by name."""
    trees = {"params": to_named(state.params), "opt_state": to_named(state.opt_state)}
    return trees if state.ema is None else {**trees, "ema": to_named(state.ema)}


def _describe(tree: Any) -> dict[str, list[Any]]:
    leaves = jax.tree.leaves(tree)
    return {n: [list(x.shape), str(x.dtype)] for n, x in zip(leaf_names(tree), leaves, strict=True)}


def _verify(name: str, tree: Any, manifest: dict[str, Any]) -> None:
    wanted, found = manifest["fingerprints"][name], fingerprints(tree)
    wrong = [leaf for leaf in wanted if found.get(leaf) != wanted[leaf]]
    if wrong or len(found) != len(wanted):
        raise _Damaged(f"{len(wrong)} array(s) of {name} do not match their fingerprints, first: {wrong[:1]}")


def _manager(folder: Path, config: CheckpointConfig) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep,
        enable_async_checkpointing=config.background,
        cleanup_tmp_directories=True,
        save_root_metadata=False,
    )
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ("params", "opt_state", "ema"):
        handler = ocp.StandardCheckpointHandler()
        handlers.add(item, ocp.args.StandardSave, handler)
        handlers.add(item, ocp.args.StandardRestore, handler)
    json_handler = ocp.JsonCheckpointHandler()
    handlers.add("manifest", ocp.args.JsonSave, json_handler)
    handlers.add("manifest", ocp.args.JsonRestore, json_handler)
    return ocp.CheckpointManager(folder, options=options, handler_registry=handlers)


def _read_manifest(step_folder: Path) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            manifest = reader.restore(step_folder / "manifest")
    except (
        Exception
    ) as error:  # Orbax raises whatever its parts raise: KeyError, ValueError, JSONDecodeError, ...
        raise _Damaged(
            f"its manifest cannot be read ({type(error).__name__}: {_first_line(error)})"
        ) from error
    return _unseal(manifest)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _drop_orbax_tracebacks(record: logging.LogRecord) -> bool:
    """Log filter: Orbax prints up to ten tracebacks for a failed save, which comes back as one error here."""
    return record.exc_info is None or "orbax" not in record.pathname


class Checkpointer:
    """Saves and restores `TrainState`s under <workdir>/checkpoints. Use as a context manager.

    Leaving the context waits for a save under way, so the last checkpoint is never lost.
    """

    def __init__(self, workdir: Path | str, config: CheckpointConfig) -> None:
        self.workdir = Path(workdir).resolve()
        logging.getLogger("absl").addFilter(_drop_orbax_tracebacks)
        self._manager = self._guard(lambda: _manager(self.workdir / FOLDER, config))

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            self.wait()
        except CheckpointError:
            if kind is None:  # an error already on its way is the one to show
                raise
        finally:
            self._manager.close()

    def _guard(self, action: Any) -> Any:
        """Runs a write; failures become one CheckpointError naming the workdir."""
        try:
            return action()
        except Exception as error:  # OSError from Orbax, ValueError from TensorStore, its own classes
            message = describe_write_failure(error, self.workdir, "a checkpoint")
            raise CheckpointError(f"{message}; earlier checkpoints are intact") from error

    def steps(self) -> list[int]:
        """Committed steps, oldest first. Saves that were interrupted do not appear."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, step: int, extra: Mapping[str, Any]) -> None:
        """Saves `state` as `step`; returns once the arrays are copied off the device.

        Args:
          state: the training state; may be donated as soon as this returns.
          step: updates done; a step that is already saved is left as it is.
          extra: JSON values to come back from `restore`: data position, config.

        Raises:
          CheckpointError: this save, or the one before it that ran in the background, could not be written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        trees = _trees(state)
        manifest = _seal(
            {
                "format": 1,
                "step": step,
                "fingerprints": {name: fingerprints(tree) for name, tree in trees.items()},
                "leaves": {name: _describe(tree) for name, tree in trees.items()},
                "extra": dict(extra),
            }
        )
        if jax.default_backend() == "cpu":
            # On CPU "copying off the device" is a view; the donated buffer must not change under the writer.
            trees = jax.tree.map(jnp.copy, trees)
        args = ocp.args.Composite(
            **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
            manifest=ocp.args.JsonSave(manifest),
        )
        self._guard(lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          CheckpointError: it could not be written.
        """

        def finish() -> None:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

        self._guard(finish)

    def restore(self, abstract: TrainState, check_extra: Any = None) -> Restored | None:
        """The newest good checkpoint, laid out like `abstract` whatever mesh it was saved on.

        A step that is truncated, emptied, altered or unreadable is reported, moved to
        <workdir>/damaged_checkpoints, and the one before it is tried.

        Args:
          abstract: TrainState of `jax.ShapeDtypeStruct` with shardings.
          check_extra: called with the stored extra values before arrays are read; may raise ConfigError.

        Returns:
          None if nothing was ever saved here.

        Raises:
          CheckpointError: there are checkpoints, but none is good. The run does not silently start again.
          ConfigError: the arrays of a good checkpoint are not the ones this run has.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            try:
                manifest = _read_manifest(self.workdir / FOLDER / str(step))
                if check_extra is not None:
                    check_extra(manifest["extra"])
                state = self._restore_state(step, abstract, manifest)
            except _Damaged as damage:
                problems.append(f"step {step}: {damage}")
                logger.warning("checkpoint of step %d in %s is damaged: %s", step, self.workdir, damage)
                continue
            self._move_damaged(step)
            if problems:
                logger.warning("continuing from the checkpoint of step %d, the newest good one", step)
            return Restored(step, state, manifest["extra"])
        if problems:
            raise CheckpointError(
                f"no good checkpoint in {self.workdir / FOLDER}; nothing was changed. "
                f"{'; '.join(problems)}. Use another --workdir to start again"
            )
        return None

    def _restore_state(self, step: int, abstract: TrainState, manifest: dict[str, Any]) -> TrainState:
        trees = _trees(abstract)
        for name in {**trees, **manifest["leaves"]}:
            stored = manifest["leaves"].get(name, {})
            _require_leaves(name, stored, _describe(trees.get(name, {})), self.workdir)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # truncated arrays, missing files, broken metadata: each its own class
            raise _Damaged(
                f"its arrays cannot be read ({type(error).__name__}: {_first_line(error)})"
            ) from error
        for name in trees:
            _verify(name, found[name], manifest)
        counter = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(
            step=counter,
            params=from_named(found["params"], abstract.params),
            opt_state=from_named(found["opt_state"], abstract.opt_state),
            ema=None if abstract.ema is None else from_named(found["ema"], abstract.ema),
        )

    def _move_damaged(self, good: int) -> None:
        """Moves the steps after `good` away, so that the run can save those steps again."""
        newer = [step for step in self.steps() if step > good]
        if newer and jax.process_index() == 0:
            (self.workdir / DAMAGED).mkdir(exist_ok=True)
            for step in newer:
                target = self.workdir / DAMAGED / str(step)
                number = 1
                while target.exists():
                    target, number = target.with_name(f"{step}-{number}"), number + 1
                (self.workdir / FOLDER / str(step)).rename(target)
        if newer:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints moved")
            self._manager.reload()


def _require_leaves(name: str, stored: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raises ConfigError where a checkpoint's arrays and the run's have other names, shapes or dtypes."""
    lines = []
    for leaf in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(leaf), wanted.get(leaf)
        if old != new:
            shown = [f"{tuple(x[0])} {x[1]}" if x else "(absent)" for x in (old, new)]
            lines.append(f"  {name}/{leaf}: {shown[0]} -> {shown[1]}")
    if lines:
        more = [f"  ... and {len(lines) - 20} more"] if len(lines) > 20 else []
        raise ConfigError("\n".join([f"the checkpoint in {where} holds other arrays:", *lines[:20], *more]))


def load_checkpoint(path: Path | str, step: int | None = None, *, averaged: bool = True) -> Restored:
    """The parameters of the newest good checkpoint as numpy arrays, with no model or mesh at hand.

    Args:
      path: a workdir, its checkpoints folder, or one step's folder.
      step: this step only; None: the newest good one (or the step that `path` names).
      averaged: take their moving average, where the run kept one.

    Returns:
      Restored, whose `state` is the pure dict of parameters.

    Raises:
      CheckpointError: no checkpoint there, or none that is good.
    """
    folder = Path(path).resolve()
    if step is None and folder.name.isdigit() and (folder / "manifest").is_dir():
        folder, step = folder.parent, int(folder.name)
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    problems: list[str] = []
    if folder.is_dir():
        # A save under way, or interrupted, has a longer name than its step.
        steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
        for candidate in steps if step is None else [s for s in steps if s == step]:
            try:
                return _load_step(folder / str(candidate), averaged)
            except _Damaged as damage:
                problems.append(f"step {candidate}: {damage}")
                logger.warning("checkpoint of step %d in %s is damaged: %s", candidate, folder, damage)
    which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise CheckpointError(
        f"{which} in {path}" if not problems else f"no good checkpoint in {path}: {problems}"
    )


def _load_step(step_folder: Path, averaged: bool) -> Restored:
    manifest = _read_manifest(step_folder)
    params = _load_tree(step_folder, manifest, "params")
    if averaged and "ema" in manifest["leaves"]:
        _overlay(params, _load_tree(step_folder, manifest, "ema"))
    return Restored(int(manifest["step"]), params, manifest["extra"])


def _overlay(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Puts the leaves of `other` in the place of those of `tree`."""
    for name, value in other.items():
        if isinstance(value, dict):
            _overlay(tree[name], value)
        else:
            tree[name] = value


def _load_tree(step_folder: Path, manifest: dict[str, Any], item: str) -> dict[str, Any]:
    template: dict[str, Any] = {}
    for leaf, (shape, dtype) in manifest["leaves"][item].items():
        node = template
        *parents, last = leaf.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape)  # holds no memory
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            args = ocp.args.PyTreeRestore(template, restore_args=restore_args)
            tree = reader.restore(step_folder / item, args=args)
    except Exception as error:  # as in `_restore_state`
        raise _Damaged(f"its arrays cannot be read ({type(error).__name__}: {_first_line(error)})") from error
    _verify(item, tree, manifest)
    return tree


def load_params(path: Path | str, step: int | None = None, *, averaged: bool = True) -> dict[str, Any]:
    """`load_checkpoint`'s parameters: a pure dict of numpy arrays."""
    return load_checkpoint(path, step, averaged=averaged).state
