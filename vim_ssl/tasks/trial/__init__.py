"""Does self-supervision help on these images? Many trainings at equal time, and one verdict.

arms.py      what is compared                     costs.py     the time of a step, measured in turns
plan.py      arms, seeds and time that fit        readings.py  classify frozen features
rows.py      finished jobs, and their names       verdict.py   the sentence, decided by intervals
session.py   run the plan, resume, test once      splits.py    the images
"""
