"""The command line: every option and recipe, and one line with exit status 2 for whatever makes no sense."""

import contextlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error, call, choose_device, run
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import data
import dgr
import main
import models
import utils

# ----------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--train", "--test", "required"]),
        (["--train", "--test"], ["not allowed with"]),
        (["--train", "--experiment=mnist"], ["--experiment", "permutated-mnist"]),
        (["--train", "--replay-mode=all"], ["--replay-mode", "generative-replay"]),
        (["--train", "--recipe=fast"], ["--recipe", "2017", "best", "quick", "demo", "flow", "vae"]),
        (["--train", "--quick", "--recipe=vae"], ["--recipe", "not allowed with", "--quick"]),
        (["--train", "--importance-of-new-task=1.5"], ["--importance-of-new-task", "'1.5'", "at most 1"]),
        (["--train", "--importance-of-new-task=nan"], ["--importance-of-new-task", "'nan'"]),
        (["--train", "--batch-size=-3"], ["--batch-size", "'-3'", "at least 1"]),
        (["--train", "--generator-iterations=0"], ["--generator-iterations", "at least 1"]),
        (["--train", "--solver-iterations=1e3"], ["--solver-iterations", "whole number"]),
        (["--train", "--mnist-permutation-number=0"], ["--mnist-permutation-number"]),
        (["--train", "--lr=0"], ["--lr", "above 0"]),
        (["--train", "--replay-targets=soft", "--temperature=1e200"], ["--temperature", "at most 1000"]),
        (["--train", "--beta1=1"], ["--beta1", "below 1"]),
        (["--train", "--solver-channel-size=1001"], ["--solver-channel-size", "multiple of 8"]),
        (["--train", "--solver-depth=1"], ["--solver-depth", "of at least 2 and at most 32"]),
        (["--train", "--seed=3000000000"], ["--seed", "at most 2147483647"]),
        (["--train", "--checkpoint-interval=inf"], ["--checkpoint-interval", "at most 2147483647"]),
        (["--train", "--solver-depth=3", "--solver-reducing-layers=3"], ["--solver-reducing-layers", "2 convolutions"]),
        (["--train", "--cuda-graphs", "--no-gpus"], ["--cuda-graphs", "--no-gpus"]),
        (["--train", "--cuda-graphs"], ["--cuda-graphs", "PyTorch finds none"]),
        (["--train", "--dtype=fp16"], ["--dtype", "float32", "bfloat16"]),
        (["--train", "--precision=bf16"], ["--precision"]),
        (["--train", "--visdom-port=70000"], ["--visdom-port", "65535"]),
        (["--train", "--seed=" + "9" * 5000], ["--seed"]),
        (["--train", "--batch=3"], ["--batch"]),
        (["--train", "--result-dir=/dev/null/results"], ["--result-dir", "/dev/null is not a directory"]),
        (["--train", "--checkpoint-dir=/proc/checkpoints"], ["--checkpoint-dir", "/proc"]),
        (["--test", "--sample-dir=/dev/null"], ["--sample-dir"]),
        (["--train", "--checkpoint-dir=results"], ["--checkpoint-dir", "--result-dir"]),
        (["--train", "--result-dir=x", "--checkpoint-dir=./y/../x"], ["--checkpoint-dir", "--result-dir"]),
        (["--train", "--checkpoint-dir=samples"], ["--checkpoint-dir", "--sample-dir"]),
        (["--train", "--sample-dir=results"], ["--sample-dir", "--result-dir"]),
        (["--train", "--batch-size=1", "--solver-depth=6", "--solver-reducing-layers=5"], ["--batch-size", "2"]),
        (["--train", "--batch-size=1", "--image-size=16", "--solver-reducing-layers=4"], ["--batch-size", "2"]),
        (["--train", "--image-size=40"], ["--image-size", "16, 32, 48, 64, 80, 96, 112, 128"]),
        (["--train", "--image-size=144"], ["--image-size", "16, 32, 48, 64, 80, 96, 112, 128"]),
        (["--train", "--image-size=28"], ["--image-size", "--generator=wgan needs a multiple of 16"]),
        (["--train", "--image-size=28", "--generator=conv-flow", "--solver=mlp"], ["--image-size", "conv-flow"]),
        (["--train", "--replay-targets=true"], ["--replay-targets", "hard or soft"]),
        (["--train", "--replay-mode=noise-replay", "--replay-targets=true"], ["--replay-targets", "noise-replay"]),
        (["--train", "--replay-mode=none", "--replay-targets=hard"], ["--replay-targets", "replays nothing"]),
        (["--train", "--temperature=2"], ["--temperature", "--replay-targets=soft"]),
        (["--train", "--replay-targets=soft", "--temperature=0"], ["--temperature", "at least 0.01"]),
        (["--train", "--experiment=mnist-chain", "--replay-mode=none"], ["--replay-mode", "replay alone"]),
        (["--train", "--mnist-split-number=11"], ["--mnist-split-number", "at least 1 and at most 10"]),
        (["--train", "--generator=gpt"], ["--generator", "wgan", "MODULE:CLASS"]),
        (["--train", "--solver=nowhere:Net"], ["--solver", "'nowhere:Net' can't be imported", "No module named"]),
        (["--train", "--solver=json:Net"], ["--solver", "module 'json' has no attribute 'Net'"]),
        (["--train", "--generator=math:pi"], ["--generator", "'math:pi' is no subclass of dgr.Generator"]),
        (["--train", "--solver=torch.nn:Linear"], ["--solver", "'torch.nn:Linear' is no subclass of dgr.Solver"]),
        (["--train", "--solver=models:VAE"], ["--solver", "'models:VAE' is no subclass of dgr.Solver"]),
        (["--train", "--generator=dgr:Generator"], ["--generator", "'dgr:Generator' is no subclass"]),
        (["--train", "--sample-size=11557"], ["--sample-size", "at most 11556 with --image-size=32"]),
        (["--train", "--sample-size=3019", "--image-size=128"], ["--sample-size", "at most 3018"]),
        (["--train", "--tasks", "absent.npz"], ["--tasks", "absent.npz"]),
        (["--train", "--tasks", "mnist", "imagenet"], ["--tasks", "imagenet", "fashion-mnist"]),
        (["--train", "--tasks", "mnist", "--experiment=split-mnist"], ["--experiment", "not allowed with"]),
        (["--train", "--on=mnist"], ["--on", "--test"]),
        (["--train", "--validation=0.6"], ["--validation", "at most 0.5"]),
        (["--train", "--measure-generator", "--continue-from=kept"], ["--continue-from", "--measure-generator"]),
        (["--train", "--replay-targets=own"], ["--replay-targets", "--generator-conditional"]),
        (["--train", "--heads=task", "--generator-conditional"], ["--heads", "--generator-conditional"]),
        (["--train", "--heads=task", "--experiment=mnist-chain"], ["--heads", "mnist-chain"]),
        (["--train", "--heads=task", "--experiment=mnist-chain", "--recipe=best"], ["--heads", "mnist-chain"]),
        (["--train", "--penalty=ewc", "--experiment=mnist-chain"], ["--penalty", "chain"]),
        (["--train", "--replay-mode=lwf", "--experiment=mnist-chain"], ["--replay-mode", "mnist-chain"]),
    ],
)
def test_bad_usage_is_one_line_and_status_2(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as stop:
        utils.run_program(lambda: models.check_machine(main.parse(flags)))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("main.py: error: ")
    for word in words:
        assert word in message
    assert list(tmp_path.iterdir()) == []


def test_bad_usage_from_the_shell(tmp_path):
    assert_one_line_error(run("main.py", "--train", "--lr=fast", cwd=tmp_path), 2, "--lr", "'fast'")


def test_widths_of_an_mlp_need_not_be_halved():
    assert parse("--solver=mlp --solver-channel-size=401").solver_channel_size == 401


def parse(flags: str = "") -> main.Options:
    return main.parse(["--train", *flags.split()])


def test_defaults_are_the_ones_users_know():
    expected = {
        "experiment": "permutated-mnist", "replay_mode": "generative-replay", "importance_of_new_task": 0.3,
        "mnist_permutation_number": 5, "mnist_permutation_seed": 0, "generator_lambda": 10, "generator_z_size": 100,
        "generator_c_channel_size": 64, "generator_g_channel_size": 64, "generator_c_updates_per_g_update": 5,
        "generator_iterations": 3000, "solver_depth": 5, "solver_reducing_layers": 3, "solver_channel_size": 1024,
        "solver_iterations": 1000, "lr": 1e-4, "lr_schedule": "constant", "beta1": 0.5, "beta2": 0.9,
        "weight_decay": 1e-5, "batch_size": 32, "test_size": 1024, "sample_size": 36, "sample_log": False,
        "sample_log_interval": 300, "image_log_interval": 100, "eval_log_interval": 50, "loss_log_interval": 30,
        "no_gpus": False, "checkpoint_dir": Path("checkpoints"), "sample_dir": Path("samples"),
    }  # fmt: skip
    options = parse()
    assert {name: getattr(options, name) for name in expected} == expected
    assert options.recipe == "2017" and options.flags == []


def test_help_has_every_option_with_its_default(tmp_path, monkeypatch):
    """Even where a notebook has set a matplotlib backend that is not installed here."""
    monkeypatch.delenv("DGR_DATA_DIR", raising=False)
    process = run("main.py", "--help", cwd=tmp_path, MPLBACKEND="module://nowhere.backend")
    assert process.returncode == 0 and process.stderr == ""
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=--)", process.stdout)[1:]]
    entries = {entry.split()[0].rstrip(","): entry for entry in entries}
    declared = {f.name: utils.default_of(f) for f in fields(main.Options) if f.metadata} | {"recipe": "2017"}
    assert set(entries) == {*map(utils.flag, declared), "--quick"}
    for name, default in declared.items():
        if default is not None and default is not False:
            assert f"(default: {default})" in entries[utils.flag(name)]
    for choice in (*dgr.REPLAY_MODES, *data.EXPERIMENTS, *main.RECIPES, "--quick", "bfloat16"):
        assert choice in process.stdout


@pytest.mark.parametrize("program", ["main.py", "run_full_experiments"])
def test_help_starts_without_what_takes_long_to_import(tmp_path, program):
    imported = run(program, "--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1").stderr
    assert " torch\n" in imported
    for name in ("torchvision", "matplotlib", "scipy"):
        assert f" {name}\n" not in imported


def test_own_data_have_names_of_their_own_in_any_language(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [
        "\u6570\u5b57.npz",
        "\u6587\u5b57.npz",
        "\u0e17\u0e35\u0e48.npz",
        "caf\u00e9.npz",
        "a b.npz",
        "mnist-svhn.npz",
        "\u6570" * 60 + ".npz",
    ]
    for file in files:
        Path(file).touch()
    names = [main.parse(["--train", "--tasks", file]).experiment for file in files]
    assert names[:6] == ["\u6570\u5b57", "\u6587\u5b57", "\u0e17\u0e35\u0e48", "caf\u00e9", "a_b", "own-mnist-svhn"]
    assert len(names[6].encode()) <= 100


def test_a_checkout_of_another_owner_is_said(monkeypatch, capsys):
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    monkeypatch.delenv(utils.COMMIT, raising=False)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)
    assert utils.commit() is None
    (warning,) = capsys.readouterr().err.splitlines()
    assert "safe.directory" in warning and utils.COMMIT in warning


def test_data_directory_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DGR_DATA_DIR", str(tmp_path))
    assert parse().data_dir == tmp_path
    monkeypatch.setenv("DGR_DATA_DIR", "/data/100%d")
    assert "(default: /data/100%d)" in " ".join(main.make_parser().format_help().split())
    monkeypatch.setenv("DGR_DATA_DIR", "")
    assert str(parse().data_dir) == "datasets"


def test_every_path_behind_an_equals_sign_may_begin_with_a_tilde(monkeypatch, tmp_path):
    """No shell expands it there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.npz").touch()
    paths = [f.name for f in fields(main.Options) if isinstance(utils.default_of(f), Path)] + ["continue_from"]
    assert len(paths) == 5
    for name in paths:
        assert getattr(parse(f"{utils.flag(name)}=~/x"), name) == tmp_path / "x"
    assert parse("--tasks=~/x.npz").tasks == [str(tmp_path / "x.npz")]
    monkeypatch.setenv("DGR_DATA_DIR", "~/x")
    assert parse().data_dir == tmp_path / "x"
    for script, flag in (("visual.py", "--figures"), ("arts/figures.py", "--keep")):
        process = call(script, *(["x"] if script == "visual.py" else []), f"{flag}=~/gone", cwd=tmp_path)
        assert process.returncode == 1 and not (tmp_path / "~").exists()


def test_a_directory_that_is_a_link_to_nowhere_is_said_to_be_one(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    Path("results").symlink_to("gone")
    for flags in ("", "--result-dir=results/below"):
        with pytest.raises(SystemExit):
            parse(flags)
        assert "--result-dir: results is a link to gone, which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--experiment=svhn-mnist --importance-of-new-task=0.40", "svhn-mnist-generative-replay-r0.4"),
        ("--replay-mode=none --importance-of-new-task=0.4", "permutated-mnist-none-r1"),
        ("--recipe=2017", "permutated-mnist-generative-replay-r0.3"),
        ("--quick", "permutated-mnist-generative-replay-rauto-quick"),
        ("--quick --replay-targets=hard", "permutated-mnist-generative-replay-rauto-quick-hard"),
        ("--quick --replay-mode=none", "permutated-mnist-none-r1-quick"),
        ("--recipe=best", "permutated-mnist-generative-replay-rauto-best"),
        ("--recipe=vae --experiment=mnist-chain", "mnist-chain-generative-replay-r0-vae"),
        ("--recipe=vae --generator=wgan", "permutated-mnist-generative-replay-rauto-vae-wgan"),
        ("--replay-mode=exact-replay --importance-of-new-task=auto", "permutated-mnist-exact-replay-rauto"),
        ("--importance-of-new-task=1", "permutated-mnist-generative-replay-r1"),
        ("--tasks mnist svhn", "mnist+svhn-generative-replay-r0.3"),
        ("--quick --solver=mlp --image-size=64", "permutated-mnist-generative-replay-rauto-quick-mlp-64px"),
        ("--image-size=32", "permutated-mnist-generative-replay-r0.3"),
        ("--recipe=vae --image-size=28", "permutated-mnist-generative-replay-rauto-vae-28px"),
        ("--generator-conditional", "permutated-mnist-generative-replay-r0.3-conditional"),
    ],
)
def test_name_of_a_run(flags, name):
    assert parse(flags).name == name


def test_a_task_may_be_below_ones_home(tmp_path, monkeypatch):
    """Shells leave ~ as it is behind =."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    assert parse("--tasks=~/pictures").tasks == [str(tmp_path / "pictures")]


def test_lists_given_twice_add_up(tmp_path):
    assert parse("--tasks mnist --seed=1 --tasks svhn mnist").tasks == ["mnist", "svhn", "mnist"]
    command = ["split-mnist", "--dry-run", "--seeds=0-1", "--seeds", "1,4"]
    lines = call("run_full_experiments", *command, cwd=tmp_path).stdout.splitlines()
    assert [re.search(r"--seed=(\d)", line)[1] for line in lines] == ["0", "1", "4"] * 3


# ----------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--recipe=quick", {"lr": 1e-3, "mnist_permutation_number": 3, "solver_iterations": 300}),
        ("--recipe=quick --experiment=svhn-mnist", {"lr": 1e-3, "solver_iterations": 900}),
        ("--recipe=demo", {"lr": 1e-3, "image_size": 16, "solver_channel_size": 128}),
        ("--recipe=vae", {"generator": "vae", "solver": "mlp", "solver_iterations": 1000, "temperature": 2}),
        ("--recipe=vae --experiment=split-mnist", {"solver": "mlp", "solver_iterations": 500, "temperature": 4}),
        ("--recipe=vae --experiment=mnist-chain", {"generator": "vae", "solver": "cnn", "solver_iterations": 5000}),
        ("--recipe=best", {"generator": "vae", "lr": 1e-3, "lr_schedule": "linear", "batch_size": 128}),
        ("--recipe=best --experiment=split-mnist", {"generator": "wgan", "solver_channel_size": 256, "lr": 5e-4}),
        ("--recipe=best --experiment=split-mnist", {"solver_blur": 1.5, "solver_distortion": 1}),
        ("--recipe=best --experiment=mnist-chain", {"generator": "conv-flow", "replay_pool": 20_000, "lr": 5e-4}),
        ("--recipe=best --experiment=mnist-chain", {"generator_conditional": True, "replay_distortion": 1}),
        ("--recipe=best --experiment=mnist-chain", {"replay_elastic": 2, "solver_distortion": 0}),
        ("--recipe=best --experiment=mnist-chain --no-generator-conditional", {"generator_conditional": False}),
        ("--recipe=best --experiment=mnist-svhn", {"generator": "vae", "solver_channel_size": 256, "lr": 1e-3}),
        ("--recipe=best --experiment=svhn-mnist", {"generator": "wgan", "solver_iterations": 3000, "temperature": 4}),
        ("--recipe=best --tasks mnist svhn", {"generator": "wgan", "solver_channel_size": 256, "lr": 5e-4}),
        ("--recipe=quick --replay-targets=hard", {"replay_targets": "hard", "temperature": 1}),
        ("--recipe=quick --replay-mode=exact-replay", {"replay_targets": "true", "temperature": 1}),
        ("--recipe=vae --experiment=split-mnist --replay-mode=none", {"replay_targets": "hard", "temperature": 1}),
    ],
)
def test_what_a_recipe_sets(flags, expected):
    options = parse(flags)
    assert {key: getattr(options, key) for key in expected} == expected and options.chain == ("chain" in flags)


def test_quick_is_short_for_its_recipe():
    assert parse("--quick") == parse("--recipe=quick") != parse()


@pytest.mark.parametrize("experiment", data.EXPERIMENTS)
@pytest.mark.parametrize("recipe", main.RECIPES)
def test_a_recipe_changes_defaults_only(recipe, experiment):
    """Nothing but what it lists, and no flag of a run says what its recipe says already."""
    usual, options = (vars(parse(f"--experiment={experiment} --recipe={name}")) for name in ("2017", recipe))
    listed = {"recipe", "temperature", *main.recipe_defaults(recipe, experiment)}
    assert {key for key in usual if usual[key] != options[key]} <= (listed if recipe != "2017" else set())
    assert parse(f"--experiment={experiment} --recipe={recipe}").flags == []


@pytest.mark.parametrize("recipe", main.RECIPES)
def test_updates_of_every_recipe_can_be_graphs(recipe, monkeypatch):
    """With a falling learning rate too."""
    monkeypatch.setattr(models, "choose_device", lambda *, gpus: torch.device("cuda"))
    for experiment in data.EXPERIMENTS:
        options = parse(f"--recipe={recipe} --experiment={experiment} --cuda-graphs --lr-schedule=linear")
        models.check_machine(options)
        assert options.cuda_graphs and options.lr_schedule == "linear"


def test_soft_targets_of_a_recipe_are_only_for_a_mode_that_has_them(monkeypatch):
    class Hard(dgr.GenerativeReplay):
        target_kinds = ("hard",)

    monkeypatch.setitem(dgr.REPLAY_MODES, "hard-replay", Hard)
    assert parse("--quick").replay_targets == "soft"
    assert parse("--quick --replay-mode=hard-replay").replay_targets == "hard"


def values(f) -> st.SearchStrategy:
    """Values of an option, as its declaration limits them."""
    default, limits = utils.default_of(f), f.metadata
    if isinstance(default, bool):
        return st.booleans()
    if choices := limits.get("choices"):
        return st.sampled_from(list(choices() if callable(choices) else choices))
    if f.name == "solver_channel_size":
        return st.sampled_from([256, 1024, 2048])
    if isinstance(default, int):
        return st.integers(limits["low"], min(limits.get("high", 5000), 5000))
    number = st.floats(max(limits.get("low", 0), 1e-6), min(limits.get("high", 1), 1), exclude_max="below" in limits)
    return number | st.just("auto") if f.name == "importance_of_new_task" else number


LEARNING = {f.name: f for f in fields(main.Options) if f.metadata.get("changes") and f.name != "tasks"}
APART = ("experiment", "replay_mode", "seed")  # what a run says in places of their own


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(list(main.RECIPES)), st.sets(st.sampled_from(list(LEARNING)), max_size=5))
def test_flags_of_a_run_are_what_differs_from_its_recipe(random, recipe, names):
    given = {name: random.draw(values(LEARNING[name]), label=name) for name in sorted(names)}
    words = [utils.flag(name, value) for name, value in given.items()]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            options = main.parse([*words, "--train", f"--recipe={recipe}"])
        except SystemExit:
            assume(False)
    assert {name: getattr(options, name) for name in given} == given  # a flag wins, wherever it stands
    mode = dgr.REPLAY_MODES[options.replay_mode]
    idle = {"importance_of_new_task"} if mode is None or options.chain else set()
    idle |= {"sample_log"} if mode is not None and mode.needs_generator else set()
    idle |= set(options.unused)
    base = ["--train", f"--recipe={recipe}", *(f"{utils.flag(key)}={getattr(options, key)}" for key in APART)]

    def learning(flags: list[str]) -> dict[str, object]:
        with contextlib.redirect_stderr(io.StringIO()):
            found = vars(main.parse([*base, *flags]))
        return {name: found[name] for name in LEARNING if name not in idle}

    wanted = {name: value for name, value in vars(options).items() if name in LEARNING and name not in idle}
    assert learning(options.flags) == wanted  # enough
    for flag in options.flags:  # and not one too many
        with contextlib.suppress(SystemExit):  # a temperature alone is refused
            assert learning([other for other in options.flags if other != flag]) != wanted


# ------------------------------------------------------------------------------------------- whatever is typed

FLAGS = sorted(string for action in main.make_parser()._actions for string in action.option_strings)
HOSTILE = ["", " ", "-1", "0", "1", "2", "7", "0.5", "1e-400", "1e400", "nan", "inf", "-inf", "auto", "true", "soft"]
HOSTILE += ["../../outside", "/", "/dev/null", "/dev/null/x", "a\nb", "é" * 300, "x" * 5000, "\udcff", "%s%d"]
HOSTILE += ["--train", "9" * 40, "9" * 5000, "0x10", "1_0", "٣", "mnist", "none", "vae", "best", "$(touch executed)"]
HOSTILE += ["permutated-mnist"]
# What a shell can hand over: any text without a null character.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
VALUES = st.one_of(st.sampled_from(HOSTILE), TEXT, st.integers().map(str), st.floats().map(str))
ARGUMENTS = st.one_of(
    st.sampled_from(FLAGS),
    st.builds("{}={}".format, st.sampled_from(FLAGS), VALUES),
    st.tuples(st.sampled_from(FLAGS), VALUES),
    VALUES,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([["--train"], ["--test"], []]), st.lists(ARGUMENTS, max_size=5))
@example(["--train"], ["--result-dir=" + "x" * 5000])
@example(["--train"], ["--data-dir=" + "x" * 5000])
@example(["--train"], [("--tasks", "x" * 5000 + ".npz")])
def test_any_command_line_ends_in_one_line_or_in_options(job, arguments):
    arguments = job + [part for each in arguments for part in ([each] if isinstance(each, str) else each)]
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
        out, error = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
                options = main.parse(arguments)
        except SystemExit as end:
            if end.code == 0:
                assert "--help" in arguments or "-h" in "".join(arguments)
            else:
                assert end.code == 2
                assert error.getvalue().startswith("main.py: error: ") and error.getvalue().count("\n") == 1
        else:
            assert options.train or options.test
            assert 0 < options.lr < math.inf and 0 <= options.beta1 < 1 and options.batch_size >= 1
            assert Path(options.name).name == options.name and not options.name.startswith(".")
        assert os.listdir(empty) == []
    assert Path.cwd() == here


def test_hostile_names_stay_in_their_directories(tmp_path):
    """A task's name is the file's, and the run's name is made of it."""
    source = tmp_path / "x" / "..;$(touch executed) \n.npz"
    source.parent.mkdir()
    source.write_bytes(b"")
    name = main.parse(["--train", "--tasks", str(source), f"--result-dir={tmp_path}"]).name
    assert Path(name).name == name and "\n" not in name and "$" not in name


# -------------------------------------------------------------------------------------- devices, memory, dtype


def pretend_gpu(monkeypatch, capability=None, smi="", why="", **environment):
    """A machine with a GPU of this capability that PyTorch sees; or that it does not, which nvidia-smi lists."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for module in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(module, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GPU of 2017")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])
    monkeypatch.setattr(torch.cuda, "init", lambda: throw(RuntimeError(why)) if why else None)
    found = subprocess.CompletedProcess([], 0, smi)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: found if smi else throw(FileNotFoundError()))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


SMI = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-6c5b)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-77aa)\n"
OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver."


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (12, 0), (12, 1), (13, 0)])
def test_a_gpu_that_pytorch_has_code_for_is_used(monkeypatch, capability):
    pretend_gpu(monkeypatch, capability)
    assert choose_device().type == "cuda" and choose_device(gpus=False).type == "cpu"


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 2), (10, 0)])
def test_a_gpu_that_pytorch_has_no_code_for_is_named(monkeypatch, capability):
    pretend_gpu(monkeypatch, capability)
    name = "NVIDIA GPU of 2017, sm_{}{}".format(*capability)
    with pytest.raises(utils.UserError, match=rf"no code for the GPU \({name}\), only for sm_75.*install.*--no-gpus"):
        choose_device()
    assert choose_device(gpus=False).type == "cpu"


def test_a_gpu_whose_driver_is_too_old_is_named(monkeypatch):
    pretend_gpu(monkeypatch, smi=SMI, why=OLD)
    with pytest.raises(utils.UserError, match=r"H100 80GB HBM3.*driver on your system is too old.*update.*--no-gpus"):
        choose_device()
    assert choose_device(gpus=False).type == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_is_left_alone(monkeypatch, hidden):
    pretend_gpu(monkeypatch, smi=SMI, why="No CUDA GPUs are available", CUDA_VISIBLE_DEVICES=hidden)
    assert choose_device().type == "cpu"


@pytest.mark.parametrize("smi", ["", "No devices were found"])
def test_without_a_gpu_the_cpu_is_used(monkeypatch, smi):
    pretend_gpu(monkeypatch, smi=smi, why="Found no NVIDIA driver on your system.")
    assert choose_device().type == "cpu"


@pytest.mark.parametrize(
    ("capability", "graphs", "name"), [((9, 0), False, "tf32"), ((9, 0), True, "bfloat16"), ((7, 5), True, "float32")]
)
def test_a_gpu_computes_in_tf32_or_with_graphs_in_bfloat16(monkeypatch, capability, graphs, name):
    """Where it has them: since Ampere, 8.0."""
    pretend_gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: capability >= (8, 0))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    gpu = torch.device("cuda")
    dtype = models.choose_dtype("auto", gpu, cuda_graphs=graphs)
    assert (models.dtype_name(dtype, gpu), torch.backends.cudnn.allow_tf32) == (name, name == "tf32")
    assert models.device_name(gpu) == "NVIDIA GPU of 2017"


def test_other_accelerators_compute_in_float32(monkeypatch):
    """Apple's GPUs, which PyTorch calls mps, and Intel's; untried."""
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    device = choose_device()
    assert device.type == "mps" and models.device_name(device) == "MPS" and models.images_at_once(device) == 512
    assert models.choose_dtype("auto", device) is None and models.dtype_name(None, device) == "float32"


@pytest.mark.parametrize("flag", ["--solver-channel-size=8388608", "--generator-z-size=2147483647"])
def test_more_memory_than_there_is_is_one_line(tmp_path, small_mnist, flag):
    """In a process of its own with a limit, because some kernels promise any amount."""
    words = [sys.executable, ROOT / "main.py", "--train", "--no-gpus", f"--data-dir={small_mnist}", *TINY, flag]
    command = f"ulimit -v 64000000; {shlex.join(map(str, words))}"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    process.stderr = process.stderr.strip().splitlines()[-1]
    assert_one_line_error(process, 1, "out of memory", "--batch-size")


def throw(error, behind=None):
    try:
        raise behind or error
    finally:
        raise error


@pytest.mark.parametrize("error", [NotImplementedError("no such kernel"), RuntimeError("sizes do not match")])
def test_what_is_no_lack_of_memory_is_not_called_one(error):
    with pytest.raises(type(error)):
        utils.run_program(lambda: throw(error))


@pytest.mark.parametrize(
    "errors",
    [
        [MemoryError()],
        [torch.OutOfMemoryError("CUDA out of memory")],
        [RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")],
        [RuntimeError("operation failed during capture"), torch.OutOfMemoryError("CUDA out of memory")],
    ],
)
def test_lack_of_memory_is_one_line(errors):
    """Behind another error too."""
    with pytest.raises(SystemExit, match="out of memory: try a smaller --batch-size"):
        utils.run_program(lambda: throw(*errors))


@pytest.mark.parametrize(
    ("amx", "name", "dtype"),
    [(True, "Intel Xeon", torch.bfloat16), (False, "AMD EPYC", torch.bfloat16), (False, "Intel Xeon", None)],
)
def test_a_cpu_computes_in_bfloat16_where_that_is_faster(monkeypatch, amx, name, dtype):
    """With AMX; AVX512-BF16 alone is faster than float32 on AMD's, slower on Intel's: see benchmarks/README.md."""
    capabilities = {"avx512_bf16": True, "cpu_name": name}
    monkeypatch.setattr(models, "AMX", amx)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert models.choose_dtype("auto", torch.device("cpu")) is dtype
    assert models.choose_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert models.choose_dtype("float32", torch.device("cpu")) is None
    capabilities["avx512_bf16"] = False  # AMD's before Zen 4
    assert models.choose_dtype("auto", torch.device("cpu")) is (torch.bfloat16 if amx else None)
