"""What a run would need before anything is rented: ``medllm plan``.

The compilers are asked by the JAX engine; here is what needs no framework.
"""
