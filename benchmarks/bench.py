#!/usr/bin/env python3
"""How fast the parts of training are, beside a baseline, in one run.

    make bench                                      at the default widths, on the device that main.py would use
    benchmarks/bench.py --image-size=64 --no-gpus   main.py's flags for networks, batches and number format work too
    benchmarks/bench.py --against 5ef79e6           beside the program of an earlier commit, in turn with ours
    benchmarks/bench.py --profile                   also which operators take our time, as shares of it

The baseline is how the method is usually written: float32, PIL transforms behind a DataLoader, a forward pass for each
source of images, a gradient through the generator in the critic's updates, a fresh draw of replay for every update,
testing in training-sized batches; on GPUs with PyTorch's default of TF32 convolutions. In generator-update-replay the
baseline learns a whole batch from each source, as is usual, where ours learns one batch that is the mix;
generator-update-mixed has a baseline that mixes too. Ours and the baseline take turns, and the table has medians.
`limit_share` is the share of what the device can do: of the floating-point rate of a large matrix product in our number
format, and for `batch` of the rate of a large copy, both measured in the same run. `against_ratio` is the time of the
earlier commit's program, which a second process runs, over ours: the median ratio of neighbours in time,
as some machines change their speed within seconds.
"""

from __future__ import annotations  # names of types that earlier programs lack

import contextlib
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import flop_registry
from torchvision import transforms
from tqdm import tqdm

sys.path.insert(0, os.environ.get("DGR_BENCHMARKED", str(Path(__file__).resolve().parent.parent)))

import data
import dgr
import main
import models
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
R = 0.5  # importance of the new task
IMAGES = 60_000
TEST_IMAGES = 1024
CLASSES = 10

# ------------------------------------------------------------------------------------------------ the baseline


class BaselineImages(Dataset):
    """Images one at a time, through PIL."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, size: int):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.Pad((size - 28) // 2), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def make_baseline(scholar: dgr.Scholar, options: models.ScholarOptions) -> dgr.Scholar:
    """The same networks with PyTorch's own layers, layout and Adam."""
    for module in scholar.modules():
        for own in (nn.Conv2d, nn.ConvTranspose2d, nn.LeakyReLU):
            if isinstance(module, own):
                module.__class__ = own
    scholar.to(memory_format=torch.contiguous_format)
    how = {"lr": options.lr, "betas": (options.beta1, options.beta2), "weight_decay": options.weight_decay}
    generator, solver = scholar.generator, scholar.solver
    generator.optimiser = torch.optim.Adam(generator.net.parameters(), **how)
    generator.critic_optimiser = torch.optim.Adam(generator.critic.parameters(), **how)
    solver.optimiser = torch.optim.Adam(solver.net.parameters(), **how)
    return scholar


def baseline_batches(images: BaselineImages, options: main.Options, device: torch.device) -> Iterator[dgr.Pairs]:
    loading = {"num_workers": 1, "pin_memory": True} if device.type == "cuda" else {}
    while True:
        for x, y in DataLoader(images, options.batch_size, shuffle=True, drop_last=True, **loading):
            yield x.to(device), y.to(device)


def baseline_inputs(old: dgr.Scholar, n: int) -> Tensor:
    return old.generator.net(old.generator.noise(n)).detach()


def baseline_replay(old: dgr.Scholar, n: int) -> dgr.Pairs:
    x = baseline_inputs(old, n)
    return x, old.solver.net(x).argmax(dim=1).detach()


def baseline_critic_loss(critic: Any, real: Tensor, fake: Tensor, penalty_weight: float) -> Tensor:
    epsilon = torch.rand(len(real), 1, 1, 1, device=real.device)
    x_hat = (epsilon * real + (1 - epsilon) * fake).detach().requires_grad_()
    scores = critic(x_hat)
    (gradient,) = torch.autograd.grad(scores, x_hat, torch.ones_like(scores), create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(fake).mean() - critic(real).mean() + penalty_weight * penalty


def baseline_generator_update(
    wgan: models.WGAN, batches: Iterator[dgr.Pairs], old: dgr.Scholar | None, *, mixed: bool = False
) -> None:
    for _ in range(wgan.critic_updates):
        x, _ = next(batches)
        if mixed:
            current = int((torch.rand(len(x)) < R).sum())
            x = torch.cat([x[:current], baseline_inputs(old, len(x) - current)])
        fake = wgan.net(wgan.noise(len(x)))
        loss = baseline_critic_loss(wgan.critic, x, fake, wgan.penalty_weight)
        if old is not None and not mixed:
            x_replayed = baseline_inputs(old, len(x))
            fake = wgan.net(wgan.noise(len(x)))
            replayed = baseline_critic_loss(wgan.critic, x_replayed, fake, wgan.penalty_weight)
            loss = R * loss + (1 - R) * replayed
        models.step(wgan.critic_optimiser, loss)
        wgan.optimiser.zero_grad()
    models.step(wgan.optimiser, -wgan.critic(wgan.net(wgan.noise(len(x)))).mean())


def baseline_solver_update(solver: models.CNN, batches: Iterator[dgr.Pairs], old: dgr.Scholar | None) -> None:
    x, y = next(batches)
    loss = F.cross_entropy(solver.net(x), y)
    if old is not None:
        x_replayed, y_replayed = baseline_replay(old, len(x))
        loss = R * loss + (1 - R) * F.cross_entropy(solver.net(x_replayed), y_replayed)
    models.step(solver.optimiser, loss)


def baseline_testing(solver: dgr.Solver, images: BaselineImages, options: main.Options, device: torch.device) -> float:
    right = 0
    with torch.no_grad():
        for x, y in DataLoader(images, options.batch_size):
            right += int((solver.net(x.to(device)).argmax(dim=1) == y.to(device)).sum())
    return right / len(images)


# ------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Seconds that work takes on a device, all of it done."""

    def __init__(self, device: torch.device):
        self.device = device

    def seconds(self, work: Callable[[], Any], times: int) -> float:
        """The mean over so many calls, one after another."""
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.wait()
        return (time.perf_counter() - start) / times

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def peak_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of this process's, that were in use at once so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_rates(clock: Clock, dtype: torch.dtype | None) -> tuple[float, float]:
    """Floating-point operations a second of a large matrix product, and bytes a second of a large copy."""
    n = 8192 if clock.device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=clock.device, dtype=dtype or torch.float32) for _ in range(2))
    block = torch.zeros(256 * 2**20, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(block)
    product = min(clock.seconds(lambda: a @ b, 3) for _ in range(5))
    copy = min(clock.seconds(lambda: target.copy_(block), 3) for _ in range(5))
    return 2 * n**3 / product, 2 * len(block) / copy


class Operations(TorchDispatchMode):
    """Counts floating-point operations; FlopCounterMode itself does not go with gradients of gradients."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def operations(work: Callable[[], Any], times: int) -> float:
    """Floating-point operations of one call."""
    with Operations() as counter:
        for _ in range(times):
            work()
    return counter.total / times


def profile(work: Callable[[], Any], times: int) -> dict[str, float]:
    """The shares of the time that the ten slowest of PyTorch's operators take on the CPU, without what they call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            work()
    seconds = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    slowest = sorted(seconds, key=seconds.get, reverse=True)[:10]
    return {key: seconds[key] / sum(seconds.values()) for key in slowest}


def our_ways(
    options: models.ScholarOptions,
    batch_size: int,
    split: data.Split,
    test: data.Split,
    device: torch.device,
    dtype: torch.dtype | None,
    block: int,
) -> dict[str, Callable[[], Any]]:
    """The parts of training by name. They run with the programs of earlier commits too."""
    ours = models.make_scholar(1, CLASSES, options, compute_dtype=dtype).to(device)
    how = {"iterations": sys.maxsize, "batch_size": batch_size}

    def replay() -> dgr.GenerativeReplay:
        mode = dgr.GenerativeReplay(ours, [split], dgr.Targets("hard"))
        mode.block = block
        return mode

    drawn = replay()
    return {
        "generator-update": partial(next, dgr.learn_generator(ours.generator, split, None, r=1.0, **how)),
        "generator-update-replay": partial(next, dgr.learn_generator(ours.generator, split, replay(), r=R, **how)),
        "generator-update-mixed": partial(next, dgr.learn_generator(ours.generator, split, replay(), r=R, **how)),
        "solver-update": partial(next, dgr.learn_solver(ours.solver, split, None, r=1.0, **how)),
        "solver-update-replay": partial(next, dgr.learn_solver(ours.solver, split, replay(), r=R, **how)),
        "replay-sampling": lambda: drawn.sample(batch_size),
        "batch": lambda: split.sample(batch_size),
        "testing": lambda: train.precision(ours.solver.remember(), test, block),
    }


def serve(device_and_formats: str, *flags: str) -> None:
    """Measure what standard input asks for, line by line, with the program that the environment names."""
    device, compute_dtype, block, precision, tf32 = json.loads(device_and_formats)
    dtype = getattr(torch, compute_dtype) if compute_dtype else None
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32
    options = main.parse(["--train", *flags])
    kind = models.ScholarOptions
    networks = kind(**{f.name: getattr(options, f.name) for f in fields(kind) if hasattr(options, f.name)})
    torch.manual_seed(options.seed)
    size = getattr(options, "image_size", 32)
    images = torch.randint(256, (IMAGES, 1, size, size), dtype=torch.uint8, device=device)
    split = data.Split(images, torch.randint(CLASSES, (IMAGES,), device=device))
    test = data.Split(split.images[:TEST_IMAGES], split.labels[:TEST_IMAGES])
    clock = Clock(torch.device(device))
    ways = our_ways(networks, options.batch_size, split, test, clock.device, dtype, block)
    for line in sys.stdin:
        name, times = line.split()
        print(clock.seconds(ways[name], int(times)), flush=True)


@contextlib.contextmanager
def program_of(
    commit: str, device: torch.device, dtype: torch.dtype | None, flags: list[str]
) -> Iterator[Callable[[str, int], float]]:
    """A function that measures a part of training, by name, with the program of an earlier commit."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True)
    if archive.returncode:
        raise utils.UserError(f"argument --against: git knows no commit {commit!r} here", status=2)
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        how = [device.type, str(dtype).split(".")[-1] if dtype else None, models.images_at_once(device)]
        how = json.dumps([*how, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32])
        command = [sys.executable, __file__, "serve", how, *flags]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env={**os.environ, "DGR_BENCHMARKED": directory}, **pipes) as process:

            def seconds(name: str, times: int) -> float:
                with contextlib.suppress(BrokenPipeError):
                    print(name, times, file=process.stdin, flush=True)
                if not (line := process.stdout.readline()):
                    raise utils.UserError(f"the program of {commit} ended: does it know these flags?")
                return float(line)

            try:
                yield seconds
            finally:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()


def measure(
    options: main.Options,
    repetitions: int,
    against: Callable[[str, int], float] | None = None,
    *,
    profiled: bool = False,
) -> list[dict[str, Any]]:
    device, dtype = models.choose(options)
    clock = Clock(device)
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    raw = random.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
    labels = random.integers(0, CLASSES, IMAGES)
    split = data.Split(
        data.fit(torch.from_numpy(raw)[:, None], options.image_size).to(device), torch.from_numpy(labels).to(device)
    )
    test = split.subset(TEST_IMAGES)
    baseline_images = BaselineImages(raw, labels, options.image_size)
    baseline_test = BaselineImages(raw[:TEST_IMAGES], labels[:TEST_IMAGES], options.image_size)

    eager_options = replace(options, cuda_graphs=False)
    block = models.images_at_once(device)
    where = split, test, device, dtype, block
    ours = our_ways(options, options.batch_size, *where)
    # A graph's operations can't be counted while it is replayed.
    counted = our_ways(eager_options, options.batch_size, *where) if options.cuda_graphs else ours
    baseline = make_baseline(models.make_scholar(1, CLASSES, eager_options).to(device), options)
    old = copy.deepcopy(baseline).eval().requires_grad_(False)
    batches = baseline_batches(baseline_images, options, device)
    baseline_ways: dict[str, Callable[[], Any]] = {
        "generator-update": lambda: baseline_generator_update(baseline.generator, batches, None),
        "generator-update-replay": lambda: baseline_generator_update(baseline.generator, batches, old),
        "generator-update-mixed": lambda: baseline_generator_update(baseline.generator, batches, old, mixed=True),
        "solver-update": lambda: baseline_solver_update(baseline.solver, batches, None),
        "solver-update-replay": lambda: baseline_solver_update(baseline.solver, batches, old),
        "replay-sampling": lambda: baseline_replay(old, options.batch_size),
        "batch": lambda: next(batches),
        "testing": lambda: baseline_testing(old.solver, baseline_test, options, device),
    }
    # So many calls that blocks of replayed pairs are drawn about as often as they are used up: a generator update takes
    # half a batch for each of its critic updates.
    a_block = 8 * -(-block // (8 * options.batch_size))
    updates = max(4, 2 * block // options.batch_size) if device.type == "cuda" else a_block // 2
    calls = {
        "generator-update": 2,
        "generator-update-replay": updates,
        "generator-update-mixed": updates,
        "solver-update": 4,
        "solver-update-replay": a_block,
        "replay-sampling": a_block,
        "batch": 200,
        "testing": 1,
    }
    warm_up = models.Captured.warm_up + 1 if options.cuda_graphs else 1
    seconds, ratios = {}, {}
    for name, times in tqdm(calls.items(), file=sys.stderr, disable=None):
        our_times, baseline_times, their_times = [], [], []
        for repetition in range(-1, repetitions):  # once before it counts
            our_times.append(clock.seconds(ours[name], times if repetition >= 0 else warm_up))
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):  # PyTorch's default, which ours changes
                baseline_times.append(clock.seconds(baseline_ways[name], max(1, times // 8) if repetition >= 0 else 1))
            their_times.append(against(name, times if repetition >= 0 else warm_up) if against else 0.0)
        seconds[name] = [statistics.median(times[1:]) for times in (our_times, baseline_times, their_times)]
        ratios[name] = statistics.median(b / a for a, b in zip(our_times[1:], their_times[1:], strict=True))
    peak = peak_memory(device)

    flops_limit, bytes_limit = peak_rates(clock, dtype)
    circumstances = {
        "repetitions": repetitions,
        "compute_dtype": models.dtype_name(dtype, device),
        "torch": torch.__version__,
        "commit": utils.commit(),
        "limit_gflop_per_s": flops_limit / 1e9,
        "limit_gb_per_s": bytes_limit / 1e9,
        "peak_memory_mib": peak / 2**20,
    }
    table = []
    for name, (our_seconds, baseline_seconds, their_seconds) in seconds.items():
        if name == "batch":  # reads uint8 pixels, writes them as uint8 and float32, and reads the first again
            pixels = options.batch_size * split.images[0].numel()
            share = pixels * (1 + 1 + 1 + 4) / our_seconds / bytes_limit
        else:
            share = operations(counted[name], calls[name]) / our_seconds / flops_limit
        row = {
            "name": name,
            "device": models.device_name(device),
            "ours_ms": our_seconds * 1000,
            "baseline_ms": baseline_seconds * 1000,
            "ratio": baseline_seconds / our_seconds,
            "limit_share": share,
        }
        if profiled:
            row["profile"] = profile(counted[name], calls[name])
        if against:
            row |= {"against_ms": their_seconds * 1000, "against_ratio": ratios[name]}
        table.append(row | circumstances)
        print(
            f"{name:<24} {1 / our_seconds:>9.1f} /s {row['ours_ms']:>10.3f} ms {row['baseline_ms']:>10.3f} ms "
            f"{row['ratio']:>7.1f} x {row['limit_share']:>7.1%} of the limit"
            + (f" {row['against_ms']:>10.3f} ms {row['against_ratio']:>7.2f} x" if against else "")
        )
    print(
        f"limits: {flops_limit / 1e9:.0f} GFLOP/s ({dtype or torch.float32}), {bytes_limit / 1e9:.1f} GB/s; "
        f"peak memory, baseline included: {peak / 2**20:.0f} MiB, of it data: {split.images.nbytes / 2**20:.0f} MiB"
    )
    return table


def run() -> None:
    parser = utils.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=utils.to_path, default="results/bench.json", help="(default: %(default)s)")
    parser.add_argument(
        "--repetitions",
        type=utils.number(1, kind=int),
        default=7,
        metavar="N",
        help="of each way (default: %(default)s)",
    )
    parser.add_argument("--against", metavar="COMMIT", help="measure the program of this commit too, in turn")
    parser.add_argument("--profile", action="store_true", help="tell which operators take our time, too")
    here, flags = parser.parse_known_args()
    options = main.parse(["--train", *flags])
    models.check_machine(options)
    if options.generator != "wgan":
        parser.error(f"argument --generator: there is no baseline for {options.generator} to compare with")
    if options.batch_size > IMAGES:
        parser.error(f"argument --batch-size: there are {IMAGES} images")
    device = models.choose_device(gpus=not options.no_gpus)
    print(f"{models.device_name(device)}, torch {torch.__version__}, commit {utils.commit()}")
    print(f"{'':<24} {'ours':>12} {'ours':>13} {'baseline':>13} {'ratio':>9}")
    dtype = models.choose_dtype(options.dtype, device, cuda_graphs=options.cuda_graphs)
    with program_of(here.against, device, dtype, flags) if here.against else contextlib.nullcontext() as against:
        table = measure(options, here.repetitions, against, profiled=here.profile)
    for row in table if here.against else ():
        row["against_commit"] = here.against
    utils.write_json(here.output, table)
    print(f"table: {here.output}")


if __name__ == "__main__" and sys.argv[1:2] == ["serve"]:
    serve(*sys.argv[2:])
elif __name__ == "__main__":
    utils.run_program(run)
