"""The data: images on a disk to batches on a device, with their labels and splits.

On a batch's way: `datasets` has the images, `batches` says which and starts workers, `bad_images`
replaces or refuses broken files, `cropping` decodes and crops, `augment` makes the strong and the
weak view; `train_loader` and `eval_loader` put it together.

May import: runtime.
"""
