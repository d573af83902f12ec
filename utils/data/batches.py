"""The loaders: two views of an image for training, one view for training with labels, to evaluate.

Each has its file; this one is where the rest of the code finds them.
"""

from utils.data.eval_loader import EvalBatch, EvalLoader, LabeledLoader
from utils.data.reading import batch_ends, epoch_batches
from utils.data.train_loader import Batch, TwoViewLoader

__all__ = [
    "Batch",
    "EvalBatch",
    "EvalLoader",
    "LabeledLoader",
    "TwoViewLoader",
    "batch_ends",
    "epoch_batches",
]
