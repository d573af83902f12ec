"""The training loop: epochs, log, saving and resuming, the files of a run.

May import: runtime, method, data, evaluation.
"""
