"""Slow oracles: every method once more, in the plainest way."""
