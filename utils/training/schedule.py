"""The learning rate as a pure function of the epoch."""

import argparse
import math


def learning_rate(args: argparse.Namespace, epoch: int) -> float:
    """Learning rate of an epoch, from 1, by `options.add_training_options`.

    --cos: base / 2 * (1 + cos(pi * (epoch - 1) / epochs)): the base in the first epoch, nearly 0
    in the last. Otherwise the base times --lr_decay_rate for each of --lr_decay_epochs before.
    """
    if args.cos:
        return args.learning_rate / 2 * (1 + math.cos(math.pi * (epoch - 1) / args.epochs))
    return args.learning_rate * args.lr_decay_rate ** sum(epoch > e for e in args.lr_decay_epochs)
