"""What must not be waited for: which modules the command line reads before its work begins."""

import subprocess
import sys

import pytest

from fpn.cli import app
from fpn.help import set_words

HEAVY = ("lightning", "matplotlib", "numpy", "pandas", "torch", "torchvision", "rich.markdown")


def modules_after(code: str) -> set[str]:
    code += "\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("verb", [[], ["train"], ["data", "info"]])
def test_help_reads_nothing_heavy(verb):
    code = f"import sys, fpn.cli\ntry: fpn.cli.main({[*verb, '--help']})\nexcept SystemExit: pass"
    assert not modules_after(code) & set(HEAVY)


@pytest.mark.slow
def test_data_info_does_without_torchvision():
    assert "torchvision" not in modules_after("import sys, fpn.spec, fpn.data\nfpn.data.describe, fpn.data.load")


def test_help_joins_lines_and_shows_code(capsys):
    from cyclopts.help import InlineText

    text = "Such as\n`a  b` and [x].\n\nNext."
    words = set_words(InlineText.from_format(text, "plaintext")).primary_renderable
    assert words.plain == "Such as a b and [x].\n\nNext."
    assert [(words.plain[span.start : span.end], span.style) for span in words.spans] == [("a b", "markdown.code")]
    with pytest.raises(SystemExit):
        app("--help")
    assert "train: {epochs: 24}" in capsys.readouterr().out
