"""How OpenMP, with which torch computes on a CPU, waits and how many threads it starts.

OpenMP's threads wait for each other after every operation, by default spinning: beside other work,
the waiting ones take the cores that the late ones need, and a training may become many times
slower. Asleep, they lose nothing. OpenMP reads its variables when torch is loaded, so `vim_ssl`
sets them when it is imported, and scripts import this module before torch.

GNU's OpenMP (Linux), LLVM's (macOS) and Intel's (Windows) read ``OMP_WAIT_POLICY``, each beside a
variable of its maker; only Linux is tested.
"""

import logging
import os
import sys

from vim_ssl.utils.cores import affinity, cores

log = logging.getLogger(__name__)

# What a user may set: the standard variable, GNU's, and, where GNU's is not torch's, LLVM's.
POLICIES: tuple[str, ...] = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
if sys.platform != "linux":
    POLICIES += ("KMP_BLOCKTIME",)
_too_late = False  # torch was loaded before


def prepare_openmp() -> None:
    """Let threads wait asleep, and start no more than a container allows; keep what the user set.

    The variables pass to the processes that this one starts.
    """
    global _too_late
    if not any(os.environ.get(name) for name in POLICIES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        _too_late = "torch" in sys.modules
    if (allowed := cores()) < affinity() and not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(allowed)


def remark_on_spinning() -> None:
    """Log, once per machine, that threads spin on a machine with more work than cores, because
    torch was loaded before `prepare_openmp`. Call it for work on the CPU, with its threads set."""
    global _too_late
    if not _too_late or not hasattr(os, "getloadavg"):  # not on Windows
        return
    if sys.modules["torch"].get_num_threads() == 1 or os.environ.get("LOCAL_RANK", "0") != "0":
        return  # one thread waits for no other
    load, machine = os.getloadavg()[0], os.cpu_count() or 1  # both of the whole machine
    if load > machine:
        _too_late = False
        log.warning(
            "torch was imported before vim_ssl, so its threads spin while they wait, and the "
            "machine has more work than cores (load %.1f, %d cores): training may be several times "
            "slower. Import vim_ssl first, or set OMP_WAIT_POLICY=passive before Python starts.",
            load, machine,
        )  # fmt: skip
