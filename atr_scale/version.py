"""The version of this package, where everything below the front door can read it."""

__version__ = "0.7.0"
