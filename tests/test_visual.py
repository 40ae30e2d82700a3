"""Live plots against servers that misbehave, sample grids, figures, progress."""

import contextlib
import fcntl
import importlib.util
import json
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from test_resume import flags, outcome, run_here, wait_until

import utils
import visual
from utils import Run, UserError

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


@pytest.fixture
def plot_server():
    server = PlotServer()
    yield server
    server.stop()


def live_plots(port: int, seed: int = 0, tasks=("one", "two"), **options) -> visual.LivePlots:
    """Plots of a run of two tasks that has just begun. options: more of its `VisdomOptions`."""
    address = {"visdom_server": "127.0.0.1", "visdom_port": port} | options
    options = {"generator_iterations": 20, "solver_iterations": 6, "image_log_interval": 10}
    config = {"name": "a-run-r0.3", "seed": seed, "recipe": "2017", "flags": [], "options": options}
    config |= {"experiment": "permutated-mnist", "replay_mode": "none", "tasks": list(tasks)}
    run = Run(Path("nowhere"), config | {"data": {"checksums": {}, "unverified": []}}, None, [])
    return visual.LivePlots(run, visual.VisdomOptions(**address))


def report_two_tasks(plots: visual.LivePlots) -> None:
    for task in (1, 2):
        for iteration in (3, 6):
            values = {f"precision-{old}": old / 10 + iteration / 100 for old in range(1, task + 1)}
            plots.scalars("solver", task, iteration, {"loss": 1.0} | values)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# -------------------------------------------------------------------------------------------------- live plots


@needs_visdom
def test_curves_are_posted_whole_and_begin_with_their_task(plot_server):
    plots = live_plots(plot_server.port, seed=3)
    report_two_tasks(plots)
    plots.images(1, 10, torch.rand(7, 1, 32, 32))
    plots.close()
    post = plot_server.newest("precision")
    assert post["eid"] == "a-run-r0.3-seed-3" and post["opts"]["legend"] == ["task 1: one", "task 2: two"]
    first, second = post["data"]
    assert first["x"] == [3, 6, 9, 12] and first["y"] == pytest.approx([0.13, 0.16, 0.13, 0.16])
    begun = [(x, y) for x, y in zip(second["x"], second["y"], strict=True) if y is not None]
    assert begun == [(9, pytest.approx(0.23)), (12, pytest.approx(0.26))]
    assert plot_server.newest("samples")["opts"]["title"] == "samples: task 1, iteration 10"
    assert plot_server.newest("solver loss")["data"][0]["x"] == [3, 6, 9, 12]


@needs_visdom
def test_windows_have_axes_and_the_colours_and_beginnings_of_tasks(plot_server):
    plots = live_plots(plot_server.port)
    wait_until(lambda: any(post.get("win") == "precision" for _, post in plot_server.posts))
    report_two_tasks(plots)
    plots.scalars("generator", 1, 15, {"critic-loss": 2.0})
    plots.close()
    first = next(post for path, post in plot_server.posts if post.get("layout"))
    assert first["win"] == "precision" and first["data"][0]["y"] == [None]  # before anything is measured
    for window, label in (("precision", "precision (share of test images)"), ("solver loss", "solver loss")):
        post = plot_server.newest(window)
        layout = post["layout"]
        assert (layout["xaxis"]["title"], layout["yaxis"]["title"]) == ("solver iterations", label)
        assert [curve["name"] for curve in post["data"]] == ["task 1: one", "task 2: two"]
        assert [curve["line"]["color"].upper() for curve in post["data"]] == visual.TASK_COLOURS[:2]
        assert [(shape["x0"], shape["x1"]) for shape in layout["shapes"]] == [(0, 0), (6, 6)]
        assert [note["text"] for note in layout["annotations"]] == ["task 1: one", "task 2: two"]
        assert [note["font"]["color"] for note in layout["annotations"]] == visual.TASK_COLOURS[:2]
    critic = plot_server.newest("generator critic-loss")
    assert critic["layout"]["title"] == critic["layout"]["yaxis"]["title"] == "generator critic loss"
    assert (critic["data"][0]["x"], len(critic["layout"]["shapes"])) == ([15], 1)


@needs_visdom
def test_one_client_serves_a_whole_run(plot_server, monkeypatch):
    plain, clients = visual.connect, []
    monkeypatch.setattr(visual, "connect", lambda **address: clients.append(plain(**address)) or clients[-1])
    plots = live_plots(plot_server.port)
    report_two_tasks(plots)
    plots.close()
    assert len(clients) == 1


ANSWERS = {
    "hangs": lambda handler: time.sleep(60),
    "forbids": lambda handler: (handler.send_response(403), handler.end_headers()),
    "garbage": lambda handler: handler.wfile.write(b"\x00\xff no HTTP at all\r\n"),
    "drops": lambda handler: handler.connection.close(),
    "slow": lambda handler: (time.sleep(1), handler.send_response(200), handler.end_headers()),
}


@needs_visdom
@pytest.mark.parametrize("answer", ["hangs", "forbids", "garbage", "drops", None])
def test_a_bad_server_is_one_warning_and_never_waited_for(capsys, monkeypatch, answer):
    """Hanging, answering 403 or garbage, closing the connection, or absent (None)."""
    monkeypatch.setattr(visual.LivePlots, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(visual, "POST_TIMEOUT", (0.5, 0.5))
    plots = live_plots(PlotServer(ANSWERS[answer]).port if answer else free_port())
    start = time.monotonic()
    for _ in range(50):
        report_two_tasks(plots)
    assert time.monotonic() - start < 2  # 200 measurements; a single post would have hung for longer
    time.sleep(1.5)
    report_two_tasks(plots)
    plots.close()
    captured = capsys.readouterr()
    assert captured.err.count("warning: no live plots") == 1 == len(captured.err.strip().splitlines())
    assert captured.out == ""


@needs_visdom
@pytest.mark.parametrize("answer", ["hangs", "forbids", "garbage", "slow", None])
def test_a_bad_server_does_not_change_what_is_learned(tmp_path, small_mnist, monkeypatch, answer):
    """Nor what its files hold (docs/differences.md, 20)."""
    monkeypatch.setattr(visual, "POST_TIMEOUT", (0.5, 2))
    port = PlotServer(ANSWERS[answer]).port if answer else free_port()
    live = [flag for flag in flags(tmp_path / "with", small_mnist) if flag != "--no-visdom"]
    run_here(flags(tmp_path / "without", small_mnist))
    run_here([*live, "--visdom-server=127.0.0.1", f"--visdom-port={port}"])
    assert outcome(tmp_path / "with") == outcome(tmp_path / "without")


@needs_visdom
def test_plots_go_on_complete_after_a_server_came_back(capsys, monkeypatch):
    monkeypatch.setattr(visual.LivePlots, "RETRY_SECONDS", 0.05)
    server = PlotServer()
    plots = live_plots(server.port)
    windows = {"precision", "generator critic-loss"}
    plots.scalars("generator", 1, 3, {"critic-loss": 0.5})
    plots.scalars("solver", 1, 3, {"precision-1": 0.5})
    wait_until(lambda: windows <= {post.get("win") for _, post in server.posts})
    server.stop()
    plots.scalars("solver", 1, 4, {"precision-1": 0.6})
    wait_until(lambda: "warning" in capsys.readouterr().err)
    plots.scalars("solver", 1, 5, {"precision-1": 0.7})
    again = PlotServer(port=server.port)  # which has nothing of the generator's phase either, and that is over
    wait_until(lambda: windows <= {post.get("win") for _, post in again.posts})
    plots.close()
    curve = again.newest("precision")["data"][0]
    assert curve["y"] == [0.5, 0.6, 0.7] and curve["line"]["color"].upper() == visual.TASK_COLOURS[0]
    again.stop()


@needs_visdom
def test_a_run_can_be_played_back_from_its_files(tmp_path, small_mnist, plot_server):
    """What was never sent is shown later: the same curves that the run itself would have shown, and its samples."""
    arguments = [flag for flag in flags(tmp_path, small_mnist) if flag != "--no-visdom"]
    run_here([*arguments, "--visdom-server=127.0.0.1", f"--visdom-port={plot_server.port}"])
    directory = next((tmp_path / "results").glob("*-r0.3"))

    def play_back() -> PlotServer:
        later = PlotServer()
        visual.main([str(directory), "--visdom", "--visdom-server=127.0.0.1", f"--visdom-port={later.port}"])
        return later

    later = play_back()
    for window in ("precision", "solver loss", "generator critic-loss"):
        assert later.newest(window) == plot_server.newest(window)
    assert later.newest("samples")["opts"]["title"] == f"samples of {directory.name}"
    with Image.open(directory / utils.SAMPLES) as samples:
        samples.convert("L").save(directory / utils.SAMPLES)  # a smaller file of the same picture
    assert play_back().newest("samples") == later.newest("samples")
    with pytest.raises(UserError, match="did not take the plots"):
        visual.main([str(directory), "--visdom", f"--visdom-port={free_port()}"])


def test_visdom_not_installed_is_one_warning(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "visdom", None)
    plots = live_plots(free_port())
    report_two_tasks(plots)
    plots.close()
    report_two_tasks(plots)
    assert capsys.readouterr().err.count("warning: no live plots") == 1


def answers(status: int):
    return lambda handler: (handler.send_response(status), handler.end_headers())


CAUSES = {
    "refused": (None, "http://127.0.0.1", "Connection refused"),
    "401": (answers(401), "http://127.0.0.1", "it answers 401 (a login is read from"),
    "404": (answers(404), "http://127.0.0.1/vis", "/vis: it answers 404 (is visdom below another path?)"),
    "scheme": (answers(200), "https://127.0.0.1", "does http or https fit?"),
    "proxy": (answers(200), "http://plots.invalid", "a proxy is between"),
}


@needs_visdom
@pytest.mark.parametrize("cause", CAUSES)
def test_the_warning_says_the_cause(capsys, monkeypatch, cause):
    answer, server, words = CAUSES[cause]
    monkeypatch.setattr(visual, "POST_TIMEOUT", (0.5, 0.5))
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{free_port()}")
    plots = live_plots(PlotServer(answer).port if answer else free_port(), visdom_server=server)
    plots.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert words in warning and "secret" not in warning


@needs_visdom
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_proxy_is_not_asked_for_this_machine(plot_server, monkeypatch, host):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert live_plots(plot_server.port, visdom_server=host).close() and plot_server.newest("precision")
    assert not utils.is_this_machine("192.0.2.1")  # of no machine


@pytest.mark.parametrize(
    "address", ["http://me:secret@host:8097", "me:secret@host", "http://host/a@b", "ftp://host", "::1"]
)
def test_an_address_that_is_none_or_has_a_login_is_refused_and_not_printed(capsys, address):
    with pytest.raises(SystemExit, match="2"):
        visual.main(["results", f"--visdom-server={address}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "VISDOM_PASSWORD" in line and "secret" not in line and address not in line


@pytest.mark.parametrize(
    "server, port, address",
    [
        ("host", 8097, "http://host:8097"),
        ("host:18097", 8097, "http://host:18097"),
        ("https://host/vis/", 8097, "https://host:443/vis"),
        ("https://host", 8443, "https://host:8443"),
        ("http://[::1]", 1234, "http://[::1]:1234"),
    ],
)
def test_an_address_of_visdom_is_host_port_and_path(monkeypatch, server, port, address):
    monkeypatch.setattr(visual.LivePlots, "_post_all", lambda _: None)
    assert live_plots(port, visdom_server=server).address == address


@needs_visdom
def test_an_environment_of_ones_own_keeps_what_others_have_there(plot_server):
    plots = live_plots(plot_server.port, visdom_env="ours")
    report_two_tasks(plots)
    plots.close()
    post = plot_server.newest("a-run-r0.3: precision")
    assert post["eid"] == "ours" and post["opts"]["title"] == "a-run-r0.3: precision"
    assert "/close" not in {path for path, _ in plot_server.posts}


@needs_visdom
def test_many_tasks_have_an_average_in_black_and_no_legend(plot_server):
    plots = live_plots(plot_server.port, tasks=[f"permutation {task}" for task in range(30)])
    for task in range(1, 31):
        for iteration in (3, 6):
            plots.scalars("solver", task, iteration, {f"precision-{old}": old / 30 for old in range(1, task + 1)})
            plots.scalars("solver", task, iteration, {"loss": 1.0})
    plots.close()
    post = plot_server.newest("precision")
    *tasks, average = post["data"]
    assert average["line"]["color"] == "#000000" and average["line"]["width"] > 2 * tasks[0]["line"]["width"]
    assert average["x"] == list(range(6, 181, 6)) and average["y"][-1] == pytest.approx(31 / 60)
    assert len({curve["line"]["color"] for curve in tasks}) == 30 and not post["layout"]["showlegend"]
    assert len(post["layout"]["annotations"]) <= 20
    assert len(plot_server.newest("solver loss")["data"]) == 1


@contextlib.contextmanager
def visdom_server(directory, *flags, **environment):
    """The port of a real server, reachable from this machine alone, started without the download of its front end."""
    port = free_port()
    flags = ["-port", str(port), "-bind_local", "-env_path", str(directory), *flags]
    start = f"import sys; from visdom.server.run_server import main; sys.argv += {flags}; main()"
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, **environment}}
    server = subprocess.Popen([sys.executable, "-c", start], **how)
    try:
        wait_until(lambda: server.poll() is not None or socket.socket().connect_ex(("127.0.0.1", port)) == 0)
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
        report_two_tasks(plots)
        plots.images(2, 20, torch.rand(7, 3, 32, 32))
        plots.close()
        window = json.loads(client.get_window_data(win="precision", env="a-run-r0.3"))
        assert [trace["name"] for trace in window["content"]["data"]] == ["task 1: one", "task 2: two"]
        assert window["content"]["data"][0]["y"] == pytest.approx([0.13, 0.16, 0.13, 0.16])
        windows = json.loads(client.get_window_data(env="a-run-r0.3"))
        assert {w["title"] for w in windows.values()} == {"precision", "solver loss", "samples: task 2, iteration 20"}


@needs_visdom
def test_a_real_server_below_a_path_takes_a_login_from_the_environment(tmp_path, monkeypatch, capsys):
    (tmp_path / ".visdom").mkdir()
    monkeypatch.setenv("VISDOM_USERNAME", "me")
    monkeypatch.setenv("VISDOM_PASSWORD", "secret")
    settings = {"HOME": str(tmp_path), "VISDOM_USE_ENV_CREDENTIALS": "1", "VISDOM_COOKIE": "cookie"}
    with visdom_server(tmp_path, "-base_url", "/vis", "-enable_login", **settings) as port:
        assert live_plots(port, visdom_server="127.0.0.1/vis").close()
        monkeypatch.setenv("VISDOM_PASSWORD", "other-secret")
        assert not live_plots(port, visdom_server="127.0.0.1/vis").close()
    error = capsys.readouterr().err
    status = 401 if version("visdom") >= "0.3" else 400
    assert f"it answers {status} (a login is read from" in error and "secret" not in error


# ---------------------------------------------------------------------------------------- samples and figures


def write_run(directory, offset=0.0, data=None, **config):
    """The files of a run of two tasks, all precisions moved by `offset`; others of its config.json by name."""
    directory.mkdir(parents=True)
    sizes = {"solver_iterations": 6, "generator_iterations": 20, "sample_dir": str(directory.parent / "samples")}
    usual = {"name": directory.name, "options": sizes, "tasks": ["original", "permutation 1"]}
    usual |= {"experiment": "permutated-mnist", "replay_mode": "none", "recipe": "2017", "flags": [], "seed": 0}
    usual["data"] = {"checksums": {}, "unverified": []} | (data or {})
    (directory / "config.json").write_text(json.dumps(usual | config))
    rows = ["phase,task,iteration,name,value", "generator,1,10,critic-loss,-0.5", "solver,1,3,loss,0.7"]
    for task, iteration, name, value in ((1, 3, 1, 0.8), (2, 6, 1, 0.5), (2, 6, 2, 0.9)):
        rows.append(f"solver,{task},{iteration},precision-{name},{value + offset}")
    rows.append("test,2,6,precision-1,0.4")
    (directory / "metrics.csv").write_text("\n".join(rows) + "\n")
    summary = {"average_precision": 0.65 + offset, "forgetting": 0.25, "seconds": 12.3, "seed": 0}
    summary["precision"] = [[0.8 + offset, None], [0.4 + offset, 0.9 + offset]]
    names = ("frechet_distance", "generator_precision", "generator_recall", "fitting_capacity")
    summary["generator"] = [dict.fromkeys(names, 0.1 * task + offset) for task in (1, 2)]
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


SUMMARY = {"average_precision": 0.65, "forgetting": 0.25, "seconds": 12.3, "precision": [[0.8, None], [0.4, 0.9]]}


def interrupt(directory):
    """Leave of a run what one has that has just begun."""
    (directory / "summary.json").unlink()
    (directory / "metrics.csv").write_text("phase,task,iteration,name,value\n")


@pytest.fixture
def results(tmp_path):
    """Two seeds of one setting, one with samples, one with another r, and what a later run has renamed."""
    for seed, offset in ((0, 0.0), (1, 0.1)):
        write_run(tmp_path / f"seed-{seed}/none-r1", offset=offset, seed=seed)
    for r, changed in (("0.3", []), ("0.5", ["--importance-of-new-task=0.5"]), ("0.3~1", [])):
        directory = tmp_path / f"seed-0/gr-r{r}"
        write_run(directory, name=f"gr-r{r[:3]}", replay_mode="generative-replay", flags=changed)
    for task, iteration in ((1, 10), (1, 20), (2, 10), (2, 20)):
        place = visual.kept_sample(tmp_path / "seed-0/samples/gr-r0.3", task, iteration)
        visual.save_samples(torch.rand(7, 1, 32, 32), place)
    return tmp_path


def settings_in(directory) -> list[utils.Setting]:
    """The settings of the only experiment below a directory."""
    (settings,) = utils.group_runs(utils.find_runs([directory])).values()
    return settings


def test_run_is_read_back_on_one_axis_of_iterations(tmp_path):
    run = Run.read(write_run(tmp_path / "a"))
    assert run.precision(1) == {3: 0.8, 12: 0.5} and run.precision(2) == {12: 0.9}
    assert run.average_precision() == {3: 0.8, 12: 0.7}
    assert run.curves["generator", "critic-loss"] == {10: -0.5}


def test_figure_and_table_of_runs_side_by_side(tmp_path, capsys):
    modes = ("none", "exact-replay", "generative-replay")
    directories = [write_run(tmp_path / mode, replay_mode=mode, flags=["--lr=0.1"]) for mode in modes]
    visual.main([*map(str, directories), "--output", str(tmp_path / "figures/f.png")])
    height, width, _ = imread(tmp_path / "figures/f.png").shape
    assert width > 2.5 * height
    row = "| permutated-mnist | 2017 | exact-replay | --lr=0.1 | 0 | 0.650 | 0.250 | 12 |"
    assert row in capsys.readouterr().out


def test_panels_of_several_experiments_have_a_legend_that_is_true_of_all(tmp_path):
    runs = [Run.read(write_run(tmp_path / name, experiment=name)) for name in ("mnist-svhn", "svhn-mnist")]
    figure = visual.precision_figure([utils.Setting([run]) for run in runs])
    assert [axes.get_title() for axes in figure.axes] == ["mnist-svhn: none", "svhn-mnist: none"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["task 1", "task 2"]


def test_output_of_another_kind_is_refused(results, capsys):
    with pytest.raises(SystemExit, match="2"):
        visual.main([str(results), "--output", "figure"])
    assert ".png, .svg or .pdf" in capsys.readouterr().err


def test_titles_may_hold_anything(tmp_path):
    """Dollars, which matplotlib would take for mathematics, and a file's name that is not UTF-8."""
    write_run(tmp_path / "a", tasks=["a$_$", "caf\udce9"], replay_mode="pseudo-replay")
    visual.main([str(tmp_path), "--figures", str(tmp_path / "figures")])
    picture = (tmp_path / "figures/permutated-mnist-precision.svg").read_text()
    assert "task 1: a$_$" in picture and "task 2: caf?" in picture


def test_runs_are_found_and_seeds_gathered(results):
    found = [run.name for run in utils.find_runs([results])]
    assert sorted(found) == ["gr-r0.3", "gr-r0.5", "none-r1", "none-r1"]
    settings = settings_in(results)
    assert [len(setting.runs) for setting in settings] == [2, 1, 1]
    other = "generative-replay (--importance-of-new-task=0.5)"
    assert [setting.label for setting in settings] == ["none", "generative-replay", other]
    xs, mean, deviation = settings[0].curve(Run.average_precision)
    assert xs.tolist() == [3, 12]
    assert mean == pytest.approx([0.85, 0.75]) and deviation == pytest.approx([0.1 / 2**0.5] * 2)
    assert settings[0].matrix()[1] == pytest.approx([0.45, 0.95])
    assert visual.cells(settings[0])["average precision"] == "0.700 ± 0.071"


def test_seeds_on_the_same_data_at_different_paths_are_averaged_and_others_not(tmp_path):
    tasks = {0: "a/own.npz", 1: "/scratch/1/own.npz", 2: "/scratch/2/own.npz"}
    for seed, path in tasks.items():
        checksums = {path: "abc" if seed < 2 else "def", "mnist/train": "123"}
        directory = write_run(tmp_path / f"{seed}/run", data={"checksums": checksums}, seed=seed)
        file = directory / "config.json"
        config = json.loads(file.read_text())
        config["options"]["tasks"] = [f"./{path}" if seed == 0 else path, "mnist"]
        file.write_text(json.dumps(config))
    assert [[run.seed for run in setting.runs] for setting in settings_in(tmp_path)] == [[0, 1], [2]]


def test_settings_are_told_apart_by_recipe_and_by_the_flags_that_differ(tmp_path):
    def labels():
        return [setting.label for setting in settings_in(tmp_path)]

    write_run(tmp_path / "a", recipe="vae", flags=["--lr=0.1"])
    assert labels() == ["none"]
    write_run(tmp_path / "b", recipe="vae", flags=["--lr=0.1", "--temperature=4.0"])
    assert labels() == ["none", "none (--temperature=4.0)"]
    write_run(tmp_path / "c", recipe="quick", flags=["--lr=0.1"])
    assert labels() == ["none (vae)", "none (vae, --temperature=4.0)", "none (quick)"]
    assert visual.figure_title(settings_in(tmp_path)) == "permutated-mnist · recipe quick, vae"


def test_figures_show_what_the_files_say(results):
    """Curves, bands and matrix as drawn, not only that there is a picture."""
    settings = settings_in(results)
    panel = visual.precision_figure(settings).axes[0]
    first = next(line for line in panel.lines if line.get_label() == "task 1: original")
    assert first.get_ydata() == pytest.approx([0.85, 0.55]) and first.get_color() == visual.TASK_COLOURS[0]
    assert len(panel.collections) == 2  # a band for each task, of two seeds
    assert {line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == ":"} == {0, 6}
    axes = visual.average_figure(settings).axes[0]
    labels = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert labels == ["none, 2 seeds", *(setting.label for setting in settings[1:])]
    assert len({line.get_color() for line in axes.lines[:3]}) == 3
    numbers = [text.get_text() for text in visual.matrix_figure(settings).axes[0].texts]
    assert numbers == [".85", ".45", ".95"]
    titles = [axes.get_title() for axes in visual.samples_figure(settings).axes]
    assert titles == ["after task 1", "after task 2"]
    distance = visual.generator_figure(settings).axes[0]
    assert distance.lines[0].get_xdata() == pytest.approx([1, 2])
    assert distance.lines[0].get_ydata() == pytest.approx([0.15, 0.25])


def test_a_generator_is_drawn_only_where_all_seeds_were_measured(results):
    summary = results / "seed-0/none-r1/summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"generator": [None, None]}))
    (*_, axes) = visual.generator_figure(settings_in(results)).axes
    assert [line.get_label() for line in axes.lines] == [
        "generative-replay",
        "generative-replay (--importance-of-new-task=0.5)",
    ]
    (results / "seed-0/gr-r0.3").rename(results / "seed-0/gr-r0.3~2")
    (results / "seed-0/gr-r0.5").rename(results / "seed-0/gr-r0.5~2")
    assert visual.generator_figure(settings_in(results)) is None


def test_all_figures_are_made_from_files_and_are_repeatable(results):
    for directory in ("one", "two"):
        visual.main([str(results / "seed-0"), str(results / "seed-1"), "--figures", str(results / directory)])
    kinds = [f"permutated-mnist-{kind}" for kind in visual.FIGURES]
    expected = [f"{kind}.png" for kind in kinds] + [f"{kind}.svg" for kind in kinds if "samples" not in kind]
    made = sorted(path.name for path in (results / "one").iterdir())
    assert made == sorted([*expected, "permutated-mnist.gif"])
    for name in made:
        assert (results / "one" / name).read_bytes() == (results / "two" / name).read_bytes(), name
    with Image.open(results / "one/permutated-mnist.gif") as animation:
        assert animation.n_frames == 4


@pytest.mark.parametrize(("known", "called"), [({}, "unofficial SVHN"), ({"svhn": "SVHN-grey"}, "SVHN-grey")])
def test_unofficial_data_are_named_so(tmp_path, known, called):
    unofficial = {"checksums": {"svhn/x": "0"}, "unverified": ["svhn/x"]} | known
    run = Run.read(write_run(tmp_path / "a", data=unofficial, tasks=["MNIST", "SVHN"], seed=1))
    assert run.tasks == ["MNIST", called] and run.data_note == f"{called} in place of SVHN"
    assert run.data_note in visual.precision_figure([utils.Setting([run])]).get_suptitle().replace("\n", " ")
    assert Run.read(write_run(tmp_path / "b")).data_note == ""
    settings = settings_in(tmp_path)  # runs on other data are no seeds of one setting
    assert {setting.label for setting in settings} == {f"none ({run.data_note})", "none (official data)"}


def test_an_animation_says_that_data_are_unofficial(results):
    """In a line above the samples."""
    (setting,) = (setting for setting in settings_in(results) if setting.first.kept_samples())
    heights = []
    for setting.first.data_note in ("", "unofficial MNIST"):
        assert visual.save_animation([setting], results / "samples.gif")
        with Image.open(results / "samples.gif") as animation:
            heights.append(animation.height)
    assert heights[1] == heights[0] + 14


def test_hyphens_in_the_name_of_unofficial_data_do_not_matter(tmp_path):
    other = {"unverified": ["cifar10/test_batch"]}
    assert Run.read(write_run(tmp_path / "a", data=other, tasks=["CIFAR-10"])).tasks == ["unofficial CIFAR10"]


def test_unfinished_run_is_drawn_and_named_so(tmp_path):
    directory = write_run(tmp_path / "a")
    (directory / "summary.json").unlink()
    visual.main([str(directory), "--figures", str(tmp_path / "figures")])
    assert "|  (1 not finished) |  |" in visual.table([Run.read(directory)])
    assert not (tmp_path / "figures/permutated-mnist-matrix.png").exists()


@pytest.mark.parametrize(
    "file, content",
    [
        *(("config.json", content) for content in ("", "[]", "{}", '{"tasks": 3}')),
        ("metrics.csv", "phase,task,iteration,name,value\n" + "x" * 200_000),
        ("metrics.csv", "phase,task,iteration,name,value\nsolver,1,3,precision-1,0.8\nsolver,2,"),
        ("metrics.csv", "phase;task;iteration;name;value\nsolver;1;3;precision-1;0,8\n"),
        ("summary.json", '{"seed": 0}'),
        *(("summary.json", json.dumps(SUMMARY | change)) for change in ({"seconds": "12"}, {"forgetting": None})),
        ("summary.json", json.dumps(SUMMARY | {"precision": [["0.8", None], [0.4, 0.9]]})),
    ],
)
def test_directory_that_is_no_run_is_an_error_alone_and_left_out_among_others(results, capsys, file, content):
    directory = write_run(results / "broken")
    (directory / file).write_text(content)
    with pytest.raises(UserError, match="not the files of a run"):
        Run.read(directory)
    assert len(utils.find_runs([results])) == 4
    (warning,) = capsys.readouterr().err.splitlines()
    assert "not the files of a run" in warning and "broken" in warning
    with pytest.raises(UserError, match="broken: not the files of a run"):
        utils.find_runs([directory])
    with pytest.raises(UserError, match="nowhere"):
        utils.find_runs([directory, results / "nowhere"])


@pytest.mark.parametrize("kept", ["mark and semicolons", "half a line of a run under way"])
def test_files_that_a_spreadsheet_or_a_run_under_way_has_written_are_read(tmp_path, kept):
    directory = write_run(tmp_path / "a")
    text = (directory / "metrics.csv").read_text()
    if kept == "mark and semicolons":
        (directory / "metrics.csv").write_text("\ufeff" + text.replace(",", ";"), encoding="utf-8")
        (directory / "config.json").write_text("\ufeff" + (directory / "config.json").read_text(), encoding="utf-8")
    else:
        (directory / "summary.json").unlink()
        (directory / "metrics.csv").write_text(text + "solver,2,6,preci")
    assert Run.read(directory).precision(1) == {3: 0.8, 12: 0.5}


def test_pictures_that_somebody_renamed_are_left_out(results):
    log = results / "seed-0/samples/gr-r0.3"
    (log / "task-1-iteration-20.jpg").rename(log / "task-1-iteration-20 (copy).jpg")
    assert list(settings_in(results)[1].first.kept_samples()) == [(1, 10), (2, 10), (2, 20)]


def test_runs_from_before_a_recipe_changed_are_no_seeds_of_it(results, capsys):
    directory = results / "seed-2/none-r1"
    write_run(directory, seed=2)
    config = json.loads((directory / "config.json").read_text())
    config["options"]["solver_iterations"] += 10
    (directory / "config.json").write_text(json.dumps(config))
    labels = [setting.label for setting in settings_in(results) if setting.first.replay_mode == "none"]
    lengths = Run.read(directory).lengths
    assert len(labels) == 2 and labels[1] == f"none ({lengths['generator']} and {lengths['solver']} iterations)"


def test_a_damaged_picture_is_left_out_of_the_figures(results, capsys):
    damaged = results / "seed-0/samples/gr-r0.3/task-1-iteration-20.jpg"
    os.truncate(damaged, 300)
    visual.main([str(results / "seed-0"), "--figures", str(results / "figures")])
    assert capsys.readouterr().err.count(f"{damaged} is left out: ") == 1
    with Image.open(results / "figures/permutated-mnist.gif") as animation:
        assert animation.n_frames == 3


def test_a_run_counts_once(results, capsys):
    """However often it is named; of two runs that are the same, seed included, one counts, and that is said."""
    assert len(utils.find_runs([results, results / "seed-0", results / "seed-1/none-r1"])) == 4
    write_run(results / "copy/none-r1", offset=0.1)
    visual.main([str(results), "--output", str(results / "f.png")])
    captured = capsys.readouterr()
    assert "| none |  | 0, 1 |" in captured.out and captured.err.count("it is the same run as") == 1


def test_a_finished_run_counts_before_its_unfinished_copy(results):
    interrupt(write_run(results / "a-copy/none-r1"))
    assert [run.directory.parent.name for run in settings_in(results)[0].runs] == ["seed-0", "seed-1"]


def test_a_seed_under_way_takes_nothing_from_the_others(results):
    interrupt(write_run(results / "seed-2/none-r1", seed=2))
    setting = settings_in(results)[0]
    assert setting.curve(Run.average_precision)[1] == pytest.approx([0.85, 0.75])
    assert visual.setting_styles([setting])[0]["label"] == "none, 2 seeds"
    assert visual.cells(setting)["seeds"] == "0, 1 (1 not finished)"


def test_a_first_seed_under_way_hides_nothing_of_the_others(results):
    interrupt(results / "seed-0/none-r1")
    first = settings_in(results)[0].first
    assert first.seed == 1 and ("generator", "critic-loss") in first.curves


def test_runs_behind_links_are_found_once(results):
    (results / "seed-1").rename(results.parent / "moved")
    (results / "seed-1").symlink_to(results.parent / "moved")
    (results / "seed-0/loop").symlink_to(results)
    assert len(utils.find_runs([results])) == 4


def test_samples_after_a_task_are_those_of_its_end(results):
    (results / "seed-0/samples/gr-r0.3/task-2-iteration-20.jpg").unlink()
    assert [len(axes.get_images()) for axes in visual.samples_figure(settings_in(results)).axes] == [1, 0]


def test_a_replay_mode_of_ones_own_has_its_place_and_colour(tmp_path):
    for mode in ("pseudo-replay", "none"):
        write_run(tmp_path / mode, replay_mode=mode)
    settings = settings_in(tmp_path)
    assert [setting.label for setting in settings] == ["none", "pseudo-replay"]
    assert len({style["color"] for style in visual.setting_styles(settings)}) == 2


def test_an_animation_ends_where_the_run_ends(results, monkeypatch):
    monkeypatch.setattr(visual, "FRAMES", 3)
    moments = []
    monkeypatch.setattr(visual.ImageDraw.ImageDraw, "text", lambda self, at, text, fill: moments.append(text))
    assert visual.save_animation(settings_in(results), results / "a.gif")
    ends = [f"generative-replay\ntask {task}, iteration 20" for task in (1, 2)]
    assert moments == ends


def write_many(directory, tasks):
    """The files of a run of many tasks, each measured twice, with samples."""
    matrix = [[1 - (i - j) / tasks if j <= i else None for j in range(tasks)] for i in range(tasks)]
    names = [f"permutation {task}" for task in range(tasks)]
    write_run(directory, tasks=names, name=directory.name)
    rows = ["phase,task,iteration,name,value"]
    for i, row in enumerate(matrix):
        rows += [f"solver,{i + 1},{at},precision-{j + 1},{row[j]}" for at in (3, 6) for j in range(i + 1)]
        visual.save_samples(
            torch.rand(7, 1, 8, 8), visual.kept_sample(directory.parent / "samples" / directory.name, i + 1, 20)
        )
    (directory / "metrics.csv").write_text("\n".join(rows) + "\n")
    (directory / "summary.json").write_text(json.dumps(SUMMARY | {"precision": matrix}))
    return [utils.Setting([Run.read(directory)])]


@pytest.mark.parametrize("tasks", [5, 10, 20, 50, 100])
def test_no_two_of_many_tasks_look_alike(tmp_path, tasks):
    figure = visual.precision_figure(write_many(tmp_path / "a", tasks))
    curves = figure.axes[0].lines[: tasks + (tasks > 7)]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == len(curves)
    labels = [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else []
    titles = [f"task {task + 1}: permutation {task}" for task in range(tasks)]
    assert labels == ["average on the tasks so far"] * (tasks > 7) + titles * (tasks <= 20)
    assert len(figure.axes) == 1 + (tasks > 20)  # the colours' scale in place of a legend


@pytest.mark.parametrize("tasks, numbers", [(12, 78), (13, 0), (100, 0)])
def test_a_large_matrix_has_no_numbers_and_few_ticks(tmp_path, tasks, numbers):
    axes = visual.matrix_figure(write_many(tmp_path / "a", tasks)).axes[0]
    assert len(axes.texts) == numbers and len([at for at in axes.get_xticks() if 1 <= at <= tasks]) <= 12


def test_pictures_of_many_tasks_stay_small(tmp_path):
    settings = write_many(tmp_path / "a", 100)
    titles = [axes.get_title() for axes in visual.samples_figure(settings).axes]
    assert len(titles) == 10 and titles[0] == "after task 1" and titles[-1] == "after task 100"


def test_long_titles_are_whole(tmp_path):
    write_run(tmp_path / "a", experiment="+".join(["a-data-set-of-ours"] * 6))
    figure = visual.precision_figure(settings_in(tmp_path))
    figure.draw_without_rendering()
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width
    assert "".join(figure.get_suptitle().split()) == "+".join(["a-data-set-of-ours"] * 6)


def test_boxes_for_characters_that_no_font_has_are_said_once(tmp_path, capsys, recwarn):
    write_run(tmp_path / "a", tasks=["\ue123", "\ue124"], experiment="\ue125")  # of no language
    visual.warn_once.cache_clear()
    visual.main([str(tmp_path), "--figures", str(tmp_path / "figures")])
    (warning,) = capsys.readouterr().err.splitlines()
    assert "Noto Sans CJK" in warning and not [w for w in recwarn if "Glyph" in str(w.message)]


# ---------------------------------------------------------------------------------------------------- progress


def report_a_phase(progress, first=1):
    progress.begin("solver", 2, 3, first - 1)
    for iteration in range(first, 4):
        progress.step(iteration)
        progress.scalars("solver", 2, iteration, {"loss": 1 / iteration, "precision-1": 0.5})
    progress.end("solver", 2)
    progress.close()


@pytest.mark.parametrize("first, done", [(1, 3), (3, 1)])
def test_progress_is_a_line_for_each_phase_without_a_terminal(capsys, first, done):
    """And counts the iterations that a resumed run does itself."""
    report_a_phase(visual.Progress(tasks=5), first)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"task 2/5 solver: {done} iterations in ") and line.endswith("0.333, precision-1 0.500")


def test_a_terminal_that_has_gone_ends_no_run(monkeypatch):
    class Gone:
        def isatty(self):
            return False

        def write(self, _text):
            raise OSError(5, "Input/output error")

        flush = isatty

    monkeypatch.setattr(sys, "stderr", Gone())
    report_a_phase(visual.Progress(tasks=5))
    utils.warn("something")


def test_progress_is_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    report_a_phase(visual.Progress(tasks=5))
    drawn = capsys.readouterr().err
    for word in ("task 2/5 solver: 100%", "3/3", "loss 0.333", "precision-1 0.500"):
        assert word in drawn


def test_progress_keeps_to_the_width_of_the_terminal(capsys, monkeypatch):
    """And names the mean of many precisions."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(follower, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = visual.Progress(tasks=100)
        progress.begin("solver", 100, 1000, 0)
        progress.scalars("solver", 100, 1000, {"loss": 0.25})
        progress.scalars("solver", 100, 1000, {f"precision-{task}": task / 100 for task in range(1, 101)})
        progress.end("solver", 100)
        shown = b""
        while select.select([leader], [], [], 0.5)[0]:  # the terminal may pass on one write after the other
            shown += os.read(leader, 10_000)
    os.close(leader)
    lines = shown.decode().replace("\r", "\n").split("\n")
    assert max(map(len, lines)) < 80 and any("loss 0.250, average precision 0.5" in line for line in lines)
