"""Retrieve images by captions, and captions by images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.workers import Loader
from vim_ssl.evaluation.extract import Readable, encode_batches
from vim_ssl.evaluation.knn import search
from vim_ssl.objectives.clip import Clip


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
    bool.

    An image matches each of its captions. The keys are ``image_to_text_r1``, ``text_to_image_r1`` …
    """
    texts_of = pairs.owner[nearest(pairs.images, pairs.texts, max(ks))]  # (n, k), image indices
    images_of = nearest(pairs.texts, pairs.images, max(ks))  # (m, k)
    index = torch.arange(len(pairs.images))
    ways = {
        "image_to_text": texts_of == index[:, None],
        "text_to_image": images_of == pairs.owner[:, None],
    }
    return {f"{way}_r{k}": hits[:, :k].any(1) for way, hits in ways.items() for k in ks}


def recall(pairs: PairFeatures, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Recall at k: the percentage of queries for which `hits_at_k` is True."""
    return {name: 100 * hits.double().mean().item() for name, hits in hits_at_k(pairs, ks).items()}
