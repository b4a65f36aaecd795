"""Names of metrics for readers: title, unit, and how each was measured.

A metric of metrics.jsonl is measured during training, on batches or on a small set of held-out
images; a metric of metrics.json is the final one. The titles keep the two apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOP5_CLASSES = 10  # with fewer classes, the correct one is among five too easily


@dataclass(frozen=True)
class Title:
    """Title and unit of a metric, and ``how`` it was measured ("" if the title says it)."""

    text: str
    unit: str = ""
    how: str = ""


# The keys of metrics.json of a task; the first existing one is the main metric.
RESULTS = {
    "top1": Title("Top-1 accuracy", " %"),
    "top5": Title("Top-5 accuracy", " %"),
    "balanced_accuracy": Title("Balanced accuracy", " %"),
    "mean_error": Title("Mean error", " classes"),
    "map_macro": Title("Mean average precision", " %"),
    "map_micro": Title("Average precision of all labels as one", " %"),
    "exact": Title("Images with all labels correct", " %"),
    "miou": Title("Mean IoU", " %"),
    "aacc": Title("Pixel accuracy", " %"),
    "macc": Title("Mean recall", " %"),
    "mdice": Title("Mean Dice", " %"),
    "volume_dice": Title("Mean Dice of the volumes", " %"),
    "volume_hd95": Title("95 % Hausdorff distance of the volumes", " mm"),
    **{
        f"{kind}_{name}": Title(f"{text} of the {kind}{'es' if kind == 'box' else 's'}", " %")
        for kind in ("box", "mask")
        for name, text in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"), ("ar", "Recall"))
    },
    "auc": Title("AUC as MedMNIST defines it, 0 to 1"),
    "acc": Title("Accuracy as MedMNIST defines it, 0 to 1"),
}

ONLINE_K, ONLINE_C = 20, 0.1  # fixed settings of the in-training check
_CHECK = ", in-training check"
_BATCHES = "training batches"
_RETRIEVAL = "all pairs of the validation data"
# The keys of metrics.jsonl, in the order of a report.
LOGGED = {
    "loss": Title("Loss", "", _BATCHES),
    "knn_top1": Title(f"kNN accuracy{_CHECK}", " %", f"k {ONLINE_K}, all layers"),
    "linear_top1": Title(f"Linear accuracy{_CHECK}", " %", f"C {ONLINE_C}, mean of the patches"),
    "pixel_mse": Title("Mean squared error of the masked pixels", "", _BATCHES),
    "image_to_text_r1": Title(f"Captions of an image, R@1{_CHECK}", " %", _RETRIEVAL),
    "text_to_image_r1": Title(f"Images of a caption, R@1{_CHECK}", " %", _RETRIEVAL),
    "batch_top1": Title("Caption retrieval within the batch, R@1", " %", _BATCHES),
    "top1": Title("Top-1 accuracy, training batches", " %", "with augmentation"),
    "pixel_accuracy": Title("Pixel accuracy, training batches", " %", "with augmentation"),
    "logit_scale": Title("Logit scale"),
    "lr": Title("Learning rate"),
    "grad_norm": Title("Gradient norm"),
    "images_per_second": Title("Images per second"),
    "data_wait": Title("Fraction of the time waiting for data"),
    "feature_std": Title("Standard deviation of the features"),
    "effective_rank": Title("Effective rank of the features"),
}
# Numbers in metrics.jsonl that describe a check and are not metrics: n of the held-out images, the
# number of their groups, if there are any, and of images that its classifiers were fitted to.
CHECK_SIZE, CHECK_GROUPS, CHECK_TRAIN = "check_images", "check_groups", "check_train_images"


def logged_title(
    key: str, row: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None
) -> Title:
    """Return the title of a metric of metrics.jsonl, with the number of images if it is known.

    Args:
        key: e.g. ``knn_top1``, or ``val_top1`` and ``test_miou`` (during training).
        row: a line of metrics.jsonl; its `CHECK_SIZE` and `CHECK_TRAIN` are used.
        config: config.json of the run. With ``validation`` 0, ``val_…`` is the test split.
    """
    row, config = row or {}, config or {}
    if key in LOGGED:
        title = LOGGED[key]
        if key in ("knn_top1", "linear_top1") and row.get(CHECK_SIZE):
            sizes = f"{row[CHECK_SIZE]:,.0f} held-out images of the training split"
            if row.get(CHECK_TRAIN):
                sizes += f", {row[CHECK_TRAIN]:,.0f} others to fit"
            return Title(title.text, title.unit, f"{sizes}; {title.how}")
        return title
    prefix, _, name = key.partition("_")
    if prefix in ("val", "test") and name in RESULTS:
        held_out = prefix == "val" and config.get("validation")
        split = "validation split" if held_out else "test split"
        return Title(f"{RESULTS[name].text}, {split}, during training", RESULTS[name].unit)
    return Title(key)


def measured_on(split: str, n: int, what: str = "images") -> str:
    """Say which images a metric was measured on: "test split, n = 1,000 images".

    Args:
        split: the value of ``split`` in metrics.json.
    """
    name = {"held out": f"held-out {what}", "all": f"all {what}"}.get(split)
    if name:
        return f"{name}, n = {n:,}"
    known = {"val": "validation", "valid": "validation"}.get(split, split)
    return f"{known} split, n = {n:,} {what}"


def split_name(data: Any, held_out: bool = True) -> str:
    """Return the name of the split of ``data`` for metrics.json; "held out" for images that were
    held out of data without splits.

    Args:
        held_out: False if the images of such data are all used.
    """
    split = getattr(data, "split", "all")
    return "held out" if held_out and split == "all" else split


def shows_top5(classes: int) -> bool:
    """True if top-5 accuracy says something about a classifier of so many classes."""
    return classes >= TOP5_CLASSES
