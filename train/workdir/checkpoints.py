"""Checkpoints of a run with Orbax: weights, moments, teacher, step and what the loop remembers.

A checkpoint is written beside the steps that follow it, and verified when it is restored: it holds
a checksum of each of its arrays, and of what it says besides. docs/adr/0021 tells why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from paravt_jax.checkpoint import CHECKSUMS, META, read_meta, save_args
from paravt_jax.checksum import checksums, is_intact, sealed
from paravt_jax.event_loops import close_in_order
from paravt_jax.params import Table
from train.hosts.cluster import is_first, on_all_hosts
from train.state import TrainState
from train.workdir.mirror import Mirror
from train.workdir.retention import Retention, Saved

Place = Path | epath.Path
"""A folder of this host, or one of a bucket that Orbax writes to itself."""
Restored = tuple[TrainState, int, Any]
"""A state, its step and its data state."""


class Checkpoints:
    """The `checkpoints/` folder of a workdir, for the parameters of a table."""

    def __init__(
        self,
        folder: Place,
        keep: Retention | int,
        table: Table,
        staleness: int = 0,
        mirror: Mirror | None = None,
    ) -> None:
        """
        Args:
          keep: what stays; a number: so many of the newest.
          staleness: earlier steps whose weights a checkpoint holds too.
          mirror: sends the workdir to a bucket, if it is there.
        """
        close_in_order()
        _hush_writers()
        self.folder = folder.absolute() if isinstance(folder, Path) else folder
        self._save_args = save_args(table)
        self._keep = Retention(keep) if isinstance(keep, int) else keep
        self._staleness, self._mirror = staleness, mirror
        self._manager = ocp.CheckpointManager(self.folder, options=_options(self.folder))
        self._failed: OSError | None = None
        self._saved = self._read_saved() if is_first() else {}
        """What is known of each checkpoint, one that is being written included."""

    def _read_saved(self) -> dict[int, Saved]:
        """What the checkpoints of the folder say of themselves; damaged ones nothing."""
        saved = {step: Saved(step) for step in self._manager.all_steps()}
        for step in saved:
            with contextlib.suppress(ValueError):
                saved[step] = Saved.from_meta(step, read_meta(self.folder / str(step)) or {})
        return saved

    def is_best(self, figure: float | None) -> bool:
        """Whether a state of this figure is to stay as one of the best; the first host knows."""
        return figure is not None and self._keep.is_best(figure, self._saved.values())

    @property
    def latest(self) -> int | None:
        """The last step, complete or being written; None if there is none."""
        return self._manager.latest_step()

    def precompile(self, state: TrainState) -> None:
        """Compile what saves a state, so that no step stops for it."""
        checksums(_arrays(state))

    def save(
        self, step: int, state: TrainState, data_state: Any = None, figure: float | None = None
    ) -> None:
        """Begin to write this step unless it is there; `data_state` is JSON. The state is copied
        first: it may be donated when this returns.

        Args:
          figure: what the state was evaluated to, if it was.

        Raises:
          OSError: this one or the one before could not be written.
        """
        if self.latest == step:
            return
        self.wait()
        saved = Saved(step, time.time(), figure)
        meta = {"step": step, "updates": int(state.step), "data": data_state}
        meta |= {"saved_at": saved.at, "figure": figure}
        meta[CHECKSUMS] = checksums(_arrays(state))
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params, self._save_args),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            META: ocp.args.JsonSave(sealed(meta)),
        }
        if state.teacher:
            items["teacher"] = ocp.args.StandardSave(state.teacher)
        if state.older:
            items["older"] = ocp.args.StandardSave(state.older)
        with self._writing(step):
            if self._mirror is not None:
                self._mirror.begin_checkpoint(step)
            self._manager.save(step, args=ocp.args.Composite(**items))
        self._saved[step] = saved

    def failure(self) -> OSError | None:
        """Why a checkpoint could not be written, as far as that is known yet."""
        with contextlib.suppress(OSError), self._writing(self.latest):
            self._manager.check_for_errors()
        if self._failed is None and self._mirror is not None:
            return self._mirror.failure()
        return self._failed

    def wait(self) -> None:
        """Wait for what is being written; then those that are not to stay are deleted.

        Raises:
          OSError: it could not be written.
        """
        if self._failed is not None:
            raise self._failed
        with self._writing(self.latest):
            self._manager.check_for_errors()
            self._manager.wait_until_finished()
            if self._mirror is not None:
                self._mirror.wait()
        if is_first():
            self._prune()

    def _prune(self) -> None:
        """Delete what is not to stay of those that are complete: Orbax names a folder last."""
        there = self.folder.iterdir() if self.folder.exists() else ()
        steps = [int(path.name) for path in there if path.name.isdigit()]
        self._saved = {step: self._saved.get(step, Saved(step)) for step in steps}
        for step in set(steps) - self._keep.kept(self._saved.values()):
            _remove(self.folder / str(step))
            del self._saved[step]

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = OSError(
                f"checkpoint {step} could not be written to {self.folder} ({_reason(error)}); "
                "older ones are as they were: make room on the disk and continue with the same "
                "--workdir"
            )
            raise self._failed from error

    def restore(self, like: TrainState, tell: Callable[[str], None] = print) -> Restored:
        """The newest intact state in the shapes and layout of `like`, its step and its data state.
        Newer ones that are damaged are told and set aside.

        Raises:
          ValueError: none is intact.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = on_all_hosts(lambda step=step: self._read(step, like, tell))
            except ValueError as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                aside = on_all_hosts(lambda bad=bad: self._set_aside(bad))
                tell(
                    f"{self.folder / str(bad)} is damaged ({why}): the run goes on from "
                    f"{self.folder / str(step)}, and the damaged one is now {aside}"
                )
            if damaged:
                self._manager.reload()
            return restored
        reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
        raise ValueError(
            f"no checkpoint in {self.folder} can be restored ({reasons}): put an intact copy "
            "there, or start again with another --workdir"
        )

    def _read(self, step: int, like: TrainState, tell: Callable[[str], None]) -> Restored:
        """Raises ValueError for a checkpoint that is not what was saved."""
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(like.params),
            "optimizer": ocp.args.StandardRestore(like.optimizer),
            META: ocp.args.JsonRestore(),
        }
        if like.teacher:
            items["teacher"] = ocp.args.StandardRestore(like.teacher)
        ages = range(1, min(step, self._staleness) + 1)
        if ages:
            older = {str(age): like.trainable for age in ages}
            items["older"] = ocp.args.StandardRestore(older)
        try:
            saved: Any = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            raise ValueError(_reason(error)) from error
        state = TrainState(
            trainable={name: saved.params[name] for name in like.trainable},
            frozen={name: saved.params[name] for name in like.frozen},
            optimizer=saved.optimizer,
            step=jax.device_put(np.int32(saved.meta["updates"]), like.step.sharding),
            teacher=saved.teacher if like.teacher else {},
            older=saved.older if ages else {},
        )
        if CHECKSUMS in saved.meta:
            _verify(saved.meta, state)
        else:
            tell(f"{self.folder / str(step)} is of an earlier version and holds no checksums")
        return state, saved.meta["step"], saved.meta["data"]

    def _set_aside(self, step: int) -> Place | None:
        """Move a damaged checkpoint out of the way of the run, which will write that step anew."""
        aside = self.folder / f"damaged-{step}"
        if is_first():
            _remove(aside)
            (self.folder / str(step)).rename(aside)
        return aside

    def close(self) -> None:
        """Wait for what is still being written. After a failure there is nothing to wait for.

        Raises:
          OSError: it could not be written.
        """
        if self._failed is None:
            self.wait()
            self._manager.close()


def _remove(folder: Place) -> None:
    """Delete a folder as far as that is possible."""
    with contextlib.suppress(OSError):
        epath.Path(folder).rmtree(missing_ok=True)


def _arrays(state: TrainState) -> dict[str, Any]:
    """All that a checkpoint keeps as arrays."""
    arrays = {"params": state.params, "optimizer": state.optimizer, "teacher": state.teacher}
    return arrays | ({"older": state.older} if state.older else {})


def _verify(meta: dict[str, Any], state: TrainState) -> None:
    """Raises ValueError if anything is not as it was saved."""
    if not is_intact(meta):
        raise ValueError("its step and data position have changed since they were written")
    sums = checksums(_arrays(state))
    changed = [name for name, value in meta[CHECKSUMS].items() if sums.get(name) != value]
    if changed:
        raise ValueError(f"{len(changed)} arrays have changed since, the first is {changed[0]}")


def _reason(error: BaseException) -> str:
    """The cause in an error of Orbax or TensorStore, without the text around it."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code.group(1)))
    match = re.search(r"\[OS error \d*:? ?([^\]]*)\]", text)
    return match.group(1).strip() if match else text[:200] or type(error).__name__


def _options(folder: Place) -> ocp.CheckpointManagerOptions:
    """How Orbax writes below a folder, which is made where several hosts write."""
    # Orbax would delete an old checkpoint also when writing the new one failed: `_prune` waits.
    options = ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
    if jax.process_count() == 1:
        return options
    on_all_hosts(lambda: is_first() and folder.mkdir(parents=True, exist_ok=True))
    # Named, hosts meet in JAX's store. Else all devices would meet, in the midst of rollouts that
    # another thread draws on some of them.
    hosts = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    return dataclasses.replace(options, create=False, multiprocessing_options=hosts)


def _hush_writers() -> None:
    """A failed write ends in one line of ours; Orbax would log it in hundreds.

    Its errors reach us by `check_for_errors` and `wait_until_finished`.
    """
    logger = logging.getLogger("absl")
    if _not_of_orbax not in logger.filters:
        logger.addFilter(_not_of_orbax)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname


def check_resume(folder: Place, resume: str) -> bool:
    """Whether there is a checkpoint to go on from; refuses a flag that does not fit.

    Raises:
      ValueError: `must` without a checkpoint, or `never` where there is one: nothing is
        overwritten.
    """
    steps = [p.name for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    if resume == "must" and not steps:
        raise ValueError(f"--resume must: no checkpoint in {folder}; check --workdir")
    if resume == "never" and steps:
        raise ValueError(
            f"--resume never: {folder} holds checkpoints; choose another --workdir or remove it"
        )
    return bool(steps)
