"""What can be proved of a run from what it left: its files, its data, its answers, its optimizer steps.

Nothing here imports an engine. The steps are taken anew in float64 by ``medllm_parity``, which is found by its name.
"""
