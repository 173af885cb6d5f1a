"""Choosing a funnel, and training a checkpoint for it: how good a funnel is beside how fast it is."""
