"""The policy (arXiv 2504.10724): which model and depth to serve, and why. It begins in `decide.py`.

Pure functions: no IO, no clock, no randomness. Their inputs and results are JSON, so `decide` can be replayed
from the decision record.
"""
