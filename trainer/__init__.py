"""Offline training in PyTorch: captioner, ranker, evaluation."""
