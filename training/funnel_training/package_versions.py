"""The versions that results depend on."""

import importlib.metadata


def package_versions(*further: str) -> dict[str, str]:
    """The versions of this package, of JAX and NumPy, and of further packages, by name."""
    return {name: importlib.metadata.version(name) for name in ("funnel-engine", "jax", "jaxlib", "numpy", *further)}
