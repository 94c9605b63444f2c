"""Retrieval quality while a gallery is being backfilled. NumPy alone; it takes vectors, whatever made them."""
