"""The model and its parts: layers, attention, adapters, packed weights, log-probabilities."""
