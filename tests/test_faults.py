"""Disks that are full, turn read-only or vanish under a run, on a small file system of its own."""

import os
import shlex
import subprocess
import sys

import pytest
import test_resume
from conftest import ROOT, WITHOUT_GPU
from test_resume import NAME, flags, outcome, state_of

whole = test_resume.whole

# In a mount namespace of its own a process may mount what nobody else sees.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]


def in_namespace(cwd, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a bash script in which $disk is a directory for a file system and `run` starts main.py."""
    disk = cwd / "disk"
    disk.mkdir()
    train = shlex.join([sys.executable, str(ROOT / "main.py"), *arguments])
    script = f'set -u; disk={shlex.quote(str(disk))}; run() {{ {train} "$@"; }}; {script}'
    return subprocess.run(
        [*NAMESPACE, script], capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **WITHOUT_GPU}
    )


@pytest.fixture(autouse=True, scope="module")
def may_mount():
    process = subprocess.run([*NAMESPACE, "mount -t tmpfs tmpfs /mnt"], capture_output=True, text=True)
    if process.returncode != 0:
        pytest.skip(f"no mount namespaces here: {process.stderr.strip()}")


@pytest.mark.slow
def test_full_disk_ends_the_run_and_loses_nothing(tmp_path, small_mnist, whole):
    """Room for the states of the first task, not for those of the second, which hold replayed pairs."""
    process = in_namespace(
        tmp_path,
        "mount -t tmpfs -o size=1300k tmpfs $disk; run; echo status $?; cp -r $disk/checkpoints kept; "
        "mount -o remount,size=64m $disk; run --resume; echo status $?; cp -r $disk after",
        *flags(tmp_path / "disk", small_mnist),
    )
    assert "status 1\n" in process.stdout and process.stdout.endswith("status 0\n"), process.stderr
    assert "No space left on device" in process.stderr and "Traceback" not in process.stderr
    assert "continues at task 2" in process.stdout
    assert (tmp_path / "kept" / state_of(tmp_path).name).exists()
    assert outcome(tmp_path / "after") == whole


@pytest.mark.slow
def test_files_that_cannot_be_written_do_not_end_training(tmp_path, small_mnist, whole):
    """Results and pictures on a full disk, checkpoints on another: metrics follow when there is room again."""
    process = in_namespace(
        tmp_path,
        "mount -t tmpfs -o size=64k tmpfs $disk; dd if=/dev/zero of=$disk/filler bs=1k 2>/dev/null; run; "
        "echo status $?; rm $disk/filler; mount -o remount,size=64m $disk; run --resume; echo status $?; "
        "cp -r $disk/* .",
        *flags(tmp_path / "disk", small_mnist),
        f"--checkpoint-dir={tmp_path / 'checkpoints'}",
    )
    assert "status 1\n" in process.stdout and process.stdout.endswith("status 0\n"), process.stderr
    assert "training goes on" in process.stderr and "--resume to finish the run" in process.stderr
    files = {name: content for name, content in outcome(tmp_path).items() if not name.startswith(("samples", "disk"))}
    expected = {name: content for name, content in whole.items() if name in files}
    assert files == expected and f"results/{NAME}/metrics.csv" in files


@pytest.mark.slow
def test_disk_that_turns_read_only(tmp_path, small_mnist):
    process = in_namespace(
        tmp_path,
        "mount -t tmpfs tmpfs $disk; run & until [ -e $disk/checkpoints/*.unfinished ]; do sleep 0.01; done; "
        "mount --bind $disk $disk; mount -o remount,bind,ro $disk; wait $!; echo status $?; "
        "umount $disk; run --resume; echo status $?",
        *flags(tmp_path / "disk", small_mnist),
        "--generator-iterations=100",
    )
    assert "status 1\n" in process.stdout and process.stdout.endswith("status 0\n"), process.stderr
    assert "Read-only file system" in process.stderr and "Traceback" not in process.stderr
    assert "continues at task" in process.stdout


@pytest.mark.slow
def test_directories_that_vanish_are_made_again(tmp_path, small_mnist):
    process = in_namespace(
        tmp_path,
        "run & until [ -e $disk/results/*/metrics.csv ]; do sleep 0.01; done; rm -rf $disk/*; wait $!; echo status $?",
        *flags(tmp_path / "disk", small_mnist),
        "--generator-iterations=100",
    )
    assert process.stdout.endswith("status 0\n"), process.stderr
    metrics = (tmp_path / "disk" / "results" / NAME / "metrics.csv").read_text().splitlines()
    assert metrics[1].startswith("generator,1,2,") and metrics[-1].startswith("test,2,")
    assert (tmp_path / "disk" / "results" / NAME / "config.json").exists()
