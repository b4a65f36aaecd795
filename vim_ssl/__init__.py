"""vim_ssl: Vision Mamba encoders, pretrained without labels and transferred to any vision task.

>>> import vim_ssl
>>> encoder = vim_ssl.load_encoder("vim_tiny_patch16_224")
>>> features = encoder(images)                      # (b, embed_dim)

Public names are imported on first use, so that importing the package (and printing the command's
help) does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vim_ssl.utils.openmp import prepare_openmp

from vim_ssl.utils.environment import __version__
from vim_ssl.utils.registration import import_after, register_folders

if TYPE_CHECKING:
    from vim_ssl.api import (
        clip_pretrain,
        detection,
        embed,
        finetune,
        knn,
        linear_probe,
        list_models,
        predict,
        pretrain,
        segmentation,
        trial,
        zero_shot,
    )
    from vim_ssl.checkpoints.loading import create_transform, load_encoder, save_encoder
    from vim_ssl.data.sources.memory import register_data
    from vim_ssl.models.encoder import VimEncoder
    from vim_ssl.objectives.clip import load_clip
    from vim_ssl.results import Run
    from vim_ssl.tasks.detection import load_detection
    from vim_ssl.tasks.models import load_classifier, load_model
    from vim_ssl.tasks.segmentation import load_segmentation

__all__ = [
    "Run",
    "VimEncoder",
    "__version__",
    "clip_pretrain",
    "create_transform",
    "detection",
    "embed",
    "finetune",
    "knn",
    "linear_probe",
    "list_models",
    "load_classifier",
    "load_clip",
    "load_detection",
    "load_encoder",
    "load_model",
    "load_segmentation",
    "predict",
    "pretrain",
    "register_data",
    "save_encoder",
    "segmentation",
    "trial",
    "zero_shot",
]
# Public name -> the module that defines it.
_DEFINED_IN = {
    "Run": "vim_ssl.results",
    "VimEncoder": "vim_ssl.models.encoder",
    "clip_pretrain": "vim_ssl.api",
    "create_transform": "vim_ssl.checkpoints.loading",
    "detection": "vim_ssl.api",
    "embed": "vim_ssl.api",
    "finetune": "vim_ssl.api",
    "knn": "vim_ssl.api",
    "linear_probe": "vim_ssl.api",
    "list_models": "vim_ssl.api",
    "load_classifier": "vim_ssl.tasks.models",
    "load_clip": "vim_ssl.objectives.clip",
    "load_detection": "vim_ssl.tasks.detection",
    "load_encoder": "vim_ssl.checkpoints.loading",
    "load_model": "vim_ssl.tasks.models",
    "load_segmentation": "vim_ssl.tasks.segmentation",
    "predict": "vim_ssl.api",
    "pretrain": "vim_ssl.api",
    "register_data": "vim_ssl.data.sources.memory",
    "save_encoder": "vim_ssl.checkpoints.loading",
    "segmentation": "vim_ssl.api",
    "trial": "vim_ssl.api",
    "zero_shot": "vim_ssl.api",
}


if not TYPE_CHECKING:  # otherwise type checkers would accept any attribute of the package

    def __getattr__(name: str) -> Any:
        """Import a public name, or a subpackage such as vim_ssl.models, on first use (PEP 562)."""
        if name in _DEFINED_IN:
            return getattr(import_module(_DEFINED_IN[name]), name)
        if not name.startswith("_"):
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


prepare_openmp()  # before torch is imported
register_folders(__name__, "kernels", "recipes", "downstream")
import_after("timm", "vim_ssl.checkpoints.timm_registry")  # adds the presets
