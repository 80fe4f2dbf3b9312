"""Native code: the one door to it."""
