"""The command line under random and hostile values: one line and exit status 2, or options that make sense."""

import contextlib
import io
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_one_line_error
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dgr
import main
import utils

FLAGS = sorted(string for action in main.make_parser()._actions for string in action.option_strings)
HOSTILE = ["", " ", "-1", "0", "1", "2", "7", "0.5", "1e-400", "1e400", "nan", "inf", "-inf", "auto", "true", "soft"]
HOSTILE += ["../../outside", "/", "/dev/null", "/dev/null/x", "a\nb", "é" * 300, "x" * 5000, "\udcff", "%s%d"]
HOSTILE += [
    "--train",
    "9" * 40,
    "9" * 5000,
    "0x10",
    "1_0",
    "٣",
    "mnist",
    "none",
    "vae",
    "$(touch executed)",
    "permutated-mnist",
]
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
            name = main.run_name(options)
            assert Path(name).name == name and not name.startswith(".")
        assert os.listdir(empty) == []
    assert Path.cwd() == here


@pytest.mark.parametrize("flag", ["--solver-channel-size=8388608", "--generator-z-size=2147483647"])
def test_more_memory_than_there_is_is_one_line(tmp_path, small_mnist, flag):
    """In a process of its own with a limit, because some kernels promise any amount."""
    words = [sys.executable, ROOT / "main.py", "--train", "--no-gpus", f"--data-dir={small_mnist}", *TINY, flag]
    command = f"ulimit -v 64000000; {shlex.join(map(str, words))}"
    process = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    process.stderr = process.stderr.strip().splitlines()[-1]
    assert_one_line_error(process, 1, "out of memory", "--batch-size")


@pytest.mark.parametrize("error", [NotImplementedError("no such kernel"), RuntimeError("sizes do not match")])
def test_what_is_no_lack_of_memory_is_not_called_one(error):
    with pytest.raises(type(error)):
        utils.run_program(lambda: throw(error))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_lack_of_memory_is_one_line(error):
    with pytest.raises(SystemExit, match="out of memory: try a smaller --batch-size"):
        utils.run_program(lambda: throw(error))


def test_lack_of_memory_behind_another_error_is_one_line():
    def capture():
        try:
            throw(torch.OutOfMemoryError("CUDA out of memory"))
        finally:
            throw(RuntimeError("operation failed due to a previous error during capture"))

    with pytest.raises(SystemExit, match="out of memory: try a smaller --batch-size"):
        utils.run_program(capture)


def throw(error):
    raise error


@pytest.mark.parametrize(
    ("amx", "name", "dtype"),
    [(True, "Intel Xeon", torch.bfloat16), (False, "AMD EPYC", torch.bfloat16), (False, "Intel Xeon", None)],
)
def test_a_cpu_computes_in_bf16_where_that_is_faster(monkeypatch, amx, name, dtype):
    """With AMX; AVX512-BF16 alone is faster than float32 on AMD's, slower on Intel's: see benchmarks/README.md."""
    capabilities = {"avx512_bf16": True, "cpu_name": name}
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert utils.choose_precision("auto", torch.device("cpu")) is dtype
    assert utils.choose_precision("bf16", torch.device("cpu")) is torch.bfloat16
    capabilities["avx512_bf16"] = False  # AMD's before Zen 4
    assert utils.choose_precision("auto", torch.device("cpu")) is (torch.bfloat16 if amx else None)


def test_quick_gives_soft_targets_only_to_a_mode_that_has_them(monkeypatch, tmp_path):
    class Hard(dgr.GenerativeReplay):
        target_kinds = ("hard",)

    monkeypatch.setitem(dgr.REPLAY_MODES, "hard-replay", Hard)
    monkeypatch.chdir(tmp_path)
    quick = ["--train", "--quick"]
    assert main.parse(quick).replay_targets == "soft"
    assert main.parse([*quick, "--replay-mode=hard-replay"]).replay_targets == "hard"


def test_hostile_names_stay_in_their_directories(tmp_path, small_mnist):
    """A task's name is the file's, and the run's name is made of it."""
    source = tmp_path / "x" / "..;$(touch executed) \n.npz"
    source.parent.mkdir()
    source.write_bytes(b"")
    options = main.parse(["--train", "--tasks", str(source), f"--result-dir={tmp_path}"])
    name = main.run_name(options)
    assert Path(name).name == name and "\n" not in name and "$" not in name
