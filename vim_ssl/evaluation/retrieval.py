"""Retrieve images by captions, and captions by images."""

import unicodedata
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.workers import Loader
from vim_ssl.evaluation.extract import Readable, encode_batches
from vim_ssl.evaluation.knn import search
from vim_ssl.metrics.ranking import COSINE_TIE, ROWS, hit_chances
from vim_ssl.models.tokenizers import clean
from vim_ssl.objectives.clip import Clip
from vim_ssl.utils.numbers import REMEDY, require_finite


@dataclass
class PairFeatures:
    """Normalised features of images (n, d) and of all their captions (m, d). ``owner`` (m,) int64
    is the image index of each caption. ``skipped``: images that are unreadable or lack captions."""

    images: Tensor
    texts: Tensor
    owner: Tensor
    ids: list[str]
    captions: list[str]
    skipped: list[str]

    @cached_property
    def texts_of_images(self) -> tuple[Tensor, Tensor]:
        """The number of each caption's text, (m,), equal for equal texts; and the different pairs
        of such a number and an image, (2, p), sorted."""
        numbers: dict[str, int] = {}
        which = torch.tensor([numbers.setdefault(_plain(text), len(numbers))
                              for text in self.captions], dtype=torch.int64)  # fmt: skip
        return which, torch.stack([which, self.owner]).unique(dim=1)

    def is_caption(self, image: int, caption: int) -> bool:
        """Whether the image has a caption with this text."""
        which, _ = self.texts_of_images
        return bool((which[self.owner == image] == which[caption]).any())


def _plain(text: str) -> str:
    """A text without differences of case and spacing, which most tokenizers drop."""
    return unicodedata.normalize("NFC", clean(text)).casefold()


class _Pairs(Readable):
    """Images with all their captions, or the error text of an unusable image."""

    def __getitem__(self, index: int):
        try:
            captions = self.data.captions(index)
            if not captions:
                return f"{self.data.ids[index]}: it has no caption"
            return captions, self.data.ids[index], self.transform(self.data[index]["image"])
        except BadImage as bad:
            return str(bad)


@torch.no_grad()
def embed_pairs(
    clip: Clip,
    data,
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: str | torch.device = "cpu",
) -> PairFeatures:
    """Compute the features of all images in a data set and of all their captions.

    Args:
        clip: a model with a tokenizer; its train/eval mode is restored.
        data: map-style data with captions.
    Raises: ValueError for data without image-caption pairs.
    """
    training = clip.training
    clip.eval()
    loader = Loader(_Pairs(data, clip.transform), batch_size, num_workers=workers, collate_fn=list)
    images, rows, skipped = encode_batches(clip.encode_image, loader, device)
    captions = [caption for texts_of_image, _ in rows for caption in texts_of_image]
    texts = [clip.encode_text(captions[i : i + batch_size]).cpu()
             for i in range(0, len(captions), batch_size)]  # fmt: skip
    clip.train(training)
    if not rows:
        raise ValueError(
            f"{data.name} has no readable image with a caption. Skipped: {skipped[:3]}"
        )
    owner = [index for index, (texts_of_image, _) in enumerate(rows) for _ in texts_of_image]
    ids = [id for _, id in rows]
    return PairFeatures(images, torch.cat(texts), torch.tensor(owner), ids, captions, skipped)


def nearest(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Indices (n, min(k, m)) of the keys (m, d) most similar to each query (n, d), best first."""
    return search(keys, queries, k=k)[1]


def hits_at_k(pairs: PairFeatures, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Tensor]:
    """Return whether each query has a match among its k nearest, in both directions: (n,) and (m,)
    float64, 0 or 1; in between if a match is as near as others (see `hit_chances`).

    An image matches each of its captions, and every caption with the same text. The keys are
    ``image_to_text_r1``, ``text_to_image_r1`` …

    Raises: ValueError for features that are not finite.
    """
    for what, features in (("images", pairs.images), ("captions", pairs.texts)):
        require_finite(features, f"the features of the {what}", REMEDY)
    which, (texts, images) = pairs.texts_of_images
    of_images = _hits(pairs.images, pairs.texts, (images, texts), None, which, ks)
    of_texts = _hits(pairs.texts, pairs.images, (texts, images), which, None, ks)
    ways = {"image_to_text": of_images, "text_to_image": of_texts}
    return {
        f"{way}_r{k}": row for way, rows in ways.items() for k, row in zip(ks, rows, strict=True)
    }


def _hits(
    queries: Tensor, keys: Tensor, matches: tuple[Tensor, Tensor], of_queries: Tensor | None,
    of_keys: Tensor | None, ks: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """`hit_chances` (len(ks), queries), some queries at a time.

    Args:
        matches: numbers of queries and keys that match, (p,) each.
        of_queries, of_keys: the number of each query and key; None: its position.
    """
    of_queries = torch.arange(len(queries)) if of_queries is None else of_queries
    of_keys = torch.arange(len(keys)) if of_keys is None else of_keys
    step = max(ROWS // len(keys), 1)
    chances = []
    for part, numbers in zip(queries.split(step), of_queries.split(step), strict=True):
        known, row = numbers.unique(return_inverse=True)
        ours = torch.isin(matches[0], known)
        right = torch.zeros(len(known), int(of_keys.max()) + 1, dtype=torch.bool)
        right[torch.searchsorted(known, matches[0][ours]), matches[1][ours]] = True
        scores = (part @ keys.T).cpu()
        chances.append(hit_chances(scores, right[row][:, of_keys], ks, tolerance=COSINE_TIE))
    return torch.cat(chances, 1)


def chance(pairs: PairFeatures) -> dict[str, float]:
    """R@1 of random ranking in per cent: ``image_to_text`` and ``text_to_image``."""
    which, (texts, _) = pairs.texts_of_images
    captions_of = which.bincount()  # of each text
    images_of = texts.bincount()
    n, m = len(pairs.images), len(pairs.texts)
    return {
        "image_to_text": 100 * int(captions_of[texts].sum()) / (n * m),
        "text_to_image": 100 * int(images_of[which].sum()) / (n * m),
    }


def recall(pairs: PairFeatures, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k: the mean of `hits_at_k` over the queries, in per cent."""
    return {name: 100 * hits.mean().item() for name, hits in hits_at_k(pairs, ks).items()}
