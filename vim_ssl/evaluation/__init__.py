"""Evaluate frozen features.

extract.py       features of images, in the order of the data
features.py      features of a data set, computed by several processes and cached on disk
readout.py       readouts (parts of the encoder's output), and the choice of readout and C
linear_heads.py  logistic regression, and MAE's head trained with LARS
knn.py           nearest neighbours: search and vote
online.py        a quick probe during training         validation.py  validation and early stopping
comparison.py    compare encoders on the same images
baselines.py     raw pixels and the most frequent class, beside the result of a task
retrieval.py     retrieve images by captions and captions by images
embeddings.py    features of any data in files, for use elsewhere

Metrics are in `vim_ssl.metrics`, drawings in `vim_ssl.utils.drawing`.
"""
