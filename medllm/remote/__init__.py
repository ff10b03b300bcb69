"""Models behind an OpenAI-compatible server: what is asked, at what pace, what comes of a fault, and what it cost."""
