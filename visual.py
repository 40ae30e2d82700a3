#!/usr/bin/env python3
"""What people look at: progress bars, live plots in visdom, sample grids, figures.

Everything drawn from the files of a run needs only those files. The precision plots of runs side by side, with a table:

    ./visual.py results/permutated-mnist-none-r1 results/permutated-mnist-generative-replay-r0.3 --output figure.png
    ./visual.py results/permutated-mnist-none-r1 --visdom        what live plots would have shown, on a visdom server
"""

import argparse
import contextlib
import csv
import itertools
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from PIL.Image import registered_extensions
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from utils import UserError, atomic_write, reason, run_program, warn

# One colour per task in every figure (Okabe and Ito's, which the colour-blind can tell apart), repeated after seven.
TASK_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def task_colour(task: int) -> str:
    """The colour of task 1, 2, ..."""
    return TASK_COLOURS[(task - 1) % len(TASK_COLOURS)]


class Observer:
    """Told what happens in a run; does nothing unless a subclass says so. Tasks and iterations count from 1."""

    image_interval: int | None = None  # generator iterations between calls of `images`; None: never

    def begin(self, phase: str, task: int, iterations: int) -> None:
        """A phase ("generator" or "solver") of a task begins."""

    def step(self, iteration: int) -> None:
        """An iteration of the phase is done."""

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        """Losses, or the precision on each task so far."""

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        """What the generator draws now: (n, channels, height, width) float in [0, 1]."""

    def end(self, phase: str, task: int) -> None:
        """The phase is done."""

    def close(self) -> None:
        """The run is over, for better or worse."""


# ---------------------------------------------------------------------------------------------- progress bars


class Progress(Observer):
    """A bar for each phase on a terminal, a line for each phase elsewhere."""

    def __init__(self, tasks: int):
        self._tasks = tasks
        self._values: dict[str, float] = {}
        self._bar: tqdm | None = None

    def begin(self, phase: str, task: int, iterations: int) -> None:
        self._title = f"task {task}/{self._tasks} {phase}"
        self._iterations = iterations
        self._values = {}
        self._started = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(total=iterations, desc=self._title, file=sys.stderr, dynamic_ncols=True)

    def step(self, iteration: int) -> None:
        if self._bar is not None:
            self._bar.update(iteration - self._bar.n)

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        self._values |= values
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary(), refresh=False)

    def end(self, phase: str, task: int) -> None:
        if self._bar is not None:
            self.close()
            return
        seconds = time.monotonic() - self._started
        print(f"{self._title}: {self._iterations} iterations in {seconds:.0f} s, {self._summary()}", file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _summary(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self._values.items())


# ------------------------------------------------------------------------------------------------ sample grids

IMAGES_PER_ROW = 6
SAMPLES = "samples.png"  # the newest grid, in the directory of a run


def save_samples(images: Tensor, path: Path) -> None:
    """Save images (n, channels, height, width) float in [0, 1] as one picture, six a row."""
    with atomic_write(path, "wb") as file:
        save_image(images.cpu(), file, nrow=IMAGES_PER_ROW, format=registered_extensions()[path.suffix])


def try_to_save_samples(images: Tensor, path: Path) -> None:
    """Save them, or warn that it can't be done: a picture is no reason to end training."""
    try:
        save_samples(images, path)
    except OSError as error:
        warn(f"{path}: {reason(error)}; training goes on without this picture")


class NewestSamples(Observer):
    """The newest picture of samples, in the directory of a run."""

    def __init__(self, directory: Path, image_interval: int):
        self.directory = directory
        self.image_interval = image_interval

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        try_to_save_samples(images, self.directory / SAMPLES)


class SampleLog(Observer):
    """A picture of samples every `image_interval` generator iterations, in `directory`."""

    def __init__(self, directory: Path, image_interval: int):
        self.directory = directory
        self.image_interval = image_interval

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        try_to_save_samples(images, self.directory / f"task-{task}-iteration-{iteration}.jpg")


# -------------------------------------------------------------------------------------------------- live plots


POST_TIMEOUT = (2.0, 3.0)  # seconds to connect, and to wait for an answer
WINDOW = {"width": 600, "height": 340, "marginright": 20, "margintop": 64, "marginbottom": 76}  # two in 1280 pixels
SAMPLES_WINDOW = {"width": 340, "height": 340}
LABEL_CHARACTERS = 75  # that fit above a plot


def retell(run: "Run", observer: Observer) -> None:
    """Tell an observer what the files of a run hold already."""
    when = ("phase", "task", "iteration")
    for (phase, task, iteration), rows in itertools.groupby(run.rows, key=lambda row: [row[part] for part in when]):
        observer.scalars(phase, int(task), int(iteration), {row["name"]: float(row["value"]) for row in rows})


class LivePlots(Observer):
    """Live plots of a run on a visdom server, in the environment of its name. Training never waits for them.

    A window for precision and for each loss, with one curve per task in the task's colour, and a dotted line where each
    task begins. What the files of the run hold already is shown first. A thread of its own posts the newest state of
    each window, whole: a slow server gets fewer updates, one that comes back gets complete plots. The windows that an
    earlier run of the same name left are closed.
    """

    RETRY_SECONDS = 10.0
    CLOSE_SECONDS = 5.0

    def __init__(self, run: "Run", server: str, port: int):
        self.image_interval = run.config["options"]["image_log_interval"]
        self._lengths = {phase: run.config["options"][f"{phase}_iterations"] for phase in ("generator", "solver")}
        self._titles = [f"task {number}: {title}" for number, title in enumerate(run.tasks, start=1)]
        self._address = f"{server}:{port}"
        self._connection = {"server": server, "port": port, "env": run.config["name"].replace("_", "-")}
        self._begun = dict.fromkeys(self._lengths, 1)  # tasks, for each phase
        self._curves: dict[str, dict[int, tuple[list[float], list[float]]]] = {"precision": {1: ([], [])}}
        self._pending: dict[str, tuple[str, dict[str, Any]]] = {}
        self._changed = threading.Condition()
        self._closing = self._warned = self._down = self._cleared = False
        self._show("precision", "line", **self._line("precision", "solver"))  # the first window
        retell(run, self)
        if (run.directory / SAMPLES).exists():
            pixels = np.asarray(Image.open(run.directory / SAMPLES))
            opts = {"title": f"samples of {run.config['name']}"} | SAMPLES_WINDOW
            self._show("samples", "image", img=pixels.transpose(2, 0, 1), opts=opts)
        self._thread = threading.Thread(target=self._post_all, daemon=True)
        self._thread.start()

    def begin(self, phase: str, task: int, iterations: int) -> None:
        self._begun[phase] = task
        for window in self._curves:
            if window.startswith(phase) or (window, phase) == ("precision", "solver"):
                self._show(window, "line", **self._line(window, phase))

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        if phase not in self._lengths:
            return
        self._begun[phase] = task
        changed = []
        for name, value in values.items():
            window, curve = f"{phase} {name}", task
            if name.startswith("precision-"):
                window, curve = "precision", int(name.removeprefix("precision-"))
            xs, ys = self._curves.setdefault(window, {}).setdefault(curve, ([], []))
            xs.append((task - 1) * self._lengths[phase] + iteration)
            ys.append(value)
            changed.append(window)
        for window in dict.fromkeys(changed):
            self._show(window, "line", **self._line(window, phase))

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        title = f"samples: task {task}, iteration {iteration}"
        pixels = (images * 255).byte().cpu().numpy()
        self._show("samples", "images", tensor=pixels, nrow=IMAGES_PER_ROW, opts={"title": title} | SAMPLES_WINDOW)

    @property
    def unsent(self) -> bool:
        """Whether something has not been taken by the server."""
        return self._down or bool(self._pending) or self._thread.is_alive()

    def close(self) -> None:
        """Post what is still to be posted: for a few seconds at most, and not to a server that has not answered."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=0.1 if self._down else self.CLOSE_SECONDS)

    def _line(self, window: str, phase: str) -> dict[str, Any]:
        """The curves of a window as columns of one matrix, absent points being NaN."""
        curves = self._curves[window]
        x = sorted({x for xs, _ in curves.values() for x in xs}) or [0]
        row = {x: i for i, x in enumerate(x)}
        y = np.full((len(x), len(curves)), np.nan)
        for column, (xs, ys) in enumerate(curves.values()):
            y[[row[x] for x in xs], column] = ys
        loss = window.removeprefix(f"{phase} ").replace("-", " ")
        title = loss if phase in loss or window == "precision" else f"{phase} {loss}"
        opts: dict[str, Any] = {"title": title, "xlabel": f"{phase} iterations", "ylabel": title, **WINDOW}
        opts["legend"] = [self._titles[task - 1] for task in curves]
        opts["linecolor"] = np.array([list(bytes.fromhex(task_colour(task)[1:])) for task in curves])
        if window == "precision":
            opts |= {"ylabel": "precision (share of test images)", "ytickmin": 0, "ytickmax": 1.01}
            opts |= {"markers": True, "markersize": 4, "markerborderwidth": 0}  # a single point is seen too
        fits = sum(map(len, self._titles)) <= LABEL_CHARACTERS
        line = {"type": "line", "line": {"color": "#808080", "dash": "dot", "width": 1.5}}
        label = {"y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False}
        shapes, labels = [], []
        for task in range(1, self._begun[phase] + 1):
            at, title = (task - 1) * self._lengths[phase], self._titles[task - 1]
            shapes.append({"yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1} | line)
            font = {"size": 11, "color": task_colour(task)}
            text = title if fits else f"task {task}"
            labels.append({"yref": "paper", "x": at, "text": text, "font": font} | label)
        legend = {"orientation": "h", "y": -0.31, "yanchor": "top"}
        opts["layoutopts"] = {"plotly": {"shapes": shapes, "annotations": labels, "legend": legend}}
        # A single column would be taken for several points of one curve.
        return {"X": np.array(x), "Y": y if y.shape[1] > 1 else y[:, 0], "opts": opts}

    def _show(self, window: str, method: str, **arguments: Any) -> None:
        with self._changed:
            self._pending[window] = (method, arguments)
            self._changed.notify()

    def _post_all(self) -> None:
        client = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                window, (method, arguments) = next(iter(self._pending.items()))
                del self._pending[window]
            try:
                client = client or connect(**self._connection)
                # A copy of the options, because visdom takes some out, and what fails is posted again.
                post = partial(getattr(client, method), win=window, **arguments)
                post(opts=dict(arguments["opts"]))
                if not self._cleared:  # after the first post, because only then is the environment sure to exist
                    client.close()
                    post(opts=dict(arguments["opts"]))
                    self._cleared = True
                self._down = False
            except Exception as error:  # Whatever a plot server does, training goes on.
                client, self._down = None, True
                if not self._warned:
                    warn(f"no live plots: visdom at {self._address}: {reason(error)[:200]}; training goes on")
                    self._warned = True
                if isinstance(error, ImportError):
                    return
                with self._changed:
                    self._pending.setdefault(window, (method, arguments))
                    if self._changed.wait_for(lambda: self._closing, timeout=self.RETRY_SECONDS):
                        return


def connect(*, server: str, port: int, env: str) -> Any:
    """A visdom client that gives up after seconds, where visdom's own would wait for ever."""
    import visdom

    class Client(visdom.Visdom):
        def _handle_post(self, url: str, data: Any = None) -> str:
            response = self.session.post(url, data=data or {}, timeout=POST_TIMEOUT)
            response.raise_for_status()
            return response.text

    logging.getLogger("visdom").setLevel(logging.ERROR)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    server = server if "://" in server else f"http://{server}"
    return Client(server=server, port=port, env=env, use_incoming_socket=False, raise_exceptions=True)


# ------------------------------------------------------------------------------------------------- TensorBoard


class TensorBoard(Observer):
    """The scalars of `metrics.csv`, sample grids and options (as hparams) of a run, for TensorBoard.

    What the files of the run hold already is written anew, and the sample grids that were there are kept: a run that
    goes on after a stop has every point once. Needs the package tensorboard, but not its SummaryWriter, whose thread
    keeps the newest points for itself and leaves a traceback where a disk is full.
    """

    def __init__(self, run: "Run"):
        options = run.config["options"]
        self.image_interval, self._tasks = options["image_log_interval"], len(run.tasks)
        self._lengths = {phase: options[f"{phase}_iterations"] for phase in ("generator", "solver")}
        self._lengths["test"] = self._lengths["solver"]
        self._directory, self._failed = run.directory / "tensorboard", False
        with self._trying():
            self._start(run, options)

    def _start(self, run: "Run", options: dict[str, Any]) -> None:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import RecordWriter, summary

        before = list(self._directory.glob("events.*"))
        events = (event for file in before for event in LegacyEventFileLoader(str(file)).Load())
        grids = {event.step: event for event in events if any(value.tag == "samples" for value in event.summary.value)}
        self._drawn, self._event, self._summary = set(grids), Event, summary
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = (self._directory / f"events.out.tfevents.{time.time():.6f}").open("wb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(session_log=SessionLog(status=SessionLog.START))  # what a reader has of earlier files is void
        values = {key: v if isinstance(v, int | float) else str(v) for key, v in options.items() if v is not None}
        *about, self._finished = summary.hparams(values, {"average-precision": 0.0})
        for part in about:
            self._write(summary=part)
        for grid in grids.values():
            self._writer.write(grid.SerializeToString())
        retell(run, self)
        for file in before:
            file.unlink()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        at = (task - 1) * self._lengths[phase] + iteration
        with self._trying():
            for name, value in values.items():
                self._write(step=at, summary=self._summary.scalar(f"{phase}/{name}", value))
            if phase == "test" and task == self._tasks:
                average = sum(values.values()) / len(values)
                self._write(step=at, summary=self._summary.scalar("average-precision", average))
                self._write(summary=self._finished)

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        at = (task - 1) * self._lengths["generator"] + iteration
        with self._trying():
            if at not in self._drawn:
                grid = make_grid(images.cpu(), IMAGES_PER_ROW).numpy()
                self._write(step=at, summary=self._summary.image("samples", grid, dataformats="CHW"))

    def close(self) -> None:
        with self._trying():
            self._file.close()

    def _write(self, **content: Any) -> None:
        if not self._failed:
            self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._file.flush()

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """Warn once if these files can't be written; training goes on."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                warn(f"{self._directory}: {reason(error)}; training goes on, and --resume writes these files anew")
            self._failed = True


# ------------------------------------------------------------------------------------------ figures from files


class Run:
    """The files of a run, read back: `config`, `summary` (None if unfinished) and curves of precision."""

    def __init__(self, directory: Path):
        try:
            self.config = json.loads((directory / "config.json").read_text())
            summary = directory / "summary.json"
            self.summary = json.loads(summary.read_text()) if summary.exists() else None
            with (directory / "metrics.csv").open(newline="") as file:
                self.rows = list(csv.DictReader(file))
            self.tasks = self.config["tasks"]
            self.task_length = self.config["options"]["solver_iterations"]
            # Per task: iterations since the start of the run, and precision.
            self.curves: list[tuple[list[int], list[float]]] = [([], []) for _ in self.tasks]
            for row in self.rows:
                if row["phase"] == "solver" and row["name"].startswith("precision-"):
                    xs, ys = self.curves[int(row["name"].removeprefix("precision-")) - 1]
                    xs.append((int(row["task"]) - 1) * self.task_length + int(row["iteration"]))
                    ys.append(float(row["value"]))
            self.directory = directory
        except OSError as error:
            raise UserError(f"{error.filename or directory}: {reason(error)}: not the directory of a run") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{directory}: not the files of a run ({type(error).__name__}: {reason(error)})") from error

    @property
    def replay_mode(self) -> str:
        return self.config["options"]["replay_mode"]

    @property
    def data_note(self) -> str:
        """A warning for figures if the data were not the official files."""
        names = sorted({name.split("/")[0] for name in self.config["data"]["unverified"]})
        return f"not the official files: {', '.join(names)}" if names else ""


def draw_precision(axes: Axes, run: Run) -> None:
    """Precision on each task over solver iterations; a dotted line where each task begins."""
    for task, (title, (xs, ys)) in enumerate(zip(run.tasks, run.curves, strict=True), start=1):
        axes.plot(xs, ys, color=task_colour(task), label=f"task {task}: {title}", linewidth=1.5)
        axes.axvline((task - 1) * run.task_length, color="0.7", linestyle=":", linewidth=1, zorder=0)
    axes.set(
        title=run.replay_mode,
        xlabel="solver iterations",
        ylabel="precision",
        xlim=(0, len(run.tasks) * run.task_length),
        ylim=(0, 1.01),
    )
    axes.grid(axis="y", color="0.9")


def save_figure(runs: list[Run], path: Path) -> None:
    """The precision plots of these runs side by side."""
    figure = Figure(figsize=(1 + 3.6 * len(runs), 3.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, run in zip(panels, runs, strict=True):
        draw_precision(axes, run)
        axes.label_outer()
    notes = sorted({run.data_note for run in runs} - {""})
    experiments = ", ".join(dict.fromkeys(run.config["options"]["experiment"] for run in runs))
    figure.suptitle(" · ".join([experiments, *notes]), fontsize="medium")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() // 2)),
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def table(runs: list[Run]) -> str:
    """What the finished runs came to, as a table in Markdown."""
    lines = ["| run | average precision | forgetting | seconds |", "|---|---|---|---|"]
    for run in runs:
        if run.summary is None:
            lines.append(f"| {run.config['name']} | not finished | | |")
        else:
            summary = run.summary
            lines.append(
                f"| {run.config['name']} | {summary['average_precision']:.3f} | {summary['forgetting']:.3f} "
                f"| {summary['seconds']:.0f} |"
            )
    return "\n".join(lines)


def play_back(run: Run, server: str, port: int) -> None:
    """Show a run on a visdom server as it would have been shown live: whole curves, and its newest samples."""
    plots = LivePlots(run, server, port)
    plots.close()
    if plots.unsent:
        raise UserError(f"visdom at {server}:{port} did not take the plots: start one, see README.md, and try again")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Draw the precision plots of runs side by side and print their table, or show runs on visdom.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="directory of a run, for instance results/NAME"
    )
    parser.add_argument("--output", type=Path, help="the figure: .png, .svg or .pdf")
    parser.add_argument("--visdom", action="store_true", help="play the runs back into a visdom server")
    parser.add_argument("--visdom-server", default="localhost", metavar="HOST", help="where (default: localhost)")
    parser.add_argument("--visdom-port", type=int, default=8097, metavar="N", help="its port (default: 8097)")
    options = parser.parse_args(arguments)
    if not (options.output or options.visdom):
        parser.error("give --output FIGURE or --visdom")
    runs = [Run(directory) for directory in options.runs]
    if options.visdom:
        for run in runs:
            play_back(run, options.visdom_server, options.visdom_port)
        print(f"visdom: {options.visdom_server}:{options.visdom_port}")
    print(table(runs))
    if options.output:
        try:
            save_figure(runs, options.output)
        except (OSError, ValueError) as error:
            raise UserError(f"--output {options.output}: {reason(error)}") from error
        print(f"figure: {options.output}")


if __name__ == "__main__":
    run_program(main)
