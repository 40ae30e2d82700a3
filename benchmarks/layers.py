#!/usr/bin/env python3
"""How fast each way of computing a convolution is on this CPU, layer by layer: what `models.choose_way` goes by.

    benchmarks/layers.py                   in the number format that main.py would choose here
    benchmarks/layers.py --dtype=float32   in another one

Milliseconds of a solver's and a generator's layers at the default and the quick widths, without gradients and with both
(of inputs and weight). The ways take turns; each number is the least of so many repetitions. Writes
`results/layers.json`.
"""

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import utils

SOLVER = [(64, 32, 128, 256), (64, 16, 256, 512), (64, 8, 512, 1024), (128, 32, 32, 64), (128, 16, 64, 128)]
SOLVER += [(64, 8, 128, 256), (128, 8, 128, 256)]  # images, their height and width, channels in and out
GENERATOR = [(32, 4, 512, 256), (32, 8, 256, 128), (32, 16, 128, 64), (64, 4, 128, 64), (64, 8, 64, 32)]
GENERATOR += [(64, 16, 32, 16)]


def ways(layer: nn.Module, dtype: torch.dtype) -> dict[str, models.Products | None]:
    window = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    known = {"PyTorch": None, "product for the weight's gradient": models.Direct(*window)}
    if dtype == torch.float32 and layer.kernel_size == (4, 4):
        return known | {"nine products": models.NineProducts()}
    return known | {"one product": models.Patches(*window)}


def measure(layer: nn.Module, n: int, side: int, dtype: torch.dtype, repetitions: int) -> dict[str, dict[str, float]]:
    """Milliseconds without and with gradients for each way."""
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(n, layer.in_channels, side, side, dtype=dtype).to(memory_format=torch.channels_last)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return layer(x)

    gradient = torch.randn_like(forward())

    def draw() -> None:
        with torch.no_grad():
            forward()

    def learn() -> None:
        layer.zero_grad()
        x.grad = None
        x.requires_grad_()
        forward().backward(gradient)
        x.requires_grad_(False)

    known, choose = ways(layer, dtype), models.choose_way
    table = {name: {"forward": float("inf"), "gradients": float("inf")} for name in known}
    try:
        for _, (name, way) in itertools.product(range(repetitions + 1), known.items()):
            models.choose_way = lambda *_, way=way: way
            for kind, work in (("forward", draw), ("gradients", learn)):
                table[name][kind] = min(table[name][kind], milliseconds(work))
    finally:
        models.choose_way = choose
    return table


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def run() -> None:
    parser = utils.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=utils.to_path, default="results/layers.json", help="(default: %(default)s)")
    parser.add_argument("--repetitions", type=utils.number(1, kind=int), default=15, metavar="N", help="of each way")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: %(default)s)"
    )
    options = parser.parse_args()
    device = torch.device("cpu")
    dtype = models.choose_dtype(options.dtype, device) or torch.float32
    rows = []
    for threads, (n, side, c_in, c_out) in itertools.product(
        sorted({1, torch.get_num_threads()}), [*SOLVER, *GENERATOR]
    ):
        torch.set_num_threads(threads)
        transposed = c_in > c_out
        kind, k = (models.TransposedConvolution, 4) if transposed else (models.Convolution, 3)
        table = measure(kind(c_in, c_out, k, stride=2, padding=1, bias=False), n, side, dtype, options.repetitions)
        places = n * (side if transposed else side // 2) ** 2
        row = {"layer": f"{kind.__name__} {c_in} to {c_out}, {n} x {side} x {side}", "threads": threads}
        rows.append(row | {"places_per_channel": places / max(c_in, c_out), "milliseconds": table})
        print(f"{row['layer']}, {threads} threads, {rows[-1]['places_per_channel']:g} places per channel")
        for name, times in table.items():
            print(f"    {name:<36} forward {times['forward']:8.2f}   with gradients {times['gradients']:8.2f}")
    circumstances = {"dtype": models.dtype_name(None if dtype == torch.float32 else dtype, device)}
    circumstances |= {"torch": torch.__version__, "commit": utils.commit(), "repetitions": options.repetitions}
    utils.write_json(options.output, circumstances | {"layers": rows})
    print(f"table: {options.output}")


if __name__ == "__main__":
    utils.run_program(run)
