"""Contrastive pretraining on images and captions: `Clip`, the objective and the trained model.

    clip     softmax over all captions of the step for each image, and over images for each caption
    siglip   a binary classification of every image-caption pair of the step

A step covers all micro-batches of all processes: `gather` joins the processes, `Clip.accumulate`
the micro-batches, both with the gradient of the large batch.

>>> clip = load_clip("runs/my-run")
>>> image = clip.encode_image(clip.transform(image)[None])
>>> image @ clip.encode_text(["a dog", "a cat"]).T                  # (1, 2) cosines
>>> clip.predict("photo.jpg", classes=["dog", "cat"]).name
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vim_ssl.checkpoints.files import check_values
from vim_ssl.checkpoints.identity import hash_of
from vim_ssl.checkpoints.loading import load_encoder, save_encoder
from vim_ssl.checkpoints.timm_models import build_timm
from vim_ssl.data.transforms.image import Transform, create_transform
from vim_ssl.models.freezing import Freezable
from vim_ssl.models.protocol import Encoder
from vim_ssl.models.text import HubText, TextEncoder, build_text
from vim_ssl.models.tokenizers import Tokenizer, load_tokenizer
from vim_ssl.objectives.base import StepOutput
from vim_ssl.objectives.pixels import refuse_head
from vim_ssl.objectives.zero_shot import TEMPLATES, TextClassifier
from vim_ssl.utils.files import atomic_write, read_object, reading

LOSSES = ("clip", "siglip")
MAX_SCALE = 100.0


class Embedded(NamedTuple):
    """Inputs of the loss: ``image`` and ``text`` (b, d), of length 1; ``scale`` (1,), the factor on
    cosines; siglip's ``bias`` (1,); ``cut`` (b,) bool, True = the caption exceeded the text tower's
    context."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor | None
    cut: Tensor


class Clip(Freezable):
    """An image and a text tower with a common embedding space.

    Batches hold ``image`` (b, c, h, w), normalised; ``tokens`` (b, l) int64; ``cut`` (b,) bool.

    Args:
        encoder: the image tower, without a head.
        embed_dim: dimension of the shared embedding space.
        loss: "clip" or "siglip".
        lock_image, lock_text: freeze a tower and disable its dropout; its projection is trained.
            Training with a locked image tower is LiT.
        tokenizer: tokenizer for strings passed to `encode_text`.
    Raises: ValueError for an unknown loss, an ``embed_dim`` below 1, two locked towers, or an image
        tower with a head or mask token, which would not be trained.
    Reference: CLIP, arXiv:2103.00020; SigLIP, arXiv:2303.15343; LiT, arXiv:2111.07991.
    """

    task = "clip"
    trained_on = ""
    classes: tuple[str, ...] = ()  # any names; see `classifier`

    def __init__(
        self,
        encoder: Encoder,
        text: TextEncoder | HubText,
        *,
        embed_dim: int = 512,
        loss: str = "clip",
        lock_image: bool = False,
        lock_text: bool = False,
        tokenizer: Tokenizer | None = None,
    ):
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}.")
        if embed_dim < 1:
            raise ValueError(f"embed_dim {embed_dim} must be 1 or more.")
        if lock_image and lock_text:
            raise ValueError(
                "lock_image and lock_text are both set, so only the projections would train; "
                "unset one."
            )
        refuse_head(encoder)
        if getattr(encoder, "mask_token", None) is not None:
            raise ValueError("clip uses no mask token; load the encoder with use_mask_token=False.")
        self.encoder, self.text, self.tokenizer = encoder, text, tokenizer
        self.embed_dim, self.loss = embed_dim, loss
        for tower, lock in ((encoder, lock_image), (text, lock_text)):
            if lock:
                self.freeze(tower)
        self.image_proj = _projection(encoder, embed_dim)
        self.text_proj = _projection(text, embed_dim)
        # One-element tensors, because FSDP cannot shard scalars.
        start = 1 / 0.07 if loss == "clip" else 10.0
        self.logit_scale = nn.Parameter(torch.tensor([math.log(start)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0])) if loss == "siglip" else None

    def dependencies(self) -> dict[str, str]:
        """Return hashes of what training reads but a checkpoint does not contain."""
        text = dict(self.text.config)
        if text.pop("hf", None):  # a path, as are two entries of transformers' settings
            paths = ("_name_or_path", "transformers_version")
            text["model"] = {k: v for k, v in text["model"].items() if k not in paths}
        tokenizer = self.tokenizer and self.tokenizer.identity()
        return {"text": hash_of(text), "tokenizer": hash_of(tokenizer)}

    # ---------------------------------------------------------------- features

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (b, c, h, w), normalised with `transform`, as (b, embed_dim) of length 1.

        Raises: TypeError for anything but a tensor.
        """
        if not isinstance(images, Tensor):
            raise TypeError(
                f"encode_image takes a tensor (b, c, h, w), not {type(images).__name__}; for an "
                "image use clip.encode_image(clip.transform(image)[None])."
            )
        return _unit(self.image_proj(self._run(self.encoder, images)))

    def encode_text(self, texts: Tensor | str | Sequence[str]) -> Tensor:
        """Embed captions, or their tokens (b, l), as (b, embed_dim) of length 1.

        Raises: ValueError for captions without a tokenizer.
        """
        if not isinstance(texts, Tensor):
            if self.tokenizer is None:
                raise ValueError("without a tokenizer encode_text takes tokens, not captions.")
            texts = self.tokenizer(texts).to(self.logit_scale.device)
        return _unit(self.text_proj(self._run(self.text, texts)))

    def _run(self, tower: Any, x: Tensor) -> Tensor:
        with self.grad_of(tower):
            return tower(x)

    @property
    def transform(self) -> Transform:
        """Return the transform from a PIL image to one element of a batch for `encode_image`."""
        return create_transform(self.encoder)

    # ---------------------------------------------------------------- classes by name

    def classifier(
        self,
        classes: Sequence[str] = (),
        *,
        texts: Sequence[str] = (),
        templates: Sequence[str] = TEMPLATES,
    ) -> TextClassifier:
        """Return a classifier of images by class names; it embeds the names once.

        Args:
            classes: class names, which are put into the templates.
            texts: instead of classes, whole sentences, which are embedded as they are.
            templates: sentences about a class; ``{}`` is its name.
        Raises: ValueError unless either classes or texts are given.
        """
        if bool(classes) == bool(texts):
            raise ValueError(
                "an image-text model needs the classes to choose from: give classes=[…], or "
                "texts=[…] for whole sentences, not both."
            )
        if texts:
            return TextClassifier(self, texts, ("{}",))
        return TextClassifier(self, classes, templates)

    def predict(self, x: Any, classes: Sequence[str] = (), **options: Any) -> Any:
        """Classify an image, or each of a list, by class names or texts.

        Args:
            x: see `Predictor.predict`.
            classes, options: see `classifier`, which is faster for repeated calls.
        Returns: a `ClassPrediction`, or a list of them.
        """
        return self.classifier(classes, **options).predict(x)

    # ---------------------------------------------------------------- the objective

    def forward(self, batch: dict[str, Tensor], only_embed: bool = False) -> Any:
        """Return the `StepOutput` of a batch, or with ``only_embed`` the inputs of its loss.

        In training, the images and captions of all processes are compared.
        """
        bias = None if self.logit_bias is None else self.logit_bias.clone()
        embedded = Embedded(
            self.encode_image(batch["image"]), self.encode_text(batch["tokens"]),
            self.logit_scale.exp(), bias, batch["cut"],
        )  # fmt: skip
        return embedded if only_embed else _output(embedded, *self.contrast(embedded))

    def contrast(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair (b,), and whether the caption is the image's nearest (b,)
        bool.

        The loss of the step is the mean over the pairs of all processes. It is computed in float32
        or higher, because the scale amplifies rounding errors of cosines.
        """
        image, text, scale, bias, _ = embedded
        alone = not (self.training and dist.is_available() and dist.is_initialized())
        first = 0 if alone else dist.get_rank() * len(image)
        match = torch.arange(first, first + len(image), device=image.device)
        with torch.autocast(image.device.type, enabled=False):
            texts = text if alone else gather(text)
            logits = scale * image @ texts.T  # (b, pairs of all processes)
            hits = logits.argmax(1) == match
            if bias is not None:
                sign = torch.full_like(logits, -1.0).scatter(1, match[:, None], 1.0)
                return -F.logsigmoid(sign * (logits + bias)).sum(1), hits
            images = image if alone else gather(image)
            losses = F.cross_entropy(logits, match, reduction="none")
            losses = losses + F.cross_entropy(scale * text @ images.T, match, reduction="none")
        return losses / 2, hits

    def accumulate(self, forward: Callable[..., Any], count: int) -> Iterator[StepOutput]:
        """Treat the micro-batches of a step as one batch, with the memory use of one micro-batch.

        First all micro-batches are embedded without a graph, and the loss of the whole batch gives
        the gradient of each feature. Then each micro-batch is embedded again with the same random
        draws, and its output carries these gradients. See `vim_ssl.objectives.base`.
        Reference: GradCache, arXiv:2101.06983.
        """
        if count == 1:
            yield forward(0)
            return
        with torch.no_grad():
            parts = [forward(i, only_embed=True) for i in range(count)]
        leaves = [torch.cat(parts_of) for parts_of in zip(*(p[:2] for p in parts), strict=True)]
        leaves += [x for x in parts[0][2:4] if x is not None]
        image, text, scale, *bias = leaves = [x.requires_grad_() for x in leaves]
        whole = Embedded(image, text, scale, bias[0] if bias else None, parts[0].cut)
        losses, hits = self.contrast(whole)
        d_image, d_text, *d_shared = torch.autograd.grad(losses.sum(), leaves)
        sizes = [len(part.image) for part in parts]
        d_shared = [d / count for d in d_shared]
        rows = (x.split(sizes) for x in (d_image, d_text, losses.detach(), hits))
        for i, (d_images, d_texts, *values) in enumerate(zip(*rows, strict=True)):
            live = forward(i, only_embed=True)
            grads = (d_images, d_texts, *d_shared)
            pull = sum((x * d).sum() for x, d in zip(live[:4], grads, strict=False))
            out = _output(live, *values)
            out.loss_sum = out.loss_sum + (pull - pull.detach())  # adds the gradient, not the value
            yield out

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp the scale to [1, 100], as CLIP does."""
        self.logit_scale.clamp_(0, math.log(MAX_SCALE))


def _projection(tower: Any, embed_dim: int) -> nn.Linear:
    width = getattr(tower, "head_hidden_size", tower.num_features)
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _unit(x: Tensor) -> Tensor:
    """Scale ``x`` to length 1, in float32 or higher."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _output(embedded: Embedded, losses: Tensor, hits: Tensor) -> StepOutput:
    metrics = {
        "batch_top1": 100.0 * hits.sum(),
        "logit_scale": embedded.scale.detach().sum() * len(losses),
        "captions_cut": 100.0 * embedded.cut.sum(),
    }
    return StepOutput(losses.sum(), len(losses), metrics)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        out = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather(list(out.chunk(dist.get_world_size())), x.contiguous())
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Concatenate (b, …) of all processes, with equal b, to (world b, …) in rank order.

    The gradient is that of the sum of all processes' losses. (torch's differentiable gathers are
    deprecated.)
    """
    return _Gather.apply(x)


# -------------------------------------------------------------------- files


def save_clip(
    clip: Clip,
    folder: str | Path,
    *,
    ema: Any = None,
    record: dict[str, Any] | None = None,
) -> None:
    """Write a model for `load_clip`: encoder.safetensors and .json with `save_encoder`, the rest as
    clip.safetensors, clip_config.json and tokenizer.json.

    Args:
        ema, record: see `save_encoder`. `load_clip` does not read the average.
    Raises: ValueError for a model without a tokenizer; TypeError for an image tower that is no
        encoder; OSError if the disk is full.
    """
    from safetensors.torch import save

    if not isinstance(clip.encoder, Encoder):
        raise TypeError(
            f"the image tower is a {type(clip.encoder).__name__}, not an encoder; load it with "
            "load_encoder, also timm's models: load_encoder('timm:NAME')."
        )
    if clip.tokenizer is None:
        raise ValueError("a model without a tokenizer cannot be loaded again; set clip.tokenizer.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        key: value.detach().cpu().contiguous()
        for key, value in clip.state_dict().items()
        if not key.startswith("encoder.")
    }
    description = {
        "format": "vim_ssl.clip", "embed_dim": clip.embed_dim, "loss": clip.loss,
        "image": None, "text": clip.text.config, "made_by": record,
    }  # fmt: skip
    clip.tokenizer.save(folder)
    atomic_write(folder / "clip.safetensors", save(state))
    atomic_write(folder / "clip_config.json", json.dumps(description, indent=2) + "\n")
    save_encoder(clip.encoder, folder, ema=ema, record=record)


COPY_AGAIN = "copy it again from its run"


def load_clip(run: str | Path, *, device: str | torch.device | None = None) -> Clip:
    """Load the model of a clip_pretrain run in eval mode, with ``encode_image``, ``encode_text``,
    ``tokenizer`` and ``transform``.

    Raises: FileNotFoundError for a folder without a model; ValueError for weights that are not
        finite; ImportError if its tokenizer or text tower needs a package that is not installed.
    """
    from safetensors.torch import load_file

    folder = Path(run)
    if not (folder / "clip_config.json").is_file():
        raise FileNotFoundError(
            f"{run} has no clip_config.json; give the directory of a clip_pretrain run. "
            "To load only the image encoder of any run, use load_encoder."
        )
    described = folder / "clip_config.json"
    stored = read_object(described, "the settings of an image-text model", COPY_AGAIN)
    tokenizer = load_tokenizer(folder)
    # Earlier runs have the weights of timm's towers here, described by timm's arguments.
    inside = stored.get("image")
    encoder: Any = None if inside else load_encoder(folder, ema=False)
    with reading(described, "the settings of an image-text model", COPY_AGAIN):
        if inside:
            encoder = build_timm(inside.pop("model_name"), **inside)
        clip = Clip(
            encoder, build_text(stored["text"]), embed_dim=stored["embed_dim"],
            loss=stored["loss"], tokenizer=tokenizer,
        )  # fmt: skip
    with reading(folder / "clip.safetensors", "the weights of an image-text model", COPY_AGAIN):
        state = load_file(folder / "clip.safetensors")
    if not inside:
        state |= {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    check_values(folder / "clip.safetensors", state, clip.state_dict())
    with reading(folder / "clip.safetensors", "weights of this model", COPY_AGAIN):
        clip.load_state_dict(state)
    return clip.to(device).eval()
