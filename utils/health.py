"""When the figures of a run are bad, and what they were in runs that went well."""

# Below these the embeddings hardly tell images apart, however low the loss is.
LOW_SPREAD = 0.1
LOW_RANK = 5.0


def warning(figures: dict[str, float]) -> str | None:
    """What is wrong with the embeddings, if anything: this family fails with a low loss.

    figures: "spread" and "effective_rank", see `meters`.
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
