"""The claims of the Vim paper, arXiv:2401.09417, each with a measurement and a state.

claims.py     the table: claim, published value, commands       rows.py       the CSV file
findings.py   the rule that decides a state                     page.py       docs/paper.md
counted.py    parameters and operations                         campaign.py   measure, resume
training.py   accuracy at equal processor time                  committed.py  other benchmarks
"""
