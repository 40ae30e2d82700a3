"""main.py at tiny sizes: as a user starts it, and its further uses in this process."""

import csv
import errno
import fcntl
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, call, run, write_small_mnist
from PIL import Image
from test_data import write_small_svhn, write_task

import data
import dgr
import main
import visual

NAME = "permutated-mnist-generative-replay-r0.3"


def train(cwd, small_mnist, *flags, start=call):
    return start("main.py", "--train", "--data-dir", small_mnist, *TINY, *flags, cwd=cwd)


def draw(cwd, *flags, start=call):
    return start("main.py", "--test", *TINY, *flags, cwd=cwd)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_mnist):
    """A directory in which a scholar was trained, and what the run printed."""
    cwd = tmp_path_factory.mktemp("trained")
    process = train(cwd, small_mnist, start=run)
    assert process.returncode == 0, process.stderr
    return cwd, process


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------- train


def test_run_leaves_its_files(trained):
    cwd, _ = trained
    directory = cwd / "results" / NAME
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "metrics.csv",
        "precision.png",
        "samples.png",
        "summary.json",
    ]
    assert [path.name for path in (cwd / "checkpoints").iterdir() if path.suffix != ".lock"] == [NAME]
    config = json.loads((directory / "config.json").read_text())
    assert config["options"]["solver_iterations"] == 6 and config["options"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__
    assert len(config["data"]["checksums"]) == 4 == len(config["data"]["unverified"])
    assert {"commit", "device", "started", "command"} <= set(config)


def test_summary_agrees_with_metrics(trained):
    directory = trained[0] / "results" / NAME
    summary = json.loads((directory / "summary.json").read_text())
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    whole = {(int(row["task"]), row["name"]): float(row["value"]) for row in rows if row["phase"] == "test"}
    assert summary["precision"] == [
        [whole[1, "precision-1"], None],
        [whole[2, "precision-1"], whole[2, "precision-2"]],
    ]
    assert summary["average_precision"] == pytest.approx(sum(summary["precision"][1]) / 2)
    assert {row["phase"] for row in rows} == {"generator", "solver", "test"}


def test_last_lines_say_the_same_for_a_person(trained):
    cwd, process = trained
    summary = json.loads((cwd / "results" / NAME / "summary.json").read_text())
    assert f"average precision {summary['average_precision']:.4f}" in process.stdout
    assert f"forgetting {summary['forgetting']:.4f}" in process.stdout
    assert process.stdout.strip().endswith(f"files: results/{NAME}, scholar: checkpoints/{NAME}")


def test_progress_is_quiet_without_a_terminal(trained):
    lines = [line for line in trained[1].stderr.splitlines() if not line.startswith("warning: ")]
    assert [line.split(":")[0] for line in lines] == [
        f"task {task}/2 {phase}" for task in (1, 2) for phase in ("generator", "solver")
    ]
    assert "\r" not in trained[1].stderr


def test_same_seed_same_files(trained, tmp_path, small_mnist):
    """Bit for bit, apart from times."""
    assert train(tmp_path, small_mnist, start=run).returncode == 0
    first, second = trained[0], tmp_path
    metrics = [(cwd / "results" / NAME / "metrics.csv").read_bytes() for cwd in (first, second)]
    assert metrics[0] == metrics[1]
    summaries = [json.loads((cwd / "results" / NAME / "summary.json").read_text()) for cwd in (first, second)]
    for summary in summaries:
        del summary["seconds"]
    assert summaries[0] == summaries[1]
    scholars = [torch.load(cwd / "checkpoints" / NAME, weights_only=True)["scholar"] for cwd in (first, second)]
    assert all(torch.equal(scholars[0][name], scholars[1][name]) for name in scholars[0])


def test_another_seed_gives_another_run(trained, tmp_path, small_mnist):
    assert train(tmp_path, small_mnist, "--seed=1").returncode == 0
    metrics = [(cwd / "results" / NAME / "metrics.csv").read_bytes() for cwd in (trained[0], tmp_path)]
    assert metrics[0] != metrics[1]


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--experiment=split-mnist"], "split-mnist-generative-replay-r0.3"),
        (["--experiment=mnist-chain"], "mnist-chain-generative-replay-r0"),
        (["--replay-mode=noise-replay"], "permutated-mnist-noise-replay-r0.3"),
        (["--replay-mode=exact-replay", "--replay-targets=soft"], "permutated-mnist-exact-replay-r0.3-soft"),
        (
            ["--generator=vae", "--replay-targets=soft", "--temperature=3"],
            "permutated-mnist-generative-replay-r0.3-soft-vae",
        ),
        (["--generator=vae", "--solver=mlp"], "permutated-mnist-generative-replay-r0.3-vae-mlp"),
    ],
)
def test_every_experiment_and_arm_runs_and_draws(tmp_path, small_mnist, flags, name):
    process = train(tmp_path, small_mnist, *flags)
    assert process.returncode == 0, process.stderr
    summary = json.loads((tmp_path / "results" / name / "summary.json").read_text())
    assert 0 <= summary["average_precision"] <= 1 and (tmp_path / "results" / name / "precision.png").exists()
    if "generative" in name:
        assert draw(tmp_path, *flags).returncode == 0
        assert (tmp_path / "samples" / f"{name}-sample.jpg").exists()


@pytest.mark.parametrize("experiment", ["mnist-svhn", "svhn-mnist"])
def test_svhn_experiments_run_and_say_that_data_are_unofficial(tmp_path, experiment):
    write_small_mnist(tmp_path / "data")
    write_small_svhn(tmp_path / "data")
    process = train(tmp_path, tmp_path / "data", f"--experiment={experiment}")
    assert process.returncode == 0, process.stderr
    assert "warning: " in process.stderr and "is not the official file" in process.stderr
    name = f"{experiment}-generative-replay-r0.3"
    unverified = json.loads((tmp_path / "results" / name / "config.json").read_text())["data"]["unverified"]
    assert {"svhn/train_32x32.mat", "svhn/test_32x32.mat"} <= set(unverified)
    assert draw(tmp_path, f"--experiment={experiment}").returncode == 0


def test_tasks_of_ones_own_mix_with_named_ones(tmp_path, small_mnist):
    write_task(tmp_path / "my digits.npz")
    flags = ["--tasks", "my digits.npz", "mnist"]
    process = train(tmp_path, small_mnist, *flags)
    assert process.returncode == 0, process.stderr
    assert "task 1, my digits: " in process.stdout and "task 2, MNIST: " in process.stdout
    assert (tmp_path / "results/my_digits+mnist-generative-replay-r0.3/summary.json").exists()
    assert draw(tmp_path, *flags).returncode == 0


def test_files_of_one_name_are_told_apart(tmp_path):
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        write_task(tmp_path / directory / "t.npz")
    assert train(tmp_path, tmp_path, "--tasks", "a/t.npz", "b/t.npz").returncode == 0
    config = json.loads((tmp_path / "results/t+t-generative-replay-r0.3/config.json").read_text())
    assert set(config["data"]["checksums"]) == {"a/t.npz", "b/t.npz"}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_what_cannot_be_printed_is_one_line(copy_of_trained):
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'visual.py'))} results > /dev/full"
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(command, shell=True, cwd=copy_of_trained, capture_output=True, text=True, env=usual)
    assert_one_line_error(process, 1, "No space left on device")


def test_the_largest_sample_grid_is_one_that_can_be_kept(copy_of_trained):
    assert draw(copy_of_trained, "--sample-size=11000").returncode == 0
    assert_one_line_error(draw(copy_of_trained, "--sample-size=11001"), 2, "--sample-size", "at most 11000")


def test_closed_standard_output_is_no_error(tmp_path, small_mnist):
    words = [sys.executable, f"{ROOT}/main.py", "--train", f"--data-dir={small_mnist}", *TINY]
    process = subprocess.run(["bash", "-c", f"{shlex.join(words)} >&-"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and "Traceback" not in process.stderr


def test_a_task_of_ones_own_is_not_taken_for_an_experiment(tmp_path):
    """Whatever its file is called: a chain, for instance, would learn nothing of the other tasks."""
    write_task(tmp_path / "mnist-chain.npz")
    options = main.parse(["--train", "--tasks", str(tmp_path / "mnist-chain.npz")])
    assert main.run_name(options) == "own-mnist-chain-generative-replay-r0.3"


@pytest.mark.parametrize("mode", ["none", "exact-replay"])
def test_modes_without_generative_replay_train_no_generator(tmp_path, small_mnist, mode):
    process = train(tmp_path, small_mnist, f"--replay-mode={mode}", "--importance-of-new-task=auto")
    assert process.returncode == 0, process.stderr
    assert "generator" not in process.stderr
    name = f"permutated-mnist-{mode}-r{1 if mode == 'none' else 'auto'}"
    assert (tmp_path / "results" / name / "summary.json").exists()
    refused = draw(tmp_path, f"--replay-mode={mode}", "--importance-of-new-task=auto")
    assert_one_line_error(refused, 1, "never trained", "--sample-log")


def test_a_mode_of_ones_own_that_draws_from_the_generator_has_it_trained(monkeypatch):
    class Half(dgr.GenerativeReplay):
        pass

    monkeypatch.setitem(dgr.REPLAY_MODES, "half", Half)
    assert main.trains_generator(main.parse(["--train", "--replay-mode=half"]))


def test_a_run_may_be_older_than_an_option():
    assert main.differences({"lr": 1e-4}, {"lr": 1e-4, "solver": "cnn"}, ["lr", "solver"]) == ""
    assert main.differences({}, {"lr": 0.1}, ["lr"]) == "--lr 0.0001, not 0.1"


def test_sample_log_trains_the_generator_in_every_mode(tmp_path, small_mnist):
    flags = ["--replay-mode=none", "--sample-log", "--sample-log-interval=2"]
    assert train(tmp_path, small_mnist, *flags).returncode == 0
    grids = sorted(path.name for path in (tmp_path / "samples/permutated-mnist-none-r1").iterdir())
    assert grids == [f"task-{task}-iteration-{iteration}.jpg" for task in (1, 2) for iteration in (2, 4)]
    assert draw(tmp_path, *flags).returncode == 0


def test_a_vae_learns_noise_that_lies_outside_of_zero_to_one(tmp_path, small_mnist):
    process = train(tmp_path, small_mnist, "--replay-mode=noise-replay", "--generator=vae", "--sample-log")
    assert process.returncode == 0, process.stderr


def test_a_vae_that_diverges_is_one_line(tmp_path, small_mnist):
    """PyTorch's loss refuses NaN by itself, in words that say nothing about --lr."""
    process = train(tmp_path, small_mnist, "--generator=vae", "--lr=1000", "--generator-iterations=40")
    process.stderr = process.stderr.strip().splitlines()[-1]  # after the warnings on data
    assert_one_line_error(process, 1, "diverged at task 1, generator iteration", "--lr")


def test_files_are_locked_as_nfs_asks_for(tmp_path, small_mnist, monkeypatch):
    """NFS locks only what is open for writing."""
    modes = []
    monkeypatch.setattr(fcntl, "flock", lambda file, _how: modes.append(fcntl.fcntl(file, fcntl.F_GETFL)))
    assert train(tmp_path, small_mnist, "--replay-mode=none").returncode == 0
    assert [mode & os.O_ACCMODE for mode in modes] == [os.O_WRONLY] * 3  # of results, checkpoints and samples


def test_a_file_system_without_locks_is_a_warning(tmp_path, small_mnist, monkeypatch):
    def flock(_file, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    process = train(tmp_path, small_mnist, "--replay-mode=none")
    assert process.returncode == 0 and "can't be locked (No locks available)" in process.stderr


def test_second_run_keeps_the_first(copy_of_trained, small_mnist):
    cwd = copy_of_trained
    before = (cwd / "results" / NAME / "metrics.csv").read_bytes(), (cwd / "checkpoints" / NAME).read_bytes()
    assert draw(cwd).returncode == 0
    process = train(cwd, small_mnist, "--seed=1")
    assert process.returncode == 0
    assert f"results/{NAME} of an earlier run is kept as results/{NAME}~1" in process.stdout
    kept = cwd / "results" / f"{NAME}~1" / "metrics.csv", cwd / "checkpoints" / f"{NAME}~1"
    assert tuple(path.read_bytes() for path in kept) == before
    assert [path.name for path in (cwd / "samples").glob("[!.]*")] == [f"{NAME}-sample.jpg~1"]
    assert (cwd / "results" / NAME / "metrics.csv").read_bytes() != before[0]
    assert train(cwd, small_mnist).returncode == 0
    assert (cwd / "results" / f"{NAME}~2").is_dir()
    assert [run.directory.name for run in visual.find_runs([cwd / "results"])] == [NAME]


def test_without_visdom_server_there_is_one_warning(tmp_path, small_mnist):
    flags = [flag for flag in TINY if flag != "--no-visdom"]
    process = run(
        "main.py", "--train", "--data-dir", small_mnist, *flags, "--visdom-port=9", "--replay-mode=none", cwd=tmp_path
    )
    assert process.returncode == 0
    assert process.stderr.count("warning: no live plots") == 1


def test_unreachable_data_is_one_line_with_a_way_out(tmp_path):
    """No network for torchvision (a proxy that does not exist) and no package index for pip."""
    process = run(
        "main.py", "--train", "--no-visdom", cwd=tmp_path,
        http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", DGR_DATA_DIR="",
        PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null",
    )  # fmt: skip
    assert process.returncode == 1 and "Traceback" not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    for word in ("main.py: error: MNIST can't be downloaded", "datasets/mnist/MNIST/raw", "--data-dir"):
        assert word in last
    for name, md5 in data.DATA_SETS["mnist"].md5.items():
        assert f"{name} (md5 {md5})" in last
    assert not (tmp_path / "results").exists()
    assert list((tmp_path / "datasets/mnist/MNIST/raw").iterdir()) == []


# -------------------------------------------------------------------------------------------------------- test


def test_samples_are_drawn_six_a_row(copy_of_trained):
    process = draw(copy_of_trained, start=run)
    assert process.returncode == 0 and process.stdout == f"samples: samples/{NAME}-sample.jpg\n"
    with Image.open(copy_of_trained / "samples" / f"{NAME}-sample.jpg") as picture:
        assert picture.size == (6 * 34 + 2, 2 * 34 + 2)


def test_samples_repeat_under_a_seed(copy_of_trained):
    def drawn(*flags):
        assert draw(copy_of_trained, *flags).returncode == 0
        return (copy_of_trained / "samples" / f"{NAME}-sample.jpg").read_bytes()

    assert drawn("--seed=4") == drawn("--seed=4") != drawn("--seed=5")


def test_samples_are_drawn_in_the_precision_asked_for(copy_of_trained):
    pictures = {}
    for precision in ("fp32", "bf16"):
        assert draw(copy_of_trained, f"--precision={precision}", start=run).returncode == 0
        pictures[precision] = (copy_of_trained / "samples" / f"{NAME}-sample.jpg").read_bytes()
    assert pictures["fp32"] != pictures["bf16"]
    assert_one_line_error(draw(copy_of_trained, "--precision=tf32"), 1, "--precision tf32")


def test_samples_of_no_checkpoint(tmp_path):
    assert_one_line_error(draw(tmp_path), 1, f"no scholar at checkpoints/{NAME}", "--train")


def test_a_line_break_in_a_path_makes_no_second_line(tmp_path):
    assert_one_line_error(draw(tmp_path, "--checkpoint-dir=a\nb"), 1, "no scholar at a b")


def test_checkpoint_of_another_shape_is_refused(copy_of_trained):
    process = draw(copy_of_trained, "--generator-z-size=9", "--solver-channel-size=32")
    assert_one_line_error(process, 1, "--generator-z-size 8, not 9", "--solver-channel-size 16, not 32")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other format", "directory"])
def test_damaged_checkpoint_is_refused(copy_of_trained, damage):
    path = copy_of_trained / "checkpoints" / NAME
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    elif damage == "other format":
        torch.save({**torch.load(path, weights_only=True), "format": 0}, path)
    else:
        path.unlink()
        path.mkdir()
    assert_one_line_error(draw(copy_of_trained), 1, f"checkpoints/{NAME}")


def test_malicious_checkpoint_is_not_executed(copy_of_trained):
    class Evil:
        def __reduce__(self):
            return subprocess.call, (["touch", str(copy_of_trained / "executed")],)

    path = copy_of_trained / "checkpoints" / NAME
    for write in (lambda: torch.save(Evil(), path), lambda: path.write_bytes(pickle.dumps(Evil()))):
        write()
        assert_one_line_error(draw(copy_of_trained), 1, f"checkpoints/{NAME}")
    assert not (copy_of_trained / "executed").exists()


# ----------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--train", "--test", "required"]),
        (["--train", "--test"], ["not allowed with"]),
        (["--train", "--experiment=mnist"], ["--experiment", "permutated-mnist"]),
        (["--train", "--replay-mode=all"], ["--replay-mode", "generative-replay"]),
        (["--train", "--importance-of-new-task=1.5"], ["--importance-of-new-task", "'1.5'", "at most 1"]),
        (["--train", "--importance-of-new-task=often"], ["--importance-of-new-task", "'often'"]),
        (["--train", "--importance-of-new-task=nan"], ["--importance-of-new-task", "'nan'"]),
        (["--train", "--batch-size=-3"], ["--batch-size", "'-3'", "at least 1"]),
        (["--train", "--generator-iterations=0"], ["--generator-iterations", "at least 1"]),
        (["--train", "--solver-iterations=1e3"], ["--solver-iterations", "whole number"]),
        (["--train", "--mnist-permutation-number=0"], ["--mnist-permutation-number"]),
        (["--train", "--lr=0"], ["--lr", "above 0"]),
        (["--train", "--lr=inf"], ["--lr"]),
        (["--train", "--replay-targets=soft", "--temperature=1e200"], ["--temperature", "at most 1000"]),
        (["--train", "--beta1=1"], ["--beta1", "below 1"]),
        (["--train", "--solver-channel-size=1001"], ["--solver-channel-size", "multiple of 8"]),
        (["--train", "--solver-depth=1"], ["--solver-depth", "of at least 2"]),
        (["--train", "--solver-depth=33"], ["--solver-depth", "at most 32"]),
        (["--train", "--seed=3000000000"], ["--seed", "at most 2147483647"]),
        (["--train", "--checkpoint-interval=inf"], ["--checkpoint-interval", "at most 2147483647"]),
        (["--train", "--solver-depth=3", "--solver-reducing-layers=3"], ["--solver-reducing-layers", "2 convolutions"]),
        (["--train", "--cuda-graphs", "--no-gpus"], ["--cuda-graphs", "--no-gpus"]),
        (["--train", "--cuda-graphs", "--lr-schedule=linear"], ["--cuda-graphs", "--lr-schedule=constant"]),
        (["--train", "--cuda-graphs", "--quick"], ["--cuda-graphs", "--lr-schedule=constant"]),
        (["--train", "--visdom-port=70000"], ["--visdom-port", "65535"]),
        (["--train", "--seed=-1"], ["--seed"]),
        (["--train", "--seed=" + "9" * 5000], ["--seed"]),
        (["--train", "--batch=3"], ["--batch"]),
        (["--train", "--result-dir=/dev/null/results"], ["--result-dir", "/dev/null is not a directory"]),
        (["--train", "--checkpoint-dir=/proc/checkpoints"], ["--checkpoint-dir", "/proc"]),
        (["--test", "--sample-dir=/dev/null"], ["--sample-dir"]),
        (["--train", "--checkpoint-dir=results"], ["--checkpoint-dir", "--result-dir"]),
        (["--train", "--result-dir=x", "--checkpoint-dir=./y/../x"], ["--checkpoint-dir", "--result-dir"]),
        (["--train", "--checkpoint-dir=samples"], ["--checkpoint-dir", "--sample-dir"]),
        (["--train", "--sample-dir=results"], ["--sample-dir", "--result-dir"]),
        (
            ["--train", "--batch-size=1", "--solver-depth=6", "--solver-reducing-layers=5"],
            ["--batch-size", "at least 2"],
        ),
        (["--train", "--replay-targets=true"], ["--replay-targets", "hard or soft"]),
        (["--train", "--replay-mode=noise-replay", "--replay-targets=true"], ["--replay-targets", "noise-replay"]),
        (["--train", "--replay-mode=none", "--replay-targets=hard"], ["--replay-targets", "replays nothing"]),
        (["--train", "--temperature=2"], ["--temperature", "--replay-targets=soft"]),
        (["--train", "--replay-targets=soft", "--temperature=0"], ["--temperature", "at least 0.01"]),
        (["--train", "--experiment=mnist-chain", "--replay-mode=none"], ["--replay-mode", "replay alone"]),
        (["--train", "--mnist-split-number=11"], ["--mnist-split-number", "at least 1 and at most 10"]),
        (["--train", "--generator=gpt"], ["--generator", "wgan"]),
        (["--train", "--tasks", "absent.npz"], ["--tasks", "absent.npz"]),
        (["--train", "--tasks", "mnist", "imagenet"], ["--tasks", "imagenet", "fashion-mnist"]),
        (["--train", "--tasks", "mnist", "--experiment=split-mnist"], ["--experiment", "not allowed with"]),
    ],
)
def test_bad_usage_is_one_line_and_status_2(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main.check_machine(main.parse(flags))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("main.py: error: ")
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_widths_of_an_mlp_need_not_be_halved():
    assert main.parse(["--train", "--solver=mlp", "--solver-channel-size=401"]).solver_channel_size == 401


def test_bad_usage_from_the_shell(tmp_path):
    assert_one_line_error(run("main.py", "--train", "--lr=fast", cwd=tmp_path), 2, "--lr", "'fast'")


def test_result_directory_that_vanishes_from_under_a_flag_is_one_line(tmp_path, small_mnist):
    (tmp_path / "data").symlink_to("nowhere")
    process = call("main.py", "--train", "--data-dir", "data", *TINY, cwd=tmp_path)
    assert_one_line_error(process, 1, "data")


def test_defaults_are_the_ones_users_know():
    options = vars(main.parse(["--train"]))
    expected = {
        "experiment": "permutated-mnist", "replay_mode": "generative-replay", "importance_of_new_task": 0.3,
        "mnist_permutation_number": 5, "mnist_permutation_seed": 0, "generator_lambda": 10, "generator_z_size": 100,
        "generator_c_channel_size": 64, "generator_g_channel_size": 64, "generator_c_updates_per_g_update": 5,
        "generator_iterations": 3000, "solver_depth": 5, "solver_reducing_layers": 3, "solver_channel_size": 1024,
        "solver_iterations": 1000, "lr": 1e-4, "lr_schedule": "constant", "beta1": 0.5, "beta2": 0.9,
        "weight_decay": 1e-5, "batch_size": 32, "test_size": 1024, "sample_size": 36, "sample_log": False,
        "sample_log_interval": 300, "image_log_interval": 100, "eval_log_interval": 50, "loss_log_interval": 30,
        "no_gpus": False,
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected
    assert str(options["checkpoint_dir"]) == "checkpoints" and str(options["sample_dir"]) == "samples"


def test_quick_changes_defaults_only():
    plain, quick = vars(main.parse(["--train"])), vars(main.parse(["--train", "--quick"]))
    changed = {name for name in plain if plain[name] != quick[name]}
    assert changed == set(main.QUICK) | {"quick", "replay_targets", "temperature"}
    assert main.parse(["--train", "--quick", "--replay-targets=hard"]).temperature == 1
    assert main.parse(["--experiment=svhn-mnist", "--train", "--quick"]).solver_iterations == 900
    assert main.parse(["--experiment=svhn-mnist", "--train", "--quick", "--solver-iterations=7"]).solver_iterations == 7
    assert main.parse(["--train", "--quick", "--replay-mode=exact-replay"]).replay_targets == "true"
    assert main.parse(["--lr=0.5", "--train", "--quick", "--solver-iterations=7"]).lr == 0.5


@pytest.mark.parametrize(
    "flags, name",
    [
        (["--experiment=svhn-mnist", "--importance-of-new-task=0.40"], "svhn-mnist-generative-replay-r0.4"),
        (["--replay-mode=none", "--importance-of-new-task=0.4"], "permutated-mnist-none-r1"),
        (["--quick"], "permutated-mnist-generative-replay-rauto"),
        (["--quick", "--replay-targets=hard"], "permutated-mnist-generative-replay-rauto-hard"),
        (["--quick", "--replay-mode=none"], "permutated-mnist-none-r1"),
        (["--replay-mode=exact-replay", "--importance-of-new-task=auto"], "permutated-mnist-exact-replay-rauto"),
        (["--importance-of-new-task=1"], "permutated-mnist-generative-replay-r1"),
        (["--tasks", "mnist", "svhn"], "mnist+svhn-generative-replay-r0.3"),
    ],
)
def test_name_of_a_run(flags, name):
    assert main.run_name(main.parse(["--train", *flags])) == name


def test_help_has_every_option_with_its_default(tmp_path):
    process = run("main.py", "--help", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr == ""
    text = " ".join(process.stdout.split())
    for name, default in vars(main.parse(["--train"])).items():
        assert f"--{name.replace('_', '-')}" in text
        if name not in ("data_dir", "tasks", "replay_targets", "temperature") and not isinstance(default, bool):
            assert f"(default: {default}" in text, name
    for mode in (*dgr.REPLAY_MODES, *data.EXPERIMENTS):
        assert mode in text


def test_data_directory_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DGR_DATA_DIR", str(tmp_path))
    assert main.parse(["--train"]).data_dir == tmp_path
    monkeypatch.setenv("DGR_DATA_DIR", "/data/100%d")
    assert "(default: /data/100%d)" in main.make_parser().format_help()
    monkeypatch.setenv("DGR_DATA_DIR", "")
    assert str(main.parse(["--train"]).data_dir) == "datasets"
