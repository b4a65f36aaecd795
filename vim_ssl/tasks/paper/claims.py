"""The table of claims: what the paper says, where, and what reproduces it.

Published values marked as recalled were written down from memory and not checked against the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from vim_ssl.tasks.paper.committed import Arms, Committed
from vim_ssl.tasks.paper.counted import LinearCost, Parameters
from vim_ssl.tasks.paper.full import FullSize
from vim_ssl.tasks.paper.measure import Measure
from vim_ssl.tasks.paper.timed import MEMORY, SECONDS, Efficiency
from vim_ssl.tasks.paper.training import ARMS, VIT, Above
from vim_ssl.utils.names import did_you_mean

README, ABSTRACT = "README of the original code", "abstract"
RECALLED = "recalled, not checked"
NO_VALUE = "none: future work"
TOO_SHORT = (
    "After 12 s the classifiers of emoji predict the largest class only (59.9 %), and those of "
    "digits are at the start: this budget shows which learns first, not which is better."
)


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        section: heading on the page.
        where: table or section of the paper.
        text: the claim in one sentence.
        published: value in the paper.
        source: where the value was read, "" if it has none; with "recalled, not checked" if so.
        measure: how it is measured, scaled down; None: only at full size.
        full: how it is measured at full size; None: the scaled-down measurement is the full one.
        remark: what a reader must know to believe our value.
    """

    key: str
    section: str
    where: str
    text: str
    published: str
    source: str
    measure: Measure | None = None
    full: FullSize | None = None
    remark: str = ""


IMAGENET = "ImageNet-1k and 8 GPUs"
_TRAIN = "supervised-pretrain --preset {preset} --data imagenet:{{imagenet}} --precision bf16"
_FINER = ("finetune --preset finer_224 --encoder {{output}}/1 --data imagenet:{{imagenet}} "
          "--precision bf16")  # fmt: skip
TOP1 = "accuracy"


def _with_deit(source: str) -> str:
    """The source of a value that stands beside DeiT's."""
    return source if source == RECALLED else f"{source}; DeiT's {RECALLED}"


def _imagenet(size: str, model: str, published: float, deit: float, *, finer: bool = False,
              source: str = README, remark: str = "") -> Claim:  # fmt: skip
    commands = [_TRAIN.format(preset=f"vim_{size}_224")] + [_FINER.format()] * finer
    return Claim(
        f"imagenet-{size}" + "-stride8" * finer, "ImageNet", "Table 1",
        f"{model} reaches {published} % top-1 on ImageNet, above DeiT of its size ({deit} %).",
        f"{published} %; DeiT {deit} %", _with_deit(source), None,
        FullSize(tuple(commands), TOP1, published, deit, IMAGENET), remark,
    )  # fmt: skip


def _ablation(key: str, section: str, arm: str, best: str, name: str, value: str, gain: float,
              of_best: str, ade: str = "") -> Claim:  # fmt: skip
    args = ARMS[arm]
    others = f"{best[0].upper()}{best[1:]} is {gain:.1f} points above {name}" + (
        f" on ImageNet{ade}." if ade else "."
    )
    return Claim(
        key, section, "ablations", others, f"{value} against {of_best}", RECALLED,
        Above({"SSM + conv1d": "mean", "the middle class token": "middle"}[best], (arm,)),
        FullSize(
            (f"{_TRAIN.format(preset='vim_tiny_224')} --model-args {args}",),
            TOP1, float(value.split()[0]), None, IMAGENET,
        ),
    )  # fmt: skip


DIRECTIONS, HEADS, EFFICIENCY = "Directions of the scan", "Classification head", "Efficiency"
_BEST_DIRECTION = ("SSM + conv1d", "73.9 % / 35.9 mIoU")
_FULL_EFFICIENCY = (
    "python benchmarks/efficiency.py --device cuda --batch 8 --models vim_tiny deit_tiny "
    "--tasks {task} --pixels 512 640 768 1024 1248"
)


def _efficiency(key: str, text: str, published: str, source: str, task: str, metric: str,
                bar: float, remark: str = "") -> Claim:  # fmt: skip
    return Claim(
        key, EFFICIENCY, "Figure 1, §4", text, published, source, Efficiency(task, metric, bar),
        FullSize((_FULL_EFFICIENCY.format(task=task),), "", None, None, "a GPU with 80 GB"), remark,
    )  # fmt: skip


def _future(key: str, text: str, measure: Committed | None, remark: str) -> Claim:
    return Claim(key, "Future work", "conclusion", text, NO_VALUE, "", measure, None, remark)


_CLAIMS = (
    _imagenet("tiny", "Vim-Ti", 76.1, 72.2),
    _imagenet("tiny", "Vim-Ti at stride 8", 78.3, 72.2, finer=True),
    _imagenet("small", "Vim-S", 80.5, 79.8,
              remark="The paper's table has 80.3 (recalled, not checked)."),
    _imagenet("small", "Vim-S at stride 8", 81.6, 79.8, finer=True,
              remark="The paper's table has 81.4 (recalled, not checked)."),
    _imagenet("base", "Vim-B", 81.9, 81.8,
              remark="The preset is that of FastVim, with LayerNorm after the scan; the original "
                     "code has no script for Vim-B."),
    _imagenet("base", "Vim-B at stride 8", 83.2, 81.8, finer=True, source=RECALLED,
              remark="No weights were published."),
    Claim(
        "vim-above-vit", "ImageNet", "Table 1",
        "A Vim is above a plain vision transformer (DeiT) of its size.",
        "Ti: 76.1 %; DeiT 72.2 %", _with_deit(README),
        Above("middle", (VIT,), ("middle", VIT)),
        FullSize((_TRAIN.format(preset="vim_tiny_224"),), TOP1, 76.1, 72.2, IMAGENET),
        "Scaled down, both have the same processor time on the same small images, not 300 epochs "
        f"of ImageNet. {TOO_SHORT}",
    ),
    Claim(
        "coco", "COCO and ADE20K", "COCO table",
        "With Cascade Mask R-CNN, Vim-Ti reaches 45.7 box AP on COCO, DeiT-Ti 44.4.",
        "45.7 box AP, 39.2 mask AP", RECALLED, None,
        FullSize(
            (_TRAIN.format(preset="vim_tiny_224"),
             "detection --preset coco_cascade_tiny --encoder {output}/1 --data coco:{coco} "
             "--precision bf16"),
            "box_ap", 45.7, 44.4, "ImageNet-1k, COCO and 4 GPUs",
        ),
        "An independent training of Vim-S reached 47.1 box AP (FastVim's README).",
    ),
    Claim(
        "ade20k-tiny", "COCO and ADE20K", "ADE20K table",
        "With UPerNet, Vim-Ti reaches 41.0 mIoU on ADE20K, DeiT-Ti 39.2.",
        "41.0 mIoU", RECALLED, None,
        FullSize(
            (_TRAIN.format(preset="vim_tiny_224"),
             "segmentation --preset ade20k_upernet_tiny --encoder {output}/1 "
             "--data ade20k:{ade20k}"),
            "miou", 41.0, 39.2, "ImageNet-1k, ADE20K and 4 GPUs",
        ),
    ),
    Claim(
        "ade20k-small", "COCO and ADE20K", "ADE20K table",
        "With UPerNet, Vim-S reaches 44.9 mIoU on ADE20K, DeiT-S 44.0.",
        "44.9 mIoU", RECALLED, None,
        FullSize(
            (_TRAIN.format(preset="vim_small_224"),
             "segmentation --preset ade20k_upernet_small --encoder {output}/1 "
             "--data ade20k:{ade20k}"),
            "miou", 44.9, 44.0, "ImageNet-1k, ADE20K and 4 GPUs",
        ),
    ),
    _ablation("directions-none", DIRECTIONS, "none", _BEST_DIRECTION[0], "one direction",
              "73.2 % / 32.3 mIoU", 0.7, _BEST_DIRECTION[1], " and 3.6 mIoU on ADE20K"),
    _ablation("directions-layer", DIRECTIONS, "layer", _BEST_DIRECTION[0],
              "alternating blocks (bidirectional layer)",
              "70.9 % / 33.6 mIoU", 3.0, _BEST_DIRECTION[1], " and 2.3 mIoU on ADE20K"),
    _ablation("directions-ssm", DIRECTIONS, "ssm", _BEST_DIRECTION[0],
              "bidirectional SSM without its second convolution",
              "72.8 % / 33.2 mIoU", 1.1, _BEST_DIRECTION[1], " and 2.7 mIoU on ADE20K"),
    Claim(
        "directions-both", DIRECTIONS, "ablations",
        "Bidirectional SSM + conv1d is the best of the four.", _BEST_DIRECTION[1], RECALLED,
        Above("mean", ("none", "layer", "ssm")),
        FullSize((f"{_TRAIN.format(preset='vim_tiny_224')} --model-args {ARMS['mean']}",),
                 TOP1, 73.9, None, IMAGENET),
        "The four read the mean of the patches, because 73.9 % is also the mean's value in the "
        f"table of heads. Time is equal, not the number of steps. {TOO_SHORT}",
    ),
    _ablation("head-mean", HEADS, "mean", "the middle class token", "the mean of the patches",
              "73.9 %", 2.2, "76.1 %"),
    _ablation("head-max", HEADS, "max", "the middle class token", "the maximum over the patches",
              "73.4 %", 2.7, "76.1 %"),
    _ablation("head-first", HEADS, "head", "the middle class token", "a class token at the head",
              "75.2 %", 0.9, "76.1 %"),
    _ablation("head-double", HEADS, "double", "the middle class token",
              "class tokens at both ends", "74.3 %", 1.8, "76.1 %"),
    Claim(
        "head-middle", HEADS, "ablations", "The middle class token is the best of the five.",
        "76.1 %", README, Above("middle", ("mean", "max", "head", "double")),
        FullSize((_TRAIN.format(preset="vim_tiny_224"),), TOP1, 76.1, None, IMAGENET),
        f"{TOO_SHORT} Differences after seconds say little about those after 300 epochs.",
    ),
    _efficiency(
        "speed", "At 1248 px, Vim-Ti extracts features 2.8 times as fast as DeiT-Ti.",
        "2.8 times", ABSTRACT, "features", SECONDS, 2.8,
        "The paper's DeiT had plain attention; today's has fused attention. Ours is one image on "
        "one CPU thread, the paper's a batch on an A100.",
    ),
    _efficiency(
        "memory", "At 1248 px, Vim-Ti extracts features in 86.8 % less memory than DeiT-Ti.",
        "86.8 % less", ABSTRACT, "features", MEMORY, 86.8,
        "Fused attention needs memory linear in tokens, which removes the advantage.",
    ),
    _efficiency(
        "speed-dense", "With a dense head, Vim-Ti is faster than DeiT-Ti at 1248 px.",
        "faster", RECALLED, "dense", SECONDS, 0.0,
        "The head (UPerNet, 150 classes) costs the same on both and hides a part of the "
        "difference.",
    ),
    _efficiency(
        "memory-dense", "With a dense head, Vim-Ti needs less memory than DeiT-Ti at 1248 px.",
        "less", RECALLED, "dense", MEMORY, 0.0,
        "The maps of the head take most of the memory, and are the same for both.",
    ),
    _efficiency(
        "memory-step", "A training step of Vim-Ti at 1248 px needs less memory than DeiT-Ti's.",
        "not in the paper", "", "step", MEMORY, 0.0,
        "Without recomputation of blocks.",
    ),
    Claim(
        "linear-cost", "Cost and size", "§3", "Vim's operations are linear in the number of "
        "tokens, those of self-attention quadratic.", "linear", RECALLED, LinearCost(), None,
        "Counted, not timed: matrix products and the recurrence. The whole of DeiT is counted, "
        "whose other products are linear, so its exponent is below 2.",
    ),
    Claim(
        "parameters", "Cost and size", "Table 1", "Vim-Ti has 7, Vim-S 26, Vim-B 98 million "
        "parameters; stride 8 changes the positions only.", "7 M, 26 M, 98 M", README,
        Parameters({
            "vim_tiny_patch16_224": 7, "vim_tiny_patch16_stride8_224": 7,
            "vim_small_patch16_224": 26, "vim_small_patch16_stride8_224": 26,
            "vim_base_patch16_224": 98,
        }),
    ),
    _future(
        "future-masked", "Vim can be pretrained by masked prediction.",
        Committed(
            "learning.csv",
            tuple(Arms(f"{data}, linear probe", {"data": data}, "arm", "mae", "untrained",
                       "logistic") for data in ("digits", "colour")),
            "python benchmarks/learning/study.py",
        ),
        "It helps in a minute of training on small images, in the linear probe; nearest neighbours "
        "on digits get worse.",
    ),
    _future(
        "future-clip", "Vim can be trained with captions, as CLIP.",
        Committed(
            "emoji_clip.csv",
            tuple(Arms(f"{name}, R@1", {"concepts": "seen", "question": question}, "arm", "vim",
                       "pixels", "r1")
                  for name, question in (("caption of an image", "caption"),
                                         ("image of a caption", "picture"))),
            "python benchmarks/emoji_clip.py",
        ),
        "On emoji only: retrieval of seen concepts beats the nearest drawing by pixels; "
        "classification by class names does not.",
    ),
    _future(
        "future-medical", "Pretrained Vim weights are useful for medical images.",
        Committed(
            "dense_transfer.csv",
            (Arms("organs in CT, Dice", {"task": "organs in CT"}, "arm", "offline_rgb",
                  "untrained", "value"),
             Arms("lobes of the brain in MRI, mIoU", {"task": "lobes of the brain"}, "arm",
                  "offline_rgb", "untrained", "value")),
            "python benchmarks/dense_transfer.py",
        ),
        "Segmentation works on small sets, and our weights pretrained on other images do not help "
        "it.",
    ),
    _future(
        "future-remote-sensing", "Pretrained Vim weights are useful for remote sensing.",
        Committed(
            "dense_transfer.csv",
            (Arms("tree crowns, box AP50", {"task": "tree crowns"}, "arm", "offline_rgb",
                  "untrained", "value"),
             Arms("buildings, mask AP", {"task": "buildings"}, "arm", "offline_rgb", "untrained",
                  "value")),
            "python benchmarks/dense_transfer.py",
        ),
        "Detection works on small sets; pretraining makes no significant difference, and buildings "
        "are too few to conclude anything.",
    ),
    _future(
        "future-video", "Pretrained Vim weights are useful for long videos.", None,
        "A stream of pieces reads a long video in a fraction of the memory of one scan, with equal "
        "outputs (long_video.csv); accuracy on a public benchmark was not measured.",
    ),
)  # fmt: skip
CLAIMS: Mapping[str, Claim] = {claim.key: claim for claim in _CLAIMS}
ALL = "all"


def chosen_claims(keys: tuple[str, ...]) -> list[Claim]:
    """Return the claims of these keys, in the order of the table; ``all`` is every one.

    Raises: ValueError for an unknown key.
    """
    for key in keys:
        if key not in CLAIMS and key != ALL:
            raise ValueError(f"no claim {key!r}. {did_you_mean(key, [*CLAIMS, ALL])}")
    return [claim for key, claim in CLAIMS.items() if key in keys or ALL in keys]
