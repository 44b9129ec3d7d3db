"""Text out of markup: HTML pages, Markdown links, dictionary entries, tagged words. Words stay, codes go."""

import re
import unicodedata
from html.parser import HTMLParser

_DROPPED = {"head", "script", "style", "svg", "nav", "button", "form", "select", "template"}
# Navigation of the manuals read here: bars above and below a page, menus, tables of contents, indices.
_DROPPED_CLASSES = {"navheader", "navfooter", "docnav", "nosearch", "toc", "indexdiv", "noprint"}
_VOID = {"br", "hr", "img", "input", "link", "meta", "col", "wbr", "area", "base", "source"}
_PARAGRAPHS = {"p", "div", "table", "pre", "blockquote", "ul", "ol", "dl", "section", "article", "hr"}
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_LINES = {"br", "li", "tr", "dt", "dd", "caption"}


class _Page(HTMLParser):
    """Collects the words of a page: paragraphs apart, list items and table rows on lines, <pre> as it is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._skipped = ""  # the tag whose content is dropped, and how deep inside tags of that name we are
        self._depth = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped:
            self._depth += tag == self._skipped
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in _VOID and (tag in _DROPPED or classes & _DROPPED_CLASSES):
            self._skipped, self._depth = tag, 1
            return
        if tag in _PARAGRAPHS or tag in _HEADINGS:
            self._break(2)
        elif tag in _LINES:
            self._break(1)
            self.parts.append("- " if tag == "li" else "")
        elif tag in ("td", "th"):
            self.parts.append("  ")
        self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipped:
            self._depth -= tag == self._skipped
            self._skipped = self._skipped if self._depth else ""
            return
        self._pre -= tag == "pre" and self._pre > 0
        if tag in _PARAGRAPHS or tag in _HEADINGS:
            self._break(2)

    def handle_data(self, data: str) -> None:
        if self._skipped:
            return
        if self._pre:
            self.parts.append(data)
            return
        text = re.sub(r"\s+", " ", data)
        is_apart = not self.parts or self.parts[-1].endswith(("\n", " "))
        if text := text.lstrip() if is_apart else text:
            self.parts.append(text)

    def _break(self, lines: int) -> None:
        self.parts.append("\n" * lines)


def html_text(page: str) -> str:
    """The words of an HTML page, without navigation, scripts and pictures."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    return tidy("".join(parser.parts))


def tidy(text: str) -> str:
    """Line ends as \\n, no white space before them, at most one empty line in a row, one \\n at the end."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ").replace("\f", "\n")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def markdown_text(text: str) -> str:
    """Markdown with the targets of links taken out; emphasis and headings stay."""
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return tidy(re.sub(r"\[([^\]]+)\]\([^)\s]*(?:\s+\"[^\"]*\")?\)", r"\1", text))


def tagged_words(text: str) -> str:
    """Plain sentences of words with their part of speech ("said/vbd ./."), one paragraph a line.

    Quotes become ", and marks lose the space before them.
    """
    words = [[word.rpartition("/")[0] or word for word in p.split()] for p in re.split(r"\n\s*\n", text)]
    return tidy("\n\n".join(_set_close(" ".join(paragraph)) for paragraph in words if paragraph))


def _set_close(text: str) -> str:
    """Words and marks as they are printed: said , `` no '' . -> said, "no"."""
    text = re.sub(r"`` ?| ?''", '"', text)
    text = re.sub(r" ([,.;:?!)\]}])(?=[ \"')\]]|$)", r"\1", text)
    text = re.sub(
        r"([.?!])\1(?= |$)", r"\1", text
    )  # after an abbreviation, and as this corpus doubles ? and !
    return re.sub(r"([(\[{]) ", r"\1", text)


# What a dictionary in ASCII spells in brackets: a mark before (or after) the letter it goes on.
_BEFORE = {
    "=": "\u0304", "^": "\u0302", '"': "\u0308", "'": "\u0301", "`": "\u0300", "~": "\u0303", ".": "\u0307",
    ",": "\u0327", "_": "\u0331", "*": "", "-": "",
}  # fmt: skip
_NAMED = {
    "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "=ae": "ǣ", "imac": "ī", "aum": "ä", "root": "√", "eth": "ð",
    "thorn": "þ", "asl": "á", "add": "ạ", "udd": "ụ", "oo^": "oo", "=oo": "oo", "deg": "°", "ng": "ŋ",
    "th": "th", "yogh": "ȝ", "sect": "§", "pounds": "£", "dsdot": "ṣ", "bar": "|",
}  # fmt: skip
_CODE = re.compile(r"\[(" + "|".join(map(re.escape, _NAMED)) + r"|[=^\"'`~.,*_-][A-Za-z]|[A-Za-z]\^)\]")
# Lines that say which edition an entry comes from, and the headword spelt again with accents: Lark \Lark\, n.
_EDITION = re.compile(
    r"\s*\[(?:1913 Webster|Webster 1913 Suppl|WordNet(?: sense)? [\d.]+|PJC|RDH|RHUD|AS|MW\d+|[\s+.,])+\]"
)
_RESPELT = re.compile(r"(?<=\S)[ \n]+\\[^\\\n]{1,80}\\")


def dictionary_text(entries: str) -> str:
    """Entries of the dictd GCIDE as a printed dictionary has them.

    Taken out: edition marks, the braces of references, respelt headwords. Letters spelt in ASCII ([=a], [ae])
    become letters.
    """
    text = _EDITION.sub("", entries)
    text = _RESPELT.sub("", text)
    return tidy(_CODE.sub(_letter, text).replace("{", "").replace("}", ""))


def _letter(match: re.Match[str]) -> str:
    code = match[1]
    if code in _NAMED:
        return _NAMED[code]
    letter, mark = (code[0], "\u0306") if code[1] == "^" else (code[1], _BEFORE[code[0]])
    return unicodedata.normalize("NFC", letter + mark)
