"""Parts that the training and evaluation scripts share; docs/design.md is the map."""
