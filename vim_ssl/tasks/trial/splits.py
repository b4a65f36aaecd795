"""The images of a trial."""

from dataclasses import dataclass
from functools import cached_property

from vim_ssl.data import ImageData, labelled_splits
from vim_ssl.data.sources.memory import register_data
from vim_ssl.data.split import stratified_split
from vim_ssl.evaluation.features import times_hash


@dataclass(frozen=True)
class Splits:
    """The images of a trial. The test images are read once, after everything is chosen."""

    train: ImageData
    validation: ImageData
    test: ImageData

    @classmethod
    def open(cls, spec: str, test: float, validation: float, seed: int) -> "Splits":
        """Split labelled images as the other tasks do; see `labelled_splits`."""
        labelled, tested = labelled_splits(spec, test, seed)
        kept, held_out = stratified_split(labelled.labels or [], validation, seed, labelled.groups)
        return cls(
            labelled.subset(kept, "held out for validation"), labelled.subset(held_out), tested
        )

    @cached_property
    def unlabelled(self) -> str:
        """Spec of the training images without their labels."""
        images = self.train.subset(range(len(self.train)))
        images.labels = images.classes = None
        return register_data(images)

    @cached_property
    def labelled(self) -> str:
        """Spec of the training images, with the validation images as its test split."""
        return register_data({"train": self.train, "test": self.validation})

    @property
    def fingerprints(self) -> dict[str, str]:
        return {name: getattr(self, name).fingerprint for name in ("train", "validation", "test")}

    @property
    def times(self) -> dict[str, str]:
        """Hashes of the modification times of the image files."""
        return {name: times_hash(getattr(self, name)) for name in ("train", "validation", "test")}
