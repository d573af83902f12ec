"""The method: encoders, memory bank, neighbors, losses; encoders out of any checkpoint.

May import: runtime.
"""
