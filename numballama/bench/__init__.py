"""Measure speed and memory, and show where the time of a step goes."""
