"""What the entry points share: one idea a file, imports downwards only."""

__version__ = "0.2.0"
