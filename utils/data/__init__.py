"""The data: images on a disk to batches on a device, with their labels and splits.

May import: runtime.
"""
