"""The task loop: one scholar, one task after another, measured on the way.

For every task: decide what to replay, train the generator, train the solver, measure precision on all tasks so far,
save the scholar. Observers (`utils.Observer`) hear what happens: the files of the run, progress bars, live plots. A run
that continues from its `state_dict` ends as the run that was never stopped. How to learn is in `dgr.py`.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dgr
from data import Split, Task
from utils import Observer, UserError, number, option, out_of_memory, own_random_numbers


def importance(text: str) -> float | str:
    return text if text == "auto" else number(0, 1)(text)


TARGETS = (
    "labels of replayed images: true ones (exact-replay, joint), the old solver's class (hard) or its probabilities "
    "(soft), a conditional generator's own class (own) (default: true for exact-replay and joint, soft for lwf, else "
    "hard; recipes other than 2017: soft for hard)"
)


@dataclass(frozen=True)
class Before:
    """What a run continues from.

    scholar: answers among all classes of the run. earlier: the checksum of each task it has learned that is not among
    the run's tasks. given: how many of them are, which the run's tasks then begin with.
    """

    scholar: dgr.Scholar
    earlier: list[str]
    given: int


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to learn a sequence of tasks, and how often to look."""

    replay_mode: str = option(
        "generative-replay", "how earlier tasks are replayed", choices=lambda: dgr.REPLAY_MODES, group="replay"
    )
    replay_targets: str | None = option(None, TARGETS, choices=("true", "hard", "soft", "own"))
    temperature: float | None = option(None, "softmax temperature of soft targets (default: 2)", low=0.01, high=1000)
    replay_pool: int = option(0, "inputs drawn once per task, to use again and again; 0: to use once (models)", low=0)
    replay_distortion: float = option(
        0.0, "random distortion of what is drawn, before the old solver answers (generative-replay)", low=0, high=3
    )
    replay_elastic: float = option(0.0, "elastic distortion of what is drawn, likewise, in pixels", low=0, high=8)
    importance_of_new_task: float | str = option(
        0.3, "r of equation 1, or auto: 1/i at task i (always so in joint)", parse=importance, metavar="R"
    )
    penalty: str = option("none", "on the solver's weights, with any replay mode", choices=lambda: dgr.PENALTIES)
    penalty_weight: float = option(1000.0, "lambda of the penalty (ewc)", low=0)
    generator_iterations: int = option(3000, "generator updates per task", low=1, group="training")
    solver_iterations: int = option(1000, "solver updates per task", low=1)
    batch_size: int = option(32, "images per batch; the solver gets as many replayed ones on top", low=1)
    solver_distortion: float = option(
        0.0, "random distortion of what the solver learns from; 1 turns images by up to 15 degrees", low=0, high=3
    )
    lr_schedule: str = option("constant", "linear: from --lr to 0 in each phase", choices=("constant", "linear"))
    test_size: int = option(
        1024, "test images per task for the curves; the summary uses all", None, low=1, group="measuring and saving"
    )
    sample_size: int = option(36, "images in a sample grid, six per row", None, low=1)
    sample_log: bool = option(False, "keep sample grids, and train the generator in every replay mode")
    sample_log_interval: int = option(300, "generator iterations between kept grids", None, low=1)
    image_log_interval: int = option(100, "generator iterations between the newest grids", None, low=1)
    eval_log_interval: int = option(50, "solver iterations between measurements of precision", None, low=1)
    loss_log_interval: int = option(30, "iterations between logged losses", None, low=1)
    measure_generator: bool = option(False, "measure the generator after each task, where one is trained", None)
    measured_images: int = option(10_000, "replayed images, and as many real ones, that measure it", None, low=100)
    checkpoint_interval: float = option(300.0, "seconds between saves of the state, besides after phases", None, low=0)
    chain: bool = False  # see `data.Experiment`
    heads: str = "one"  # see `models.ScholarOptions`

    @property
    def targets(self) -> dgr.Targets:
        return dgr.Targets(self.replay_targets, self.temperature)

    @property
    def r(self) -> float | str:
        """The setting of r: the replay mode's own, or the option."""
        mode = dgr.REPLAY_MODES[self.replay_mode]
        return (mode and mode.importance) or self.importance_of_new_task

    @property
    def trains_generator(self) -> bool:
        mode = dgr.REPLAY_MODES[self.replay_mode]
        return self.sample_log or (mode is not None and mode.needs_generator)


def unused(options: TrainingOptions) -> dict[str, str]:
    """The options without effect beside this penalty and replay mode, and what takes it from them."""
    mode = dgr.REPLAY_MODES[options.replay_mode]
    found = {"penalty_weight": "--penalty=none"} if options.penalty == "none" else {}
    if mode is None or not issubclass(mode, dgr.ModelReplay):
        found["replay_pool"] = f"--replay-mode={options.replay_mode}"
    if mode is None or not issubclass(mode, dgr.GenerativeReplay):
        found |= dict.fromkeys(("replay_distortion", "replay_elastic"), f"--replay-mode={options.replay_mode}")
    if mode is not None and mode.importance:
        found["importance_of_new_task"] = f"--replay-mode={options.replay_mode}"
    return found


def scores(solver: dgr.Solver, split: Split, images_at_once: int, *, head: int = -1) -> Tensor:
    """The class scores (n, classes) that the solver gives a split's images; head: from 0, if there are several."""
    parts = (slice(start, start + images_at_once) for start in range(0, len(split), images_at_once))
    with dgr.evaluating(solver):
        given = torch.cat([solver(split.batch(part)[0]) for part in parts])
    return given[:, head] if given.dim() == 3 else given


def share_right(scores: Tensor, labels: Tensor, classes: Tensor | None = None) -> float:
    """The share of labels (n,) that scores (n, classes) answer rightly; classes: the only answers, None: all."""
    given = scores.argmax(dim=1) if classes is None else classes[scores[:, classes].argmax(dim=1)]
    return int((given == labels).sum()) / len(labels)


def precision(solver: dgr.Solver, split: Split, images_at_once: int) -> float:
    """Test accuracy: the share of a split's images that the solver answers correctly, in [0, 1]."""
    return share_right(scores(solver, split, images_at_once), split.labels)


Measures = dict[str, float | list[float]]  # of a generator, by name; see `measure_generator`
Matrix = list[list[float | None]]  # row i, column j: precision on task j after task i; None where it was not measured


def average_precision(matrix: Matrix) -> float:
    """The mean over all tasks of the precision after the last task; for a chain, the precision of the last scholar."""
    last = [value for value in matrix[-1] if value is not None]
    return sum(last) / len(last)


def incremental_average(matrix: Matrix) -> float:
    """The mean over tasks of the average precision after each (Rebuffi et al. 2017, arXiv 1611.07725)."""
    measured = [average_precision([row]) for row in matrix if any(value is not None for value in row)]
    return sum(measured) / len(measured)


def forgetting(matrix: Matrix) -> float:
    """The mean over old tasks of the best earlier precision minus the final one (0 if there is only one task).

    For a chain, whose scholars all take the same test: the best earlier scholar's precision minus the last one's.
    """
    if len(matrix) == 1:
        return 0.0
    if matrix[-1][0] is None:
        return max(row[i] for i, row in enumerate(matrix[:-1])) - matrix[-1][-1]
    old = range(len(matrix) - 1)
    # A run that continues from a kept scholar has not measured the ones before it.
    earlier = [[row[task] for row in matrix[task:-1] if row[task] is not None] for task in old]
    return sum(max(values) - matrix[-1][task] for task, values in enumerate(earlier)) / len(old)


def backward_transfer(matrix: Matrix) -> float | None:
    """The mean over old tasks of the final precision minus the one just after learning the task.

    None for a single task, and for a chain, whose scholars each learn once (Lopez-Paz and Ranzato 2017, arXiv
    1706.08840, equation 3). Tasks that a kept scholar had learned before count from where it was measured first.
    """
    if len(matrix) == 1 or matrix[-1][0] is None:
        return None
    first = [next(row[task] for row in matrix[task:] if row[task] is not None) for task in range(len(matrix) - 1)]
    return sum(matrix[-1][task] - value for task, value in enumerate(first)) / len(first)


def forward_transfer(before: Sequence[float | None], untrained: Sequence[float | None]) -> float | None:
    """The mean over tasks but the first of the precision just before learning the task minus an untrained solver's.

    None if there is no such task, or if it was not measured: for a chain, and where a task's own output layer is not
    trained before (Lopez-Paz and Ranzato 2017, equation 4).
    """
    gains = [b - u for b, u in zip(before[1:], untrained[1:], strict=True) if b is not None and u is not None]
    return sum(gains) / len(gains) if gains else None


@dataclass(eq=False)
class Training:
    """A scholar, or a chain of them, on its way through the tasks."""

    new_scholar: Callable[[], dgr.Scholar]
    tasks: Sequence[Task]
    options: TrainingOptions
    _: KW_ONLY
    observers: Sequence[Observer]
    sample: Callable[[dgr.Scholar], Tensor]  # shows what the generator knows, by random numbers of its own
    save_scholar: Callable[[dgr.Scholar], None]  # called after each task
    keep_state: Callable[[], None] = lambda: None  # called when `state_dict` is worth saving: see `save_state`
    images_at_once: int = 64  # to test or replay together
    classifier: nn.Sequential | None = None  # measures the generator after each task (see `measure_generator`)
    stop_requested: Callable[[], int] = lambda: 0  # the number of the signal that wants training to stop, or 0
    before: Before | None = None  # what the new scholar, which starts from the same weights, continues from

    def __post_init__(self) -> None:
        self.scholar = self.new_scholar()
        self.replay: dgr.ReplayMode | None = None
        self.first = self.task = 1 + (self.before.given if self.before else 0)
        self.done = {"generator": 0, "solver": 0}  # iterations of this task
        self._looks_ahead = not self.options.chain and self.options.heads == "one"  # tests what is not learned yet
        self.matrix: Matrix = []
        self.task_incremental: Matrix = []  # the same, with each task's own classes as the only answers
        self.ahead: dict[str, list[float | None]] = {"before": [None], "untrained": [None] * len(self.tasks)}
        self.generator_measures: list[Measures | None] = []  # measures of the generator after each task
        penalty = dgr.PENALTIES[self.options.penalty]
        self.penalty = penalty and penalty(self.options.penalty_weight).to(next(self.scholar.parameters()).device)

    def measures(self) -> dict[str, Any]:
        """The measures of the run by their names in summary.json, from whole test sets (docs/running.md)."""
        return {
            "precision": self.matrix,
            "average_precision": average_precision(self.matrix),
            "forgetting": forgetting(self.matrix),
            "backward_transfer": backward_transfer(self.matrix),
            "forward_transfer": forward_transfer(self.ahead["before"], self.ahead["untrained"]),
            "incremental_average": incremental_average(self.matrix),
            "task_incremental": self.task_incremental,
            **({"generator": self.generator_measures} if any(self.generator_measures) else {}),
        }

    def run(self) -> dict[str, Any]:
        """Learn the remaining tasks in order. Returns the `measures`."""
        if self.options.trains_generator:
            self._check_samples(self.sample(self.scholar))
        if self.first > 1 and not self.matrix:  # what the scholar knows of the tasks before
            self.matrix = [[None] * len(self.tasks) for _ in range(self.first - 2)]
            self.task_incremental = copy.deepcopy(self.matrix)
            self.ahead["before"] = [None] * (self.first - 1)
            self._measure(self.first - 1)
        if self.task == 1 and not any(self.done.values()) and self._looks_ahead and not self.before:
            tests = {number: task.test for number, task in enumerate(self.tasks, start=1)}
            self.ahead["untrained"] = list(self._precisions(tests)[0].values())
        self.keep_state()
        self._last_saved = time.monotonic()
        while self.task <= len(self.tasks):
            self._learn_task()
            self.replay, self.done, self.task = None, dict.fromkeys(self.done, 0), self.task + 1
            self.save_state()
        return self.measures()

    def _learn_task(self) -> None:
        options = self.options
        if (self.task > 1 or self.before) and self.replay is None:
            self.replay = self._make_replay()
            if options.chain or (self.replay is not None and self.replay.from_scratch):
                self.scholar = self.new_scholar()
        if options.chain and self.replay is not None:
            current, replay, r = self.replay, None, 1.0
        else:
            earlier = len(self.before.earlier) if self.before else 0
            r = dgr.importance_of_new_task(options.r, self.task + earlier)
            current, replay = self._data(self.task, heads=self.task), self.replay
        self.scholar.solver.begin_task(self.task, replays=replay is not None)
        settings: dict[str, Any] = {"r": r, "batch_size": options.batch_size}

        if options.trains_generator:
            for iteration in self._watched("generator", dgr.learn_generator, current, replay, **settings):
                self._show_samples(iteration, options.generator_iterations)

        settings |= {"temperature": options.temperature, "penalty": self.penalty if self.task > 1 else None}
        settings["distortion"] = options.solver_distortion
        subsets = {number: test.subset(options.test_size) for number, test in self._tests(self.task).items()}
        for iteration in self._watched("solver", dgr.learn_solver, current, replay, **settings):
            if at_interval(iteration, options.eval_log_interval, options.solver_iterations):
                self._report("solver", iteration, self._precisions(subsets)[0])

        self._measure(self.task)
        self.generator_measures.append(self._measure_generator() if self.classifier is not None else None)
        if self.penalty is not None and self.task < len(self.tasks):
            self.penalty.remember(self.scholar.solver, current)
        self.save_scholar(self.scholar)

    def _tests(self, task: int) -> dict[int, Split]:
        """The test splits, by number, that the scholar of a task is measured on."""
        seen = [task] if self.options.chain else range(1, task + 1)
        return {number: self.tasks[number - 1].test for number in seen}

    def _measure(self, task: int) -> None:
        """Measure the scholar of a task on whole test sets: a row of each matrix, and the task that comes next."""
        ahead = {task + 1: self.tasks[task].test} if self._looks_ahead and task < len(self.tasks) else {}
        row, task_known = self._precisions(self._tests(task) | ahead)
        if task < len(self.tasks):
            self.ahead["before"].append(row.pop(f"precision-{task + 1}", None))
            task_known.pop(f"precision-{task + 1}", None)
        for matrix, values in ((self.matrix, row), (self.task_incremental, task_known)):
            matrix.append([values.get(f"precision-{j}") for j in range(1, len(self.tasks) + 1)])
        for observer in self.observers:
            observer.scalars("test", task, self.options.solver_iterations, row)

    def _make_replay(self) -> dgr.ReplayMode | None:
        """The replay mode with what the scholar knows now, and the data of the tasks before this one."""
        mode = dgr.REPLAY_MODES[self.options.replay_mode]
        if mode is None:
            return None
        old = range(1, self.task)
        old_tasks = [self._data(task, heads=len(old)) for task in old]
        old_scholar = self.before.scholar if self.before and self.task == self.first else self.scholar
        replay = mode(old_scholar, old_tasks, self.options.targets)
        replay.block, replay.pool = self.images_at_once, self.options.replay_pool
        replay.distortion, replay.elastic = self.options.replay_distortion, self.options.replay_elastic
        replay.current = self.tasks[self.task - 1].train
        return replay

    def _data(self, task: int, heads: int) -> dgr.Source:
        """What task 1, 2, ... is learned from; if each task has an output layer, with targets for that one of them."""
        data = self.tasks[task - 1].train
        return dgr.OwnHead(data, task - 1, heads) if self.options.heads == "task" else data

    def _precisions(self, tests: dict[int, Split]) -> tuple[dict[str, float], dict[str, float]]:
        """Precision on these tests by task, and with the classes of the task as the only answers (task-incremental)."""
        solver, values, task_known = self.scholar.solver.remember(), {}, {}
        for task, test in tests.items():
            name, classes = f"precision-{task}", self.tasks[task - 1].train.labels.unique()
            while name not in values:
                try:
                    given = scores(solver, test, self.images_at_once, head=task - 1)
                    task_known[name] = share_right(given, test.labels, classes)
                    values[name] = share_right(given, test.labels)
                except (MemoryError, RuntimeError) as error:
                    if self.images_at_once == 1 or not out_of_memory(error):
                        raise
                    self.images_at_once //= 2  # tried outside this handler, which keeps the block's memory
        return values, task_known

    def _measure_generator(self) -> Measures:
        learned, at_once = self.tasks[: self.task], self.images_at_once
        measures = measure_generator(self.scholar, learned, self.classifier, self.new_scholar, self.options, at_once)
        scalars = {name: value for name, value in measures.items() if isinstance(value, float)}
        self._report("test", self.options.solver_iterations, scalars)
        return measures

    def _watched(self, phase: str, learn: Callable[..., Any], *sources: Any, **settings: Any) -> Iterator[int]:
        """Learn, and yield the number of each iteration done. Losses leave the device only when they are reported."""
        iterations, done = getattr(self.options, f"{phase}_iterations"), self.done[phase]
        if done == iterations:
            return
        for observer in self.observers:
            observer.begin(phase, self.task, iterations, done)
        network, schedule = getattr(self.scholar, phase), self.options.lr_schedule
        set_learning_rates(network, schedule, done / iterations)
        learning = learn(network, *sources, iterations=iterations - done, **settings)
        for iteration, losses in enumerate(learning, start=done + 1):
            set_learning_rates(network, schedule, iteration / iterations)
            for observer in self.observers:
                observer.step(iteration)
            if at_interval(iteration, self.options.loss_log_interval, iterations):
                values = {name: float(loss) for name, loss in losses.items()}
                self._report(phase, iteration, values)
                if not all(map(math.isfinite, values.values())):
                    raise self._diverged(phase, iteration)
            yield iteration
            self.done[phase] = iteration
            if signal := self.stop_requested():
                self.save_state(phase)
                where = f"task {self.task}, {phase} iteration {iteration}"
                again = "run the same command with --resume to continue"
                raise UserError(f"stopped at {where}; {again}", status=128 + signal)
            if iteration == iterations or time.monotonic() - self._last_saved >= self.options.checkpoint_interval:
                self.save_state(phase)
        for observer in self.observers:
            observer.end(phase, self.task)

    def _show_samples(self, iteration: int, iterations: int) -> None:
        watching = [o for o in self.observers if at_interval(iteration, o.image_interval, iterations)]
        if watching:
            images = self.sample(self.scholar)
            self._check_samples(images)
            for observer in watching:
                observer.images(self.task, iteration, images)

    def _check_samples(self, images: Tensor) -> None:
        """Refuse a generator whose images are not in [0, 1], where those of the data are."""
        low, high = images.min().item(), images.max().item()
        if low < 0 or high > 1:
            drawn = f"{type(self.scholar.generator).__name__} draws values from {low:.3g} to {high:.3g}"
            end = "end its network with models.Sigmoid() (or, after a Tanh, compute (x + 1) / 2)"
            raise UserError(f"--generator: {drawn}, and images are in [0, 1]: {end}")

    def _report(self, phase: str, iteration: int, values: dict[str, float]) -> None:
        for observer in self.observers:
            observer.scalars(phase, self.task, iteration, values)

    def _diverged(self, phase: str, iteration: int) -> UserError:
        flags = "--lr" if phase == "solver" else "--lr or --generator-lambda"
        return UserError(
            f"training diverged at task {self.task}, {phase} iteration {iteration} (loss or weights not finite): "
            f"restart with a smaller {flags}, or with --dtype=float32; the last good state is kept"
        )

    # ------------------------------------------------------------------------------------------ saved state

    def save_state(self, phase: str = "solver") -> None:
        """Save what training has reached, unless its weights are broken."""
        part = getattr(self.scholar, phase)
        sound = [value.isfinite().all() for value in part.parameters()]
        sound += [~value.isnan().any() for value in part.buffers()]  # a mask, for one, may be infinite
        if not all(sound):
            raise self._diverged(phase, self.done[phase])
        self.keep_state()
        self._last_saved = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Everything the rest of training depends on, as tensors and plain values."""
        measured = ("matrix", "task_incremental", "ahead", "generator_measures")
        device = next(self.scholar.parameters()).device
        return {
            "task": self.task,
            "done": dict(self.done),
            "measured": {key: getattr(self, key) for key in measured},
            "penalty": None if self.penalty is None else self.penalty.state_dict(),
            "scholar": self.scholar.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in optimisers(self.scholar).items()},
            "replay": None if self.replay is None else self.replay.state_dict(),
            "random": torch.get_rng_state(),
            "random_of_gpu": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was called."""
        self.task, self.done = state["task"], dict(state["done"])
        vars(self).update(copy.deepcopy(state["measured"]))
        if self.penalty is not None:
            self.penalty.load_state_dict(state["penalty"])
        if state["replay"] is not None:
            self.replay = self._make_replay()
            self.replay.load_state_dict(state["replay"])
        self.scholar.load_state_dict(state["scholar"])
        for name, optimiser in optimisers(self.scholar).items():
            optimiser.load_state_dict(state["optimisers"][name])
        torch.set_rng_state(state["random"])
        device = next(self.scholar.parameters()).device
        if device.type != "cpu" and state["random_of_gpu"] is not None:
            torch.get_device_module(device).set_rng_state(state["random_of_gpu"], device)


def continue_from(scholar: dgr.Scholar, kept: dict[str, Any], tasks: list[Task], options: TrainingOptions) -> Before:
    """What a run of these tasks needs of a kept scholar; UserError if it can't continue from it."""
    mode, learned = dgr.REPLAY_MODES[options.replay_mode], kept["learned"]
    if kept["options"].get("chain"):
        raise UserError("--continue-from: a scholar of mnist-chain can't be continued: use another")
    given = len(learned) if learned == [task.train.checksum for task in tasks[: len(learned)]] else 0
    if given == len(tasks):
        raise UserError("--continue-from: this scholar has learned all of these tasks: name further ones after them")
    if mode is not None and not (mode.needs_generator or given):
        raise UserError(f"--continue-from: {options.replay_mode} needs the old tasks too: name them before new ones")
    if mode is not None and mode.needs_generator and not kept["generator_trained"]:
        raise UserError("--continue-from: this scholar's generator was never trained: use another, or --sample-log")
    print(f"tasks that the scholar has learned: {len(learned)}; the next one is {tasks[given].name}")
    return Before(scholar, [] if given else learned, given)


def at_interval(iteration: int, interval: int | None, last: int) -> bool:
    """Whether it is time: every `interval` iterations and at the last one, or never if it is None."""
    return interval is not None and (iteration % interval == 0 or iteration == last)


def set_learning_rates(network: nn.Module, schedule: str, done: float) -> None:
    """Set the rates of the next iteration, after this share of a phase is done."""
    if schedule == "linear":
        for optimiser in optimisers(network).values():
            for group in getattr(optimiser, "param_groups", ()):
                group["initial_lr"] = group.get("initial_lr") or float(group["lr"])  # to read it from a GPU is to wait
                rate = group["initial_lr"] * (1 - done)  # a CUDA graph reads its tensor, which stays the same one
                group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def optimisers(scholar: dgr.Scholar) -> dict[str, Any]:
    """The optimisers and schedulers that parts of a scholar hold as attributes, by their full names."""
    return {
        f"{name}.{attribute}": value
        for name, module in scholar.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler)
    }


# ------------------------------------------------------------------------------------------ measures of a generator


def measure_generator(
    scholar: dgr.Scholar,
    tasks: Sequence[Task],
    classifier: nn.Sequential,
    new_scholar: Callable[[], dgr.Scholar],
    options: TrainingOptions,
    images_at_once: int = 64,
) -> Measures:
    """How good the pairs (x', y') are that a scholar of these tasks would replay, beside their test images.

    docs/running.md defines the measures. They have a random stream of their own and leave the scholar as it is.
    classifier: from images to class scores; what its last layer sees are the features (n, d).
    """
    tests = [task.test for task in (tasks[-1:] if options.chain else tasks)]
    tests = [test.subset(max(1, options.measured_images // len(tests))) for test in tests]
    real, labels = map(torch.cat, zip(*(test.batch(slice(None)) for test in tests), strict=True))
    kinds = dgr.GenerativeReplay.target_kinds
    targets = options.targets if options.replay_targets in kinds else dgr.Targets(kinds[0])
    with own_random_numbers(real.device, 0):
        replay = dgr.GenerativeReplay(scholar, [], targets)
        replay.block, replay.pool = images_at_once, len(real)
        drawn, answers = replay.pooled()
        if drawn.shape != real.shape:
            raise UserError(f"images of the data are {tuple(real.shape[1:])}, the generator's {tuple(drawn.shape[1:])}")
        solver = new_scholar().solver.to(real.device)
        capacity = fitting_capacity(solver, replay, tests, options, images_at_once)
    (seen, classes), (seen_drawn, classes_drawn) = (features(classifier, x, images_at_once) for x in (real, drawn))
    among_real, among_drawn = precision_and_recall(seen, seen_drawn)
    answers, labels = (answers.argmax(dim=1) if answers.is_floating_point() else answers).cpu(), labels.cpu()
    shares = torch.bincount(classes_drawn, minlength=classifier[-1].out_features) / len(drawn)
    return {
        "frechet_distance": frechet_distance(seen, seen_drawn),
        "generator_precision": among_real,
        "generator_recall": among_drawn,
        "fitting_capacity": capacity,
        "label_agreement": (answers == classes_drawn).double().mean().item(),
        "classifier_precision": (classes == labels).double().mean().item(),
        "class_share": shares.tolist(),
    }


def features(classifier: nn.Sequential, x: Tensor, images_at_once: int) -> tuple[Tensor, Tensor]:
    """What the last layer sees of images, (n, d) in float64, and their classes (n,) int64, both on the CPU."""
    with dgr.evaluating(classifier):
        seen = torch.cat([classifier[:-1](part) for part in x.split(images_at_once)])
        return seen.cpu().double(), classifier[-1](seen).argmax(dim=1).cpu()  # Apple's GPUs have no float64


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for points (n, d) and (m, d) with means m and covariances C.

    It is the square of the distance between two Gaussians (Heusel et al. 2017, arXiv 1706.08500).
    """
    # With C = R^T R, the last trace is the sum of the singular values of R_a R_b^T: exact for singular C, too.
    r_a, r_b = (torch.linalg.qr((x - x.mean(dim=0)) / max(1, len(x) - 1) ** 0.5).R for x in (a, b))
    common = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (a.mean(dim=0) - b.mean(dim=0)).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * common
    return distance.clamp(min=0).item()


def precision_and_recall(real: Tensor, drawn: Tensor, k: int = 3, block: int = 1000) -> tuple[float, float]:
    """The share of drawn points (n, d) among the real ones (m, d), and of real points among the drawn ones.

    A point is among others if it is no farther from one of them than that one's k-th nearest neighbour
    (Kynkäänniemi et al. 2019, arXiv 1904.06991). Distances are computed for `block` points at once.
    """
    # Rounding puts copies of a point a little apart; without slack, one would not be among the others.
    slack = 1e-5 * torch.cat([real, drawn]).norm(dim=1).max()

    def reach(points: Tensor) -> Tensor:
        nearest = min(k + 1, len(points))  # the first of them is the point itself
        parts = [torch.cdist(part, points).topk(nearest, largest=False).values[:, -1] for part in points.split(block)]
        return torch.cat(parts) + slack

    of_real, of_drawn = reach(real), reach(drawn)
    among_real, among_drawn = [], torch.zeros_like(of_real, dtype=torch.bool)
    for part, of_part in zip(drawn.split(block), of_drawn.split(block), strict=True):
        apart = torch.cdist(part, real)
        among_real.append((apart <= of_real).any(dim=1))
        among_drawn |= (apart <= of_part[:, None]).any(dim=0)
    return torch.cat(among_real).double().mean().item(), among_drawn.double().mean().item()


def fitting_capacity(
    solver: dgr.Solver, replay: dgr.Source, tests: Sequence[Split], options: TrainingOptions, images_at_once: int
) -> float:
    """The mean precision on tests of a solver that learns replayed pairs alone.

    The name is from Lesort et al. 2019 (arXiv 1806.10840).
    """
    iterations, size = options.solver_iterations, options.batch_size
    settings = {"r": 1.0, "iterations": iterations, "batch_size": size, "temperature": options.temperature}
    settings["distortion"] = options.solver_distortion
    for done, _ in enumerate(dgr.learn_solver(solver, replay, None, **settings), start=1):
        set_learning_rates(solver, options.lr_schedule, done / iterations)
    return sum(precision(solver.remember(), test, images_at_once) for test in tests) / len(tests)
