"""The version, for those who may not import the package that it is of."""

__version__ = "0.2.0"
