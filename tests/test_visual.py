"""Live plots against servers that misbehave, sample grids, figures, progress."""

import contextlib
import importlib.util
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from test_resume import flags, outcome, run_here

import visual
from utils import UserError

needs_visdom = pytest.mark.skipif(not importlib.util.find_spec("visdom"), reason="visdom is not installed")


class PlotServer:
    """A server that takes posts as visdom does and keeps them; `answer(handler)` decides what it says."""

    def __init__(self, answer=None, port=0):
        self.posts = posts = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if answer is not None:
                    answer(self)
                    return
                posts.append((self.path, json.loads(body)))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"window")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    def newest(self, window):
        return [post for path, post in self.posts if path == "/events" and post.get("win") == window][-1]


def live_plots(port: int) -> visual.LivePlots:
    """Plots of a run of two tasks that has just begun."""
    options = {"generator_iterations": 20, "solver_iterations": 6, "image_log_interval": 10}
    options |= {"experiment": "permutated-mnist", "replay_mode": "none", "seed": 0}
    with tempfile.TemporaryDirectory() as directory:
        files = Path(directory)
        (files / "metrics.csv").write_text("phase,task,iteration,name,value\n")
        config = {"name": "a-run-r0.3", "tasks": ["one", "two"], "options": options, "data": {"unverified": []}}
        (files / "config.json").write_text(json.dumps(config))
        return visual.LivePlots(visual.Run(files), "127.0.0.1", port)


def tell_two_tasks(plots: visual.LivePlots) -> None:
    for task in (1, 2):
        for iteration in (3, 6):
            values = {f"precision-{old}": old / 10 + iteration / 100 for old in range(1, task + 1)}
            plots.scalars("solver", task, iteration, {"loss": 1.0} | values)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------------- live plots


@needs_visdom
def test_curves_are_posted_whole_and_begin_with_their_task():
    server = PlotServer()
    plots = live_plots(server.port)
    tell_two_tasks(plots)
    plots.images(1, 10, torch.rand(7, 1, 32, 32))
    plots.close()
    post = server.newest("precision")
    assert post["eid"] == "a-run-r0.3" and post["opts"]["legend"] == ["task 1: one", "task 2: two"]
    first, second = post["data"]
    assert first["x"] == [3, 6, 9, 12] and first["y"] == pytest.approx([0.13, 0.16, 0.13, 0.16])
    begun = [(x, y) for x, y in zip(second["x"], second["y"], strict=True) if y is not None]
    assert begun == [(9, pytest.approx(0.23)), (12, pytest.approx(0.26))]
    assert server.newest("samples")["opts"]["title"] == "samples: task 1, iteration 10"
    assert server.newest("solver loss")["data"][0]["x"] == [3, 6, 9, 12]
    server.stop()


@needs_visdom
def test_windows_have_axes_and_the_colours_and_beginnings_of_tasks():
    server = PlotServer()
    plots = live_plots(server.port)
    wait_for(lambda: any(post.get("win") == "precision" for _, post in server.posts))
    tell_two_tasks(plots)
    plots.scalars("generator", 1, 15, {"critic-loss": 2.0})
    plots.close()
    first = next(post for path, post in server.posts if post.get("layout"))
    assert first["win"] == "precision" and first["data"][0]["y"] == [None]  # before anything is measured
    for window, label in (("precision", "precision (share of test images)"), ("solver loss", "solver loss")):
        post = server.newest(window)
        layout = post["layout"]
        assert (layout["xaxis"]["title"], layout["yaxis"]["title"]) == ("solver iterations", label)
        assert [curve["name"] for curve in post["data"]] == ["task 1: one", "task 2: two"]
        assert [curve["line"]["color"].upper() for curve in post["data"]] == visual.TASK_COLOURS[:2]
        assert [(shape["x0"], shape["x1"]) for shape in layout["shapes"]] == [(0, 0), (6, 6)]
        assert [note["text"] for note in layout["annotations"]] == ["task 1: one", "task 2: two"]
        assert [note["font"]["color"] for note in layout["annotations"]] == visual.TASK_COLOURS[:2]
    critic = server.newest("generator critic-loss")
    assert critic["layout"]["title"] == critic["layout"]["yaxis"]["title"] == "generator critic loss"
    assert (critic["data"][0]["x"], len(critic["layout"]["shapes"])) == ([15], 1)
    server.stop()


@needs_visdom
def test_one_client_serves_a_whole_run(monkeypatch):
    server, plain, clients = PlotServer(), visual.connect, []
    monkeypatch.setattr(visual, "connect", lambda **address: clients.append(plain(**address)) or clients[-1])
    plots = live_plots(server.port)
    tell_two_tasks(plots)
    plots.close()
    assert len(clients) == 1
    server.stop()


def hang(handler):
    time.sleep(60)


def forbid(handler):
    handler.send_response(403)
    handler.end_headers()


def garbage(handler):
    handler.wfile.write(b"\x00\xff no HTTP at all\r\n")


def drop(handler):
    handler.connection.close()


@needs_visdom
@pytest.mark.parametrize("answer", [hang, forbid, garbage, drop, None])
def test_a_bad_server_is_one_warning_and_never_waited_for(capsys, monkeypatch, answer):
    """Hanging, answering 403 or garbage, closing the connection, or absent (None)."""
    monkeypatch.setattr(visual.LivePlots, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(visual, "POST_TIMEOUT", (0.5, 0.5))
    server = PlotServer(answer) if answer else None
    plots = live_plots(server.port if server else free_port())
    start = time.monotonic()
    for _ in range(50):
        tell_two_tasks(plots)
    assert time.monotonic() - start < 2  # 200 measurements; a single post would have hung for longer
    time.sleep(1.5)
    tell_two_tasks(plots)
    plots.close()
    captured = capsys.readouterr()
    assert captured.err.count("warning: no live plots") == 1 == len(captured.err.strip().splitlines())
    assert captured.out == ""


@needs_visdom
def test_plots_go_on_complete_after_a_server_came_back(capsys, monkeypatch):
    monkeypatch.setattr(visual.LivePlots, "RETRY_SECONDS", 0.05)
    server = PlotServer()
    plots = live_plots(server.port)
    plots.scalars("generator", 1, 3, {"critic-loss": 0.5})
    plots.scalars("solver", 1, 3, {"precision-1": 0.5})
    for window in ("precision", "generator critic-loss"):
        wait_for(lambda window=window: any(post.get("win") == window for _, post in server.posts))
    server.stop()
    plots.scalars("solver", 1, 4, {"precision-1": 0.6})
    wait_for(lambda: "warning" in capsys.readouterr().err)
    plots.scalars("solver", 1, 5, {"precision-1": 0.7})
    again = PlotServer(port=server.port)
    for window in ("precision", "generator critic-loss"):  # whose phase is over too: the new server has nothing of it
        wait_for(lambda window=window: any(post.get("win") == window for _, post in again.posts))
    plots.close()
    curve = again.newest("precision")["data"][0]
    assert curve["y"] == [0.5, 0.6, 0.7] and curve["line"]["color"].upper() == visual.task_colour(1)
    again.stop()


def slow(handler):
    time.sleep(1)
    handler.send_response(200)
    handler.end_headers()


@needs_visdom
@pytest.mark.parametrize("answer", [hang, forbid, garbage, slow, None])
def test_a_bad_server_does_not_change_what_is_learned(tmp_path, small_mnist, monkeypatch, answer):
    monkeypatch.setattr(visual, "POST_TIMEOUT", (0.5, 2))
    server = PlotServer(answer) if answer else None
    port = server.port if server else free_port()
    without = flags(tmp_path / "without", small_mnist)
    live = [flag for flag in flags(tmp_path / "with", small_mnist) if flag != "--no-visdom"]
    run_here(without)
    run_here([*live, "--visdom-server=127.0.0.1", f"--visdom-port={port}"])
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")


@needs_visdom
def test_a_run_can_be_played_back_from_its_files(tmp_path, small_mnist):
    """What was never sent is shown later: the same curves that the run itself would have shown, and its samples."""
    arguments = [flag for flag in flags(tmp_path, small_mnist) if flag != "--no-visdom"]
    live, later = PlotServer(), PlotServer()
    run_here([*arguments, "--visdom-server=127.0.0.1", f"--visdom-port={live.port}"])
    directory = next((tmp_path / "results").glob("*-r0.3"))
    visual.main([str(directory), "--visdom", "--visdom-server=127.0.0.1", f"--visdom-port={later.port}"])
    for window in ("precision", "solver loss", "generator critic-loss"):
        assert later.newest(window) == live.newest(window)
    assert later.newest("samples")["opts"]["title"] == f"samples of {directory.name}"
    with Image.open(directory / visual.SAMPLES) as samples:
        samples.convert("L").save(directory / visual.SAMPLES)  # as arts/figures.py keeps it
    kept = PlotServer()
    visual.main([str(directory), "--visdom", "--visdom-server=127.0.0.1", f"--visdom-port={kept.port}"])
    assert kept.newest("samples") == later.newest("samples")
    with pytest.raises(UserError, match="did not take the plots"):
        visual.main([str(directory), "--visdom", f"--visdom-port={free_port()}"])


def test_visdom_not_installed_is_one_warning(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "visdom", None)
    plots = live_plots(free_port())
    tell_two_tasks(plots)
    plots.close()
    tell_two_tasks(plots)
    assert capsys.readouterr().err.count("warning: no live plots") == 1


@contextlib.contextmanager
def visdom_server(directory):
    """The port of a real server, reachable from this machine alone, started without the download of its front end."""
    port = free_port()
    start = f"import sys; from visdom.server.run_server import main; sys.argv += ['-port', '{port}', '-bind_local', "
    start += f"'-env_path', {str(directory)!r}]; main()"
    server = subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: server.poll() is not None or socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield port
    finally:
        server.kill()
        server.wait()


@needs_visdom
def test_windows_arrive_at_a_real_visdom_server_in_place_of_an_earlier_runs(tmp_path):
    with visdom_server(tmp_path) as port:
        client = visual.connect(server="127.0.0.1", port=port, env="a-run-r0.3")
        client.text("of an earlier run", win="solver another-loss")
        plots = live_plots(port)
        tell_two_tasks(plots)
        plots.images(2, 20, torch.rand(7, 3, 32, 32))
        plots.close()
        window = json.loads(client.get_window_data(win="precision", env="a-run-r0.3"))
        assert [trace["name"] for trace in window["content"]["data"]] == ["task 1: one", "task 2: two"]
        assert window["content"]["data"][0]["y"] == pytest.approx([0.13, 0.16, 0.13, 0.16])
        windows = json.loads(client.get_window_data(env="a-run-r0.3"))
        assert {w["title"] for w in windows.values()} == {"precision", "solver loss", "samples: task 2, iteration 20"}


# ---------------------------------------------------------------------------------------- samples and figures


def test_sample_grid_has_six_images_a_row(tmp_path):
    visual.save_samples(torch.rand(14, 1, 32, 32), tmp_path / "deep" / "grid.png")
    with Image.open(tmp_path / "deep" / "grid.png") as picture:
        assert picture.size == (6 * 34 + 2, 3 * 34 + 2)


def write_run(directory, offset=0.0, unverified=None, **options):
    """The files of a run of two tasks, all precisions moved by `offset`."""
    directory.mkdir(parents=True)
    usual = {"experiment": "permutated-mnist", "replay_mode": "none", "seed": 0, "sample_dir": str(directory.parent)}
    config = {
        "name": directory.name,
        "command": ["./main.py", "--train", "--seed=<0>"],
        "options": usual | {"solver_iterations": 6, "generator_iterations": 20} | options,
        "tasks": ["original", "permutation 1"],
        "data": {"checksums": unverified or {}, "unverified": list(unverified or {})},
    }
    (directory / "config.json").write_text(json.dumps(config))
    rows = ["phase,task,iteration,name,value", "generator,1,10,critic-loss,-0.5", "solver,1,3,loss,0.7"]
    for task, iteration, name, value in ((1, 3, 1, 0.8), (2, 6, 1, 0.5), (2, 6, 2, 0.9)):
        rows.append(f"solver,{task},{iteration},precision-{name},{value + offset}")
    rows.append("test,2,6,precision-1,0.4")
    (directory / "metrics.csv").write_text("\n".join(rows) + "\n")
    summary = {"average_precision": 0.65 + offset, "forgetting": 0.25, "seconds": 12.3, "seed": 0}
    summary["precision"] = [[0.8 + offset, None], [0.4 + offset, 0.9 + offset]]
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def keep_samples(directory, tasks=(1, 2)):
    for task in tasks:
        for iteration in (10, 20):
            visual.save_samples(torch.rand(7, 1, 32, 32), directory / f"task-{task}-iteration-{iteration}.jpg")


def test_run_is_read_back_on_one_axis_of_iterations(tmp_path):
    run = visual.Run(write_run(tmp_path / "a"))
    assert run.precision(1) == {3: 0.8, 12: 0.5} and run.precision(2) == {12: 0.9}
    assert run.average_precision() == {3: 0.8, 12: 0.7}
    assert run.curves["generator", "critic-loss"] == {10: -0.5}


def test_figure_of_runs_side_by_side(tmp_path, capsys):
    modes = ("none", "exact-replay", "generative-replay")
    directories = [write_run(tmp_path / mode, replay_mode=mode) for mode in modes]
    visual.main([*map(str, directories), "--output", str(tmp_path / "figures/f.png")])
    height, width, _ = imread(tmp_path / "figures/f.png").shape
    assert width > 2.5 * height
    said = capsys.readouterr().out
    assert "| permutated-mnist | exact-replay | 0 | 0.650 | 0.250 | 12 | .955 | .96 to .97 |" in said


def test_panels_of_several_experiments_have_a_legend_that_is_true_of_all(tmp_path):
    runs = [visual.Run(write_run(tmp_path / name, experiment=name)) for name in ("mnist-svhn", "svhn-mnist")]
    runs[1].tasks = ["original", "another"]
    figure = visual.precision_figure([visual.Arm([run]) for run in runs])
    assert [axes.get_title() for axes in figure.axes] == ["mnist-svhn: none", "svhn-mnist: none"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["task 1: original", "task 2"]


def test_output_of_another_kind_is_refused(results, capsys):
    with pytest.raises(SystemExit, match="2"):
        visual.main([str(results), "--output", "figure"])
    assert ".png, .svg and .pdf" in capsys.readouterr().err


def test_name_of_a_file_that_is_not_utf_8_can_be_drawn(tmp_path):
    config = write_run(tmp_path / "a") / "config.json"
    config.write_text(config.read_text().replace("original", r"caf\udce9").replace("--seed=<0>", r"caf\udce9.npz"))
    visual.main([str(tmp_path), "--figures", str(tmp_path / "figures"), "--report", str(tmp_path / "r.html")])
    assert "caf?.npz" in (tmp_path / "r.html").read_text()


def test_unofficial_data_are_named_so(tmp_path):
    directory = write_run(tmp_path / "a", unverified={"cifar10/test_batch": "0"})
    config = json.loads((directory / "config.json").read_text()) | {"tasks": ["CIFAR-10", "MNIST"]}
    (directory / "config.json").write_text(json.dumps(config))
    assert visual.Run(directory).tasks == ["unofficial CIFAR10", "MNIST"]


@pytest.fixture
def results(tmp_path):
    """Two seeds of one arm, an arm with samples, one with another r, and what a later run set aside."""
    for seed, offset in ((0, 0.0), (1, 0.1)):
        write_run(tmp_path / f"seed-{seed}/none-r1", offset=offset, seed=seed)
    for r in ("0.3", "0.5", "0.3~1"):
        directory = tmp_path / f"seed-0/gr-r{r}"
        write_run(directory, replay_mode="generative-replay", importance_of_new_task=float(r[:3]))
    config = tmp_path / "seed-0/gr-r0.3~1/config.json"
    config.write_text(config.read_text().replace("gr-r0.3~1", "gr-r0.3"))
    keep_samples(tmp_path / "seed-0/gr-r0.3/sample-log")
    return tmp_path


def test_runs_are_found_and_seeds_gathered(results):
    runs = visual.find_runs([results])
    assert [run.name for run in runs] == ["none-r1", "none-r1", "gr-r0.3", "gr-r0.5"]
    assert [run.environment for run in runs[:2]] == ["none-r1", "none-r1-seed-1"]
    (arms,) = visual.arms_of(runs).values()
    assert [len(arm.runs) for arm in arms] == [2, 1, 1]
    assert [arm.label for arm in arms] == [
        "none",
        "generative-replay",
        "generative-replay (importance of new task 0.5)",
    ]
    xs, mean, deviation = arms[0].curve(visual.Run.average_precision)
    assert xs.tolist() == [3, 12]
    assert mean == pytest.approx([0.85, 0.75]) and deviation == pytest.approx([0.1 / 2**0.5] * 2)
    assert arms[0].matrix()[1] == pytest.approx([0.45, 0.95])
    assert visual.cells(arms[0])["average precision"] == "0.700 ± 0.071"


def test_a_seed_from_before_an_option_joins_later_ones(results):
    config = results / "seed-1/none-r1/config.json"
    content = json.loads(config.read_text())
    content["options"]["lr_schedule"] = "constant"
    config.write_text(json.dumps(content))
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    assert [len(arm.runs) for arm in arms] == [2, 1, 1]


def test_figures_show_what_the_files_say(results):
    """Curves, bands and matrix as drawn, not only that there is a picture."""
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    panel = visual.precision_figure(arms).axes[0]
    first = next(line for line in panel.lines if line.get_label() == "task 1: original")
    assert first.get_ydata() == pytest.approx([0.85, 0.55]) and first.get_color() == visual.task_colour(1)
    assert len(panel.collections) == 2  # a band for each task, of two seeds
    assert {line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == ":"} == {0, 6}
    axes = visual.average_figure(arms).axes[0]
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert labels == ["none, 2 seeds", *(arm.label for arm in arms[1:])]
    assert len({line.get_color() for line in axes.lines[:3]}) == 3
    numbers = [text.get_text() for text in visual.matrix_figure(arms).axes[0].texts]
    assert numbers == [".85", ".45", ".95"]
    assert [axes.get_ylabel() for axes in visual.loss_figure(arms).axes] == ["critic loss", "solver loss"]
    titles = [axes.get_title() for axes in visual.samples_figure(arms).axes]
    assert titles == ["after task 1", "after task 2"]


def test_all_figures_are_made_from_files_and_are_repeatable(results):
    for directory in ("one", "two"):
        visual.main([str(results / "seed-0"), str(results / "seed-1"), "--figures", str(results / directory)])
    made = sorted(path.name for path in (results / "one").iterdir())
    kinds = [f"permutated-mnist-{kind}" for kind in visual.FIGURES]
    expected = [f"{kind}.png" for kind in kinds] + [f"{kind}.svg" for kind in kinds if "samples" not in kind]
    assert made == sorted([*expected, "permutated-mnist.gif"])
    for name in made:
        assert (results / "one" / name).read_bytes() == (results / "two" / name).read_bytes(), name
    with Image.open(results / "one/permutated-mnist.gif") as animation:
        assert animation.n_frames == 4


def test_report_is_one_page_with_everything(results):
    visual.main([str(results), "--report", str(results / "report.html")])
    page = (results / "report.html").read_text()
    assert "<td>0.700 ± 0.071</td>" in page and "<td>.75 to .79</td>" in page
    assert page.count("./main.py --train") == 4 and "seed=&lt;0&gt;" in page
    assert page.count("data:image/svg+xml;base64,") == 4 and page.count("data:image/gif;base64,") == 1
    assert not re.search(r"""(src|href)=(?!"data:)""", page)


@pytest.mark.parametrize(
    ("checksum", "called"), [("0" * 32, "unofficial SVHN"), ("d4c8bae1cc7bd94ad847c0aec19ecb15", "SVHN-grey")]
)
def test_figure_says_that_data_are_unofficial(tmp_path, checksum, called):
    write_run(tmp_path / "a", unverified={"svhn/train_32x32.mat": checksum})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"tasks": ["MNIST", "SVHN"]}))
    run = visual.Run(tmp_path / "a")
    assert run.tasks == ["MNIST", called] and run.data_note == f"{called} in place of SVHN"
    assert run.data_note in visual.precision_figure([visual.Arm([run])]).get_suptitle()
    assert visual.Run(write_run(tmp_path / "b")).data_note == ""


def test_runs_on_other_data_are_no_seeds_of_one_arm(tmp_path):
    runs = [
        visual.Run(write_run(tmp_path / "a")),
        visual.Run(write_run(tmp_path / "b", unverified={"svhn/x": "0"}, seed=1)),
    ]
    (arms,) = visual.arms_of(runs).values()
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0], [1]]
    assert arms[0].label != arms[1].label and "in place of SVHN" in arms[0].label + arms[1].label


def test_unfinished_run_is_drawn_and_named_so(tmp_path):
    directory = write_run(tmp_path / "a")
    (directory / "summary.json").unlink()
    visual.main([str(directory), "--figures", str(tmp_path / "figures")])
    assert "|  (1 not finished) |  |" in visual.table([visual.Run(directory)])
    assert not (tmp_path / "figures/permutated-mnist-matrix.png").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tasks": 3}'])
def test_directory_that_is_no_run_is_an_error(tmp_path, content):
    directory = write_run(tmp_path / "a")
    (directory / "config.json").write_text(content)
    with pytest.raises(UserError, match="not the files of a run"):
        visual.Run(directory)


def test_metrics_that_are_no_table_are_an_error(tmp_path):
    directory = write_run(tmp_path / "a")
    (directory / "metrics.csv").write_text("phase,task,iteration,name,value\n" + "x" * 200_000)
    with pytest.raises(UserError, match="not the files of a run"):
        visual.Run(directory)


def test_a_run_counts_once(results, capsys):
    """However often it is named; of two runs that are the same, seed included, one counts, and that is said."""
    runs = visual.find_runs([results, results / "seed-0", results / "seed-1/none-r1"])
    assert len(runs) == 4
    write_run(results / "copy/none-r1", offset=0.1)
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    assert [run.seed for run in arms[0].runs] == [0, 1]
    assert "it is the same run as" in capsys.readouterr().err
    visual.main([str(results), "--output", str(results / "f.png")])
    captured = capsys.readouterr()
    assert "| none | 0, 1 |" in captured.out and captured.err.count("it is the same run as") == 1


def test_a_seed_under_way_takes_nothing_from_the_others(results):
    begun = results / "seed-2/none-r1"
    write_run(begun, seed=2)
    (begun / "summary.json").unlink()
    (begun / "metrics.csv").write_text("phase,task,iteration,name,value\n")
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    assert arms[0].curve(visual.Run.average_precision)[1] == pytest.approx([0.85, 0.75])
    assert visual.arm_styles(arms)[0]["label"] == "none, 2 seeds"
    assert visual.cells(arms[0])["seeds"] == "0, 1 (1 not finished)"


def test_a_first_seed_under_way_hides_nothing_of_the_others(results):
    begun = results / "seed-0/none-r1"
    (begun / "summary.json").unlink()
    (begun / "metrics.csv").write_text("phase,task,iteration,name,value\n")
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    assert arms[0].first.seed == 1
    assert "generator critic-loss" in {" ".join(key) for key in arms[0].first.curves}


def test_runs_behind_links_are_found_once(results):
    (results / "seed-1").rename(results.parent / "moved")
    (results / "seed-1").symlink_to(results.parent / "moved")
    (results / "seed-0/loop").symlink_to(results)
    assert len(visual.find_runs([results])) == 4


def test_a_finished_run_counts_before_its_unfinished_copy(results):
    copy = write_run(results / "a-copy/none-r1")
    (copy / "summary.json").unlink()
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    assert [run.directory.parent.name for run in arms[0].runs] == ["seed-0", "seed-1"]


def test_samples_after_a_task_are_those_of_its_end(results):
    (results / "seed-0/gr-r0.3/sample-log/task-2-iteration-20.jpg").unlink()
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    assert [len(axes.get_images()) for axes in visual.samples_figure(arms).axes] == [1, 0]


def test_what_is_no_run_stops_no_figure(results, capsys):
    """A foreign config.json, a broken summary, a renamed picture: left out, and the first two said."""
    (results / "foreign").mkdir()
    (results / "foreign/config.json").write_text("{}")
    (write_run(results / "broken") / "summary.json").write_text('{"seed": 0}')
    log = results / "seed-0/gr-r0.3/sample-log"
    (log / "task-1-iteration-20.jpg").rename(log / "task-1-iteration-20 (copy).jpg")
    runs = visual.find_runs([results])
    assert len(runs) == 4 and list(runs[2].kept_samples()) == [(1, 10), (2, 10), (2, 20)]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all("of a run" in line for line in warnings)


def test_a_replay_mode_of_ones_own_is_drawn_too(tmp_path):
    """And a name of a task with dollars, which matplotlib would take for mathematics."""
    for mode in ("pseudo-replay", "none"):
        config = write_run(tmp_path / mode, replay_mode=mode) / "config.json"
        config.write_text(config.read_text().replace('"original"', '"a$_$"'))
    visual.main([str(tmp_path), "--figures", str(tmp_path / "figures")])
    (arms,) = visual.arms_of(visual.find_runs([tmp_path])).values()
    assert [arm.label for arm in arms] == ["none", "pseudo-replay"]
    assert len({style["color"] for style in visual.arm_styles(arms)}) == 2


def test_arms_are_told_apart_by_temperature_alone(tmp_path):
    def labels():
        (arms,) = visual.arms_of(visual.find_runs([tmp_path])).values()
        return [arm.label for arm in arms]

    write_run(tmp_path / "a", replay_targets="hard", temperature=1.0)
    write_run(tmp_path / "b", replay_targets="soft", temperature=2.0)
    assert labels() == ["none", "none (replay targets soft)"]
    write_run(tmp_path / "c", replay_targets="soft", temperature=4.0)
    assert labels() == [
        "none (replay targets hard)",
        "none (temperature 2.0)",
        "none (temperature 4.0)",
    ]


def test_an_animation_ends_where_the_run_ends(results, monkeypatch):
    monkeypatch.setattr(visual, "FRAMES", 3)
    moments = []
    monkeypatch.setattr(visual.ImageDraw.ImageDraw, "text", lambda self, at, text, fill: moments.append(text))
    (arms,) = visual.arms_of(visual.find_runs([results])).values()
    assert visual.save_animation(arms, results / "a.gif")
    assert moments[1::2] == ["task 1, iteration 20", "task 2, iteration 20"]


def test_a_task_has_one_colour_and_seven_differ():
    assert len({visual.task_colour(task) for task in range(1, 8)}) == 7
    assert visual.task_colour(8) == visual.task_colour(1)


# ---------------------------------------------------------------------------------------------------- progress


def tell_a_phase(progress, first=1):
    progress.begin("solver", 2, 3, first - 1)
    for iteration in range(first, 4):
        progress.step(iteration)
        progress.scalars("solver", 2, iteration, {"loss": 1 / iteration, "precision-1": 0.5})
    progress.end("solver", 2)
    progress.close()


def test_progress_is_a_line_for_each_phase_without_a_terminal(capsys):
    tell_a_phase(visual.Progress(tasks=5))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("task 2/5 solver: 3 iterations in ") and line.endswith("loss 0.333, precision-1 0.500")


def test_progress_counts_what_a_resumed_run_does_itself(capsys):
    tell_a_phase(visual.Progress(tasks=5), first=3)
    assert "task 2/5 solver: 1 iterations in " in capsys.readouterr().err


def test_a_terminal_that_has_gone_ends_no_run(monkeypatch):
    class Gone:
        def isatty(self):
            return False

        def write(self, _text):
            raise OSError(5, "Input/output error")

        flush = isatty

    monkeypatch.setattr(sys, "stderr", Gone())
    tell_a_phase(visual.Progress(tasks=5))
    visual.warn("something")


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tell_a_phase(visual.Progress(tasks=5))
    drawn = capsys.readouterr().err
    for word in ("task 2/5 solver: 100%", "3/3", "loss 0.333", "precision-1 0.500"):
        assert word in drawn
