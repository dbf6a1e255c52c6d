"""``constraints-hashes.txt`` from ``constraints.txt``: each pin with the sha256 of every file of its release.

The list of files is asked from the indexes and folders that pip is configured with, by pip itself; nothing is
downloaded but local files that come without a hash, which are read. ``make hashes`` runs this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import InvalidVersion
from pins import ROOT, Pin, read_pins
from pip._internal.commands import create_command
from pip._internal.index.collector import parse_links

from can_dist.tables.artifacts import file_digest, write_text

if TYPE_CHECKING:
    from pip._internal.index.collector import LinkCollector
    from pip._internal.models.link import Link

HASHED = ROOT / "constraints-hashes.txt"
HEAD = "# Written by `make hashes` from constraints.txt: change that file, then run it again.\n"


@contextmanager
def open_collector() -> Iterator[LinkCollector]:
    """Give what asks the indexes that pip is configured with, as ``pip install`` would."""
    command: Any = create_command("download")
    options, _ = command.parse_args(["pip"])
    with command.main_context():
        finder = command._build_package_finder(options=options, session=command.get_default_session(options))
        yield finder._link_collector


def links_of(collector: LinkCollector, name: str) -> Iterator[Link]:
    """Yield every file that an index or a folder offers of a project."""

    def links_of_page(page: Link) -> list[Any]:
        response = collector.fetch_response(page)
        return list(parse_links(response)) if response else []

    sources = collector.collect_sources(name, candidates_from_page=links_of_page)
    for source in (*sources.find_links, *sources.index_urls):
        if source is not None:
            yield from source.page_candidates()
            yield from source.file_links()


def is_of(link: Link, pin: Pin) -> bool:
    """Return whether a file is of the pinned release; a build of it with a local version (``+cpu``) is."""
    try:
        parse = parse_wheel_filename if link.filename.endswith(".whl") else parse_sdist_filename
        name, version, *_ = parse(link.filename)
    except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion):
        return False
    return (name, version.public) == (pin.name, pin.version)


def hash_of(link: Link) -> str:
    """Return the sha256 of a file as its index says it; of a local file without one, as read."""
    if link.hash_name == "sha256" and link.hash:
        return str(link.hash)
    return file_digest(ROOT / link.file_path) if link.is_file else ""


def hashed(pins: Sequence[Pin]) -> str:
    """Return pip's text of the pins with their hashes.

    Raises:
        SystemExit: A pin has no hash.
    """
    blocks, bare = [], []
    with open_collector() as collector:
        for pin in pins:
            links = [link for link in links_of(collector, pin.name) if is_of(link, pin)]
            hashes = sorted({digest for link in links if (digest := hash_of(link))})
            blocks.append(" \\\n".join([pin.line, *(f"    --hash=sha256:{digest}" for digest in hashes)]))
            bare += [] if hashes else [pin.line]
    if bare:
        sys.exit(f"no hashes of {len(bare)} pins: {'; '.join(bare[:5])}. Is the index reached, and the release there?")
    return "\n".join(blocks) + "\n"


if __name__ == "__main__":
    write_text(HASHED, HEAD + hashed(read_pins()))
