"""The questions of arXiv:2504.02877 at a size that anyone can run: `python -m funnel_training.miniature --help`."""
