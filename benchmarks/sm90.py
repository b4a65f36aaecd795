"""Compute the instruction cost of the Triton scan on an H100 or H200 without such a GPU.

    python benchmarks/sm90.py                           # every variant, 5 minutes; appends rows
    python benchmarks/sm90.py --only backward --states 16 --json     # prints rows, appends none

Compiles the kernels for sm_90 with Triton's ptxas and counts registers per thread, bytes of spilled
registers, and the loop instructions per element (one step of one state of 32 channels, the unit of
the lower bounds in benchmarks/README.md). A special-function instruction takes 8 cycles of a
scheduler, any other takes one. Nothing is executed. A state is counted without the zeros that fill
it up, and a branch that one direction takes is counted in full. For each token, the backward pass
recomputes (EVERY / K - 1) / 2 others on average, from a saved state up to a group of K.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before the import: the kernels must be compiled

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
import triton
import triton.language as tl
from rows import ORIGIN, append_rows, markdown_table, origin, results_parser
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vim_ssl.kernels.selective_scan import triton_backend, triton_backward, triton_kernels

FILE = "sm90.csv"
COUNTS = ("triton", "kernel", "d_state", "variant", "tokens", "warps", "every", "registers",
          "spilled_bytes", "instructions_per_element", "compile_cpu_s")  # fmt: skip
KERNELS = ("forward", "training", "backward")  # training: the forward pass that saves states
# Sizes at the ends of the launcher's rows: the best and the worst of each.
STATES = {"forward": (1, 8, 16, 33, 64), "training": (1, 8, 16, 33, 64),
          "backward": (16, 1, 2, 3, 4, 5, 6, 7, 8, 17, 32, 33, 40, 41, 64)}  # fmt: skip
FLAGS = {"SOFTPLUS": True, "HAS_D": True, "HAS_Z": True, "HAS_BIAS": True}
BFLOAT16 = ("u", "delta", "z", "out", "dout", "B", "C", "du", "ddelta", "dz")
ALIGNED = re.compile(r"d|\w+_ptr|(u|delta|z)_[sbl]")  # multiples of 16


def compile_kernel(function, constants: dict, num_warps: int) -> dict:
    """Return registers, spilled bytes, CPU seconds of compilation, and the number of instructions
    of each loop, nested loops first."""
    signature, attributes = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = _type(name)
        if ALIGNED.fullmatch(name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": num_warps}
    before = sum(os.times()[:4])
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    seconds = sum(os.times()[:4]) - before
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
        listing = _run(tools / "nvdisasm", "-c", cubin)
    registers, stack = re.findall(r"REG:(\d+).*?STACK:(\d+)", usage)[0]
    return {"registers": int(registers), "spilled_bytes": int(stack),
            "compile_cpu_s": round(seconds, 1), "loops": _loops(listing)}  # fmt: skip


def _type(name: str) -> str:
    if name == "scale":
        return "fp32"
    if name == "bc_ptr":
        return "*i64"
    if name.endswith("_ptr"):
        return "*bf16" if name.removesuffix("_ptr") in BFLOAT16 else "*fp32"
    return "i32"


def _run(*command) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def _loops(listing: str) -> list[int]:
    """Return the number of instructions between each backward branch and its target."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        start = labels.get(target[1], end) if target else end
        if start < end - 8:  # a shorter loop is the trap after the kernel's end
            loops.append(end + 1 - start)
    return loops


def forward(n: int, channels: int, save: bool) -> dict:
    """Cost of a scan with this many ``channels`` per lane."""
    every = triton_backend.EVERY
    constants = FLAGS | {"S": 2, "N": n, "C": channels, "EVERY": every, "HAS_START": False,
                         "SAVE": save, "KEEP_SUM": save}  # fmt: skip
    counts = compile_kernel(triton_kernels.forward_kernel, constants, num_warps=2)
    until_middle, beyond = counts.pop("loops")
    return counts | {
        "variant": f"{channels} channels a lane", "tokens": 1, "warps": 2, "every": every,
        "instructions_per_element": round((until_middle + beyond) / 2 / (n * channels), 2),
    }  # fmt: skip


def backward(n: int) -> dict:
    chosen = triton_backend.variant(n)
    groups, channels, tokens = chosen
    every = triton_backend.EVERY
    constants = FLAGS | {"N": n, "G": groups, "X": channels, "K": tokens, "EVERY": every,
                         "HAS_CARRY": False, "OFFSET": tl.int32}  # fmt: skip
    counts = compile_kernel(triton_backward.backward_kernel, constants, num_warps=1)
    *to_group, whole = counts.pop("loops")
    again = sum(to_group)  # one token, if any is recomputed
    each = (whole - again) / tokens + again * (every - tokens) / 2 / tokens
    return counts | {
        "variant": f"{groups} groups, {channels} channels a lane",
        "tokens": tokens, "warps": 1, "every": every,
        "instructions_per_element": round(each / (n * channels / groups), 2),
    }  # fmt: skip


def variants(kernel: str, n: int) -> Iterator[dict]:
    """Count every variant of ``kernel`` that is used for a state of ``n``."""
    if kernel == "backward":
        yield backward(n)
        return
    most = triton_backend.channels_per_lane(sys.maxsize, n, torch.device("cpu"))
    for channels in range(most, 0, -1):
        yield forward(n, channels, save=kernel == "training")


def main() -> int:
    parser = results_parser(__doc__, FILE)
    parser.add_argument("--only", nargs="+", choices=KERNELS, default=KERNELS, help="kernels")
    parser.add_argument("--states", nargs="+", type=int, metavar="N", help="sizes of the state")
    parser.add_argument("--json", action="store_true", help="print JSON and append no rows")
    args = parser.parse_args()
    if not args.json:
        os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # to time it
    source = {} if args.json else origin()
    counted = []
    for kernel in args.only:
        for n in args.states or STATES[kernel]:
            for row in variants(kernel, n):
                row = {"triton": triton.__version__, "kernel": kernel, "d_state": n, **row}
                counted.append(row)
                if not args.json:
                    append_rows(args.out / FILE, (*ORIGIN, *COUNTS), [source | row])
    if args.json:
        print(json.dumps(counted))
    else:
        print(markdown_table(COUNTS, ([str(row[name]) for name in COUNTS] for row in counted)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
