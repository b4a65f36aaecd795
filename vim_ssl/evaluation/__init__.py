"""Evaluate frozen features.

extract.py       features of images under an encoder, in order
features.py      features of a data set, shared out over processes and kept on disk
readout.py       which parts of the encoder are read, and which readout and C are chosen
linear_heads.py  logistic regression, and MAE's head trained by LARS
knn.py           nearest neighbours: search and vote
online.py        a quick probe while a run trains      validation.py  validation and early stopping
comparison.py    encoders side by side on the same images
retrieval.py     images by captions and captions by images
embeddings.py    features of any data in files, for use elsewhere

The metrics stand in `vim_ssl.metrics`, the drawings in `vim_ssl.utils.drawing`.
"""
