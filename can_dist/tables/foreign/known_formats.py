"""The formats of other people's data that are known, and the one that a file's columns fit."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from can_dist.errors import DataError
from can_dist.tables.foreign.rated import RATED_FORMATS
from can_dist.tables.foreign.rows import FORMATS, Format

# the first whose columns are all there wins: ratings and pairs before the bare prompts that they hold too
KNOWN = (*RATED_FORMATS, *FORMATS)


def find_format(columns: Sequence[str], place: str, *, pairs_only: bool = False) -> Format:
    """Return the first format of ``KNOWN`` whose columns are all there.

    Raises:
        DataError: none fits; lists the columns found, the formats known with what each needs, and the nearest.
    """
    known = [form for form in KNOWN if form.pairs or not pairs_only]
    for form in known:
        if not _missing(form, columns):
            return form
    nearest = min(known, key=lambda form: (len(_missing(form, columns)), -len(set(form.needs) & set(columns))))
    missing = _missing(nearest, columns)
    typos = [
        (near[0], name) for name in missing if (near := difflib.get_close_matches(name, columns, n=1, cutoff=0.75))
    ]
    rename = "; ".join(f"is {typo!r} meant to be {name!r}?" for typo, name in typos)
    raise DataError(
        f"{place}: unknown {'preference ' if pairs_only else ''}format.\n"
        f"  Columns found: {', '.join(columns)}.\n"
        "  Formats known:\n" + "".join(f"    {form.title}: {form.needs_text()}\n" for form in known) + "  Nearest: "
        f"{nearest.title}, missing {', '.join(missing)}" + (f" ({rename})" if rename else "") + ".",
        "Rename or add columns.",
    )


def _missing(form: Format, columns: Sequence[str]) -> list[str]:
    missing = [name for name in form.needs if name not in columns]
    if form.one_of and not set(form.one_of) & set(columns):
        missing.append(" or ".join(form.one_of))
    return missing
