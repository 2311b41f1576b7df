"""Chooses the plan of each request by what a probe of its prompt shows. Pure: no IO, no clock, no torch."""
