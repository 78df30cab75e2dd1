"""Read a verdict from the text of an answer, strictly: nothing is repaired and no type is coerced."""

from ..files.json_text import loads

TEXT_CAP = 2**16                                             # characters in which a verdict is looked for


def read_verdict(text, schema):
    """(status, data, parse_mode, names of extra keys) of an answer's text.

    The verdict is the whole text, or the one object in it that fits the schema, in a fence or in prose. Two different
    objects are no verdict, and neither is a list, a cut object or a key that occurs twice.
    """
    try:
        whole = loads(text.strip())
        spans, mode = [text] if isinstance(whole, dict) else [], "whole"
    except (ValueError, RecursionError):
        if "{" not in text:
            return "refused_text", None, None, ()
        spans, mode = _objects(text[:TEXT_CAP]), "extracted"
    fitting = []
    for span in spans:
        try:
            value = loads(span)
        except (ValueError, RecursionError):
            continue
        if _fits(value, schema) and value not in fitting:
            fitting.append(value)
    if len(fitting) != 1:
        return "invalid_verdict", None, None, ()
    names = schema["properties"]
    (verdict,) = fitting
    return "ok", {n: verdict[n] for n in names if n in verdict}, mode, tuple(n for n in verdict if n not in names)


def _objects(text):
    """The outermost {...} of a text. None of them if one is in a list or never closes: the rest could be inside it."""
    spans, start, depth, quoted, escaped = [], 0, 0, False, False
    for i, char in enumerate(text):
        if quoted:
            quoted, escaped = escaped or char != '"', char == "\\" and not escaped
        elif char == '"':
            quoted = depth > 0
        elif char == "{":
            start, depth = (i, 1) if depth == 0 else (start, depth + 1)
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                spans.append((start, text[start:i + 1]))
    if depth or any(text[:start].rstrip().endswith("[") for start, _ in spans):
        return []
    return [span for _, span in spans]


KINDS = {"boolean": bool, "string": str, "integer": int, "number": (int, float), "array": list, "object": dict}


def _fits(value, schema):
    """True if a JSON value is an object with the schema's required properties, of the right types."""
    for name in schema["properties"] if isinstance(value, dict) else ():
        kind = schema["properties"][name].get("type")
        if name not in value:
            if name in schema.get("required", ()):
                return False
        elif kind and (not isinstance(value[name], KINDS[kind]) or (isinstance(value[name], bool) and kind != "boolean")):
            return False
    return isinstance(value, dict)
