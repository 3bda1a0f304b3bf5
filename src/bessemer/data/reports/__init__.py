"""Reports of corpora and stages: dataset card, stage statistics, histograms of scores."""
