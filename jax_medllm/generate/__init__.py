"""Generation with a key/value cache, and the scoring of given texts."""
