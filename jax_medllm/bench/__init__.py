"""What ``medllm bench`` measures of this engine, each in a process of its own."""
