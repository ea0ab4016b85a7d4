"""Echo's plug-ins for ms-swift and verl. Nothing heavy is imported here: every process of both frameworks passes by."""

__version__ = "0.1.0"
