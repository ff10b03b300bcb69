"""Weights and adapters, from files into their shards and back."""
