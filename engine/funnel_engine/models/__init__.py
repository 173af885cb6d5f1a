"""The forward pass of each architecture that differs in more than data."""
