"""A run as people see it elsewhere: the live page in a real browser, TensorBoard, pandas."""

import errno
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_one_line_error, run, start
from PIL import Image
from test_resume import NAME, flags, run_here, run_until, wait_until
from test_visual import needs_visdom, visdom_server

import utils
import visual

needs_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed"
)


# ------------------------------------------------------------------------------------------- the page in a browser

TITLES = ["original", "permutation 1", "permutation 2"]
SIZES = {"generator": 20, "solver": 40}
SAMPLES_TITLE = f"samples: task 3, iteration {SIZES['generator']}"

# What a person sees of each plot: title, axes, legend, curves with colour and points, beginnings of tasks.
LOOK = """() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => {
    const layout = plot._fullLayout, box = element => element.getBoundingClientRect().toJSON()
    return {
        title: layout.title.text, x: layout.xaxis.title.text, y: layout.yaxis.title.text,
        legend: [...plot.querySelectorAll('.legendtext')].map(text => text.textContent),
        curves: plot._fullData.map(curve => ({
            name: curve.name, colour: curve.line.color,
            points: [...curve.x].map((x, i) => [x, curve.y[i]]).filter(point => point[1] !== null),
        })),
        lines: layout.shapes.map(line => [line.x0, line.x1]),
        labels: layout.annotations.map(label => [label.text, label.font.color]),
        box: box(plot),
        texts: [...plot.querySelectorAll('.legend, .annotation, .gtitle, .g-xtitle, .g-ytitle')].map(box),
    }
})"""


@pytest.fixture
def page():
    """An empty page of a headless Chromium, where there is one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    visdom = Path(importlib.util.find_spec("visdom").origin).parent
    if not (visdom / "static/js/plotly-plotly.min.js").exists():
        pytest.skip("visdom's front end is not there: `python -m visdom.server` downloads it when it is first started")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1280, "height": 1130})
        browser.close()


def points_of(directory, lengths) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By title and legend, the points that the plots of a run must have, from its metrics.csv."""
    plots = {}
    for row in utils.Run.read(directory).rows:
        phase, name, task = row["phase"], row["name"], int(row["task"])
        if phase == "test":
            continue
        titles = {"loss": "solver loss", "critic-loss": "generator critic loss", "generator-loss": "generator loss"}
        title = titles.get(name, f"generator {name}")
        if name.startswith("precision-"):
            title, task = "precision", int(name.removeprefix("precision-"))
        point = [(int(row["task"]) - 1) * lengths[phase] + int(row["iteration"]), float(row["value"])]
        plots.setdefault(title, {}).setdefault(f"task {task}: {TITLES[task - 1]}", []).append(point)
    return plots


def points_seen(page) -> dict[str, dict[str, list[tuple[int, float]]]]:
    plots = page.evaluate(LOOK)
    assert len({plot["title"] for plot in plots}) == len(plots)
    return {plot["title"]: {curve["name"]: curve["points"] for curve in plot["curves"]} for plot in plots}


def bars(page) -> list[str]:
    return sorted(bar.inner_text().strip() for bar in page.query_selector_all(".window .bar > div.pull-right"))


@needs_visdom
def test_the_page_of_a_run_is_what_its_files_say(tmp_path, small_mnist, page):
    with visdom_server(tmp_path / "server") as port:
        sizes = [f"--{phase}-iterations={n}" for phase, n in SIZES.items()]
        arguments = [flag for flag in flags(tmp_path, small_mnist, *sizes) if flag != "--no-visdom"]
        arguments += ["--mnist-permutation-number=3", "--checkpoint-interval=300"]
        arguments += ["--visdom-server=127.0.0.1", f"--visdom-port={port}"]
        directory = tmp_path / "results" / NAME
        process = start("main.py", *arguments, cwd=tmp_path)
        wait_until((directory / "metrics.csv").exists)
        wait_until(lambda: "solver,1," in (directory / "metrics.csv").read_text())
        process.send_signal(signal.SIGSTOP)
        assert process.poll() is None

        # In the middle of the run: the first task, and no line of the next ones.
        page.goto(f"http://127.0.0.1:{port}/env/{NAME}")
        page.wait_for_selector(".js-plotly-plot")
        wait_until(lambda: "generator critic loss" in points_seen(page))
        early, so_far = points_seen(page), points_of(directory, SIZES)
        for title, curves in early.items():
            for name, points in curves.items():
                assert points == so_far.get(title, {}).get(name, [])[: len(points)]
        assert all(plot["lines"] == [[0, 0]] for plot in page.evaluate(LOOK))
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0 and "no live plots" not in error

        # At its end, on the page that is still open.
        expected = points_of(directory, SIZES)
        wait_until(lambda: points_seen(page) == expected)
        wait_until(lambda: bars(page) == sorted([*expected, SAMPLES_TITLE]))
        names = [f"task {task}: {title}" for task, title in enumerate(TITLES, start=1)]
        for plot in page.evaluate(LOOK):
            phase = "generator" if "generator" in plot["title"] else "solver"
            assert plot["x"] == f"{phase} iterations"
            assert plot["y"] == {"precision": "precision (share of test images)"}.get(plot["title"], plot["title"])
            assert plot["legend"] == [curve["name"] for curve in plot["curves"]] == names
            assert [curve["colour"].upper() for curve in plot["curves"]] == visual.TASK_COLOURS[:3]
            assert plot["lines"] == [[task * SIZES[phase]] * 2 for task in range(3)]
            assert plot["labels"] == [list(pair) for pair in zip(names, visual.TASK_COLOURS, strict=False)]
            for text in plot["texts"]:
                assert inside(text, plot["box"]), (plot["title"], text, plot["box"])
        page.wait_for_function("[...document.querySelectorAll('.window img')].some(image => image.naturalWidth > 200)")
        boxes = page.evaluate("[...document.querySelectorAll('.window')].map(w => w.getBoundingClientRect().toJSON())")
        assert len(boxes) == 6 and all(box["right"] <= 1280 for box in boxes)
        assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))
        page.screenshot(path=tmp_path / "live.png", full_page=True)
        assert (tmp_path / "live.png").stat().st_size > 20_000

        # A second, shorter run of the same name: the same windows, of its own curves, on the open page and a fresh one.
        shorter = {"generator": 20, "solver": 12}
        process = start("main.py", *arguments, "--solver-iterations=12", cwd=tmp_path)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0 and (tmp_path / "results" / f"{NAME}~1").exists(), error
        expected = points_of(directory, shorter)
        for _ in range(2):
            wait_until(lambda: points_seen(page) == expected)
            wait_until(lambda: bars(page) == sorted([*expected, SAMPLES_TITLE]))
            page.reload()


def inside(one, other) -> bool:
    return (
        other["left"] <= one["left"] <= one["right"] <= other["right"]
        and other["top"] <= one["top"] <= one["bottom"] <= other["bottom"]
    )


def overlap(one, other) -> bool:
    return (
        min(one["right"], other["right"]) - max(one["left"], other["left"]) > 1
        and min(one["bottom"], other["bottom"]) - max(one["top"], other["top"]) > 1
    )


# ---------------------------------------------------------------------------------------------- TensorBoard, pandas


def test_metrics_load_into_pandas_as_they_are(tmp_path, small_mnist):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    run_here(flags(tmp_path, small_mnist, "--replay-mode=none"))
    (directory,) = (tmp_path / "results").glob("*-none-r1")
    frame = pandas.read_csv(directory / "metrics.csv")
    assert [frame[column].dtype.kind for column in ("task", "iteration", "value")] == ["i", "i", "f"]
    assert frame.notna().all(axis=None)
    assert frame.astype(str).to_dict("records") == utils.Run.read(directory).rows


def assert_board_is_what_the_files_say(directory, drawn) -> None:
    """TensorBoard reads every scalar once, the outcome, and sample grids of these iterations, the newest one last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected, lengths = {}, {"generator": 4, "solver": 6, "test": 6}
    for row in utils.Run.read(directory).rows:
        at = (int(row["task"]) - 1) * lengths[row["phase"]] + int(row["iteration"])
        expected.setdefault(f"{row['phase']}/{row['name']}", []).append((at, pytest.approx(float(row["value"]))))
    summary = json.loads((directory / "summary.json").read_text())
    expected["average-precision"] = [(12, pytest.approx(summary["average_precision"]))]
    seen = EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert {tag: [(e.step, e.value) for e in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]} == expected
    grids = seen.Images("samples") if drawn else []
    assert [grid.step for grid in grids] == drawn
    for grid in grids[-1:]:
        newest = np.asarray(Image.open(io.BytesIO(grid.encoded_image_string)), dtype=int)
        with Image.open(directory / utils.SAMPLES) as file:
            assert np.abs(newest - np.asarray(file)).max() <= 1  # one cuts off, the other rounds


@needs_tensorboard
def test_tensorboard_shows_what_the_files_say(tmp_path, small_mnist):
    """A second run of the same name leaves the first one's files as they are, and has its own."""
    for _ in range(2):
        run_here(flags(tmp_path, small_mnist, "--tensorboard"))
    for name in (NAME, f"{NAME}~1"):
        assert_board_is_what_the_files_say(tmp_path / "results" / name, drawn=[2, 4, 6, 8])


# Of the 23 states of such a run (tests/test_resume.py): in the first generator, the first solver, the second of both.
@needs_tensorboard
@pytest.mark.parametrize(
    "saves, before, drawn",
    [(3, True, [4, 6, 8]), (9, True, [6, 8]), (15, True, [8]), (22, True, []), (9, False, [6, 8])],
)
def test_tensorboard_of_a_resumed_run_has_every_point_once(tmp_path, small_mnist, monkeypatch, saves, before, drawn):
    """Stopped where more was written than the state knows, or begun without the flag; earlier grids are lost."""
    arguments = flags(tmp_path, small_mnist)
    run_until(monkeypatch, saves, [*arguments, *["--tensorboard"] * before])
    run_here([*arguments, "--tensorboard", "--resume"])
    assert_board_is_what_the_files_say(tmp_path / "results" / NAME, drawn)


@needs_tensorboard
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_that_cannot_be_written_is_one_warning(tmp_path, small_mnist, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    run_here(flags(tmp_path, small_mnist, "--tensorboard"))
    assert capsys.readouterr().err.count("No space left on device; training goes on") == 1


def test_tensorboard_not_installed_is_one_line(tmp_path, small_mnist):
    """As where it is missing: a package of the name that cannot be imported stands before any other."""
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorboard'\")\n")
    arguments = flags(tmp_path, small_mnist, "--tensorboard")
    process = run("main.py", *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert_one_line_error(process, 2, "--tensorboard", "pip install tensorboard")
    assert not (tmp_path / "results").exists()
