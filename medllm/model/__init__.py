"""Folders of a model: its weights, its adapters, its tokenizer, and small random ones."""
