"""The machine a command runs on: child processes, several processes, memory, installation, progress."""
