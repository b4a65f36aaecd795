"""Set up accelerate and the moving average."""

import copy
import os
from datetime import timedelta

import torch
from torch import nn

from vim_ssl.training.config import TrainConfig
from vim_ssl.training.optim import check_step
from vim_ssl.utils import openmp
from vim_ssl.utils.allocator import keep_freed_memory
from vim_ssl.utils.cores import cores

TIMEOUT = timedelta(hours=2)  # for ranks waiting while rank 0 evaluates; NCCL's default is 10 min


def make_accelerator(config: TrainConfig):
    """Return accelerate's Accelerator for this configuration.

    Raises: ValueError if the launcher's processes are not connected, for several processes with
        ``eval_only``, for a precision that the device does not support, and for ``ema`` under FSDP.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and getattr(config, "eval_only", False):
        raise ValueError(
            f"--eval-only runs in one process, but the launcher started {world}; start it without "
            "a launcher."
        )
    # Launchers set OMP_NUM_THREADS=1, which would leave a single process on one core.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.threads or max(cores() // local, 1))
    if world > 1 and not torch.cuda.is_available():
        # Without this, accelerate finds no GPU and every process trains alone.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != config.precision:
        AcceleratorState._reset_state()  # an earlier run of this process had another precision
    timeout = InitProcessGroupKwargs(timeout=TIMEOUT)
    accelerator = Accelerator(mixed_precision=config.precision, kwargs_handlers=[timeout])
    # A second Accelerator in a process would keep the plugin of the first.
    backend = "inductor" if config.compile else None
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=backend)
    if world != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {world} processes but accelerate sees "
            f"{accelerator.num_processes}: each would train alone and write the same files. "
            "Check `accelerate env` and the launcher's flags."
        )
    if config.precision != "no" and not accelerator.native_amp:
        raise ValueError(
            f"precision {config.precision} is not active on this device ({accelerator.device.type})"
            ": autocast and the loss scaler of fp16 need a GPU; use --precision bf16 or no."
        )
    if config.ema and accelerator.distributed_type == "FSDP":
        raise ValueError(
            "ema keeps a full copy of the encoder, which FSDP shards; use --ema 0, or DDP."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        openmp.remark_on_spinning()
    check_step(config, accelerator.device)
    if accelerator.is_main_process:
        for remark in unused_settings(config, accelerator.distributed_type):
            print(remark, flush=True)
    return accelerator


def unused_settings(config: TrainConfig, distributed_type: str) -> list[str]:
    """Return a sentence about each setting of ``accelerate launch`` that a run does not use."""
    env, remarks = os.environ, []
    precision = env.get("ACCELERATE_MIXED_PRECISION", config.precision).lower()
    if precision not in ("no", config.precision):
        remarks.append(
            f"The launcher's mixed_precision {precision} is not used, but --precision "
            f"{config.precision}."
        )
    steps = env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto", str(config.accumulation)):
        remarks.append(
            f"The launcher's gradient_accumulation_steps {steps} is not used, but --accumulation "
            f"{config.accumulation}."
        )
    backend = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no" and not config.compile:
        remarks.append(f"The launcher's dynamo_backend {backend} is not used; --compile is off.")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        requested = env.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes")
        if requested and str(getattr(distributed_type, "value", distributed_type)) != name:
            remarks.append(f"The launcher's {name} settings are not used on this device.")
    launched = "ACCELERATE_MIXED_PRECISION" in env
    if launched and "MASTER_ADDR" in env and "WORLD_SIZE" not in env:
        # accelerate starts several processes on CPUs only through mpirun.
        remarks.append(
            "The launcher started one process instead of several; use torchrun --nproc_per_node N, "
            "or accelerate's --multi_gpu on GPUs."
        )
    return remarks


class Average:
    """The moving average of ``model``, an encoder or an objective with its heads.

    The decay rises with the steps, 1 - step^(-2/3), until it reaches ``decay``, as in timm's
    ModelEmaV3. ``module`` is the averaged copy; its frozen parameters are exactly those of the
    model.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        tensors = model.state_dict(keep_vars=True)  # by the names of `update`
        self._frozen = {
            name
            for name, x in tensors.items()
            if isinstance(x, nn.Parameter) and not x.requires_grad
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after optimiser step ``step`` = 1, 2, …"""
        weight = 1 - min(1 - float(step) ** (-2 / 3), self.decay)
        now, averaged = self.model.state_dict(), self.module.state_dict()
        floats = []
        for name in now:
            if name in self._frozen:
                continue
            if now[name].is_floating_point():
                floats.append(name)
            else:
                averaged[name].copy_(now[name])
        torch._foreach_lerp_([averaged[n] for n in floats], [now[n] for n in floats], weight)


def make_average(model: nn.Module, config: TrainConfig) -> Average | None:
    """Return the average that ``config.ema`` requests, if any."""
    return Average(model, config.ema) if config.ema else None
