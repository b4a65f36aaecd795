"""The selective scan of Mamba (arXiv:2312.00752), one-directional and bidirectional.

Start with `reference.py`, which implements it as a plain loop.
"""

from vim_ssl.kernels.backends import available_backends
from vim_ssl.kernels.selective_scan.dispatch import bi_selective_scan, selective_scan

__all__ = ["available_backends", "bi_selective_scan", "selective_scan"]
