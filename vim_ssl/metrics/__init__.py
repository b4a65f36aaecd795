"""Metrics of all tasks, with 95 % intervals.

bootstrap.py       a metric, its interval, the difference of two metrics
classification.py  accuracy, average precision, the metrics of each type of target
segmentation.py    pixel accuracy, IoU and Dice          volumes.py   Dice, Hausdorff distance
detection.py       COCO's average precision              medmnist.py  MedMNIST's AUC and accuracy
titles.py          names of metrics for readers         sentences.py  compare with baselines
tables.py          classes and predictions as CSV files and printed tables
"""
