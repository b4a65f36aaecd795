"""The commands as functions, for notebooks and scripts.

>>> run = vim_ssl.pretrain("photos/", epochs=20)
>>> vim_ssl.linear_probe(run, (images, labels))        # images in memory: see `register_data`
>>> fitted = vim_ssl.finetune(run, {"train": train, "test": test})
>>> fitted.model().predict(image)

A function has the settings of its command as keyword arguments: ``--base-lr`` is ``base_lr=``. A
setting that is left out has the command's default. An encoder is a `Run`, a run directory, a
checkpoint, a preset, or a `VimEncoder`. Data are a data spec, a path, or images in memory; see
`vim_ssl.data.sources.memory.register_data`.

Errors are exceptions. Ctrl-C in a training saves its state and raises KeyboardInterrupt; the same
call with ``output=RUN, resume="auto"`` continues. Random generators, the number of threads and
accelerate's settings are as before after a call, and do not change its result.
"""

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from vim_ssl.results import Evaluation, Run
from vim_ssl.utils.environment import print_any_character
from vim_ssl.utils.names import did_you_mean

if TYPE_CHECKING:
    from vim_ssl.evaluation.embeddings import Embedded

F = TypeVar("F", bound=Callable[..., Any])
DATA = ("data", "test_data", "val")  # settings that are data specs
# Settings that a function lacks: with the first a script trains nothing; the others are of files.
HIDDEN = {"eval_only", "top_k", "probabilities", "threshold"}
PRETRAIN, CLIP = "vim_ssl.recipes.mim_pretrain", "vim_ssl.recipes.clip_pretrain"
FINETUNE, SEGMENTATION, DETECTION, LINEAR_PROBE, KNN, ZERO_SHOT, EMBED, PREDICT, TRIAL = (
    f"vim_ssl.downstream.{name}"
    for name in (
        "finetune", "segmentation", "detection", "linear_probe", "knn", "zero_shot", "embed",
        "predict", "trial",
    )
)  # fmt: skip


class Command:
    """A function whose ``**settings`` are those of a script.

    Its signature and documentation list them. They are read from the script on first use, which
    keeps the import of this module light.
    """

    def __init__(self, function: Callable[..., Any], script: str):
        functools.update_wrapper(self, function, set(functools.WRAPPER_ASSIGNMENTS) - {"__doc__"})
        self.function, self.script = function, script

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.function(*args, **settings)

    def __repr__(self) -> str:
        return f"<function vim_ssl.{self.function.__name__}>"

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        declared = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        return signature.replace(parameters=[*declared, *self._settings().values()])

    def _settings(self) -> dict[str, inspect.Parameter]:
        module = import_module(self.script)
        hints, declared = get_type_hints(module.Config), inspect.signature(self.function).parameters
        return {
            field.name: inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
                # A preset decides: there is no single default.
                default=... if hasattr(module, "PRESETS") else _default(field),
            )
            for field in _fields(module) if field.name not in declared
        }  # fmt: skip

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        module = import_module(self.script)
        helps = {field.name: field.metadata.get("help", "") for field in _fields(module)}
        lines = [inspect.cleandoc(self.function.__doc__ or ""), "", "Settings:"]
        for name, setting in self._settings().items():
            default = "" if setting.default is ... else f" (default: {setting.default!r})"
            lines.append(f"    {name}: {helps[name]}{default}")
        if presets := getattr(module, "PRESETS", None):
            texts = {
                name: (inspect.getdoc(f) or "").partition("\n")[0] for name, f in presets.items()
            }
            lines += ["Presets:", *(f"    {name}: {text}" for name, text in texts.items())]
        return "\n".join(lines)


def command(script: str) -> Callable[[F], F]:
    """Make the decorated function a `Command` of a script."""

    def decorate(function: F) -> F:
        wrapped: Any = Command(function, script)
        return wrapped

    return decorate


def _fields(module: ModuleType) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(module.Config) if field.name not in HIDDEN]


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# ---------------------------------------------------------------- training


@command(PRETRAIN)
def pretrain(data: Any = None, *, preset: str | None = None, **settings: Any) -> Run:
    """Pretrain an encoder on images without labels, as ``vim-ssl mim-pretrain`` does.

    Args:
        data: images; see `vim_ssl.api`. Without any, the demo's digits.
        preset: name of a preset; by default one for the data and the machine.
    Returns: the run, with ``encoder()``.
    """
    return _train(PRETRAIN, settings, data=data, preset=preset)


@command(CLIP)
def clip_pretrain(data: Any = None, *, preset: str | None = None, **settings: Any) -> Run:
    """Pretrain an encoder on images with captions, as ``vim-ssl clip-pretrain`` does.

    Args:
        data: images with captions, such as a list of {"image": …, "caption": …}.
        preset: name of a preset.
    Returns: the run, with ``encoder()``, and ``model()``, which finds images by words.
    """
    return _train(CLIP, settings, data=data, preset=preset)


@command(FINETUNE)
def finetune(
    encoder: Any = None, data: Any = None, *, preset: str | None = None, **settings: Any
) -> Run:
    """Fine-tune an encoder for classification, as ``vim-ssl finetune`` does.

    Args:
        encoder: see `vim_ssl.api`; by default the newest run under runs/.
        data: labelled images, with or without a test split; by default the run's training data.
        preset: name of a preset.
    Returns: the run, with ``model()``, and the test result in ``metrics``.
    """
    return _train(FINETUNE, settings, encoder=encoder, data=data, preset=preset)


@command(SEGMENTATION)
def segmentation(
    encoder: Any = None, data: Any = None, *, preset: str | None = None, **settings: Any
) -> Run:
    """Train an encoder to segment images, as ``vim-ssl segmentation`` does.

    Args:
        encoder: see `vim_ssl.api`; by default the newest run under runs/.
        data: images with masks, such as a list of (image, mask).
        preset: name of a preset.
    Returns: the run, with ``model()``, and the test result in ``metrics``.
    """
    return _train(SEGMENTATION, settings, encoder=encoder, data=data, preset=preset)


@command(DETECTION)
def detection(
    encoder: Any = None, data: Any = None, *, preset: str | None = None, **settings: Any
) -> Run:
    """Train an encoder to detect objects, as ``vim-ssl detection`` does.

    Args:
        encoder: see `vim_ssl.api`; by default the newest run under runs/.
        data: images with boxes: ``coco:FOLDER``.
        preset: name of a preset.
    Returns: the run, with ``model()``, and the test result in ``metrics``.
    """
    return _train(DETECTION, settings, encoder=encoder, data=data, preset=preset)


# ---------------------------------------------------------------- frozen encoders


def list_models(filter: str = "*", pretrained: bool = False) -> list[str]:
    """Return the names that `load_encoder` accepts: presets, and weights in the package.

    Args:
        filter: pattern with wildcards, such as "vim_tiny*".
        pretrained: only names with weights.
    """
    from vim_ssl.checkpoints.loading import TAGS
    from vim_ssl.models.encoder import PRESETS

    names = [*TAGS] if pretrained else [*PRESETS, *TAGS]
    return sorted(name for name in names if fnmatchcase(name, filter))


@command(LINEAR_PROBE)
def linear_probe(encoder: Any = None, data: Any = None, **settings: Any) -> Evaluation:
    """Evaluate frozen features with a linear layer, as ``vim-ssl linear-probe`` does.

    Args:
        encoder: see `vim_ssl.api`; by default the newest run under runs/.
        data: labelled images, with or without a test split; by default the run's training data.
    """
    return _evaluate(LINEAR_PROBE, settings, encoder=encoder, data=data)


@command(KNN)
def knn(encoder: Any = None, data: Any = None, **settings: Any) -> Evaluation:
    """Evaluate frozen features by nearest neighbours, as ``vim-ssl knn`` does.

    Args:
        encoder: see `vim_ssl.api`; by default the newest run under runs/.
        data: labelled images, with or without a test split; by default the run's training data.
    """
    return _evaluate(KNN, settings, encoder=encoder, data=data)


@command(ZERO_SHOT)
def zero_shot(encoder: Any = None, data: Any = None, **settings: Any) -> Evaluation:
    """Evaluate an image-text model without training, as ``vim-ssl zero-shot`` does.

    Args:
        encoder: run of `clip_pretrain`.
        data: images with labels or captions; by default those of the run.
    """
    return _evaluate(ZERO_SHOT, settings, encoder=encoder, data=data)


@command(TRIAL)
def trial(data: Any = None, **settings: Any) -> Run:
    """Test whether pretraining helps on these images, as ``vim-ssl trial`` does.

    Args:
        data: labelled images, with or without a test split.
    Returns: the directory of the trial; its ``metrics`` have ``rows``, ``differences`` and
        ``verdict``, and ``summary`` is the sentence.
    """
    return _train(TRIAL, settings, data=data)


@command(EMBED)
def embed(encoder: Any = None, data: Any = None, **settings: Any) -> "Embedded":
    """Embed images, as ``vim-ssl embed`` does. Without ``output`` no files are kept.

    Args:
        encoder: see `vim_ssl.api`; by default the newest run under runs/.
        data: images, labelled or not; by default the run's training data.
    Returns: the embeddings ``x`` (n, d), float32, with ``ids`` and ``labels`` of the images.
    """
    from vim_ssl.evaluation.embeddings import read_embeddings

    with tempfile.TemporaryDirectory() as folder:
        settings = {"output": str(Path(folder, "embeddings"))} | settings
        config = _config(EMBED, settings, encoder=encoder, data=data)
        with _isolated(), contextlib.redirect_stdout(io.StringIO()):
            import_module(EMBED).run(config)
        return read_embeddings(Path(config.output))


@command(PREDICT)
def predict(encoder: Any, data: Any, **settings: Any) -> list[Any]:
    """Predict images with a fitted model, as ``vim-ssl predict`` does, but without files.

    Args:
        encoder: a run with a task model, or the model itself; None: the newest run.
        data: images.
    Returns: what the model's ``predict`` returns for each image, in their order; None for an image
        that cannot be read, which a warning names.
    """
    from vim_ssl.models.predictor import Predictor
    from vim_ssl.tasks.models import load_model, newest_model
    from vim_ssl.tasks.prediction import predict_batch, read_batches
    from vim_ssl.utils.distributed import pick_device

    module, given = import_module(PREDICT), isinstance(encoder, Predictor)
    config = _config(PREDICT, settings, encoder=None if given else encoder, data=data)
    with _isolated():
        model: Any = encoder
        if not given:
            model = load_model(config.encoder or newest_model(), device=pick_device(config.device))
        opened = module.open_for(model, config.data)
        if model.task == "clip":
            model = module.name_classes(model, config, opened)
        size = config.batch_size if model.batched else 1
        batches = read_batches(opened, model, (), batch_size=size, workers=config.workers)
        results = [pair for batch in batches for pair in predict_batch(model, batch)]
    results.sort(key=lambda pair: pair[0][0])
    if broken := [
        f"{id}: {content}" for (_, id, content), _ in results if isinstance(content, str)
    ]:
        named = "; ".join(broken[:3])
        warnings.warn(f"{len(broken)} images cannot be read: {named}", stacklevel=3)
    return [result for _, result in results]


# ---------------------------------------------------------------- calls


def _config(script: str, settings: Mapping[str, Any], **arguments: Any) -> Any:
    """Build a script's Config from the keyword arguments of a call.

    Args:
        arguments: further settings; None for those that are left out.
    Raises: TypeError for an unknown setting; the errors of `vim_ssl.utils.config.build`.
    """
    from vim_ssl.training.config import TrainConfig
    from vim_ssl.training.run import stored_or
    from vim_ssl.utils.config import build

    module = import_module(script)
    known = [field.name for field in _fields(module)]
    for name in settings:
        if name not in known:
            raise TypeError(f"unknown setting {name!r}. {did_you_mean(name, known)}")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    given = {name: _plain(name, value) for name, value in (arguments | dict(settings)).items()}
    choose = getattr(module, "default_preset", None)
    if issubclass(module.Config, TrainConfig):
        choose = stored_or(choose)
        if not given.get("output") and given.get("resume") != "auto":
            given["output"] = _new_folder(script.rpartition(".")[2])
    return build(module.Config, getattr(module, "PRESETS", {}), given, choose)


def _train(script: str, settings: Mapping[str, Any], **arguments: Any) -> Run:
    """Run a script that trains; see `_config`."""
    config = _config(script, settings, **arguments)
    try:
        with _isolated(), _fresh_accelerate():
            import_module(script).run(config)
    except SystemExit:  # a signal; the state is saved
        raise KeyboardInterrupt(
            f"stopped, and saved in {config.output}; continue with the same call and "
            f"output={config.output!r}, resume='auto'."
        ) from None
    return Run(config.output)


def _evaluate(script: str, settings: Mapping[str, Any], **arguments: Any) -> Evaluation:
    """Run a script that evaluates, without its printed text; see `_config`."""
    module, config = import_module(script), _config(script, settings, **arguments)
    with _isolated(), contextlib.redirect_stdout(io.StringIO()):
        metrics = module.run(config)
    return Evaluation(metrics, module.table(metrics).strip("\n"))


def _plain(name: str, value: Any) -> Any:
    """Convert an argument to the plain value of a setting."""
    import numpy as np
    import torch

    if name in DATA:
        from vim_ssl.data.sources.memory import register_data

        return register_data(os.fspath(value) if isinstance(value, Run) else value)
    if isinstance(value, torch.nn.Module):
        return _saved(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    return str(value) if isinstance(value, torch.device) else value


def _saved(encoder: Any) -> str:
    """Save an encoder in the user's cache, named by its weights and by the record of its trainings,
    which equal weights may lack; return the folder.

    Raises: ValueError for an encoder that its file cannot represent, and for weights that are not
        finite.
    """
    from vim_ssl.checkpoints.loading import save_encoder
    from vim_ssl.checkpoints.representable import not_saved
    from vim_ssl.evaluation.features import weights_hash
    from vim_ssl.models.encoder import VimEncoder
    from vim_ssl.models.timm_encoder import TimmEncoder
    from vim_ssl.utils.files import user_cache
    from vim_ssl.utils.numbers import require_finite

    if isinstance(encoder, VimEncoder | TimmEncoder):
        if lost := not_saved(encoder):
            raise ValueError(
                f"{lost}; a call reads its settings and weights, and would pass over that. Merge "
                "it into the weights and give a plain VimEncoder (wrappers such as LoRA have a "
                "function for that), or compute the features yourself, with "
                "encoder.forward_features."
            )
        for name, weight in encoder.state_dict().items():
            require_finite(weight, f"{name} of the encoder in memory", "load other weights")
    known = [getattr(encoder, name, None) or None for name in ("trainings", "classes")]
    record = blake2b(json.dumps(known).encode(), digest_size=4).hexdigest()
    folder = user_cache() / "encoders" / f"{weights_hash(encoder)}-{record}"
    if not (folder / "encoder.json").exists():
        save_encoder(encoder, folder)
    return str(folder)


def _new_folder(recipe: str) -> str:
    """Create a run directory under runs/ and return its name."""
    from vim_ssl.training.folders import new_folder

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several processes need the same run directory; set output=FOLDER.")
    return str(new_folder(recipe))


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Restore the random generators and the number of threads of the process."""
    import numpy as np
    import torch

    print_any_character()
    states = (random.getstate(), np.random.get_state())  # noqa: NPY002
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _fresh_accelerate() -> Iterator[None]:
    """Hide accelerate's settings, which a process otherwise makes once, such as its precision."""
    from accelerate.state import AcceleratorState

    shared = AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    try:
        yield
    finally:
        shared.clear()
        shared.update(before)
