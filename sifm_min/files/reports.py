"""Reports beside results: a JSON file says which question they answer, so that no run reuses or overwrites the wrong result.

A report holds "asked", all that decides the result (the picture's bytes, the weights, every option), and "finished". It is
written first, unfinished, and so claims the names; then the results; then itself once more, finished. Files of the
same "asked" may be replaced, after a kill or by two runs at once; files of another "asked" only with `overwrite`.
"""

import contextlib
import json

from . import writing


def read_report(path):
    """The report in a JSON file, as a dict; an empty one where there is none, or none of ours."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return report if isinstance(report, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def in_short(report):
    """A report as --json prints it on one line."""
    return {key: value for key, value in report.items() if key not in ("loss", "asked", "results")}


def is_result(path, endings, report_ending):
    """True for a file NAME<ending> whose report, NAME<report_ending> beside it, names it among its "results", and for
    such a report itself."""
    for ending in (*endings, report_ending):
        if path.name.endswith(ending):
            report = read_report(path.with_name(path.name.removesuffix(ending) + report_ending))
            results = report.get("results")
            return "asked" in report and (ending == report_ending or isinstance(results, list) and path.name in results)
    return False


def earlier(report_path, asked, outputs, *, overwrite):
    """The finished report of the same question, or None where the work is to be done (again).

    outputs: every path that the work may write. Raises ValueError where one of them exists from another question and
    `overwrite` is not set.
    """
    existing = [path for path in (*outputs, report_path) if path.exists()]               # raises for a name that is too long
    if overwrite:
        return None
    report = read_report(report_path)
    if report.get("asked") == asked:
        return report if report.get("finished") else None
    if existing:
        raise ValueError(f"{existing[0]} exists, from another picture or other options; "
                         "add --overwrite or choose another folder")
    return None


def write_results(report_path, report, writers, *, overwrite):
    """Write the report unfinished, the results, and the report finished.

    report: JSON text as a function of finished, True or False. writers: {path: function(path) that writes it, over an
    existing file if need be}. Raises FileExistsError where a file exists that another question, or somebody else, has
    written since `earlier` looked. On any error nothing new is left behind.
    """
    asked = json.loads(report(False))["asked"]

    def ours():
        return overwrite or read_report(report_path).get("asked") == asked

    with contextlib.ExitStack() as undo:
        mine = ours()
        if existing := [path for path in writers if path.exists() and not mine]:
            raise FileExistsError(f"{existing[0]} exists; --overwrite replaces it")
        for path in (report_path, *writers):
            if not path.exists():
                undo.callback(_remove, path)
        try:
            writing.write(report_path, report(False), overwrite=mine)
        except FileExistsError:
            if not ours():                                   # else another run asks the same, and writes the same
                raise
        for path, write in writers.items():
            write(path)
        writing.write(report_path, report(True), overwrite=True)
        undo.pop_all()


def _remove(path):
    with contextlib.suppress(OSError):
        path.unlink()
