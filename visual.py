#!/usr/bin/env python3
"""What people look at: progress bars, live plots, sample grids, figures and tables.

Everything that is drawn after a run needs its files alone:

    ./visual.py results                                    the table of all runs in a directory
    ./visual.py results --figures figures                  all their figures
    ./visual.py results/A results/B --output figure.png    precision plots of some runs, side by side
    ./visual.py results/A --visdom                         what live plots would have shown, on a visdom server
"""

import contextlib
import itertools
import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # figures are saved, not shown; a notebook's backend may not be installed here

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from PIL.Image import registered_extensions
from torch import Tensor
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import utils
from utils import MODES, PRECISION, Curve, Observer, Run, Setting, UserError, atomic_write, option, reason, warn

# Titles hold names of files, and those may have dollars.
rcParams.update({"text.parse_math": False, "axes.titlesize": "medium", "figure.titlesize": "medium"})

# Colours of tasks, in every figure (Okabe and Ito's, which colour-blind readers can tell apart), and dashes, for prints
# in grey; both are repeated after seven tasks. Colours of settings are Paul Tol's muted ones.
TASK_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES = ["-", "--", "-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (3, 1, 1, 1))]
SETTING_COLOURS = ["#882255", "#999933", "#117733", "#332288", "#88CCEE", "#CC6677", "#DDCC77"]


def task_colour(task: int) -> str:
    """The colour of task 1, 2, ..."""
    return TASK_COLOURS[(task - 1) % len(TASK_COLOURS)]


@dataclass(frozen=True, kw_only=True)
class VisdomOptions:
    visdom_server: str = option("localhost", "host of the visdom server", None, metavar="HOST", group="live plots")
    visdom_port: int = option(8097, "port of the visdom server", None, low=1, high=65535)


@dataclass(frozen=True, kw_only=True)
class PlotOptions(VisdomOptions):
    no_visdom: bool = option(False, "no live plots", None)
    tensorboard: bool = option(False, "write files for TensorBoard too (pip install tensorboard)", None)


class Progress(Observer):
    """A bar for each phase on a terminal; a line for each phase elsewhere."""

    def __init__(self, tasks: int):
        self._tasks, self._bar, self._values = tasks, None, {}

    def begin(self, phase: str, task: int, iterations: int, done: int) -> None:
        self._title, self._left = f"task {task}/{self._tasks} {phase}", iterations - done
        self._values, self._started = {}, time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self._title, total=iterations, initial=done, file=sys.stderr, dynamic_ncols=True)

    def step(self, iteration: int) -> None:
        if self._bar is not None:
            self._bar.update()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        self._values |= values
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary(), refresh=False)

    def end(self, phase: str, task: int) -> None:
        if self._bar is None:
            seconds = time.monotonic() - self._started
            with contextlib.suppress(OSError):  # the terminal may have gone
                print(f"{self._title}: {self._left} iterations in {seconds:.0f} s, {self._summary()}", file=sys.stderr)
        self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _summary(self) -> str:
        return ", ".join(f"{name} {value:.3f}" for name, value in self._values.items())


IMAGES_PER_ROW = 6


def save_samples(images: Tensor, path: Path) -> None:
    """Save images (n, channels, height, width) float in [0, 1] as one picture, six per row."""
    with atomic_write(path, "wb") as file:
        save_image(images.cpu(), file, nrow=IMAGES_PER_ROW, format=registered_extensions()[path.suffix])


def kept_sample(directory: Path, task: int, iteration: int) -> Path:
    """Where a picture of --sample-log goes."""
    return directory / f"task-{task}-iteration-{iteration}.jpg"


class SamplePictures(Observer):
    """Saves pictures of samples through training, each where `place(task, iteration)` says."""

    def __init__(self, place: Callable[[int, int], Path], image_interval: int):
        self.place = place
        self.image_interval = image_interval

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        path = self.place(task, iteration)
        try:
            save_samples(images, path)
        except OSError as error:  # no reason to end training
            warn(f"{path}: {reason(error)}; training goes on without this picture")


POST_TIMEOUT = (2.0, 3.0)  # seconds to connect, and to wait for an answer
WINDOW = {"width": 600, "height": 340, "marginright": 20, "margintop": 64, "marginbottom": 76}  # two in 1280 pixels
SAMPLES_WINDOW = {"width": 340, "height": 340}
LABEL_CHARACTERS = 75  # that fit above a plot


def replay_scalars(run: Run, observer: Observer) -> None:
    """Report to an observer what the files of a run already hold."""
    when = ("phase", "task", "iteration")
    for (phase, task, iteration), rows in itertools.groupby(run.rows, key=lambda row: [row[part] for part in when]):
        observer.scalars(phase, int(task), int(iteration), {row["name"]: float(row["value"]) for row in rows})


Post = tuple[str, dict[str, Any]]  # a method of a visdom client, and its arguments


class LivePlots(Observer):
    """Live plots of a run on a visdom server, in an environment named after the run. Training never waits for them.

    There is a window for precision and for each loss, with a curve per task in the task's colour and a dotted line
    where each task begins. A separate thread posts the newest state of each window, always whole: a slow server gets
    fewer updates, one that comes back gets complete plots. Windows of an earlier run of the same name are closed.
    """

    RETRY_SECONDS = 10.0
    CLOSE_SECONDS = 5.0

    def __init__(self, run: Run, server: str, port: int):
        self.image_interval = run.options["image_log_interval"]
        self._lengths, self._titles, self._address = run.lengths, run.task_titles, f"{server}:{port}"
        environment = run.name.replace("_", "-") + (f"-seed-{run.seed}" if run.seed else "")
        self._connection = {"server": server, "port": port, "env": environment}
        self._curves: dict[str, dict[int, Curve]] = {"precision": {1: {}}}  # of each window, by task
        self._newest: dict[str, Callable[[], Post]] = {}  # functions that make the newest state of each window
        self._pending: dict[str, Callable[[], Post]] = {}  # those of them that are not posted yet
        self._changed = threading.Condition()
        self._closing = self._warned = self._down = self._cleared = False
        self._post(precision=partial(self._line, "precision"))  # the first window
        replay_scalars(run, self)
        with contextlib.suppress(OSError):  # no picture, or not a whole one
            pixels = np.asarray(Image.open(run.directory / utils.SAMPLES).convert("RGB"))
            arguments = {"img": pixels.transpose(2, 0, 1), "opts": {"title": f"samples of {run.name}"} | SAMPLES_WINDOW}
            self._post(samples=lambda: ("image", arguments))
        self._thread = threading.Thread(target=self._post_all, daemon=True)
        self._thread.start()

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        if phase not in self._lengths:
            return
        with self._changed:
            for name, value in values.items():
                window, curve = f"{phase} {name}", task
                if found := PRECISION.fullmatch(name):
                    window, curve = "precision", int(found[1])
                at = (task - 1) * self._lengths[phase] + iteration
                self._curves.setdefault(window, {}).setdefault(curve, {})[at] = value
                self._post(**{window: partial(self._line, window)})

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        opts = {"title": f"samples: task {task}, iteration {iteration}"} | SAMPLES_WINDOW
        pixels = (images * 255).byte().cpu().numpy()
        self._post(samples=lambda: ("images", {"tensor": pixels, "nrow": IMAGES_PER_ROW, "opts": opts}))

    @property
    def unsent(self) -> bool:
        """Whether the server has not taken everything."""
        return self._down or bool(self._pending) or self._thread.is_alive()

    def close(self) -> None:
        """Post the rest, for a few seconds at most, unless the server does not answer."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout=0.1 if self._down else self.CLOSE_SECONDS)

    def _post(self, **makers: Callable[[], Post]) -> None:
        """Have windows posted; they are put together then, not here, where training would wait."""
        with self._changed:
            self._newest |= makers
            self._pending |= makers
            self._changed.notify()

    def _line(self, window: str) -> Post:
        """The curves of a window as columns of one matrix, with NaN for missing points."""
        curves, phase = self._curves[window], "solver" if window == "precision" else window.split()[0]
        x = sorted(set().union(*curves.values())) or [0]
        y = np.array([[curve.get(at, np.nan) for curve in curves.values()] for at in x])
        loss = window.removeprefix(f"{phase} ").replace("-", " ")
        title = loss if phase in loss or window == "precision" else f"{phase} {loss}"
        opts: dict[str, Any] = {"title": title, "xlabel": f"{phase} iterations", "ylabel": title, **WINDOW}
        opts["legend"] = [self._titles[task - 1] for task in curves]
        opts["linecolor"] = np.array([list(bytes.fromhex(task_colour(task)[1:])) for task in curves])
        if window == "precision":
            opts |= {"ylabel": "precision (share of test images)", "ytickmin": 0, "ytickmax": 1.01}
            opts |= {"markers": True, "markersize": 4, "markerborderwidth": 0}  # so that a single point shows
        fits = sum(map(len, self._titles)) <= LABEL_CHARACTERS
        line = {"type": "line", "line": {"color": "#808080", "dash": "dot", "width": 1.5}}
        label = {"y": 1, "xanchor": "left", "yanchor": "bottom", "showarrow": False, "yref": "paper"}
        shapes, labels = [], []
        for task in range(1, max(curves) + 1):
            at, title = (task - 1) * self._lengths[phase], self._titles[task - 1]
            shapes.append({"yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1} | line)
            font = {"size": 11, "color": task_colour(task)}
            labels.append({"x": at, "text": title if fits else f"task {task}", "font": font} | label)
        legend = {"orientation": "h", "y": -0.31, "yanchor": "top"}
        opts["layoutopts"] = {"plotly": {"shapes": shapes, "annotations": labels, "legend": legend}}
        # visdom takes a single column for several points of one curve.
        return "line", {"X": np.array(x), "Y": y if y.shape[1] > 1 else y[:, 0], "opts": opts}

    def _post_all(self) -> None:
        client = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closing)
                if not self._pending:
                    return
                window, newest = next(iter(self._pending.items()))
                del self._pending[window]
            try:
                with self._changed:
                    method, arguments = newest()
                client = client or connect(**self._connection)
                # A copy of the options: visdom writes into them, and a failed post is repeated.
                post = partial(getattr(client, method), win=window, **arguments)
                post(opts=dict(arguments["opts"]))
                if not self._cleared:  # only after the first post is the environment sure to exist
                    client.close()
                    post(opts=dict(arguments["opts"]))
                    self._cleared = True
                self._down = False
            except Exception as error:  # whatever a plot server does, training goes on
                client, self._down = None, True
                if not self._warned:
                    warn(f"no live plots: visdom at {self._address}: {reason(error)[:200]}; training goes on")
                    self._warned = True
                if isinstance(error, ImportError):
                    return
                with self._changed:
                    self._pending = dict(self._newest)  # all of them: a restarted server has none
                    if self._changed.wait_for(lambda: self._closing, timeout=self.RETRY_SECONDS):
                        return


def connect(*, server: str, port: int, env: str) -> Any:
    """A visdom client that gives up after a few seconds; visdom's own waits forever."""
    import visdom

    class Client(visdom.Visdom):
        def _handle_post(self, url: str, data: Any = None) -> str:
            response = self.session.post(url, data=data or {}, timeout=POST_TIMEOUT)
            response.raise_for_status()
            return response.text

    for name in ("visdom", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    server = server if "://" in server else f"http://{server}"
    return Client(server=server, port=port, env=env, use_incoming_socket=False, raise_exceptions=True)


class TensorBoard(Observer):
    """Scalars and sample grids of a run for TensorBoard. Needs the package tensorboard.

    A resumed run writes all its scalars again, so that each point is there once; its earlier sample grids are lost.
    """

    def __init__(self, run: Run):
        self.image_interval, self._run, self._failed = run.options["image_log_interval"], run, False
        self._try(self._open)
        replay_scalars(run, self)

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        for file in (self._run.directory / "tensorboard").glob("events.*"):
            file.unlink()
        usual = threading.excepthook  # the writer's thread would print its error, which the next call raises anyway
        threading.excepthook = lambda error: type(error.thread).__module__.startswith("tensorboard.") or usual(error)
        self._writer = SummaryWriter(self._run.directory / "tensorboard")

    def scalars(self, phase: str, task: int, iteration: int, values: dict[str, float]) -> None:
        at = (task - 1) * self._run.lengths["solver" if phase == "test" else phase] + iteration
        for name, value in values.items():
            self._try(lambda: self._writer.add_scalar(f"{phase}/{name}", value, at))  # noqa: B023
        if phase == "test" and task == len(self._run.tasks) and all(map(PRECISION.fullmatch, values)):
            self._try(lambda: self._writer.add_scalar("average-precision", sum(values.values()) / len(values), at))

    def images(self, task: int, iteration: int, images: Tensor) -> None:
        at, grid = (task - 1) * self._run.lengths["generator"] + iteration, make_grid(images.cpu(), IMAGES_PER_ROW)
        self._try(lambda: self._writer.add_image("samples", grid, at))

    def close(self) -> None:
        self._try(lambda: self._writer.close())

    def _try(self, write: Callable[[], None]) -> None:  # training goes on, whatever becomes of these files
        try:
            if not self._failed:
                write()
        except Exception as error:
            self._failed = True
            warn(f"TensorBoard: {reason(error)}; training goes on, and --resume writes these files again")


def draw_band(axes: Axes, curve: tuple[np.ndarray, np.ndarray, np.ndarray], **style: Any) -> None:
    """A curve, and for several seeds a band of one standard deviation on each side."""
    xs, mean, deviation = curve
    axes.plot(xs, mean, linewidth=1.6, **style)
    if deviation.any():
        axes.fill_between(xs, mean - deviation, mean + deviation, color=style["color"], alpha=0.2, linewidth=0)


def draw_task_boundaries(axes: Axes, settings: Sequence[Setting]) -> None:
    """A dotted line where each task begins, unless the settings differ in that."""
    lengths = {setting.first.lengths["solver"] for setting in settings}
    tasks = max(len(setting.first.tasks) for setting in settings)
    for task in range(tasks if len(lengths) == 1 else 0):
        axes.axvline(task * max(lengths), color="0.6", linestyle=":", linewidth=1, zorder=0)
    end = max(len(setting.first.tasks) * setting.first.lengths["solver"] for setting in settings)
    axes.set(xlim=(0, end), ylim=(0, 1.01), xlabel="solver iterations")
    axes.grid(axis="y", color="0.92")


def panels(count: int, settings: Sequence[Setting], height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with so many plots, at most four in a row, and a title for the settings."""
    rows = -(-count // 4)
    columns = -(-count // rows)
    figure = Figure(figsize=(0.8 + 3.0 * columns, height * rows), layout="constrained")
    figure.suptitle(figure_title(settings))
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def figure_title(settings: Sequence[Setting]) -> str:
    """Experiments, recipes other than the default one, and a note if the data were not the official ones."""
    runs = [setting.first for setting in settings]
    recipes = ", ".join(sorted({run.recipe for run in runs}))
    title = [", ".join(dict.fromkeys(run.experiment for run in runs)), f"recipe {recipes}" if recipes != "2017" else ""]
    return " · ".join(part for part in [*title, *sorted({run.data_note for run in runs})] if part)


def legend_below(figure: Figure, all_axes: Sequence[Axes]) -> None:
    """One legend for all plots, taken from the plot with most curves, in as many rows as it takes."""
    handles, labels = max((axes.get_legend_handles_labels() for axes in all_axes), key=lambda found: len(found[0]))
    labels = [textwrap.fill(label, 64) for label in labels]
    lines = [line for label in labels for line in label.split("\n")]
    columns = max(1, int(figure.get_figwidth() / (max(map(len, lines), default=1) * 0.08 + 0.5)))  # inches
    figure.set_figheight(figure.get_figheight() + 0.22 * max(0, len(lines) / columns - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.4)


def precision_figure(settings: Sequence[Setting]) -> Figure:
    """Precision on each task over solver iterations, a panel for each setting."""
    figure, all_axes = panels(len(settings), settings)
    several = len({setting.first.experiment for setting in settings}) > 1
    for axes, setting in zip(all_axes, settings, strict=True):
        for task, title in enumerate(setting.first.task_titles, start=1):
            curve = setting.curve(lambda run, task=task: run.precision(task))
            style = {"color": task_colour(task), "linestyle": DASHES[(task - 1) % len(DASHES)]}
            draw_band(axes, curve, label=f"task {task}" if several else title, **style)
        draw_task_boundaries(axes, [setting])
        title = f"{setting.first.experiment}: {setting.label}" if several else setting.label
        axes.set(title=textwrap.fill(title, 38), ylabel="precision")
        if not axes.get_subplotspec().is_first_col():
            axes.set(ylabel="", yticklabels=[])
    legend_below(figure, all_axes)
    return figure


def setting_styles(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Colour, dash pattern and label of each setting; a replay mode's first setting looks the same in every figure."""
    modes = [setting.first.replay_mode for setting in settings]
    styles: list[dict[str, Any]] = []
    for number, (setting, mode) in enumerate(zip(settings, modes, strict=True)):
        at = MODES.index(mode) if mode in MODES and mode not in modes[:number] else len(MODES) + number
        seeds = f", {len(setting.shown)} seeds" if len(setting.shown) > 1 else ""
        style = {"color": SETTING_COLOURS[at % len(SETTING_COLOURS)], "linestyle": DASHES[(at + 3) % len(DASHES)]}
        styles.append(style | {"label": setting.label + seeds})
    return styles


def average_figure(settings: Sequence[Setting]) -> Figure:
    """Average precision on the tasks so far, all settings in one plot."""
    figure, (axes,) = panels(1, settings, height=4)
    figure.set_figwidth(6.4)
    for setting, style in zip(settings, setting_styles(settings), strict=True):
        draw_band(axes, setting.curve(Run.average_precision), **style)
    draw_task_boundaries(axes, settings)
    axes.set(ylabel="average precision on the tasks so far")
    legend_below(figure, [axes])
    return figure


def matrix_figure(settings: Sequence[Setting]) -> Figure | None:
    """The precision matrix of each setting: on task j after task i, whole test sets; None if no run is finished."""
    settings = [setting for setting in settings if setting.finished]
    if not settings:
        return None
    figure, all_axes = panels(len(settings), settings, height=3.6)
    for axes, setting in zip(all_axes, settings, strict=True):
        matrix = setting.matrix()
        image = axes.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
        for (row, column), value in np.ndenumerate(matrix):
            if not np.isnan(value):
                dark = "white" if value < 0.6 else "black"
                axes.text(column, row, f"{value:.2f}".lstrip("0"), ha="center", va="center", color=dark)
        axes.set(title=textwrap.fill(setting.label, 38), xlabel="precision on task", ylabel="after task")
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(range(len(matrix)), range(1, len(matrix) + 1))
    figure.colorbar(image, ax=all_axes, shrink=0.8, aspect=20 * all_axes[0].get_gridspec().nrows, label="precision")
    return figure


def kept_samples(settings: Sequence[Setting]) -> list[tuple[Setting, dict[tuple[int, int], Path]]]:
    """The settings whose first run kept samples (--sample-log), and their pictures by task and iteration."""
    return [(setting, samples) for setting in settings if (samples := setting.first.kept_samples())]


def samples_figure(settings: Sequence[Setting]) -> Figure | None:
    """What the generator draws from the same noise after each task, a row for each setting that kept samples."""
    if not (shown := kept_samples(settings)):
        return None
    tasks = max(len(setting.first.tasks) for setting, _ in shown)
    figure = Figure(figsize=(0.4 + 2.2 * tasks, 0.6 + 2.4 * len(shown)), layout="constrained")
    title = f"{figure_title([setting for setting, _ in shown])}: samples after each task"
    figure.suptitle(textwrap.fill(title, int(11 * figure.get_figwidth())))
    for axes_row, (setting, samples) in zip(figure.subplots(len(shown), tasks, squeeze=False), shown, strict=True):
        end = setting.first.lengths["generator"]
        axes_row[0].set_ylabel(textwrap.fill(setting.label, 32))
        for task, axes in enumerate(axes_row, start=1):
            axes.set(xticks=[], yticks=[], title=f"after task {task}")
            if (task, end) in samples:
                axes.imshow(np.asarray(Image.open(samples[task, end])))
            elif task > len(setting.first.tasks):
                axes.axis("off")
    return figure


def generator_figure(settings: Sequence[Setting]) -> Figure | None:
    """What the generator knows after each task, where all seeds of a setting measured it (--measure-generator)."""
    settings = [
        setting for setting in settings if all(run.generator_measure("frechet_distance") for run in setting.shown)
    ]
    if not settings:
        return None
    names = ("frechet_distance", "generator_precision", "generator_recall", "fitting_capacity")
    figure, all_axes = panels(len(names), settings)
    for axes, name in zip(all_axes, names, strict=True):
        for setting, style in zip(settings, setting_styles(settings), strict=True):
            draw_band(axes, setting.curve(lambda run, name=name: run.generator_measure(name)), marker=".", **style)
        axes.set(title=name.replace("_", " ").capitalize().replace("Fre", "Fré"), xlabel="after task")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(0, None if name == names[0] else 1.01)
    legend_below(figure, all_axes)
    return figure


FRAMES = 30  # of an animation, at most


def save_animation(settings: Sequence[Setting], path: Path) -> bool:
    """Save a GIF of kept samples through all tasks, settings side by side. False if there are none."""
    shown = kept_samples(settings)
    moments = sorted(set.intersection(*(set(samples) for _, samples in shown))) if shown else []
    if not moments:
        return False
    frames = []
    for task, iteration in moments[:: -(len(moments) // -FRAMES) * -1][::-1]:  # the last one is among them
        grids = [Image.open(samples[task, iteration]).convert("RGB") for _, samples in shown]
        size = sum(grid.width + 8 for grid in grids), max(grid.height for grid in grids) + 34
        frame, left = Image.new("RGB", size, "white"), 4
        for grid, (setting, _) in zip(grids, shown, strict=True):
            ImageDraw.Draw(frame).text((left, 2), f"{setting.label}\ntask {task}, iteration {iteration}", fill="black")
            frame.paste(grid, (left, 32))
            left += grid.width + 8
        frames.append(frame.quantize(64))
    with atomic_write(path, "wb") as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=250, loop=0, optimize=True)
    return True


FIGURES: dict[str, Callable[[Sequence[Setting]], Figure | None]] = {
    "precision": precision_figure,
    "average": average_figure,
    "matrix": matrix_figure,
    "samples": samples_figure,
    "generator": generator_figure,
}


def save_figures(runs: Sequence[Run], directory: Path) -> None:
    """Save all figures of each experiment as <experiment>-<kind>.png and .svg, and <experiment>.gif."""
    for experiment, settings in utils.group_runs(runs).items():
        for kind, draw in FIGURES.items():
            if (figure := draw(settings)) is not None:
                for suffix in (".png", ".svg") if kind != "samples" else (".png",):
                    write_figure(figure, directory / f"{experiment}-{kind}{suffix}")
        save_animation(settings, directory / f"{experiment}.gif")


def write_figure(figure: Figure, path: Path) -> None:
    """Save a figure; the same figure always gives the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "dgr", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """Save the precision plots of these runs side by side."""
    write_figure(
        precision_figure([setting for settings in utils.group_runs(runs).values() for setting in settings]), path
    )


def mean_sd(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, ± the standard deviation if there are several; empty if there are none."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):z.{digits}f}{deviation}"  # z: no -0.000


def cells(setting: Setting) -> dict[str, str]:
    """A setting as a row of a table."""
    run, unfinished = setting.first, len(setting.runs) - len(setting.finished)
    seeds = ", ".join(str(run.seed) for run in setting.finished)
    values = {key: [run.summary[key] for run in setting.finished] for key in utils.SUMMARY_KEYS}
    return {
        "experiment": run.experiment + (f" ({run.data_note})" if run.data_note else ""),
        "recipe": run.recipe,
        "replay mode": run.replay_mode,
        "flags": " ".join(run.flags),
        "seeds": seeds + (f" ({unfinished} not finished)" if unfinished else ""),
        "average precision": mean_sd(values["average_precision"], 3),
        "forgetting": mean_sd(values["forgetting"], 3),
        "seconds": mean_sd(values["seconds"], 0),
    }


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same keys as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(runs: Sequence[Run]) -> str:
    """Means and standard deviations over seeds, in Markdown."""
    return markdown([cells(setting) for settings in utils.group_runs(runs).values() for setting in settings])


def play_back(run: Run, server: str, port: int) -> None:
    """Show a finished or stopped run on a visdom server as it would have been shown live."""
    plots = LivePlots(run, server, port)
    plots.close()
    if plots.unsent:
        raise UserError(f"visdom at {server}:{port} did not take the plots: start a server there and try again")


def main(arguments: list[str] | None = None) -> None:
    parser = utils.Parser(description="Tables and figures of runs, from their files.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="result directory of a run, or of many")
    parser.add_argument("--output", type=Path, metavar="FILE", help="their precision plots: .png, .svg or .pdf")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="all figures, as DIR/EXPERIMENT-KIND.png and .svg")
    parser.add_argument("--visdom", action="store_true", help="play the runs back on a visdom server")
    utils.add_options(parser, VisdomOptions)
    options = parser.parse_args(arguments)
    if options.output and options.output.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --output: {options.output} must end in .png, .svg or .pdf")
    settings = [
        setting for settings in utils.group_runs(utils.find_runs(options.runs)).values() for setting in settings
    ]
    runs = [run for setting in settings for run in setting.runs]  # each once
    print(table(runs))
    if options.visdom:
        for run in runs:
            play_back(run, options.visdom_server, options.visdom_port)
        print(f"visdom: {options.visdom_server}:{options.visdom_port}")
    for name, make in (("output", save_figure), ("figures", save_figures)):
        if path := getattr(options, name):
            try:
                make(runs, path)
            except (OSError, ValueError) as error:
                raise UserError(f"--{name} {path}: {reason(error)}") from error
            print(f"{name}: {path}")


if __name__ == "__main__":
    utils.run_program(main)
