"""What is left of marked-up text: all words, in order, and nothing of the markup."""

from tasks.lm.data.markup import dictionary_text, html_text, markdown_text, tagged_words, tidy
from tasks.lm.data.roff import manual_text

PAGE = """<!DOCTYPE html><html><head><title>No</title><style>p {}</style></head><body>
<div class="navheader"><table><tr><td><div>Prev</div></td></tr></table></div>
<script>if (a < b) { no() }</script>
<h2 class="title">3.1. Views &amp; more</h2><p>Refer
  to the <code>weather</code> table<br/>in&nbsp;<i>SQL</i>.
<pre class="x">
SELECT *
    FROM t &lt; 3;
</pre>
<ul><li>one<li> two <b>bold</b> </ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<svg><text>picture</text></svg><div class="toc nav"><div>1. Contents</div></div>end</body></html>"""


def test_html() -> None:
    assert html_text(PAGE) == (
        "3.1. Views & more\n\nRefer to the weather table\nin SQL.\n\nSELECT *\n    FROM t < 3;\n\n"
        "- one\n- two bold\n\n  a  b\n  1  2\n\nend\n"
    )


def test_unclosed_tags_lose_no_text() -> None:
    assert html_text("<p>a<p>b<div class=nosearch>menu</div><li>c") == "a\n\nb\n- c\n"
    assert html_text("plain &gt; text") == "plain > text\n"


def test_markdown_keeps_emphasis_and_loses_targets() -> None:
    text = (
        'See [section\nA.2](secA2.md#x), **[_this_](a.md "t")** and [Goldman, p. 4].\r\n\r\n\r\n\r\nEnd  \n'
    )
    assert markdown_text(text) == "See section\nA.2, **_this_** and [Goldman, p. 4].\n\nEnd\n"


def test_tagged_words() -> None:
    text = (
        "\n\n\t``/`` Why/wrb should/md I/ppss ?/. ?/.\nI/ppss own/vb 1/2/cd (/( half/abn )/) ''/'' ,/, "
        "said/vbd Mr./np Allen/np Jr./np ./.\n\n\n\tThe/at jury's/nn$ end/nn ;/.\n"
    )
    assert tagged_words(text) == '"Why should I? I own 1/2 (half)", said Mr. Allen Jr.\n\nThe jury\'s end;\n'


def test_dictionary() -> None:
    entries = (
        "Lark \\Lark\\ (l[aum]rk), n. [AS. l[=a]werc; l[ae]virki.] (Zool.)\n   Any of\n   {Alauda}, "
        "family {Alaudid[ae]}. [Obs.]\n   [1913 Webster]\n\n   Note: The [i^] sky'ark. [1913 Webster +PJC]\n"
        '        [WordNet 1.5]\n\nLarine \\La"rine\\, a. [Cf. [Gr. ?.]]\n   [Webster 1913 Suppl.]\n   Gull.'
    )
    assert dictionary_text(entries) == (
        "Lark (lärk), n. [AS. lāwerc; lævirki.] (Zool.)\n   Any of\n   Alauda, family Alaudidæ. "
        "[Obs.]\n\n   Note: The ĭ sky'ark.\n\nLarine, a. [Cf. [Gr. ?.]]\n   Gull.\n"
    )


MANUAL = r"""'\" t
.\" A comment
.de IX
..
.    tm ignored
.TH mmap 2 2023-02-05 "Linux man-pages"
.SH NAME
mmap, munmap \- map or unmap
.SH SYNOPSIS
.nf
.B #include <sys/mman.h>
.PP
.BI "void *mmap(void " addr [. length "], int " prot \
", off_t " offset );
.fi
.SS Sub "section"
.PP
.BR mmap ()
creates a \fInew\fP mapping\(emin \fB\,memory\/\fP.  \" gone
It is \f(CW\*(C`cheap\*(C'\fR; see
.IR mmap (2)\c
, or \s-1POSIX\s0 \e and \(co.
.IX Item "gone"
.TP
.B MAP_SHARED
Share it.
.IP "flag \- x" 4
Said.
.EX
    a  =  b;
.EE
.TS
allbox;
l l.
Name	Value
_
T{
a\-b
T}	1
.TE
after
"""


def test_manual_pages() -> None:
    assert manual_text(MANUAL) == (
        "mmap(2)\n\nNAME\n\nmmap, munmap - map or unmap\n\nSYNOPSIS\n\n#include <sys/mman.h>\n\n"
        "void *mmap(void addr[.length], int prot, off_t offset);\n\nSub section\n\n"
        'mmap() creates a new mapping—in memory. It is "cheap"; see mmap(2) , or POSIX \\ and ©.\n\n'
        "MAP_SHARED\nShare it.\n\nflag - x\nSaid.\n    a  =  b;\n\nName  Value\na-b  1\n\nafter\n"
    )


def test_a_page_that_refers_to_another_is_empty() -> None:
    assert manual_text(".so man2/mmap.2\n") == ""
    assert manual_text("no manual page at all") == ""


def test_tidy() -> None:
    assert tidy("a \r\nb\t\r\n\r\n\r\n\r\n\xa0c\f") == "a\nb\n\n c\n"
