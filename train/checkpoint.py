"""Checkpoints of a run with Orbax: weights, moments, teacher, step and what the loop remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from paravt_jax.checkpoint import save_args
from paravt_jax.params import Table
from train.state import TrainState


class Checkpoints:
    """The `checkpoints/` folder of a workdir, for the parameters of a table."""

    def __init__(self, folder: Path, every: int, keep: int, table: Table):
        self._every, self._save_args = every, save_args(table)
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=False
            ),
        )

    @property
    def latest(self) -> int | None:
        """The last complete step, None if there is none."""
        return self._manager.latest_step()

    def maybe_save(self, step: int, state: TrainState, data_state: Any) -> None:
        """Save if the schedule says so. `data_state` is JSON."""
        if self._every and step % self._every == 0:
            self.save(step, state, data_state)

    def save(self, step: int, state: TrainState, data_state: Any = None) -> None:
        """Save this step unless it is there already."""
        if self.latest == step:
            return
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params, self._save_args),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "meta": ocp.args.JsonSave(
                {"step": step, "updates": int(state.step), "data": data_state}
            ),
        }
        if state.teacher:
            items["teacher"] = ocp.args.StandardSave(state.teacher)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, like: TrainState) -> tuple[TrainState, int, Any]:
        """The last saved state in the shapes and layout of `like`, its step and its data state."""
        step = self.latest
        assert step is not None, "nothing to restore"
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(like.params),
            "optimizer": ocp.args.StandardRestore(like.optimizer),
            "meta": ocp.args.JsonRestore(),
        }
        if like.teacher:
            items["teacher"] = ocp.args.StandardRestore(like.teacher)
        saved: Any = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = TrainState(
            trainable={name: saved.params[name] for name in like.trainable},
            frozen={name: saved.params[name] for name in like.frozen},
            optimizer=saved.optimizer,
            step=jax.device_put(np.int32(saved.meta["updates"]), like.step.sharding),
            teacher=saved.teacher if like.teacher else {},
        )
        return state, saved.meta["step"], saved.meta["data"]

    def close(self) -> None:
        """Wait for what is still being written."""
        self._manager.close()


def check_resume(folder: Path, resume: str) -> bool:
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
