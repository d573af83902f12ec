"""From the command line to objects: flags, what they build for training and for evaluation.

May import: all but reporting.
"""
