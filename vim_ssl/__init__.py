"""vim_ssl: Vision Mamba encoders pretrained without labels and moved to any vision task.

>>> import vim_ssl
>>> encoder = vim_ssl.load_encoder("vim_tiny_patch16_224")
>>> features = encoder(images)                      # (b, embed_dim)
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path


def _register_sibling_folders() -> None:
    """Make the checkout's kernels/, recipes/ and downstream/ importable as vim_ssl.<name>.

    In a wheel they already lie inside the package. In a checkout they stand beside it, without an
    ``__init__.py``, because other packages own those names at the top level. Registering exactly
    these three keeps ``vim_ssl.tests``, ``vim_ssl.setup`` and a second ``vim_ssl.vim_ssl`` out.
    """
    package = Path(__file__).resolve().parent
    for name in ("kernels", "recipes", "downstream"):
        folder = package.parent / name
        if (package / name).is_dir() or not folder.is_dir():
            continue
        spec = ModuleSpec(f"{__name__}.{name}", loader=None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        setattr(sys.modules[__name__], name, module)


_register_sibling_folders()

from vim_ssl.checkpoints.loading import load_encoder, save_encoder  # noqa: E402
from vim_ssl.data.transforms.image import create_transform  # noqa: E402
from vim_ssl.models.encoder import VimEncoder  # noqa: E402
from vim_ssl.objectives.clip import load_clip  # noqa: E402
from vim_ssl.utils.environment import __version__

__all__ = [
    "VimEncoder",
    "__version__",
    "create_transform",
    "load_clip",
    "load_encoder",
    "save_encoder",
]
