"""How work inside other work reports itself."""

from loralab.progress import ProgressOnly, Reporter


class Listening(Reporter):
    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def say(self, text: str) -> None:
        self.heard.append(("say", text))

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        self.heard.append(("progress", label, done, total, detail))

    def finish(self, label: str) -> None:
        self.heard.append(("finish", label))


def test_progress_is_passed_on_by_a_name_of_its_own_and_words_are_not() -> None:
    listening = Listening()
    inner = ProgressOnly(listening, "rows of the run")
    inner.say("cache hit")
    inner.progress("tokenize", 3, 9, detail="fast")
    inner.finish("tokenize")
    assert listening.heard == [
        ("progress", "rows of the run: tokenize", 3, 9, "fast"),
        ("finish", "rows of the run: tokenize"),
    ]
