"""Plots, page, model card and methods paragraph of a run folder, made from its files. No torch."""

import errno

from loralab.errors import StorageError
from loralab.reports.facts import load_facts
from loralab.reports.html import write_report
from loralab.reports.methods import Methods, describe_methods
from loralab.reports.model_card import write_model_card
from loralab.reports.pictures import pictures_folder
from loralab.reports.plots import write_plots
from loralab.reports.sections import report_images
from loralab.run import RunFolder
from loralab.workflows.thumbnails import keep_thumbnails


def build_report(folder: RunFolder) -> None:
    """Write plots, `report.html` and, where there is an adapter, its model card.

    Raises:
        StorageError: the run folder is read-only.
    """
    try:
        write_plots(folder)
        keep_thumbnails(pictures_folder(folder), report_images(load_facts(folder)))
        write_report(folder)
        if folder.adapter.is_dir():
            write_model_card(folder)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise StorageError(
            f"cannot write the report: {error.strerror}",
            where=str(error.filename or folder.path),
            fix="make the run folder writable, or copy it to a place of your own and report on the copy",
        ) from error


def methods_of(folder: RunFolder) -> Methods:
    """Return a paragraph for a paper with the run's numbers, and BibTeX of what it used; nothing is written.

    Raises:
        RunFolderError: a file of the run is there but broken.
    """
    return describe_methods(folder)
