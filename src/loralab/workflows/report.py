"""Plots, page and model card of a run folder, rebuilt from its files. No torch."""

from loralab.reports.html import write_report
from loralab.reports.model_card import write_model_card
from loralab.reports.plots import write_plots
from loralab.run import RunFolder


def build_report(folder: RunFolder) -> None:
    """Write plots, `report.html` and, where there is an adapter, its model card."""
    write_plots(folder)
    write_report(folder)
    if folder.adapter.is_dir():
        write_model_card(folder)
