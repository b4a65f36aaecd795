"""The sections `machine`, `correctness` and `tests` of `gpu_check.py`."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import compiles
import torch
from rows import ORIGIN
from section import Section, apart

ROOT = Path(__file__).parents[2]
ACCURACY_COLUMNS = (*ORIGIN, "case", "dtype", "backend", "quantity", "error", "holds")
CEILING_COLUMNS = (*ORIGIN, "exp2_per_s", "fma_per_s", "copied_bytes_per_s", "sm_clock_mhz")
TEST_COLUMNS = (*ORIGIN, "quantity", "test", "backend", "holds")
PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "numba", "accelerate", "pytest")


# --- machine ---------------------------------------------------------------------------------


def machine(section: Section) -> None:
    """Versions, ceilings, and the lower bounds that follow for the scan."""
    import ceilings
    import timing

    for name, value in section.origin.items():
        section.say(f"{name}: {value}")
    section.say(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    for command in (["nvidia-smi"], ["nvcc", "--version"]):
        with suppress(OSError, subprocess.TimeoutExpired):
            print(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout)
    rates = ceilings.measure(section.device, steps=1 if section.dry else 2000)
    section.row("ceilings.csv", CEILING_COLUMNS, section.origin | {
        "exp2_per_s": f"{rates.exp2:.4g}", "fma_per_s": f"{rates.fma:.4g}",
        "copied_bytes_per_s": f"{rates.copied:.4g}", "sm_clock_mhz": rates.sm_clock_mhz,
    }, "ceilings:")  # fmt: skip
    for shape in () if section.dry else timing.CUDA_SHAPES:
        floors = [rates.floor_ms(way, **vars(shape)) for way in ("forward", "backward")]
        section.say(f"{shape!s:22} floor forward {floors[0]:.4f} ms, backward {floors[1]:.4f} ms")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is missing"


# --- correctness -----------------------------------------------------------------------------

# The encoder of the comparison with float64: relative errors of the features and of the gradients.
ENCODER_BOUNDS = {"fp32": 1e-4, "bf16": 5e-2}
SLOW_TO_COMPILE = "n64"  # in the names of tests
# A line of pytest -v, with xdist and without.
OUTCOME = re.compile(
    r"^\[gw\d+\] \[ *\d+%\] (?P<outcome>[A-Z]+) (?P<test>tests/.*)$"
    r"|^(?P<name>tests/\S+::.*?) (?P<result>[A-Z]+)\b.*\[ *\d+%\]$"
)


def correctness(section: Section) -> None:
    """Errors of the Triton scan and of an encoder against float64, and the tests marked gpu.

    They run in several processes, because most of their time is spent on compiling. Long sequences,
    the torch backend and the largest states come last.
    """
    from vim_ssl.kernels.selective_scan import accuracy

    names, skipped = accuracy.runnable(section.device)
    for line in skipped:
        section.say(line)
    cases = sorted(accuracy.CASES, key=lambda case: case.l)
    encoders: list[tuple] = [("encoder", (dtype, 224)) for dtype in ENCODER_BOUNDS]
    if section.dry:
        cases, encoders = [case for case in cases if case.small][:1], [("encoder", ("fp32", 32))]
    checked = [*cases, "zeros", "non-finite"] if "triton" in names else []
    tasks = encoders + [("triton", what) for what in checked]
    rest = [(name, case) for case in cases for name in names
            if name not in ("triton", "reference") and not case.long]  # fmt: skip
    _accuracy(section, tasks, share=0.6)
    _tests(section, "gpu", ["-m", "gpu", "-k", f"not {SLOW_TO_COMPILE}"])
    _accuracy(section, rest)
    if not section.dry:
        _tests(section, "gpu", ["-m", "gpu", "-k", SLOW_TO_COMPILE])


def _accuracy(section: Section, tasks: list[tuple], share: float = 1.0) -> None:
    try:
        for row, compilations in apart(section, measure_accuracy, tasks, share):
            for one in compilations:
                section.compiled(one)
            _write_errors(section, row)
    except TimeoutError:
        section.cut_off("errors against float64")


def _write_errors(section: Section, row) -> None:
    common = section.origin | {"case": row.case, "dtype": row.dtype, "backend": row.backend}
    cells = {name: (f"{error:.2e}", name in row.broken) for name, error in row.errors.items()}
    cells["two runs" if row.errors else "note"] = row.note, "note" in row.broken
    for quantity, (error, broken) in cells.items():
        section.row("accuracy.csv", ACCURACY_COLUMNS, common | {
            "quantity": quantity, "error": error, "holds": not broken,
        })  # fmt: skip
    section.say(_described(row))
    for name, expected in row.broken.items():
        section.fail(f"{name} {row.errors.get(name, row.note)}; expected {expected}")


def _described(row) -> str:
    worst = max(row.errors, key=row.errors.get, default=None)
    errors = f"y {row.errors['y']:.0e}, largest {worst} {row.errors[worst]:.0e}" if worst else ""
    return f"{row.case:38} {row.dtype:5} {row.backend:8} {errors}  {row.note}"


def measure_accuracy(device: str, backend: str, what) -> tuple:
    """Return the `accuracy.Row` of a case and the compilations that it needed."""
    from vim_ssl.kernels.selective_scan import accuracy

    special = {"zeros": accuracy.measure_zeros, "non-finite": accuracy.measure_non_finite}
    compilations: list[compiles.Compilation] = []
    with compiles.heard(compilations.append):
        if backend == "encoder":
            row = _encoder_errors(device, *what)
        elif what in special:
            row = special[what](backend, device)
        else:
            row = accuracy.measure(what, backend, device)
    return row, compilations


def _encoder_errors(device: str, dtype: str, px: int):
    """Two blocks with every kernel that they use, against the same in float64 on the CPU.

    The error of the gradients is that of all parameters together, and in float32 also the largest
    of one parameter.
    """
    import timm

    from vim_ssl.kernels.selective_scan.accuracy import Row, relative_error

    row = Row(f"encoder of 2 blocks, {px} px", dtype, "auto")

    def results(device: str, dtype: torch.dtype, autocast: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model("vim_tiny_patch16_224", img_size=px, depth=2, num_classes=10)
        x = torch.randn(2, 3, px, px).to(device, dtype)
        model = model.to(device, dtype)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = model(x)
        y.double().square().sum().backward()
        grads = {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {name: m.detach().double().cpu() for name, m in ({"y": y} | grads).items()}

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got, again = (results(device, torch.float32, dtype == "bf16") for _ in "12")
    os.environ["VIM_SSL_BACKEND"] = "torch"  # numba need not support this numpy
    try:
        exact = results("cpu", torch.float64, False)
    finally:
        del os.environ["VIM_SSL_BACKEND"]
    errors = {name: relative_error(got[name], exact[name]) for name in exact}
    row.errors = {"y": errors.pop("y"), "gradients": relative_error(*(
        torch.cat([m[name].flatten() for name in errors]) for m in (got, exact)
    ))}  # fmt: skip
    if dtype == "fp32":
        row.errors["one gradient"] = max(errors.values())
    bound = ENCODER_BOUNDS[dtype]
    row.broken = {name: f"at most {bound:.0e}" for name, error in row.errors.items()
                  if not error <= bound}  # fmt: skip
    same = all(torch.equal(got[name], again[name]) for name in got)
    row.note = "" if same else "two runs differ, which cuBLAS may cause"
    return row


def _tests(section: Section, kind: str, options: list[str]) -> None:
    """Run tests of the kernels in several processes; write a row for each as it ends.

    Args:
        kind: "gpu" for those marked so, which need a GPU; "kernels" for those that run in Triton's
            interpreter where there is none.
    """
    word = {"gpu": "mark.gpu", "kernels": "backend_helpers"}[kind]
    files = [str(path) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
             if word in path.read_text(encoding="utf-8")]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no",
               *options]  # fmt: skip
    if not section.dry and find_spec("xdist"):
        command += ["-n", str(min(os.cpu_count() or 1, 12)), "--dist", "worksteal"]
    process = subprocess.Popen(
        [*command, *(files[:1] if section.dry else files)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in map(str.rstrip, process.stdout):
        if match := OUTCOME.search(line):
            outcome, test = match["outcome"] or match["result"], match["test"] or match["name"]
            holds = {"PASSED": True, "SKIPPED": ""}.get(outcome, False)
            section.row("tests.csv", TEST_COLUMNS, section.origin | {
                "quantity": kind, "test": test, "backend": "pytest", "holds": holds,
            })  # fmt: skip
            if holds is False:
                section.fail(f"{outcome} {test}")
        elif not line.startswith("tests/"):  # xdist's line of a test that begins
            section.say(line)
    if (code := process.wait()) not in (0, 1, 5):  # 1: a test failed; 5: no test has the name
        section.fail(f"pytest ended with {code}")
        section.cut = True


def tests(section: Section) -> None:
    """The tests that run in Triton's interpreter elsewhere; here they take the GPU."""
    _tests(section, "kernels", ["-m", "not gpu", *["-k", "refused"] * section.dry])
