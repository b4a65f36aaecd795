"""Dense heads: pyramids from the encoder's single-scale maps, and predictions from pyramids.

maps = encoder.forward_intermediates(images, taps, norm=True, intermediates_only=True)
FeatureUpsampling(d, stride)(maps)        # four maps at strides 4, 8, 16, 32
SimpleFeaturePyramid(d, stride)(maps[-1]) # five maps at strides 4 to 64, by name
RCNN(256, classes)(images, pyramid)       # detections
"""

from vim_ssl.models.heads.pyramid import FeatureUpsampling, SimpleFeaturePyramid
from vim_ssl.models.heads.rcnn import RCNN
from vim_ssl.models.heads.upernet import NORMS, FCNHead, LinearHead, UPerNet

__all__ = [
    "NORMS",
    "RCNN",
    "FCNHead",
    "FeatureUpsampling",
    "LinearHead",
    "SimpleFeaturePyramid",
    "UPerNet",
]
