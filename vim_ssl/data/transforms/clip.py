"""Transform clips: all frames get the same augmentation."""

import random
from typing import Any

import numpy as np
import torch
from PIL import Image

from vim_ssl.data.clips import Video


class ClipTransform:
    """Transform a `Video` to a clip (c, t, h, w), or to (clips, c, t, h, w) for several clips in
    evaluation.

    Args:
        image_transform: image -> (c, h, w); its random draws are the same for all frames.
        training: draw one clip at random.
    """

    def __init__(self, image_transform: Any, training: bool):
        self.image_transform, self.training = image_transform, training

    def __call__(self, video: Video) -> torch.Tensor:
        if not isinstance(video, Video):
            raise TypeError(
                f"A video encoder takes videos (data video:ROOT), not {type(video).__name__}."
            )
        state: Any = None

        def prepare(frame: Image.Image) -> torch.Tensor:
            # Restore the state that the generators had before the first frame.
            nonlocal state
            if state is None:
                state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
            random.setstate(state[0])
            np.random.set_state(state[1])  # noqa: NPY002
            torch.set_rng_state(state[2])
            return self.image_transform(frame)

        clips = [torch.stack(frames, dim=1) for frames in video.clips(self.training, prepare)]
        return clips[0] if len(clips) == 1 else torch.stack(clips)

    def __repr__(self) -> str:
        return f"ClipTransform({self.image_transform!r}, training={self.training})"
