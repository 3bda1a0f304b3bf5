"""Scaling laws: the loss of a model from its parameters and training tokens, fitted to measured points.

One meaning each: N are parameters, D training tokens, L a loss, C training FLOPs. numpy alone: no scipy, no torch.
"""
