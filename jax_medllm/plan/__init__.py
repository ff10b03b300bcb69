"""What a stage's programs take on devices that need not be there, by the compilers of those devices.

:mod:`jax_medllm.plan.programs` traces the very functions that train and generate; :mod:`jax_medllm.plan.compiled` compiles
them and reads memory, collectives and traffic from the result. ``python -m jax_medllm.plan`` is the child process of
:mod:`medllm.plan`.
"""
