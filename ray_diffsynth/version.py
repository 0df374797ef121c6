"""The version, where everything may import it: the package itself names all of its public API."""

__version__ = "0.1.0"
