"""Data sets: a seeded synthetic catalogue with an impression log, and importers of real ones."""
