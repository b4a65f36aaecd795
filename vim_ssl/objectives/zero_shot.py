"""Zero-shot classification: an image-text model and class names as a classifier.

The embedding of a class is the normalised mean over several sentences with its name. Reference:
CLIP, arXiv:2103.00020, section 3.1.4.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim_ssl.data.dataset import ImageData
from vim_ssl.models.predictor import ClassPrediction, Predictor
from vim_ssl.utils.files import read_text

# According to CLIP's authors, these seven nearly match all eighty of theirs on ImageNet.
TEMPLATES = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
    "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
)  # fmt: skip


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless there is a template, and each has ``{}`` once."""
    if not templates:
        raise ValueError("templates is empty; give at least one: --templates {}.")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"the template {template!r} must contain {{}} once, for the class name."
            )


def class_names(data: ImageData, file: str) -> list[str]:
    """Return the class names: the lines of the file, or the data's names in readable form.

    Raises: ValueError for a file with a wrong number of names, or a repeated name.
    """
    classes = data.classes or []
    if file:
        names = read_text(Path(file)).split("\n")
        names = [name.strip() for name in names if name.strip()]
        if len(names) != len(classes):
            raise ValueError(f"{file} has {len(names)} names; {data.name} has {len(classes)}.")
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"{file} has two classes named {twice[0]!r}; names must differ.")
        return names
    return imagenet_names(classes) or [name.replace("_", " ") for name in classes]


def imagenet_names(labels: Sequence[str] | None = None) -> list[str]:
    """Return readable, different names for labels such as n01440764, by default all of ImageNet-1k
    in their order; [] if one is not such a label."""
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo()
    labels = imagenet.label_names() if labels is None else labels
    if not set(labels) <= set(imagenet.label_names()):
        return []
    plain = [imagenet.label_name_to_description(label).split(",")[0] for label in labels]
    times = Counter(plain)  # ambiguous names (crane: bird, machine) get the definition
    return [
        name if times[name] == 1 else imagenet.label_name_to_description(label, detailed=True)
        for name, label in zip(plain, labels, strict=True)
    ]


@torch.no_grad()
def text_classifier(clip: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return (classes, d): per class, the normalised mean of its normalised sentence embeddings."""
    rows = [
        clip.encode_text([template.replace("{}", name) for template in templates]).mean(0)
        for name in names
    ]
    return F.normalize(torch.stack(rows), dim=-1).cpu()


class TextClassifier(Predictor, nn.Module):
    """An image-text model that classifies images by the names of classes.

    The probabilities are the softmax of cosine times the model's scale, over these classes.

    Args:
        clip: a `Clip` with a tokenizer.
        classes: class names, or whole texts with the template ``{}``.
        templates: sentences about a class; ``{}`` is its name.
    Raises: ValueError for no class, a repeated one, or a template without ``{}``.
    """

    task, batched = "clip", True
    text_features: Tensor

    def __init__(self, clip: Any, classes: Sequence[str], templates: Sequence[str] = TEMPLATES):
        super().__init__()
        check_templates(templates)
        if isinstance(classes, str) or not classes or len(set(classes)) < len(classes):
            raise ValueError(f"classes are {classes!r}; expected a list of different names.")
        self.clip, self.classes, self.templates = clip, list(classes), list(templates)
        self.encoder, self.transform = clip.encoder, clip.transform
        features = text_classifier(clip, self.classes, self.templates)  # (classes, d)
        self.register_buffer("text_features", features.to(clip.logit_scale.device))

    def prepare(self, image: Any) -> Tensor:
        return self.transform(image)

    @torch.no_grad()
    def predict_prepared(self, inputs: Sequence[Tensor]) -> list[ClassPrediction]:
        images = self.clip.encode_image(torch.stack(list(inputs)).to(self.text_features.device))
        logits = self.clip.logit_scale.exp() * images @ self.text_features.T
        rows = logits.float().softmax(1).cpu().numpy()
        return [ClassPrediction(int(row.argmax()), row, self.classes) for row in rows]
