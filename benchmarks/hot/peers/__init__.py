"""The same ranking as other servers' documentation would have one write it; run in an environment of their own."""
