"""The subset of Go's templates: what it writes, and that nothing else is guessed."""

import pytest

from loralab.errors import TemplateError
from loralab.export.go_template import GoTemplate, quote_text

VALUES = {
    "System": "be kind",
    "Empty": "",
    "Messages": [{"Role": "user", "Content": "hi"}, {"Role": "tool", "Content": "x"}],
}


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a {{ .System }} b", "a be kind b"),
        ("a \n {{- .System -}} \n b", "abe kindb"),
        ('{{ if .Empty }}yes{{ else if eq .System "no" "be kind" }}second{{ else }}no{{ end }}', "second"),
        (
            "{{ range .Messages }}[{{ .Role }}:{{ .Content }}:{{ $.System }}]{{ end }}",
            "[user:hi:be kind][tool:x:be kind]",
        ),
        ('{{ $n := "1" }}{{ range .Messages }}{{ $n }}{{ $n = "2" }}{{ end }}{{ $n }}', "122"),
        ('{{ $n := "1" }}{{ range .Messages }}{{ $n := "2" }}{{ end }}{{ $n }}', "1"),
        ("{{ if and .System (not .Empty) }}both{{ end }}{{ or .Empty .System }}{{ ne 1 1 }}", "bothbe kindfalse"),
        ('{{ "\\n}}" }}{{ `a"` }}', '\n}}a"'),
    ],
)
def test_a_template_writes_what_go_writes(text: str, written: str) -> None:
    assert GoTemplate(text).render(VALUES) == written


@pytest.mark.parametrize(
    "text",
    [
        "{{ .Nothing }}",
        "{{ if .System }}",
        "{{ end }}",
        "{{ with .System }}{{ end }}",
        "{{ len .System }}",
        "{{ $x }}",
        "a {{ b",
    ],
)
def test_what_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(TemplateError):
        GoTemplate(text).render(VALUES)


@pytest.mark.parametrize("text", ["{{ .System }}", 'a """ b', "ends with {", "{{{{", "}} {% x %}", '"""'])
def test_quoted_text_stands_for_itself(text: str) -> None:
    quoted = quote_text(text)
    assert '"""' not in quoted
    assert GoTemplate(quoted + "{{ .System }}").render(VALUES) == text + "be kind"
