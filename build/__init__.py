"""Checkpoints → deployable artefacts, and the assembly of a release."""
