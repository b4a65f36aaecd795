"""Metrics of every task: the calculation and its 95 % interval.

bootstrap.py       a metric, its interval, the difference of two metrics
classification.py  accuracy, average precision, metrics by kind of target
segmentation.py    IoU, Dice and accuracy of pixels      volumes.py   Dice, Hausdorff distance
detection.py       COCO's average precision              medmnist.py  MedMNIST's AUC and accuracy
tables.py          classes and predictions as CSV files and printed tables
"""
