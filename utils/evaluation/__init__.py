"""Evaluation: features of a data set, k-NN, linear and logistic classifiers, transfer.

May import: runtime, method, data.
"""
