"""Compute the instruction cost of the Triton scan on an H100 or H200 without such a GPU.

    python benchmarks/sm90.py            # a table, or --json

Compiles the kernels for sm_90 with Triton's ptxas and counts registers per thread, bytes of spilled
registers, and the loop instructions per element (one step of one state of 32 channels, the unit of
the lower bounds in benchmarks/README.md). A special-function instruction takes 8 cycles of a
scheduler, any other takes one. Nothing is executed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before the import: the kernels must be compiled

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vim_ssl.kernels.selective_scan import triton_kernels

N, EVERY, GROUP = 16, 8, 4
FLAGS = {"SOFTPLUS": True, "HAS_D": True, "HAS_Z": True, "HAS_BIAS": True}
BFLOAT16 = ("u", "delta", "z", "out", "dout", "B", "C", "du", "ddelta", "dz")
ALIGNED = re.compile(r"d|\w+_ptr|(u|delta|B|C|z)_[sbl]")  # multiples of 16


def compile_kernel(function, constants: dict, num_warps: int) -> dict:
    """Return registers, spilled bytes, and instructions of each loop, nested loops first."""
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
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(tools / "cuobjdump", "-res-usage", cubin)
        listing = _run(tools / "nvdisasm", "-c", cubin)
    registers, stack = re.findall(r"REG:(\d+).*?STACK:(\d+)", usage)[0]
    return {"registers": int(registers), "spilled": int(stack), "loops": _loops(listing)}


def _type(name: str) -> str:
    if name in ("scale", "zero"):
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


def forward(channels: int) -> dict:
    """Cost of one scan for inference with this many ``channels`` per lane."""
    constants = FLAGS | {"S": 2, "N": N, "C": channels, "EVERY": EVERY, "HAS_START": False,
                         "SAVE": False, "KEEP_SUM": False}  # fmt: skip
    counts = compile_kernel(triton_kernels.forward_kernel, constants, num_warps=2)
    until_middle, beyond = counts.pop("loops")
    return counts | {"per_element": (until_middle + beyond) / 2 / (N * channels)}


def backward() -> dict:
    """Cost of the backward scan. On average half of the tokens are recomputed from saved states."""
    constants = FLAGS | {"N": N, "TILE": N, "K": GROUP, "EVERY": EVERY, "HAS_CARRY": False}
    counts = compile_kernel(triton_kernels.backward_kernel, constants, num_warps=1)
    to_group, whole = counts.pop("loops")
    again = sum(range(EVERY // GROUP)) * GROUP / EVERY  # of the tokens
    return counts | {"per_element": (whole - to_group) / (N * GROUP) + again * to_group / N}


KERNELS = {
    "forward, 2 channels a lane": lambda: forward(2),
    "forward, 1 channel a lane": lambda: forward(1),
    "backward": backward,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    rows = {name: count() for name, count in KERNELS.items()}
    if args.json:
        print(json.dumps({"triton": triton.__version__, "kernels": rows}))
        return 0
    print(f"Triton {triton.__version__}, sm_90, bfloat16, d_state {N}")
    for name, row in rows.items():
        print(f"{name:28} {row['registers']:4} registers {row['spilled']:4} bytes spilled "
              f"{row['per_element']:6.2f} instructions per element")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
