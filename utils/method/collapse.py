"""Collapse of the embeddings: spread, effective rank, and a warning when they are low."""

import torch
from torch import Tensor


@torch.no_grad()
def spread(embeddings: Tensor) -> Tensor:
    """Root mean squared distance of unit vectors (N, D) from their mean: 0 to 1.

    1 where they are spread evenly, 0 where all are one point: the collapse of methods without
    negatives.
    """
    return (1 - embeddings.mean(dim=0).square().sum()).clamp(min=0).sqrt()


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> Tensor:
    """Effective rank of embeddings (N, D): 1 to min(N, D).

    The exponential of the entropy of the normalized singular values (Roy and Vetterli 2007; used on
    embeddings as RankMe, Garrido et al. 2023).
    """
    singular = torch.linalg.svdvals(embeddings)
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp()


def embedding_health(embeddings: Tensor, *, most: int = 2048) -> dict[str, Tensor]:
    """`spread` and `effective_rank` of at most `most` rows of (N, D), evenly taken."""
    step = -(-embeddings.shape[0] // most)
    sample = embeddings[::step].float()
    return {"spread": spread(sample), "effective_rank": effective_rank(sample)}


# Below these the embeddings hardly tell images apart, however low the loss is.
LOW_SPREAD = 0.1
LOW_RANK = 5.0


def warning(figures: dict[str, float]) -> str | None:
    """What is wrong with the embeddings, if anything: this family fails with a low loss.

    figures: "spread" and "effective_rank" of `embedding_health`.
    """
    advice = "try a lower --learning_rate, a --momentum nearer to 1, or --proj_bn"
    if figures["spread"] < LOW_SPREAD:
        return f"the embeddings collapse: spread {figures['spread']:.3f} of 0 to 1; {advice}"
    if figures["effective_rank"] < LOW_RANK:
        rank = f"{figures['effective_rank']:.1f}"
        return (
            f"the embeddings have an effective rank of {rank} only: a low loss then means "
            f"that images look alike, not that they are understood; {advice}"
        )
    return None
