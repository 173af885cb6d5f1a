"""`funnel bench scaling`: how latency and memory grow with the work, in each direction in which it can grow."""
