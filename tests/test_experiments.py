"""run_full_experiments: many runs on one machine, as a list of commands, and on a Ray cluster."""

import contextlib
import importlib.machinery
import importlib.util
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import test_resume
import torch
from conftest import ROOT, TINY, assert_one_line_error, call, run, start, write_small_mnist

import main
import visual

NAME = "permutated-mnist-generative-replay-r0.3"
NAMES = ["permutated-mnist-none-r1", "permutated-mnist-exact-replay-r0.3", NAME]


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


def test_one_experiment_and_again(tmp_path, small_mnist):
    """Three runs, their table, figure and samples; the second time nothing is left to do."""
    process = experiments(tmp_path, small_mnist, "permutated-mnist")
    assert process.returncode == 0, process.stderr
    results = tmp_path / "results"
    assert sorted(path.name for path in results.iterdir() if path.is_dir()) == sorted(NAMES)
    for line in process.stdout.strip().splitlines()[-3:]:
        assert (tmp_path / line.split(": ")[1]).exists()
    for number, name in enumerate(NAMES, start=1):
        summary = summary_of(results, name)
        row = f"| {summary['replay_mode']} | 0 | {summary['average_precision']:.3f} |"
        assert row in (results / "permutated-mnist.md").read_text()
        line = rf"^\[{number}/3\] \S+ {name}, seed 0: average precision {summary['average_precision']:.4f}, \d+ s$"
        assert re.search(line, process.stdout, re.MULTILINE)
    again = experiments(tmp_path, small_mnist, "permutated-mnist", start=call)
    assert again.returncode == 0 and "$ ./main.py" not in again.stdout and "[3/3]" in again.stdout
    assert len(list(results.glob("*/summary.json"))) == 3


def test_seeds_side_by_side_equal_runs_alone(tmp_path, small_mnist):
    """Two at a time, each seed in directories of its own, with a log; the same outcome as main.py by itself."""
    process = experiments(tmp_path, small_mnist, "noise-replay", "--seeds=3,5", "--jobs=2")
    assert process.returncode == 0, process.stderr
    name = "permutated-mnist-noise-replay-r0.3"
    for seed in (3, 5):
        assert summary_of(tmp_path / f"results/seed-{seed}", name)["seed"] == seed
        assert (tmp_path / f"checkpoints/seed-{seed}" / name).exists()
        assert "average precision" in (tmp_path / f"results/seed-{seed}/{name}.log").read_text()
    assert "| noise-replay | 3, 5 | 0." in (tmp_path / "results/noise-replay.md").read_text()
    flags = ["--replay-mode=noise-replay", f"--data-dir={small_mnist}", *TINY, "--seed=5", "--result-dir=alone"]
    assert call("main.py", "--train", *flags, cwd=tmp_path).returncode == 0
    metrics = [(tmp_path / where / name / "metrics.csv").read_text() for where in ("alone", "results/seed-5")]
    assert metrics[0] == metrics[1]


def test_a_failed_run_stops_no_other(tmp_path, small_mnist):
    damaged = write_small_mnist(tmp_path / "damaged")
    svhn = damaged / "svhn"
    svhn.mkdir()
    for part in ("train", "test"):
        (svhn / f"{part}_32x32.mat").write_bytes(b"nothing")
    process = experiments(tmp_path, damaged, "mnist-svhn", "noise-replay", "--jobs=2")
    assert process.returncode == 1 and "Traceback" not in process.stderr + process.stdout
    assert process.stdout.count("failed: exit status 1: main.py: error: ") == 3
    assert "[4/4]" in process.stdout and (tmp_path / "results/noise-replay.png").exists()
    assert re.search("3 of 4 runs failed, the others are done: mnist-svhn-none-r1, seed 0, ", process.stderr)


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


def do(full, cwd, data, *flags):
    """What is called for noise replay with these flags, in this process; None if it is finished already."""
    (job,) = full.jobs_of("noise-replay", None, [f"--data-dir={data}", *TINY, *flags])
    with contextlib.chdir(cwd):
        if job.is_finished():
            assert not job.starts_anew()
            return None
        assert job.starts_anew()
        (command,) = job.commands
    return call("main.py", *command, cwd=cwd)


def test_a_run_with_other_flags_is_set_aside(full, copy_of_finished, small_mnist):
    assert do(full, copy_of_finished, small_mnist) is None
    process = do(full, copy_of_finished, small_mnist, "--lr=2e-3")
    assert process.returncode == 0 and "of an earlier run is kept as" in process.stdout
    assert do(full, copy_of_finished, small_mnist, "--lr=2e-3") is None
    directory = copy_of_finished / "results/permutated-mnist-noise-replay-r0.3"
    rates = [json.loads((d / "config.json").read_text())["options"]["lr"] for d in (directory, aside(directory))]
    assert rates == [2e-3, 1e-3]


def test_results_shown_are_of_the_flags_asked_for(full, copy_of_finished, small_mnist, monkeypatch, capsys):
    monkeypatch.chdir(copy_of_finished)
    for flags, shown in ([[], True], [["--lr=2e-3"], False]):
        full.show("noise-replay", full.jobs_of("noise-replay", None, [*TINY, *flags]), copy_of_finished)
        assert ("| noise-replay |" in capsys.readouterr().out) == shown


def aside(directory):
    return directory.with_name(f"{directory.name}~1")


def test_a_finished_run_with_other_flags_is_not_taken_for_this_one(tmp_path, small_mnist):
    flags = ["--train", f"--data-dir={small_mnist}", *TINY]
    assert call("main.py", *flags, cwd=tmp_path).returncode == 0
    assert "nothing to resume" in call("main.py", *flags, "--resume", cwd=tmp_path).stdout
    process = call("main.py", *flags, "--resume", "--lr=2e-3", cwd=tmp_path)
    assert_one_line_error(process, 1, "--lr 0.001, not 0.002", "--resume")


def test_interrupted_runs_go_on(tmp_path, small_mnist):
    """SIGTERM stops the runs under way with their states saved, and the same command does what is left."""
    own = ["--solver-iterations=600", "--eval-log-interval=20"]
    flags = ["noise-replay", "--seeds=0-1", "--jobs=2", f"--data-dir={small_mnist}", *TINY, *own]
    with start("run_full_experiments", *flags, cwd=tmp_path) as process:
        states = [tmp_path / f"results/seed-{seed}/permutated-mnist-noise-replay-r0.3/metrics.csv" for seed in (0, 1)]
        limit = time.monotonic() + 120
        while not all(path.exists() and path.read_text().count("\n") > 3 for path in states):
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "the same command goes on" in err and "Traceback" not in out + err
    assert out.count("with --resume goes on") == 2
    assert len(list(tmp_path.glob("checkpoints/*/*.unfinished"))) == 2
    process = run("run_full_experiments", *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    for path in states:
        assert "goes on at task" in path.parent.with_name(f"{path.parent.name}.log").read_text()


def test_dry_run_is_the_list_of_commands(tmp_path, full):
    """One run a line, each line complete, and nothing is touched."""
    process = call("run_full_experiments", "--seeds=0-4", "--dry-run", "--lr=1e-3", cwd=tmp_path)
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and len(lines) == 45 and not list(tmp_path.iterdir())
    names = set()
    for line in lines:
        for command in line.split(" && "):
            script, *arguments = shlex.split(command)
            options = main.parse(arguments)
            assert script == "./main.py" and options.lr == 1e-3
            assert options.result_dir.name == f"seed-{options.seed}" and (options.test or options.resume)
        names.add((main.run_name(options), options.seed))
    assert len(names) == 45


def test_runs_of_other_machines_are_listed_here(tmp_path):
    process = call("run_full_experiments", "--dry-run", "--cuda-graphs", cwd=tmp_path)
    assert process.returncode == 0 and process.stdout.count("--cuda-graphs") >= 9


def test_reader_that_has_enough_is_no_error(tmp_path):
    command = f"{sys.executable} {ROOT}/run_full_experiments --seeds=0-59 --dry-run | head -1"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.count("\n") == 1 and process.stderr == ""


def test_nine_runs_have_their_settings(full):
    jobs = [job for experiment in full.NINE_RUNS for job in full.jobs_of(experiment, None, [])]
    assert len(jobs) == 9
    for job in jobs:
        options = job.options
        sizes = options.generator_iterations, options.solver_iterations, options.lr, options.importance_of_new_task
        permutated = job.experiment == "permutated-mnist"
        assert sizes == ((3000, 1000, 1e-4, 0.3) if permutated else (20000, 4000, 3e-5, 0.4))
        assert options.sample_log == (not permutated and options.replay_mode != "exact-replay")
    (quick, *_) = full.jobs_of("mnist-svhn", None, ["--quick", "--seed=1"])
    assert quick.options.generator_iterations == 400 and quick.options.seed == 1
    assert [job.options.replay_mode for job in full.jobs_of("mnist-chain", None, [])] == [
        "exact-replay",
        "generative-replay",
    ]


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["mnist"], "'mnist'"),
        (["--replay-mode=none"], "--replay-mode"),
        (["permutated-mnist", "--lr=x"], "--lr"),
        (["--quick", "permutated-mnist"], "before the flags"),
        (["--seeds=4-"], "--seeds"),
        (["--seeds=0-2", "--seed=1"], "--seed is set for each run: leave it out"),
        (["--experiment=mnist-svhn"], "--experiment is set for each run: name experiments"),
        (["--jobs=0"], "--jobs"),
    ],
)
def test_bad_usage_is_refused_before_the_first_run(tmp_path, arguments, word):
    process = call("run_full_experiments", *arguments, cwd=tmp_path)
    assert_one_line_error(process, 2, word)
    assert process.stdout == "" and not list(tmp_path.iterdir())


def test_no_ray_is_one_line(tmp_path, small_mnist):
    (tmp_path / "ray.py").write_text("raise ImportError('no ray')")
    process = experiments(tmp_path, small_mnist, "noise-replay", "--ray", PYTHONPATH=str(tmp_path))
    assert_one_line_error(process, 1, "requirements-cluster.txt")


@pytest.mark.parametrize("refusals", [0, 1, 1000])
def test_a_worker_goes_on_and_sends_what_is_new_and_what_is_gone(full, tmp_path, small_mnist, monkeypatch, refusals):
    """From the unfinished state at home to a finished run there, without the state; if home takes it, now or later."""
    monkeypatch.setattr("sys.argv", sys.argv)  # which the worker sets
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(get=lambda result: result))
    home, refused = full.Gather(), []

    def put(*arguments):
        if len(refused) < refusals:
            refused.append(arguments)
            raise OSError("a full disk")
        home.put(*arguments)

    gather = types.SimpleNamespace(
        files=types.SimpleNamespace(remote=home.files), put=types.SimpleNamespace(remote=put)
    )
    test_resume.run_until(monkeypatch, 5, test_resume.flags(tmp_path, small_mnist))
    places = {f"{kind}_dir": str(tmp_path / f"{kind}s") for kind in ("result", "checkpoint", "sample")}
    paths = main.Paths(*(tmp_path / f"{kind}s" / NAME for kind in ("result", "checkpoint", "sample")))
    assert not paths.finished
    arguments = test_resume.flags(tmp_path, small_mnist, "--resume")
    problem = full.work_on_ray(NAME, [arguments], places, gather)
    if refusals == 1000:
        assert "could not be sent: a full disk" in problem and not paths.finished and paths.resumable
        return
    assert problem is None and paths.finished and len(refused) == refusals
    kept = visual.Run(paths.results)
    assert {kind: kept.options[kind] for kind in places} == places
    pictures = kept.kept_samples().values()
    assert len(pictures) == 4 and all(path.parent == paths.sample_log for path in pictures)
    assert not list(tmp_path.glob("checkpoints/*.unfinished*"))
    assert "goes on at task" in (tmp_path / f"results/{NAME}.log").read_text()


@pytest.mark.parametrize("wrong", ["--lr=-1", "--tensorboard", "an error of our own"])
def test_what_went_wrong_in_a_worker_is_said_at_home(full, tmp_path, small_mnist, monkeypatch, wrong):
    def fail(*_):
        raise ValueError("something that nobody has thought of")

    monkeypatch.setattr("sys.argv", sys.argv)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(get=lambda result: result))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed there
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    home = full.Gather()
    gather = types.SimpleNamespace(
        files=types.SimpleNamespace(remote=home.files), put=types.SimpleNamespace(remote=home.put)
    )
    places = {f"{kind}_dir": str(tmp_path / f"{kind}s") for kind in ("result", "checkpoint", "sample")}
    arguments, says = test_resume.flags(tmp_path, small_mnist), "argument --lr"
    if wrong.startswith("--"):
        arguments.append(wrong)
        says = wrong
    else:
        monkeypatch.setattr(main, "run_training", fail)
        says = "nobody has thought of"
    problem = full.work_on_ray(NAME, [arguments], places, gather)
    assert says.split("=")[0] in problem
    log = (tmp_path / f"results/{NAME}.log").read_text()
    assert problem in log and ("Traceback" in log) == (not wrong.startswith("--"))


def test_an_unfinished_run_of_other_flags_is_set_aside_without_its_results_too(
    full, tmp_path, small_mnist, monkeypatch
):
    test_resume.run_until(monkeypatch, 5, test_resume.flags(tmp_path, small_mnist))
    shutil.rmtree(tmp_path / "results")
    arguments = test_resume.flags(tmp_path, small_mnist, "--lr=5e-3")
    job = full.Job("permutated-mnist", tuple(arguments[1:]), main.parse(arguments))
    assert job.is_other_run() and job.starts_anew() and "--resume" not in job.commands[0]
    main.run_training(main.parse(job.commands[0]))
    assert job.paths.finished and list(tmp_path.glob("checkpoints/*.unfinished~1"))


def test_targets_are_no_flag_of_runs_without_replay(full):
    jobs = full.jobs_of("permutated-mnist", None, ["--quick", "--temperature", "3", "--replay-targets=soft"])
    assert [job.options.replay_targets for job in jobs] == ["hard", "soft", "soft"]


def test_cores_are_counted_where_no_affinity_is_known(full, monkeypatch):
    """On macOS."""
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    full.run_here([], 1, None)


def test_a_command_names_directories_of_home_where_it_ended_with_those_of_a_worker(full):
    command = ["./main.py", "--train", "--result-dir=r/seed-1", "--lr=1", "--result-dir=/tmp/x/result_dir"]
    config = full.at_home(json.dumps({"command": command, "options": {"lr": 1}}).encode(), {"result_dir": "/home/r"})
    assert json.loads(config)["command"] == [*command[:2], "--lr=1", "--result-dir=/home/r"]
    assert json.loads(config)["options"] == {"lr": 1, "result_dir": "/home/r"}


@pytest.mark.parametrize("content", ["", '{"seed": 0}'])
def test_a_run_with_a_broken_summary_is_made_anew(full, copy_of_finished, small_mnist, content):
    (summary,) = copy_of_finished.glob("results/*/summary.json")
    summary.write_text(content)
    process = do(full, copy_of_finished, small_mnist)
    assert process.returncode == 0 and "of an earlier run is kept as" in process.stdout
    assert "average_precision" in summary.read_text()
    assert do(full, copy_of_finished, small_mnist) is None


@pytest.mark.parametrize("seeds", ["4-0", "0-999999999", "1-2-3", ""])
def test_seeds_that_are_no_list_are_refused(tmp_path, seeds):
    assert_one_line_error(call("run_full_experiments", f"--seeds={seeds}", cwd=tmp_path), 2, "--seeds")


def test_a_lost_node_costs_a_run_nothing(tmp_path, small_mnist):
    """A cluster of two nodes, a run on each; one is killed, and its run goes on on the other from its last state."""
    pytest.importorskip("ray", reason="Ray is not installed (requirements-cluster.txt)")
    from ray.cluster_utils import Cluster

    name = "permutated-mnist-noise-replay-r0.3"
    own = ["--solver-iterations=600", "--checkpoint-interval=1"]
    flags = ["noise-replay", f"--data-dir={small_mnist}", *TINY, *own]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
        with start("run_full_experiments", *flags, "--seeds=0-1", f"--ray={cluster.address}", cwd=tmp_path) as process:
            states = [tmp_path / f"checkpoints/seed-{seed}/{name}.unfinished.previous" for seed in (0, 1)]
            limit = time.monotonic() + 240
            while not all(path.exists() for path in states):
                assert time.monotonic() < limit and process.poll() is None, process.communicate()
                time.sleep(0.1)
            cluster.remove_node(nodes[0])
            out, err = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, out + err
    assert "[2/2]" in out and "| noise-replay | 0, 1 |" in out
    logs = [(tmp_path / f"results/seed-{seed}/{name}.log").read_text() for seed in (0, 1)]
    assert sum("goes on at task" in log for log in logs) == 1
    for seed in (0, 1):
        kinds = ("result", "checkpoint", "sample")
        assert main.Paths(*(tmp_path / f"{kind}s/seed-{seed}/{name}" for kind in kinds)).finished
    alone = ["run_full_experiments", *flags, "--seeds=0-1", "--result-dir=alone", "--checkpoint-dir=checkpoints-alone"]
    assert run(*alone, cwd=tmp_path).returncode == 0
    for seed in (0, 1):
        metrics = [(tmp_path / where / f"seed-{seed}/{name}/metrics.csv").read_text() for where in ("alone", "results")]
        assert metrics[0] == metrics[1]
