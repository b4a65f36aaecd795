"""What an encoder is worth.

features.py      of a data set under an encoder, shared out over processes and kept on disk
probes.py        nearest neighbours, the choice of readout and C; linear_heads.py fits
comparison.py    encoders side by side on the same images
retrieval.py     images by captions and captions by images
scores.py        a figure and its interval; class_, medmnist_, mask_, box_scores: each task's own
embeddings.py    features of any data in files, to be taken elsewhere
sheets.py        drawings of truth and prediction
"""
