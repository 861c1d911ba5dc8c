"""Measure speed, memory and how well a model predicts a text, and show where the time of a step goes."""
