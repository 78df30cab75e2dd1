"""Tables as text: Markdown, CSV and LaTeX.

Titles, notes and cells may hold line breaks, from a folder's name or an error message. In Markdown and LaTeX each becomes
one line: a line break would end a row, a list item or a comment.
"""

import csv
import io


def markdown(tables):
    """GitHub's Markdown. A heading above several columns is put before each of them."""
    parts = []
    for table in tables:
        heads = [f"{above}: {heading}" if above else heading for above, heading in table.columns]
        lines = [f"### {_line(table.title)}", "", _piped(heads), _piped(["---", *["---:"] * (len(heads) - 1)])]
        lines += [_piped(row) for row in table.rows]
        parts.append("\n".join([*lines, "", *(f"- {_line(note)}" for note in table.notes)]))
    return "\n\n".join(parts)


def _piped(cells):
    return "| " + " | ".join(_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _line(text):
    """The text without line breaks."""
    return " ".join(text.splitlines())


def comma_separated(tables):
    """CSV at full precision, one row per method, prompt type and author (ours or the paper)."""
    rows = [row for table in tables for row in table.data]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def latex(tables):
    """LaTeX for a document with \\usepackage{booktabs}. Every line of a note is a comment."""
    parts = []
    for table in tables:
        groups = []                                          # [heading above, number of columns below it]
        for above, _ in table.columns:
            if groups and groups[-1][0] == above:
                groups[-1][1] += 1
            else:
                groups.append([above, 1])
        above = " & ".join(f"\\multicolumn{{{span}}}{{c}}{{{_tex(head)}}}" if head else " & ".join([""] * span)
                           for head, span in groups)
        lines = ["\\begin{table*}", "\\centering", f"\\caption{{{_tex(table.title)}}}",
                 f"\\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", "\\toprule", f"{above} \\\\",
                 " & ".join(_tex(heading) for _, heading in table.columns) + " \\\\", "\\midrule"]
        lines += [" & ".join(map(_tex, row)) + " \\\\" for row in table.rows]
        comments = [f"% {line}" for note in table.notes for line in note.splitlines()]
        lines += ["\\bottomrule", "\\end{tabular}", *comments, "\\end{table*}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
       "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\rightarrow$"}


def _tex(text):
    return "".join(TEX.get(letter, letter) for letter in _line(text))


BY_NAME = {"markdown": markdown, "csv": comma_separated, "latex": latex}
