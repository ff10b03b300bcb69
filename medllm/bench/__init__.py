"""What things cost on this machine: ``medllm bench``. Each measurement runs in a fresh process, so that peaks are its own.

A measurement is a module here, which makes its input and judges the outcome, and a function of the same name in the engine's
``bench`` module, which a child process runs (:mod:`medllm.host.child`). Neither framework is imported here.
"""
