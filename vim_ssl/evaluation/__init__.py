"""What an encoder is worth: features of a data set, probes on them, figures of every task.

parts = encode_parts(encoder, (train, test))          # features.py: shared out, kept on disk
probes.py, linear_heads.py                            # nearest neighbours, linear heads on them
retrieval.py, comparison.py                           # captions; encoders side by side
scores.py, medmnist_scores.py, mask_scores.py, box_scores.py   # figures with their intervals
embeddings.py, sheets.py                              # features in files; drawings
"""
