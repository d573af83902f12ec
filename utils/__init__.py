"""Parts that the training and evaluation scripts share; the README's map says what lives where."""
