"""Manual pages (roff with man macros and tbl tables) as plain text: paragraphs filled, examples as is."""

import re

from tasks.lm.data.markup import tidy

_SPECIAL = {
    "em": "—", "en": "-", "hy": "-", "mi": "-", "aq": "'", "oq": "'", "cq": "'",
    "aa": "'", "dq": '"', "lq": '"', "rq": '"', "ga": "`", "bu": "•", "co": "©", "rg": "®", "tm": "™",
    "mu": "x", "ti": "~", "ha": "^",
    "rs": "\\", "sl": "/", "->": "→", "<-": "←", ">=": "≥", "<=": "≤", "!=": "≠", "+-": "±", "pl": "+",
    "eq": "=", "de": "°", "sc": "§", "ba": "|", "br": "|", "ul": "_", "at": "@", "sh": "#", "Do": "$",
    "Eu": "€", "Po": "£", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "<", "ra": ">", "14": "1/4",
    "12": "1/2", "34": "3/4", "*m": "μ", "*p": "π", "if": "∞", "ss": "ß",
}  # fmt: skip
_ACCENTED = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ",": "\u0327"}
_STRINGS = {"C`": '"', "C'": '"', 'L"': '"', 'R"': '"', "lq": '"', "rq": '"', "--": "--", "R": "(R)"}
_ESCAPE = re.compile(
    r"""\\(?:
      f(?:\[[^\]]*\]|\(..|.) | s(?:[+-]?\d{1,2}|\[[^\]]*\]) | [vhwZDLlbo]'[^']*'
    | n(?:[+-]?(?:\(..|\[[^\]]*\]|.)) | m\[[^\]]*\] | k. | z
    | \*(?:\((?P<two>..)|\[(?P<long>[^\]]*)\]|(?P<one>.))
    | \((?P<special>..) | \[(?P<named>[^\]]*)\]
    | (?P<char>.)
    )""",
    re.VERBOSE | re.DOTALL,
)
_PLAIN = {
    "-": "-",
    "e": "\\",
    "\\": "\\",
    " ": " ",
    "~": " ",
    "0": " ",
    ".": ".",
    "'": "'",
    "`": "`",
    "t": "\t",
}
_PARAGRAPH = {"PP", "LP", "P", "Sp", "sp", "HP", "RS", "RE"}
_VERBATIM_BEGINS, _VERBATIM_ENDS = {"nf", "Vb", "EX", "CS"}, {"fi", "Ve", "EE", "CE"}
_ALTERNATING = {"BR", "BI", "IB", "IR", "RB", "RI"}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')


def manual_text(source: str) -> str:
    """The text of a manual page; "" for a page that only refers to another one (.so)."""
    page = _ManualPage()
    for line in _logical_lines(source):
        page.read(line)
    return page.text()


def _logical_lines(source: str) -> list[str]:
    """Lines from .TH on, with continued ones joined and comments gone. Before .TH macros are defined."""
    text = re.sub(r"\\\n", "", source.replace("\r\n", "\n"))
    text = re.sub(r"(?m)^[.'][ \t]*\\\".*\n?|^\.\.?[ \t]*\n", "", text)
    text = re.sub(r"[ \t]*\\[\"#].*", "", text)
    begin = re.search(r"(?m)^\.TH\b", text)
    return text[begin.start() :].split("\n") if begin else []


def _unescaped(text: str) -> str:
    """Characters for roff's escapes; fonts, sizes and motions are dropped."""

    def character(match: re.Match[str]) -> str:
        name = match["special"] or match["named"]
        if name is not None:
            accent = _ACCENTED.get(name[:1]) if len(name) == 2 else None
            if name in _SPECIAL:
                return _SPECIAL[name]
            if accent and name[1].isalpha():
                return name[1] + accent
            return chr(int(name[1:], 16)) if re.fullmatch(r"u[0-9A-F]{4,6}", name) else ""
        string = match["two"] or match["long"] or match["one"]
        if string is not None:
            return _STRINGS.get(string, "")
        return _PLAIN.get(match["char"] or "", "")

    return _ESCAPE.sub(character, text)


def _arguments(text: str) -> list[str]:
    found = []
    for quoted, word in _ARGUMENT.findall(text):
        found.append(word if word else quoted.replace('""', '"'))
    return found


class _ManualPage:
    """What has been read of a page."""

    def __init__(self) -> None:
        self._out: list[str] = []
        self._words: list[str] = []  # of the paragraph under way
        self._is_verbatim = False
        self._is_tag = False  # the next line stands by itself, above its paragraph
        self._table = ""  # "", "format" or "rows"
        self._row: str | None = None  # a table row whose cell T{ goes on over lines

    def text(self) -> str:
        self._end_paragraph()
        return tidy("\n".join(self._out)) if any(line.strip() for line in self._out) else ""

    def read(self, line: str) -> None:
        if self._table and not line.startswith(".TE"):
            self._read_table(line)
        elif re.match(r"[.'][ \t]*[A-Za-z]", line):
            name, _, rest = line[1:].strip().partition(" ")
            self._macro(name, rest.strip())
        elif not line.startswith((".", "'")):
            self._words_of(line)

    def _words_of(self, line: str) -> None:
        text = _unescaped(line)
        if self._is_verbatim:
            self._out.append(text)
        elif not text.strip():
            self._end_paragraph("")
        else:
            self._words.append(text.strip())
            if self._is_tag:
                self._end_paragraph()
                self._is_tag = False

    def _macro(self, name: str, rest: str) -> None:
        if name in _ALTERNATING:
            self._words_of("".join(_arguments(rest)))
        elif name in ("B", "I", "SM", "SB", "R", "CW"):
            self._words_of(" ".join(_arguments(rest)))
        elif name in ("SH", "SS", "TH"):
            words = _arguments(rest)
            title = f"{words[0]}({words[1]})" if name == "TH" and len(words) > 1 else " ".join(words)
            self._end_paragraph("")
            self._out += [_unescaped(title), ""]
            self._is_verbatim = False
        elif name in _PARAGRAPH:
            self._end_paragraph("")
        elif name == "br":
            self._end_paragraph()
        elif name in ("TP", "TQ"):
            self._end_paragraph("" if name == "TP" else None)
            self._is_tag = True
        elif name == "IP":
            self._end_paragraph("")
            self._out += [_unescaped(word) for word in _arguments(rest)[:1] if word]
        elif name in _VERBATIM_BEGINS:
            self._end_paragraph()
            self._is_verbatim = True
        elif name in _VERBATIM_ENDS:
            self._is_verbatim = False
        elif name == "UR" or name == "MT":
            self._words_of(" ".join(_arguments(rest)[:1]))
        elif name == "MR":
            words = _arguments(rest)
            self._words_of(f"{words[0]}({words[1]}){''.join(words[2:])}" if len(words) > 1 else rest)
        elif name == "TS":
            self._end_paragraph("")
            self._table = "format"
        elif name == "TE":
            self._table = ""
            self._out.append("")

    def _read_table(self, line: str) -> None:
        if self._table == "format":
            self._table = "rows" if line.rstrip().endswith(".") else "format"
        elif line.startswith(".T&"):
            self._table = "format"
        elif self._row is not None and not line.startswith("T}"):
            self._row += "" if line.startswith(".") else f"{line} "
        elif not line.startswith("."):
            row = (self._row or "").rstrip(" ") + line.removeprefix("T}")
            self._row = row[:-2] if row.endswith("T{") else None
            if self._row is None and row.strip("_= \t"):
                self._out.append(_unescaped(row.replace("\t", "  ")).rstrip())

    def _end_paragraph(self, then: str | None = None) -> None:
        """Writes the paragraph under way, and a line after it."""
        if self._words:
            self._out.append(" ".join(self._words))
            self._words = []
        if then is not None and (self._out and self._out[-1]):
            self._out.append(then)
