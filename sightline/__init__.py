"""What training and serving share. Importing it never imports torch."""

__version__ = "0.1.0"
