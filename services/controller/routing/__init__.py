"""The router's side of the controller: learns it, chooses sets of plans for it, and pushes it to workers.

It begins in `request_routing.py`. `plan_sets.py`, `costs.py`, `expectation.py` and `learning.py` are pure.
"""
