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
    replay_targets: dgr.Targets
    importance_of_new_task: float | str
    chain: bool  # each scholar from scratch, on the replay of the last one alone (the paper's Table 1)
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
    new_scholar: Callable[[], dgr.Scholar],
    tasks: Sequence[Task],
    schedule: Schedule,
    *,
    observers: Sequence[visual.Observer],
    sample: Callable[[dgr.Scholar], Tensor],
    save: Callable[[dgr.Scholar, int], None],
) -> list[list[float | None]]:
    """Let a scholar learn the tasks in their order, or a chain of scholars, one for each task.

    sample: draws images that show what the generator knows, without touching training's random stream.
    save: keeps the scholar after a task, given the number of tasks learned.
    Returns the precision matrix: row i, column j is precision on task j, over its whole test set, after task i; None
    for tasks not yet begun, and for those of earlier scholars of a chain.
    """
    scholar, matrix = new_scholar(), []
    for number, task in enumerate(tasks, start=1):
        current, replay, r = task.train, None, dgr.importance_of_new_task(schedule.importance_of_new_task, number)
        if number > 1:
            mode = dgr.REPLAY_MODES[schedule.replay_mode]
            replay = mode(scholar, [old.train for old in tasks[: number - 1]], schedule.replay_targets)
        if schedule.chain and number > 1:
            scholar, current, replay, r = new_scholar(), replay, None, 1.0

        how = {"r": r, "batch_size": schedule.batch_size}
        if schedule.train_generator:
            iterations = schedule.generator_iterations
            learning = dgr.learn_generator(scholar.generator, current, replay, iterations=iterations, **how)
            for iteration in watched("generator", number, learning, iterations, schedule, observers):
                show_samples(scholar, number, iteration, iterations, sample, observers)

        iterations, temperature = schedule.solver_iterations, schedule.replay_targets.temperature
        learning = dgr.learn_solver(
            scholar.solver, current, replay, iterations=iterations, temperature=temperature, **how
        )
        measured = {seen: tasks[seen - 1].test for seen in ([number] if schedule.chain else range(1, number + 1))}
        glimpses = {seen: test.spread(schedule.test_size) for seen, test in measured.items()}
        for iteration in watched("solver", number, learning, iterations, schedule, observers):
            if due(iteration, schedule.eval_log_interval, iterations):
                tell(observers, "solver", number, iteration, precisions(scholar.solver, glimpses))

        row = precisions(scholar.solver, measured)
        matrix.append([row.get(f"precision-{seen}") for seen in range(1, len(tasks) + 1)])
        tell(observers, "test", number, iterations, row)
        save(scholar, number)
    return matrix


def precisions(solver: dgr.Solver, tests: dict[int, Split]) -> dict[str, float]:
    """Precision on these tasks, by name."""
    return {f"precision-{task}": precision(solver, test) for task, test in tests.items()}


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
    scholar: dgr.Scholar,
    task: int,
    iteration: int,
    iterations: int,
    sample: Callable[[dgr.Scholar], Tensor],
    observers: Sequence[visual.Observer],
) -> None:
    """Draw samples if an observer wants them now."""
    curious = [o for o in observers if o.image_interval and due(iteration, o.image_interval, iterations)]
    if curious:
        images = sample(scholar)
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

    def write_summary(self, matrix: list[list[float | None]], **description: Any) -> dict[str, Any]:
        """The outcome of the run; the keys are explained in README.md."""
        summary = {
            **description,
            "precision": matrix,
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
