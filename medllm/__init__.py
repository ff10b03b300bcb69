"""The study both engines share: corpus, preferences, exam and report. Imports neither jax nor torch."""

__version__ = "0.1.0"
