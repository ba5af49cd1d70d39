"""The folder of a preference test: the frozen items, and one file of votes for each rater.

Owns names of files and raters, when items may still change, and what is moved aside for a new test.
"""

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loralab.errors import JudgingError, StorageError
from loralab.judging.items import ItemSet, read_items, write_items
from loralab.judging.sitting import Sitting
from loralab.judging.votes import Votes, check_belongs, is_held, open_votes, read_votes

# A name becomes the name of a file, on every system.
_RATER = re.compile(r"\w(?:[\w .@+-]{0,62}[\w+-])?")
_TAKEN_NAMES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
_SUFFIX = ".jsonl"


def check_rater(name: str, *, where: str) -> str:
    """Return a rater's name in its composed form.

    Args:
        name: as given.
        where: it was given.

    Raises:
        JudgingError: no file can be named so everywhere.
    """
    composed = unicodedata.normalize("NFC", name)
    if _RATER.fullmatch(composed) is None or _TAKEN_NAMES.fullmatch(composed):
        raise JudgingError(
            f"not a rater's name: {name[:80]!r}",
            where=where,
            fix="give letters, digits, dots, hyphens, @ or single words with blanks, 64 characters at most",
        )
    return composed


@dataclass(frozen=True, slots=True)
class PreferenceFolder:
    """The folder of one preference test.

    Args:
        path: the folder.
        pictures: folder of the pictures' small copies.
    """

    path: Path
    pictures: Path

    @property
    def items_file(self) -> Path:
        """The frozen items."""
        return self.path / "items.json"

    def votes_file(self, rater: str) -> Path:
        """Return the file of a rater's votes.

        Args:
            rater: name of the rater, checked.
        """
        return self.path / "votes" / f"{rater}{_SUFFIX}"

    def load_items(self) -> ItemSet | None:
        """Return the items, or None where there are none yet.

        Raises:
            JudgingError: the file is no set of items, or was changed.
            RunFolderError: it cannot be read.
        """
        return read_items(self.items_file, pictures=self.pictures) if self.items_file.is_file() else None

    def keep_items(self, items: ItemSet) -> None:
        """Write the items, in the place of others that nobody has voted on.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            write_items(self.items_file, items)
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def has_votes(self) -> bool:
        """Return whether anybody has voted here, or has a page to vote on, so that the items are frozen."""
        return any(path.stat().st_size for path in self._vote_files())

    def raters(self) -> list[str]:
        """Return the names of those who have voted or have a page to vote on, sorted."""
        # macOS gives names back in parts: a letter, then its accent.
        names = (unicodedata.normalize("NFC", path.name) for path in self._vote_files() if path.stat().st_size)
        return sorted(name.removesuffix(_SUFFIX) for name in names)

    def _vote_files(self) -> list[Path]:
        folder = self.path / "votes"
        return [path for path in folder.glob(f"*{_SUFFIX}") if path.is_file()] if folder.is_dir() else []

    def load_votes(self, items: ItemSet) -> list[Votes]:
        """Return the votes of all raters, by name, whether their sittings are closed or not.

        Args:
            items: the items of this folder.

        Raises:
            JudgingError: a file holds no votes, or votes on other items.
        """
        found = []
        for rater in self.raters():
            votes = read_votes(self.votes_file(rater))
            if votes is not None:
                check_votes(votes, items, rater=rater, where=str(self.votes_file(rater)))
                found.append(votes)
        return found

    @contextmanager
    def open_sitting(self, items: ItemSet, rater: str) -> Iterator[Sitting]:
        """Hold a rater's sitting; no other process can meanwhile.

        Args:
            items: the items of this folder.
            rater: name of the rater, checked.

        Raises:
            JudgingError: another process holds it, or its votes are on other items.
            StorageError: votes cannot be written.
        """
        sha256 = items.sha256

        def still_there() -> None:
            now = self.load_items()
            if now is None or now.sha256 != sha256:
                raise JudgingError(
                    "the items were changed meanwhile: this sitting was opened on others",
                    where=str(self.items_file),
                    fix="end this sitting, and start `loralab judge` again",
                )

        file = self.votes_file(rater)
        with open_votes(file, rater=rater, items_sha256=sha256, before_first=still_there) as log:
            check_votes(log.votes, items, rater=rater, where=str(file))
            yield Sitting(rater, items.pairs_for(rater), log)

    def await_votes(self, items: ItemSet, rater: str) -> None:
        """Freeze the items for a rater who has a page to vote on; its votes come later, from elsewhere.

        Args:
            items: the items of this folder.
            rater: name of the rater, checked.

        Raises:
            JudgingError: another process holds the rater's sitting, or its votes are on other items.
            StorageError: it cannot be written.
        """
        with open_votes(self.votes_file(rater), rater=rater, items_sha256=items.sha256) as log:
            log.begin()

    def move_aside(self) -> Path | None:
        """Move the test aside for a new one; return where it is now, or None where there was none.

        Raises:
            JudgingError: somebody is judging at this moment.
            StorageError: it cannot be moved.
        """
        if not self.path.exists():
            return None
        held = next((path for path in self._vote_files() if is_held(path)), None)
        if held is not None:
            raise JudgingError(
                f"{held.name.removesuffix(_SUFFIX)!r} is judging at this moment, so there can be no new test",
                where=str(held),
                fix="wait for the end of that sitting, or end its process",
            )
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return aside


def check_votes(votes: Votes, items: ItemSet, *, rater: str, where: str) -> None:
    """Check that votes are a rater's on these items.

    Raises:
        JudgingError: they are not.
    """
    check_belongs(votes, rater=rater, items_sha256=items.sha256, where=where)
    known = {item.item for item in items.shown}
    foreign = next((act.item for act in votes.acts if act.item not in known), None)
    if foreign is not None:
        raise JudgingError(
            f"a vote on an item that was never shown: {foreign}", where=where, fix="restore the file from a backup"
        )


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write the preference test: {error.strerror or error}",
        where=str(path),
        fix=f"make {str(path.parent)!r} a writable folder, or name another with --output FOLDER",
    )
