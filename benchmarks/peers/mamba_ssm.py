"""A peer of the scan: the CUDA kernel of state-spaces/mamba, called twice as Vim calls it.

It is built here from its source distribution, without its Python code:

    pip download --no-binary :all: --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
    mkdir -p .peers/mamba_ssm
    tar xzf mamba_ssm-2.3.2.post1.tar.gz -C .peers/mamba_ssm --strip-components 1

    PYTHONPATH=. python benchmarks/peers/mamba_ssm.py        # build it in advance, minutes

Git ignores the folder .peers/. The build needs nvcc, a C++ compiler and ninja. It compiles the real
float32 and bfloat16 kernels, forward and backward, once for each version of torch.

One provider includes the flips that Vim makes (of x and z as inputs, of the backward direction's
output); the other calls the two kernels alone. Inputs are channel-first. Tensors that a model would
compute in flipped order (delta, B and C of the backward direction) are flipped beforehand, which is
not timed.
"""

import os
import sys
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # for `providers`

import torch
from providers import Provider
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / ".peers" / "mamba_ssm" / "csrc" / "selective_scan"
BUILD = ROOT / ".peers" / "build"
FILES = ("selective_scan_fwd_fp32.cu", "selective_scan_fwd_bf16.cu",
         "selective_scan_bwd_fp32_real.cu", "selective_scan_bwd_bf16_real.cu")  # fmt: skip
# Stand-ins for the kernels that are not built (float16 and complex numbers), for the linker.
STUBS = """
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>
#include "selective_scan.h"

#define NOT_BUILT TORCH_CHECK(false, "this dtype was not built")
template <typename input_t, typename weight_t>
void selective_scan_fwd_cuda(SSMParamsBase &params, cudaStream_t stream) { NOT_BUILT; }
template <typename input_t, typename weight_t>
void selective_scan_bwd_cuda(SSMParamsBwd &params, cudaStream_t stream) { NOT_BUILT; }

using c64 = c10::complex<float>;
template void selective_scan_fwd_cuda<at::Half, float>(SSMParamsBase &, cudaStream_t);
template void selective_scan_fwd_cuda<at::Half, c64>(SSMParamsBase &, cudaStream_t);
template void selective_scan_bwd_cuda<at::Half, float>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::Half, c64>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<at::BFloat16, c64>(SSMParamsBwd &, cudaStream_t);
template void selective_scan_bwd_cuda<float, c64>(SSMParamsBwd &, cudaStream_t);
"""
# As in the setup.py of the package.
NVCC = ["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda",
        *(f"-U__CUDA_NO_{what}__" for what in (
            "HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS",
            "BFLOAT162_OPERATORS", "BFLOAT162_CONVERSIONS"))]  # fmt: skip


@cache
def extension():
    """Build and return the module with ``fwd`` and ``bwd``.

    Raises: FileNotFoundError without the sources; any error of the compiler.
    """
    from torch.utils.cpp_extension import load

    if not SOURCES.is_dir():
        raise FileNotFoundError(
            f"no sources in {SOURCES}; the docstring of {Path(__file__).name} has the commands"
        )
    BUILD.mkdir(exist_ok=True)
    stubs = BUILD / "stubs.cpp"
    if not stubs.exists() or stubs.read_text() != STUBS:
        stubs.write_text(STUBS)
    sources = [str(stubs), str(SOURCES / "selective_scan.cpp"), *(str(SOURCES / f) for f in FILES)]
    os.environ.setdefault("MAX_JOBS", str(len(sources)))
    return load(
        "selective_scan_cuda", sources, extra_cflags=["-O3"], extra_cuda_cflags=NVCC,
        extra_include_paths=[str(SOURCES)], build_directory=str(BUILD), with_cuda=True,
    )  # fmt: skip


class OneWay(torch.autograd.Function):
    """u, delta, z (b, d, l), A (d, n), B, C (b, n, l), D, bias (d,) -> (b, d, l)."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias):
        B, C = B[:, None], C[:, None]  # one group
        out, x, gated = extension().fwd(u, delta, A, B, C, D, z, bias, True)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, x, out)
        return gated

    @staticmethod
    def backward(ctx, dout):
        u, delta, A, B, C, D, z, bias, x, out = ctx.saved_tensors
        du, ddelta, dA, dB, dC, dD, dbias, dz = extension().bwd(
            u, delta, A, B, C, D, z, bias, dout.contiguous(), x, out, None, True, False
        )
        return du, ddelta, dA, dB[:, 0], dC[:, 0], dD, dz, dbias


def prepare(m: dict[str, Tensor], flips: bool) -> dict[str, Tensor]:
    """Channel-first tensors; the backward direction's flipped, except those that `scan` flips."""
    tensors = {}
    for i, name in enumerate(("ahead", "back")):
        one = {k: m[k][i].mT for k in ("u", "delta", "B", "C")}
        one |= {"z": m["z"].mT} | {k: m[k][i] for k in ("A", "D", "delta_bias")}
        for k in ("u", "delta", "B", "C", "z") if i else ():
            if not (flips and k in ("u", "z")):
                one[k] = one[k].flip(-1)
        tensors |= {f"{k}_{name}": v.contiguous() for k, v in one.items()}
    if flips:
        tensors["z_back"] = tensors["z_ahead"]
    return tensors


def scan(flips: bool, **m: Tensor) -> Tensor:
    """Tensors of `prepare` -> (b, d, l), or without flips the two outputs, (2, b, d, l)."""
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    ahead, back = ([m[f"{k}_{name}"] for k in order] for name in ("ahead", "back"))
    if not flips:
        return torch.stack([OneWay.apply(*ahead), OneWay.apply(*back)])
    back[0], back[6] = back[0].flip(-1), back[6].flip(-1)
    return OneWay.apply(*ahead) + OneWay.apply(*back).flip(-1)


def _raster(y: Tensor) -> Tensor:
    return (y[0] + y[1].flip(-1)).mT


def providers() -> list[Provider]:
    extension()
    return [
        Provider("mamba-ssm, flips", partial(scan, True), partial(prepare, flips=True),
                 lambda y: y.mT, capture=True),
        Provider("mamba-ssm, two calls alone", partial(scan, False), partial(prepare, flips=False),
                 _raster, capture=True),
    ]  # fmt: skip


if __name__ == "__main__":
    print(extension().__file__)
