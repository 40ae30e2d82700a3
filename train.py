"""The task loop: one scholar, one task after another, measured as it goes, and the files that a run leaves.

For every task: find what to replay, let the generator learn, let the solver learn, measure precision on all tasks so
far, save the scholar. What happens is told to observers (`visual.Observer`): the files of the run, the progress bars,
the live plots. How to learn is in `dgr.py`.
"""

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import dgr
import visual
from data import Split, Task
from utils import UserError, atomic_write


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long to learn, from what, and how often to look. Intervals are in iterations."""

    replay_mode: str
    importance_of_new_task: float | str
    train_generator: bool
    generator_iterations: int
    solver_iterations: int
    batch_size: int
    test_size: int
    eval_log_interval: int
    loss_log_interval: int


def precision(solver: dgr.Solver, split: Split, *, batch_size: int = 1000) -> float:
    """The share of images of a split that the solver answers rightly, in [0, 1]."""
    right = 0
    for start in range(0, len(split), batch_size):
        x, y = split.batch(slice(start, start + batch_size))
        right = right + (solver.answer(x) == y).sum()
    return int(right) / len(split)


def train(
    scholar: dgr.Scholar,
    tasks: Sequence[Task],
    schedule: Schedule,
    *,
    observers: Sequence[visual.Observer],
    sample: Callable[[], Tensor],
    save: Callable[[int], None],
) -> list[list[float]]:
    """Let the scholar learn the tasks in their order.

    sample: draws images that show what the generator knows, without touching training's random stream.
    save: keeps the scholar after a task, given the number of tasks learned.
    Returns the precision matrix: row i, column j is precision on task j, over its whole test set, after task i; row i
    has i entries.
    """
    matrix = []
    for number, task in enumerate(tasks, start=1):
        replay, r = None, dgr.importance_of_new_task(schedule.importance_of_new_task, number)
        if number > 1:
            replay = dgr.REPLAY_MODES[schedule.replay_mode](scholar, [old.train for old in tasks[: number - 1]])
        if schedule.train_generator:
            learning = dgr.learn_generator(
                scholar.generator,
                task.train,
                replay,
                r=r,
                iterations=schedule.generator_iterations,
                batch_size=schedule.batch_size,
            )
            for iteration in watched("generator", number, learning, schedule.generator_iterations, schedule, observers):
                show_samples(number, iteration, schedule.generator_iterations, sample, observers)

        learning = dgr.learn_solver(
            scholar.solver,
            task.train,
            replay,
            r=r,
            iterations=schedule.solver_iterations,
            batch_size=schedule.batch_size,
        )
        glimpses = [seen.test.spread(schedule.test_size) for seen in tasks[:number]]
        for iteration in watched("solver", number, learning, schedule.solver_iterations, schedule, observers):
            if due(iteration, schedule.eval_log_interval, schedule.solver_iterations):
                row = [precision(scholar.solver, glimpse) for glimpse in glimpses]
                tell(observers, "solver", number, iteration, precisions(row))

        row = [precision(scholar.solver, seen.test) for seen in tasks[:number]]
        matrix.append(row)
        tell(observers, "test", number, schedule.solver_iterations, precisions(row))
        save(number)
    return matrix


def precisions(row: Sequence[float]) -> dict[str, float]:
    """Names for the precision on task 1, 2, ..."""
    return {f"precision-{task}": value for task, value in enumerate(row, start=1)}


def due(iteration: int, interval: int, last: int) -> bool:
    return iteration % interval == 0 or iteration == last


def watched(
    phase: str,
    task: int,
    learning: Iterator[dict[str, Tensor]],
    iterations: int,
    schedule: Schedule,
    observers: Sequence[visual.Observer],
) -> Iterator[int]:
    """Learn, and yield the number of every iteration done. Losses leave the device only when they are told."""
    for observer in observers:
        observer.begin(phase, task, iterations)
    for iteration, losses in enumerate(learning, start=1):
        for observer in observers:
            observer.step(iteration)
        if due(iteration, schedule.loss_log_interval, iterations):
            values = {name: float(loss) for name, loss in losses.items()}
            tell(observers, phase, task, iteration, values)
            if not all(map(math.isfinite, values.values())):
                raise UserError(
                    f"training diverged at task {task}, {phase} iteration {iteration} ({values}): try a smaller --lr"
                )
        yield iteration
    for observer in observers:
        observer.end(phase, task)


def show_samples(
    task: int, iteration: int, iterations: int, sample: Callable[[], Tensor], observers: Sequence[visual.Observer]
) -> None:
    """Draw samples if an observer wants them now."""
    curious = [o for o in observers if o.image_interval and due(iteration, o.image_interval, iterations)]
    if curious:
        images = sample()
        for observer in curious:
            observer.images(task, iteration, images)


def tell(observers: Sequence[visual.Observer], phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
    for observer in observers:
        observer.scalars(phase, task, iteration, values)


# --------------------------------------------------------------------------------------------- files of a run


class RunFiles(visual.Observer):
    """`config.json`, `metrics.csv` and `summary.json` in the directory of a run."""

    METRICS = ("phase", "task", "iteration", "name", "value")

    def __init__(self, directory: Path, config: dict[str, Any]):
        self.directory = directory
        self.directory.mkdir(parents=True)
        self._write_json("config.json", config)
        self._metrics = (directory / "metrics.csv").open("w", newline="")
        self._writer = csv.writer(self._metrics, lineterminator="\n")
        self._writer.writerow(self.METRICS)
        self._started = time.monotonic()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        self._writer.writerows([phase, task, iteration, name, repr(value)] for name, value in values.items())
        self._metrics.flush()

    def write_summary(self, experiment: str, replay_mode: str, seed: int, matrix: list[list[float]]) -> dict[str, Any]:
        """The outcome of the run; the keys are explained in README.md."""
        tasks = len(matrix)
        summary = {
            "experiment": experiment,
            "replay_mode": replay_mode,
            "seed": seed,
            "precision": [row + [None] * (tasks - len(row)) for row in matrix],
            "average_precision": average_precision(matrix),
            "forgetting": forgetting(matrix),
            "seconds": round(time.monotonic() - self._started, 1),
        }
        self._write_json("summary.json", summary)
        return summary

    def close(self) -> None:
        self._metrics.close()

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        with atomic_write(self.directory / name) as file:
            json.dump(content, file, indent=2)
            file.write("\n")


def average_precision(matrix: Sequence[Sequence[float]]) -> float:
    """The mean over all tasks of the precision after the last task."""
    return sum(matrix[-1]) / len(matrix[-1])


def forgetting(matrix: Sequence[Sequence[float]]) -> float:
    """The mean over old tasks of the best earlier precision minus the final one (0 if there is one task)."""
    old = len(matrix) - 1
    best = [max(row[task] for row in matrix[task:-1]) for task in range(old)]
    return sum(best[task] - matrix[-1][task] for task in range(old)) / old if old else 0.0
