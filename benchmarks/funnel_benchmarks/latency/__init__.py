"""`funnel bench latency`: what a funnel saves, against its ideal. The experiment of arXiv:2504.02877, Figure 4."""
