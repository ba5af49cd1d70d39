"""Plots, the HTML report and the model card: made from the files of a run folder alone."""
