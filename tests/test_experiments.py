"""run_full_experiments: many runs on one machine, as a list of commands, and on a Ray cluster."""

import argparse
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from functools import partialmethod

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, call, run, start
from test_data import write_task
from tqdm import tqdm

import data
import main
import utils
from utils import UserError

NOISE = "permutated-mnist-noise-replay-r0.3"
NAMES = ["permutated-mnist-none-r1", "permutated-mnist-exact-replay-r0.3", "permutated-mnist-generative-replay-r0.3"]


@pytest.fixture(scope="module")
def full():
    """run_full_experiments as a module."""
    loader = importlib.machinery.SourceFileLoader("run_full_experiments", str(ROOT / "run_full_experiments"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def experiments(cwd, data, *arguments, start=run, **environment):
    return start("run_full_experiments", *arguments, f"--data-dir={data}", *TINY, cwd=cwd, **environment)


def summary_of(results, name):
    return json.loads((results / name / "summary.json").read_text())


def wait_for(process, *paths):
    limit = time.monotonic() + 240
    while not all(path.exists() for path in paths):
        assert time.monotonic() < limit and process.poll() is None, process.communicate()
        time.sleep(0.1)


def test_one_experiment_and_again(tmp_path, small_mnist):
    """Three runs, their table, figure and samples; the second time nothing is left to do."""
    process = experiments(tmp_path, small_mnist, "permutated-mnist", start=call)
    assert process.returncode == 0, process.stderr
    results = tmp_path / "results"
    assert sorted(path.name for path in results.iterdir() if path.is_dir()) == sorted(NAMES)
    for line in process.stdout.strip().splitlines()[-3:]:
        assert (tmp_path / line.split(": ")[1]).exists()
    for number, name in enumerate(NAMES, start=1):
        summary = summary_of(results, name)
        row = rf"\| {summary['replay_mode']} \| .*\| 0 \| {summary['average_precision']:.3f} \|"
        assert re.search(row, (results / "permutated-mnist.md").read_text())
        line = rf"^\[{number}/3\] \S+ {name}, seed 0: average precision {summary['average_precision']:.4f}, \d+ s$"
        assert re.search(line, process.stdout, re.MULTILINE)
    again = experiments(tmp_path, small_mnist, "permutated-mnist", start=call)
    assert again.returncode == 0 and "$ ./main.py" not in again.stdout and "[3/3]" in again.stdout
    assert len(list(results.glob("*/summary.json"))) == 3


def test_seeds_side_by_side_equal_runs_alone(tmp_path, small_mnist):
    """Two at a time, each seed in directories of its own, with a log; the same outcome as main.py by itself."""
    process = experiments(tmp_path, small_mnist, "noise-replay", "--seeds=3,5", "--jobs=2", start=call)
    assert process.returncode == 0, process.stderr
    for seed in (3, 5):
        assert summary_of(tmp_path / f"results/seed-{seed}", NOISE)["seed"] == seed
        assert (tmp_path / f"checkpoints/seed-{seed}" / NOISE).exists()
        assert "average precision" in (tmp_path / f"results/seed-{seed}/{NOISE}.log").read_text()
    assert "| 3, 5 | 0." in (tmp_path / "results/noise-replay.md").read_text()
    flags = ["--replay-mode=noise-replay", f"--data-dir={small_mnist}", *TINY, "--seed=5", "--result-dir=alone"]
    assert call("main.py", "--train", *flags, cwd=tmp_path).returncode == 0
    metrics = [(tmp_path / where / NOISE / "metrics.csv").read_text() for where in ("alone", "results/seed-5")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("visible", "seen", "gpus"),
    [
        (None, 2, ["0", "1", "0", "1"]),
        (None, 1, ["0"] * 4),
        (None, 0, ["none"] * 4),
        ("5, 2,-1,7", 8, ["5", "2", "5", "2"]),
        ("GPU-6c5b", 8, ["GPU-6c5b"] * 4),
        ("", 8, [""] * 4),
    ],
)
def test_runs_are_spread_over_the_visible_gpus(full, tmp_path, monkeypatch, visible, seen, gpus):
    """With a stand-in for main.py that tells which GPU it is given; `seen` is how many PyTorch would count."""
    (tmp_path / "main.py").write_text("import os\nprint('GPU', os.environ.get('CUDA_VISIBLE_DEVICES', 'none'))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "__file__", str(tmp_path / "main.py"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    jobs = full.make_jobs("noise-replay", [0, 1, 2, 3], TINY)
    full.run_jobs(jobs, argparse.Namespace(ray=None, jobs=4))
    assert sorted(job.log.read_text().splitlines()[-1] for job in jobs) == sorted(f"GPU {gpu}" for gpu in gpus)


def test_no_two_runs_share_a_gpu_while_another_is_free(full, tmp_path, monkeypatch):
    """Six runs, three at a time, on three GPUs."""
    under_way, most, turn = [], [], threading.Barrier(3)

    def run_here(_job, _logged, environment, _stopping):
        under_way.append(environment["CUDA_VISIBLE_DEVICES"])
        turn.wait(60)
        most.append(sorted(under_way))
        turn.wait(60)
        under_way.remove(environment["CUDA_VISIBLE_DEVICES"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,4,6")
    monkeypatch.setattr(full, "run_here", run_here)
    full.run_jobs(full.make_jobs("noise-replay", list(range(6)), TINY), argparse.Namespace(ray=None, jobs=3))
    assert most == [["1", "4", "6"]] * 6


def test_the_longest_run_is_among_the_first_to_start(full, tmp_path, monkeypatch):
    begun = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(full, "run_here", lambda job, *_: begun.append(job.options.replay_mode))
    full.run_jobs(full.make_jobs("permutated-mnist", None, TINY), argparse.Namespace(ray=None, jobs=2))
    assert "generative-replay" in begun[:2] and len(begun) == 3


def test_the_share_of_a_run_that_is_done_is_read_from_its_files(full, tmp_path, monkeypatch):
    """TINY has 2 critic updates and 1 of the generator, 4 times, then 6 of the solver, which count three times."""
    monkeypatch.chdir(tmp_path)
    job = full.make_jobs("permutated-mnist", None, TINY)[2]
    assert job.share_done(0) == 0 and job.cost_of_task == 4 * 3 + 6 * 3
    utils.write_json(job.paths.results / "config.json", {"tasks": ["one", "two"]})
    metrics = job.paths.results / "metrics.csv"
    for row, share in (
        ("generator,1,4", 12 / 60),
        ("solver,1,2", 18 / 60),
        ("generator,2,1", 33 / 60),
        ("solver,2,6", 1),
    ):
        metrics.write_text("phase,task,iteration,name,value\n" * 20 + f"{row},loss,0.5\n")
        assert job.share_done(time.time()) == pytest.approx(share)
    assert job.share_done(time.time() + 100) == 0  # of an earlier run of this name
    metrics.write_text("phase,task,iteration,name,value\n")
    assert job.share_done(0) == 0
    (vae,) = full.make_jobs("noise-replay", None, [*TINY, "--sample-log", "--generator=vae"])
    assert vae.cost_of_task == 4 + 6 * 3


def test_one_bar_says_how_long_is_left_of_runs_side_by_side(full, tmp_path, monkeypatch):
    """One that is continued from its middle: what was done before says nothing about the time."""
    monkeypatch.chdir(tmp_path)
    (job,) = full.make_jobs("noise-replay", None, TINY)
    written, results = io.StringIO(), job.paths.results
    monkeypatch.setattr(written, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        full, "tqdm", type("OnTerminal", (tqdm,), {"__init__": partialmethod(tqdm.__init__, file=written, ncols=80)})
    )

    def run_here(job, *_):
        utils.write_json(results / "config.json", {"tasks": ["one", "two"]})
        for row in ("solver,2,3", "solver,2,4"):
            (results / "metrics.csv").write_text(f"phase,task,iteration,name,value\n{row},loss,0.5\n")
            time.sleep(1.5)

    monkeypatch.setattr(full, "run_here", run_here)
    assert full.run_jobs([job], argparse.Namespace(ray=None, jobs=2))  # it leaves no summary
    shown = re.findall(r"(\d+)%[^\r]*about (\S+) left", written.getvalue())
    assert ("75", "?") in shown and shown[-1][0] == "83" and re.fullmatch(r"00:0[2-9]", shown[-1][1])


def test_a_failed_run_stops_no_other(tmp_path, small_mnist):
    with utils.locked(tmp_path / "results/permutated-mnist-joint-rauto"):  # as another run of this name does
        process = experiments(tmp_path, small_mnist, "joint", "noise-replay", "--jobs=2", start=call)
    assert process.returncode == 1 and "Traceback" not in process.stderr + process.stdout
    assert process.stdout.count("failed: exit status 1: main.py: error: ") == 1
    assert "[2/2]" in process.stdout and (tmp_path / "results/noise-replay.png").exists()
    assert re.search("1 of 2 runs failed, the others are done: permutated-mnist-joint-", process.stderr)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_mnist):
    """A directory with a finished run of noise replay."""
    cwd = tmp_path_factory.mktemp("finished")
    flags = ["--replay-mode=noise-replay", f"--data-dir={small_mnist}", *TINY]
    assert call("main.py", "--train", *flags, cwd=cwd).returncode == 0
    return cwd


@pytest.fixture
def copy_of_finished(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize("summary, flag", [(None, "--lr=2e-3"), ("", "--lr=1e-3"), ('{"seed": 0}', "--lr=1e-3")])
def test_a_run_with_other_flags_or_a_broken_summary_is_renamed_and_made_again(
    full, copy_of_finished, small_mnist, monkeypatch, capsys, summary, flag
):
    monkeypatch.chdir(copy_of_finished)
    (job,) = full.make_jobs("noise-replay", None, [f"--data-dir={small_mnist}", *TINY, flag])
    if summary is not None:
        (job.paths.results / "summary.json").write_text(summary)
    full.show("noise-replay", [job], copy_of_finished)
    assert "| noise-replay |" not in capsys.readouterr().out
    main.main(job.command())
    assert "of an earlier run is kept as" in capsys.readouterr().out
    full.show("noise-replay", [job], copy_of_finished)
    assert "| noise-replay |" in capsys.readouterr().out
    configs = [job.paths.results.with_name(name) / "config.json" for name in (NOISE, f"{NOISE}~1")]
    assert [json.loads(config.read_text())["options"]["lr"] for config in configs] == [job.options.lr, 1e-3]


def test_a_run_on_other_files_of_a_data_set_is_renamed_and_made_again(full, copy_of_finished, small_mnist, monkeypatch):
    """The files may be elsewhere, but not others; without any, there is nothing to tell."""
    monkeypatch.chdir(copy_of_finished)
    moved, other = (shutil.copytree(small_mnist, copy_of_finished / name) for name in ("moved", "other"))
    with next(other.rglob("t10k-labels*")).open("r+b") as file:
        file.seek(8)
        file.write(bytes([3, 4, 5]))
    jobs = [full.Job("--replay-mode=noise-replay", f"--data-dir={place}", *TINY) for place in (moved, other, "none")]
    assert [job.replaces_another() for job in jobs] == [False, True, False]
    process = call("main.py", "--train", "--resume", *jobs[1].flags, cwd=copy_of_finished)
    assert_one_line_error(process, 1, "other files of mnist in --data-dir")
    main.main(jobs[1].command())
    assert [job.replaces_another() for job in jobs[:2]] == [True, False]


def test_an_unfinished_run_with_other_flags_is_renamed_without_its_results_too(
    full, tmp_path, small_mnist, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = ["--replay-mode=noise-replay", f"--data-dir={small_mnist}", *TINY]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stopped at task 1"):
        patch.setattr(utils, "stop_requests", lambda: contextlib.nullcontext(lambda: True))
        main.main(["--train", *flags])
    shutil.rmtree(tmp_path / "results")
    assert "--resume" in full.Job(*flags).command()
    job = full.Job(*flags, "--lr=5e-3")
    assert job.replaces_another() and "--resume" not in job.command()
    main.main(job.command())
    assert job.paths.finished and list(tmp_path.glob("checkpoints/*.unfinished~1"))


def test_a_finished_run_with_other_flags_is_not_taken_for_this_one(copy_of_finished, small_mnist):
    flags = ["--train", "--resume", "--replay-mode=noise-replay", f"--data-dir={small_mnist}", *TINY]
    assert "nothing to resume" in call("main.py", *flags, cwd=copy_of_finished).stdout
    process = call("main.py", *flags, "--lr=2e-3", cwd=copy_of_finished)
    assert_one_line_error(process, 1, "--lr 0.001, not 0.002", "--resume")


def test_interrupted_runs_continue(tmp_path, small_mnist):
    """SIGTERM stops the runs under way with their states saved, and the same command does what is left."""
    own = ["--solver-iterations=600", "--checkpoint-interval=0.5"]
    flags = ["noise-replay", "--jobs=2", f"--data-dir={small_mnist}", *TINY, *own]
    states = [tmp_path / f"checkpoints/seed-{seed}/{NOISE}.unfinished" for seed in (0, 1, 2)]
    with start("run_full_experiments", *flags, "--seeds=0-2", cwd=tmp_path) as process:
        wait_for(process, *(utils.previous(state) for state in states[:2]))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "run the same command again" in err
    assert out.count(": stopped: ") == out.count("with --resume to continue") == 2
    assert "failed" not in out and "Traceback" not in out + err
    assert [state.exists() for state in states] == [True, True, False]  # the third never starts
    process = run("run_full_experiments", *flags, "--seeds=1", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "continues at task" in (tmp_path / f"results/seed-1/{NOISE}.log").read_text()


def test_dry_run_is_the_list_of_commands(tmp_path):
    """One run a line, each line complete, for any machine, and nothing is touched."""
    process = call("run_full_experiments", "--seeds=0-4", "--dry-run", "--lr=1e-3", "--cuda-graphs", cwd=tmp_path)
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and len(lines) == 45 and not list(tmp_path.iterdir())
    names = set()
    for line in lines:
        here, command = line.split(" && ")
        python, script, *arguments = shlex.split(command)
        options = main.parse(arguments)
        assert shlex.split(here) == ["cd", str(tmp_path)]
        assert [python, script] == [sys.executable, str(ROOT / "main.py")]
        assert options.lr == 1e-3 and options.cuda_graphs and options.resume
        assert options.result_dir.name == f"seed-{options.seed}"
        names.add((options.name, options.seed))
    assert len(names) == 45


def test_own_tasks_through_a_link_and_lines_that_work_from_anywhere(tmp_path, small_mnist):
    write_task(tmp_path / "my task.npz")
    (tmp_path / "link").symlink_to(ROOT / "run_full_experiments")
    own = ["--tasks", "my task.npz", "--tasks", "mnist", f"--data-dir={small_mnist}", *TINY]
    command = [sys.executable, "link", *own, "--seeds=0-1", "--dry-run"]
    lines = subprocess.check_output(command, cwd=tmp_path, text=True).splitlines()
    assert len(lines) == 6
    subprocess.run(["bash", "-c", lines[0]], cwd="/", check=True, capture_output=True)
    assert summary_of(tmp_path / "results/seed-0", "my_task+mnist-none-r1")["replay_mode"] == "none"
    command = [sys.executable, "link", "noise-replay", *own, "--seeds=0"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert summary_of(tmp_path / "results/seed-0", "my_task+mnist-noise-replay-r0.3")
    assert (tmp_path / "results/my_task+mnist-noise-replay.md").exists()


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    command = f"{sys.executable} {ROOT}/run_full_experiments --seeds=0-59 --dry-run | head -1"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.count("\n") == 1 and process.stderr == ""


def test_nine_runs_have_their_settings(full):
    jobs = [job for name in full.DEFAULT_EXPERIMENTS for job in full.make_jobs(name, None, [])]
    assert len(jobs) == 9
    for options in (job.options for job in jobs):
        sizes = options.generator_iterations, options.solver_iterations, options.lr, options.importance_of_new_task
        permutated = options.experiment == "permutated-mnist"
        assert sizes == ((3000, 1000, 1e-4, 0.3) if permutated else (20000, 4000, 3e-5, 0.4))
        assert options.sample_log == (not permutated and options.replay_mode != "exact-replay")
    (split, *_) = full.make_jobs("split-mnist", None, ["--recipe", "2017"])
    assert split.options.importance_of_new_task == "auto" and split.options.sample_log
    modes = [job.options.replay_mode for job in full.make_jobs("mnist-chain", None, [])]
    assert modes == ["exact-replay", "generative-replay"]


@pytest.mark.parametrize("flags", [["--quick"], ["--recipe=best"], ["--recipe", "vae"]])
def test_other_recipes_keep_their_sizes(full, flags):
    for job in full.make_jobs("mnist-svhn", None, flags):
        options = job.options
        plain = [f"--experiment={options.experiment}", f"--replay-mode={options.replay_mode}", *flags]
        plain += ["--sample-log"] * options.sample_log
        assert options == main.parse(["--train", *plain])


def test_flags_override_full_size(full):
    (job, *_) = full.make_jobs("mnist-svhn", None, ["--solver-iterations=7"])
    assert (job.options.solver_iterations, job.options.generator_iterations) == (7, 20000)


def test_a_new_experiment_runs_by_its_name(full, monkeypatch):
    monkeypatch.setitem(data.EXPERIMENTS, "two-digits", data.EXPERIMENTS["split-mnist"])
    assert [job.options.experiment for job in full.make_jobs("two-digits", [4], [])] == ["two-digits"] * 3


def test_targets_are_no_flag_of_runs_without_replay(full):
    jobs = full.make_jobs("permutated-mnist", None, ["--quick", "--temperature", "3", "--replay-targets=soft"])
    assert [job.options.replay_targets for job in jobs] == ["hard", "soft", "soft"]
    assert [job.options.temperature for job in jobs] == [1, 3, 3]


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["mnist"], "'mnist'"),
        (["--replay-mode=none"], "--replay-mode: each run sets its own"),
        (["permutated-mnist", "--lr=x"], "--lr"),
        (["permutated-mnist", "--temperature"], "--temperature"),
        (["--quick", "permutated-mnist"], "before the flags"),
        (["--seeds=0-2", "--seed=1"], "--seed: each run sets its own"),
        (["--experiment=mnist-svhn"], "name experiments before the flags"),
        (["split-mnist", "--tasks", "mnist"], "split-mnist has tasks of its own"),
        (["--jobs=0"], "--jobs"),
        *(([f"--seeds={seeds}"], "--seeds") for seeds in ["4-", "4-0", "0-999999999", "1-2-3", ""]),
    ],
)
def test_bad_usage_is_refused_before_the_first_run(tmp_path, arguments, word):
    process = call("run_full_experiments", *arguments, cwd=tmp_path)
    assert_one_line_error(process, 2, word)
    assert process.stdout == "" and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- a Ray cluster


def test_no_ray_is_one_line(tmp_path, small_mnist):
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')")
    process = experiments(tmp_path, small_mnist, "noise-replay", "--ray", PYTHONPATH=str(tmp_path))
    assert_one_line_error(process, 1, "no ray", "requirements-cluster.txt")


@pytest.mark.parametrize("flags, share", [([], {"num_cpus": 1, "num_gpus": 0.5}), (["--no-gpus"], {"num_cpus": 4})])
def test_ray_gets_every_run_once_with_its_share(full, finished, tmp_path, monkeypatch, capsys, flags, share):
    """A run whose worker is lost for good fails in one line, and stops no other."""
    handed, settings = [], {}

    class Task:
        def __init__(self, function):
            assert function is full.run_in_worker

        def remote(self, job, shared):
            assert all(path.exists() for path in shared)
            handed.append(job.options.seed)
            if job.options.seed == 0:
                shutil.copytree(finished / "results" / NOISE, job.paths.results)
                job.paths.scholar.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(finished / "checkpoints" / NOISE, job.paths.scholar)
            return job.options.seed

    def get(seed, timeout):
        if seed == 1:
            raise RuntimeError("the worker\nis lost")

    ray = types.SimpleNamespace(
        init=lambda address, runtime_env, **_: settings.update(runtime_env["env_vars"], address=address),
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}, {"Alive": True, "Resources": {"CPU": 9.0}}],
        cluster_resources=lambda: {"GPU": 2.0},
        remote=lambda **options: settings.update(options) or Task,
        wait=lambda references, timeout: (references, []),
        get=get,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.chdir(tmp_path)
    jobs = full.make_jobs("noise-replay", [0, 1], [*TINY, *flags])
    failed = full.run_jobs(jobs, argparse.Namespace(ray="head:1", jobs=2))
    assert sorted(handed) == [0, 1] and failed == [f"{NOISE}, seed 1"]
    assert settings.items() >= {**share, "address": "head:1", utils.COMMIT: utils.commit()}.items()
    assert ("num_gpus" in settings) == ("num_gpus" in share)
    out = capsys.readouterr().out
    assert "seed 0: average precision 0." in out and "seed 1: failed: the worker is lost\n" in out


def test_a_worker_says_which_directory_it_does_not_see(full, tmp_path):
    (job,) = full.make_jobs("noise-replay", None, TINY)
    with pytest.raises(UserError, match=f"does not see {tmp_path}/results/.shared-1, which all machines must share"):
        full.run_in_worker(job, [tmp_path, tmp_path / "results/.shared-1"])


def test_a_worker_waits_until_a_lost_one_has_gone(full, tmp_path, monkeypatch):
    (job,) = full.make_jobs("noise-replay", None, TINY)
    monkeypatch.chdir(tmp_path)  # and back afterwards
    with contextlib.ExitStack() as lost:
        lost.enter_context(utils.locked(job.paths.results))
        waits, runs = [], []
        monkeypatch.setattr("time.sleep", lambda seconds: waits.append(seconds) or len(waits) < 3 or lost.close())
        monkeypatch.setattr(full, "run_here", lambda job, *_: runs.append((job, len(waits))))
        full.run_in_worker(job, [tmp_path])
    assert runs == [(job, 3)]


@pytest.mark.slow
def test_a_lost_node_costs_a_run_nothing(tmp_path, small_mnist):
    """A cluster of two nodes, a run on each; one is killed, and its run continues on the other from its last state."""
    pytest.importorskip("ray", reason="Ray is not installed (requirements-cluster.txt)")
    from ray.cluster_utils import Cluster

    flags = ["noise-replay", f"--data-dir={small_mnist}", *TINY, "--solver-iterations=600", "--checkpoint-interval=1"]
    flags += ["--seeds=0-1"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
        with start("run_full_experiments", *flags, f"--ray={cluster.address}", cwd=tmp_path) as process:
            wait_for(process, *(tmp_path / f"checkpoints/seed-{seed}/{NOISE}.unfinished.previous" for seed in (0, 1)))
            cluster.remove_node(nodes[0])
            out, err = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, out + err
    assert "[2/2]" in out and "| 0, 1 |" in out
    logs = [(tmp_path / f"results/seed-{seed}/{NOISE}.log").read_text() for seed in (0, 1)]
    assert sum("continues at task" in log for log in logs) == 1
    alone = ["--result-dir=alone", "--checkpoint-dir=checkpoints-alone", "--sample-dir=samples-alone"]
    assert run("run_full_experiments", *flags, *alone, cwd=tmp_path).returncode == 0
    for seed in (0, 1):
        metrics = [tmp_path / where / f"seed-{seed}/{NOISE}/metrics.csv" for where in ("alone", "results")]
        assert metrics[0].read_text() == metrics[1].read_text()
