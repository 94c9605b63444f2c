"""Evidence: does what an item looks like make a ranker better? Splits, arms, intervals, reports, gates."""
