"""The task loop: one scholar, one task after another, measured as it goes, and the files that a run leaves.

For every task: find what to replay, let the generator learn, let the solver learn, measure precision on all tasks so
far, save the scholar. What happens is told to observers (`visual.Observer`): the files of the run, the progress bars,
the live plots. All that training has come to is in its `state_dict`: a run that goes on from there is the run that was
never stopped. How to learn is in `dgr.py`.
"""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgr
import visual
from data import Split, Task
from utils import UserError, atomic_write, reason, warn


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to learn, from what, and how often to look. Intervals are in iterations, but for the checkpoints'."""

    replay_mode: str
    replay_targets: dgr.Targets
    importance_of_new_task: float | str
    chain: bool  # each scholar from scratch, on the replay of the last one alone (the paper's Table 1)
    train_generator: bool
    generator_iterations: int
    solver_iterations: int
    batch_size: int
    lr_schedule: str  # "constant", or "linear": down to 0 in each phase of a task
    test_size: int
    eval_log_interval: int
    loss_log_interval: int
    checkpoint_interval: float  # seconds
    images_at_once: int  # where nothing is learned from them: testing and replay


def precision(solver: dgr.Solver, split: Split, images_at_once: int) -> float:
    """The share of images of a split that the solver answers rightly, in [0, 1]."""
    right = 0
    for start in range(0, len(split), images_at_once):
        x, y = split.batch(slice(start, start + images_at_once))
        right = right + (solver.answer(x) == y).sum()
    return int(right) / len(split)


def due(iteration: int, interval: int, last: int) -> bool:
    return iteration % interval == 0 or iteration == last


class Training:
    """A scholar, or a chain of them, on its way through the tasks.

    sample: draws images that show what the generator knows, without touching training's random stream.
    save_scholar: keeps the scholar after a task.
    save_state: called after each phase, and in between at the schedule's interval, when `state_dict` is worth keeping.
    stop_requested: whether somebody asks for an end; training then saves its state and raises `UserError`.
    """

    def __init__(
        self,
        new_scholar: Callable[[], dgr.Scholar],
        tasks: Sequence[Task],
        schedule: Schedule,
        *,
        observers: Sequence[visual.Observer],
        sample: Callable[[dgr.Scholar], Tensor],
        save_scholar: Callable[[dgr.Scholar], None],
        save_state: Callable[[], None] = lambda: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self.new_scholar, self.tasks, self.schedule = new_scholar, tasks, schedule
        self.observers, self.sample = observers, sample
        self.save_scholar, self._save_state, self.stop_requested = save_scholar, save_state, stop_requested
        self.scholar = new_scholar()
        self.replay: dgr.ReplayMode | None = None
        self.task = 1
        self.done = {"generator": 0, "solver": 0}  # iterations of this task
        # Row i, column j: precision on task j, over its whole test set, after task i; None for tasks not yet begun, and
        # for those of earlier scholars of a chain.
        self.matrix: list[list[float | None]] = []

    def run(self) -> list[list[float | None]]:
        """Learn the tasks that are left, in their order. Returns the precision matrix."""
        self._save_state()
        self._last_saved = time.monotonic()
        while self.task <= len(self.tasks):
            self._learn_task()
            self.replay, self.done, self.task = None, dict.fromkeys(self.done, 0), self.task + 1
            self.save_state()
        return self.matrix

    def _learn_task(self) -> None:
        schedule, task = self.schedule, self.tasks[self.task - 1]
        if self.task > 1 and self.replay is None:
            self.replay = self._old_scholar_as_replay()
            if schedule.chain:
                self.scholar = self.new_scholar()
        if schedule.chain and self.replay is not None:
            current, replay, r = self.replay, None, 1.0
        else:
            r = dgr.importance_of_new_task(schedule.importance_of_new_task, self.task)
            current, replay = task.train, self.replay
        how: dict[str, Any] = {"r": r, "batch_size": schedule.batch_size}

        if schedule.train_generator:
            iterations = schedule.generator_iterations
            left = iterations - self.done["generator"]
            learning = dgr.learn_generator(self.scholar.generator, current, replay, iterations=left, **how)
            for iteration in self._watched("generator", learning, iterations):
                self._show_samples(iteration, iterations)

        iterations, how["temperature"] = schedule.solver_iterations, schedule.replay_targets.temperature
        left = iterations - self.done["solver"]
        learning = dgr.learn_solver(self.scholar.solver, current, replay, iterations=left, **how)
        seen = [self.task] if schedule.chain else range(1, self.task + 1)
        measured = {number: self.tasks[number - 1].test for number in seen}
        glimpses = {number: test.spread(schedule.test_size) for number, test in measured.items()}
        for iteration in self._watched("solver", learning, iterations):
            if due(iteration, schedule.eval_log_interval, iterations):
                self._tell("solver", iteration, self._precisions(glimpses))

        row = self._precisions(measured)
        self.matrix.append([row.get(f"precision-{number}") for number in range(1, len(self.tasks) + 1)])
        self._tell("test", iterations, row)
        self.save_scholar(self.scholar)

    def _old_scholar_as_replay(self) -> dgr.ReplayMode:
        old_tasks = [old.train for old in self.tasks[: self.task - 1]]
        replay = dgr.REPLAY_MODES[self.schedule.replay_mode](self.scholar, old_tasks, self.schedule.replay_targets)
        replay.block = self.schedule.images_at_once
        return replay

    def _precisions(self, tests: dict[int, Split]) -> dict[str, float]:
        solver, at_once = self.scholar.solver.remember(), self.schedule.images_at_once
        return {f"precision-{task}": precision(solver, test, at_once) for task, test in tests.items()}

    def _watched(self, phase: str, learning: Iterator[dict[str, Tensor]], iterations: int) -> Iterator[int]:
        """Learn, and yield the number of every iteration done. Losses leave the device only when they are told."""
        if self.done[phase] == iterations:
            return
        for observer in self.observers:
            observer.begin(phase, self.task, iterations, self.done[phase])
        self._set_learning_rates(phase, self.done[phase] / iterations)
        for iteration, losses in enumerate(learning, start=self.done[phase] + 1):
            self._set_learning_rates(phase, iteration / iterations)
            for observer in self.observers:
                observer.step(iteration)
            if due(iteration, self.schedule.loss_log_interval, iterations):
                values = {name: float(loss) for name, loss in losses.items()}
                self._tell(phase, iteration, values)
                if not all(map(math.isfinite, values.values())):
                    raise self._diverged(phase, iteration)
            yield iteration
            self.done[phase] = iteration
            if self.stop_requested():
                self.save_state(phase)
                at = f"task {self.task}, {phase} iteration {iteration}"
                raise UserError(f"stopped at {at}; the same command with --resume goes on")
            if iteration == iterations or time.monotonic() - self._last_saved >= self.schedule.checkpoint_interval:
                self.save_state(phase)
        for observer in self.observers:
            observer.end(phase, self.task)

    def _set_learning_rates(self, phase: str, done: float) -> None:
        """Those of the next iteration, where this share of the phase is done."""
        if self.schedule.lr_schedule == "linear":
            for optimiser in optimisers_of(getattr(self.scholar, phase)).values():
                for group in getattr(optimiser, "param_groups", ()):
                    group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - done)

    def _show_samples(self, iteration: int, iterations: int) -> None:
        """Draw samples if an observer wants them now."""
        curious = [o for o in self.observers if o.image_interval and due(iteration, o.image_interval, iterations)]
        if curious:
            images = self.sample(self.scholar)
            for observer in curious:
                observer.images(self.task, iteration, images)

    def _tell(self, phase: str, iteration: int, values: dict[str, float]) -> None:
        for observer in self.observers:
            observer.scalars(phase, self.task, iteration, values)

    def _diverged(self, phase: str, iteration: int) -> UserError:
        flags = "--lr" if phase == "solver" else "--lr or --generator-lambda"
        return UserError(
            f"training diverged at task {self.task}, {phase} iteration {iteration}, a loss or weight not being finite: "
            f"start anew with another {flags}, or with --precision=fp32; the last good state is kept"
        )

    # ---------------------------------------------------------------------------------------------- its state

    def save_state(self, phase: str = "solver") -> None:
        """Keep what training has come to, unless it is broken."""
        part = getattr(self.scholar, phase)
        sound = [value.isfinite().all() for value in part.parameters()]
        sound += [~value.isnan().any() for value in part.buffers()]  # which may be infinite, as a mask is
        if not all(sound):
            raise self._diverged(phase, self.done[phase])
        self._save_state()
        self._last_saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """All that what comes next depends on, as tensors and plain values."""
        device = next(self.scholar.parameters()).device
        return {
            "task": self.task,
            "done": dict(self.done),
            "matrix": self.matrix,
            "scholar": self.scholar.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in optimisers_of(self.scholar).items()},
            "replay": None if self.replay is None else self.replay.state_dict(),
            "random": torch.get_rng_state(),
            "random_of_gpu": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        self.task, self.done, self.matrix = state["task"], dict(state["done"]), [list(row) for row in state["matrix"]]
        if state["replay"] is not None:
            self.replay = self._old_scholar_as_replay()
            self.replay.load_state_dict(state["replay"])
        self.scholar.load_state_dict(state["scholar"])
        for name, optimiser in optimisers_of(self.scholar).items():
            optimiser.load_state_dict(state["optimisers"][name])
        torch.set_rng_state(state["random"])
        device = next(self.scholar.parameters()).device
        if device.type == "cuda" and state["random_of_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_of_gpu"], device)


def optimisers_of(scholar: dgr.Scholar) -> dict[str, Any]:
    """The optimisers and schedulers that the parts of a scholar hold as attributes, by the attribute's full name."""
    return {
        f"{name}.{attribute}": value
        for name, module in scholar.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler)
    }


# --------------------------------------------------------------------------------------------- files of a run


class RunFiles(visual.Observer):
    """`config.json`, `metrics.csv` and `summary.json` in the directory of a run.

    state: what `state_dict` of an unfinished run gave, to go on with its files.
    """

    def __init__(self, directory: Path, config: dict[str, Any], state: dict[str, Any] | None = None):
        self.directory = directory
        self._file = directory / "metrics.csv"
        state = state or {"config": config, "metrics": "phase,task,iteration,name,value\n", "seconds": 0.0}
        self._config, self._metrics = state["config"], state["metrics"]
        self._started = time.monotonic() - state["seconds"]
        self._complete = self._warned = False  # whether the files hold everything; whether somebody was told that not
        self._write_metrics()

    def state_dict(self) -> dict[str, Any]:
        return {"config": self._config, "metrics": self._metrics, "seconds": time.monotonic() - self._started}

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        rows = io.StringIO()
        when = (phase, task, iteration)
        csv.writer(rows, lineterminator="\n").writerows((*when, name, repr(value)) for name, value in values.items())
        self._metrics += rows.getvalue()
        self._write_metrics(rows.getvalue())

    def _write_metrics(self, new: str = "") -> None:
        """Write what is new. Training goes on if that fails, and the next time everything is written."""
        try:
            if self._complete:
                with self._file.open("r+") as file:  # fails where the file has gone
                    file.seek(0, io.SEEK_END)
                    file.write(new)
            else:
                write_json(self.directory / "config.json", self._config)
                with atomic_write(self._file) as file:
                    file.write(self._metrics)
            self._complete = True
        except OSError as error:
            self._complete = False
            if not self._warned:
                warn(f"{self._file}: {reason(error)}; training goes on and tries again")
                self._warned = True

    def write_summary(self, matrix: list[list[float | None]], **description: Any) -> dict[str, Any]:
        """The outcome of the run; the keys are explained in README.md."""
        summary = {
            **description,
            "precision": matrix,
            "average_precision": average_precision(matrix),
            "forgetting": forgetting(matrix),
            "seconds": round(time.monotonic() - self._started, 1),
        }
        self._write_metrics()
        if not self._complete:
            raise UserError(f"{self._file} could not be written; put that right and --resume to finish the run")
        write_json(self.directory / "summary.json", summary)
        return summary


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        json.dump(content, file, indent=2)
        file.write("\n")


def average_precision(matrix: Sequence[Sequence[float | None]]) -> float:
    """The mean over all tasks of the precision after the last task; of a chain, the precision of the last scholar."""
    last = [value for value in matrix[-1] if value is not None]
    return sum(last) / len(last)


def forgetting(matrix: Sequence[Sequence[float | None]]) -> float:
    """The mean over old tasks of the best earlier precision minus the final one (0 if there is one task).

    Of a chain, where all scholars do the same test: the best earlier scholar's precision minus the last one's.
    """
    if len(matrix) == 1:
        return 0.0
    if matrix[-1][0] is None:
        return max(row[i] for i, row in enumerate(matrix[:-1])) - matrix[-1][-1]
    old = range(len(matrix) - 1)
    return sum(max(row[task] for row in matrix[task:-1]) - matrix[-1][task] for task in old) / len(old)
