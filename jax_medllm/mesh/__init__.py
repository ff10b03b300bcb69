"""Devices: a mesh over them, what lies where on it, and the processes that share it."""
