"""`funnel bench kernels`: how fast each op is on each backend, against what this machine can do at best."""
