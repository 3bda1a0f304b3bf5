"""Figures of corpora and stages: the dataset card, counts by stage, histograms of scores."""
