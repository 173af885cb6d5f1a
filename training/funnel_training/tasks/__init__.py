"""Tasks that a model is scored on: one module for each form of data, with its reader and its scores."""
