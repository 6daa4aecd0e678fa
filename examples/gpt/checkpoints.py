"""Checkpoints of a run: model, optimizer and records, all of one moment."""

import contextlib
import copy
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from .settings import Settings, fail

if TYPE_CHECKING:
    from .training import Run


class Checkpoints:
    """The checkpoints of a run in a folder; none without a folder.

    A process that is killed, at any moment, leaves the newest checkpoint that was whole.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._manager, self.step = folder, None, None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY)
        try:  # the system takes the lock off when the process ends, however it does
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out: {folder} is in use by another process; wait for its end or end it")
        # Saves that a killed process had begun are removed before anything else is done here:
        # Orbax would do that beside the next save.
        for begun in folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(begun)
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self.step = self._manager.latest_step()

    def load(self, settings: Settings) -> dict[str, Any]:
        """Records and facts; ends the program if they are of other settings or another step."""
        told = self._restore("told", ocp.args.JsonRestore())
        for name, value in settings.of_a_run.items():
            if (got := told["settings"].get(name)) != value:
                option = name.replace("_", "-")
                fail(
                    f"--out: {settings.out} has a run with --{option} {got}, here it is {value}; "
                    "choose another folder"
                )
        steps = [record["step"] for record in told["records"]]
        if steps != list(range(self.step + 1)):
            self._refuse(f"records of the steps 0 to {self.step}", _span(steps))
        return told

    def restore(self, run: "Run") -> None:
        """Sets model and optimizer to what they were, to the bit, on the devices of this run."""
        state = nnx.state((run.model, run.optimizer))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        self._check_arrays(_described(abstract))
        restored = self._restore("state", ocp.args.StandardRestore(abstract))
        nnx.replace_by_pure_dict(state, restored)
        nnx.update((run.model, run.optimizer), state)
        if (step := int(run.optimizer.step[...])) != self.step:
            self._refuse(f"arrays of step {self.step}", f"those of step {step}")

    def _restore(self, item: str, how: Any) -> Any:
        with self._whole():
            return self._manager.restore(self.step, args=ocp.args.Composite(**{item: how}))[item]

    def _check_arrays(self, expected: dict[str, str]) -> None:
        """Refuses arrays of another model, such as one of an earlier version, by name and shape."""
        with self._whole():
            folder = self._folder.absolute() / str(self.step) / "state"
            stored = _described(ocp.StandardCheckpointHandler().metadata(folder).tree)
        for name in sorted(expected.keys() | stored.keys()):
            wanted, got = (arrays.get(name, "none") for arrays in (expected, stored))
            if wanted != got:
                self._refuse(f"{name} {wanted}", got)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Refuses a checkpoint that cannot be read."""
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            self._refuse(f"a whole checkpoint of step {self.step}", str(error).splitlines()[0])

    def _refuse(self, expected: str, got: str) -> NoReturn:
        fail(
            f"--out: {self._folder}: expected {expected}, got {got}; remove the folder to begin "
            "that run anew, or choose another --out"
        )

    def save(self, step: int, run: "Run") -> None:
        """Begins to write; `close` and the next `save` wait for the end."""
        # Copies, since Orbax writes while the next step takes over the arrays, which are donated to
        # it, and adds to the records.
        state = nnx.to_pure_dict(nnx.state((run.model, run.optimizer)))
        state = jax.tree.map(np.array, jax.device_get(state))
        told = dict(settings=run.settings.of_a_run, facts=run.facts, records=run.records)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), told=ocp.args.JsonSave(copy.deepcopy(told))
        )
        self._manager.save(step, args=items)

    def close(self) -> None:
        """Waits until all is written."""
        if self._manager is not None:
            self._manager.close()
            os.close(self._lock)


def _described(arrays: Any) -> dict[str, str]:
    """Names of arrays of model and optimizer, each with its dtype and shape."""

    def name(path: Any) -> str:
        first, *others = (str(key.key) for key in path)
        return ".".join([("model", "optimizer")[int(first)], *others])

    return {
        name(path): f"{np.dtype(array.dtype)}{list(array.shape)}"
        for path, array in jax.tree.leaves_with_path(arrays)
    }


def _span(steps: list[int]) -> str:
    return f"{len(steps)}, of the steps {steps[0]} to {steps[-1]}" if steps else "none"
