"""Ways to serve an engine: an HTTP server, a corpus on a Ray cluster, and adapters for frameworks."""
