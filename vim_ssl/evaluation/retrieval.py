"""Retrieve images by captions and captions by images."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vim_ssl.data.images import BadImage
from vim_ssl.evaluation.extract import Readable, encode_batches
from vim_ssl.evaluation.knn import search
from vim_ssl.objectives.clip import Clip


@dataclass
class PairFeatures:
    """Features of images (n, d) and of all their captions (m, d), of length 1; ``owner`` (m,)
    int64 is the image of each caption. ``skipped``: images that are unreadable or have none."""

    images: Tensor
    texts: Tensor
    owner: Tensor
    ids: list[str]
    captions: list[str]
    skipped: list[str]


class _Pairs(Readable):
    """Images with all their captions; the error as text for one that is no pair."""

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
    """The features of all images of a data set and of all their captions.

    Args:
        clip: with a tokenizer; its mode (training or not) is restored.
        data: map-style, with captions.
    Raises: ValueError for data without a pair.
    """
    training = clip.training
    clip.eval()
    loader = DataLoader(
        _Pairs(data, clip.transform), batch_size, num_workers=workers, collate_fn=list
    )
    images, rows, skipped = encode_batches(clip.encode_image, loader, device)
    captions = [caption for texts_of_image, _ in rows for caption in texts_of_image]
    texts = [clip.encode_text(captions[i : i + batch_size]).cpu()
             for i in range(0, len(captions), batch_size)]  # fmt: skip
    clip.train(training)
    if not rows:
        raise ValueError(f"{data.name} holds no image with a caption: {skipped[:3]}")
    owner = [index for index, (texts_of_image, _) in enumerate(rows) for _ in texts_of_image]
    ids = [id for _, id in rows]
    return PairFeatures(images, torch.cat(texts), torch.tensor(owner), ids, captions, skipped)


def nearest(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Indices (n, min(k, m)) of the keys (m, d) most similar to each query (n, d), best first."""
    return search(keys, queries, k=k)[1]


def hits_at_k(pairs: PairFeatures, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, Tensor]:
    """True where a match of the query is among its k nearest, in both directions: (n,), (m,) bool.

    Any caption of an image matches it. Keys ``image_to_text_r1``, ``text_to_image_r1`` …
    """
    texts_of = pairs.owner[nearest(pairs.images, pairs.texts, max(ks))]  # (n, k): their images
    images_of = nearest(pairs.texts, pairs.images, max(ks))  # (m, k)
    index = torch.arange(len(pairs.images))
    ways = {
        "image_to_text": texts_of == index[:, None],
        "text_to_image": images_of == pairs.owner[:, None],
    }
    return {f"{way}_r{k}": hits[:, :k].any(1) for way, hits in ways.items() for k in ks}


def recall(pairs: PairFeatures, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """`hits_at_k` as per cent of the queries."""
    return {name: 100 * hits.double().mean().item() for name, hits in hits_at_k(pairs, ks).items()}
