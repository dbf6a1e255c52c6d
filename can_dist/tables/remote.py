"""Files in object stores (``s3://``, ``gs://`` and whatever else fsspec knows): copied here to be read, and put there.

What is read is copied whole into the user's cache, so that reading never stops in the middle and the copy's digest is
that of a local file. An object store has no atomic rename, so run directories cannot lie in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.tables.artifacts import atomic_directory, digest_of
from can_dist.tables.cache import cache_directory
from can_dist.tables.urls import is_remote

LAST = "config.json"
"""Without it no directory is a model, so it is put there when all else is."""


def local_path(name: str) -> Path:
    """Return the path that a name means, of a URL that of its copy, with the errors of :func:`local_copy`."""
    return local_copy(name) if is_remote(name) else Path(name).expanduser()


def local_copy(url: str) -> Path:
    """Return a copy of a remote file, or of the files of a remote folder, in the user's cache; made once a version.

    Raises:
        ConfigError: fsspec knows no such store.
        DataError: there is no such file, folder or bucket.
        EnvironmentProblem: the package for the store is missing, or the store refuses or breaks off.
    """
    files, path = _open(url)
    with _named(url):
        if files.isfile(path):
            names = [path]
        else:
            names = sorted(name for name in files.ls(path, detail=False) if files.isfile(name))
        versions = {name: str(files.checksum(name)) for name in names}
        sizes = {name: files.info(name)["size"] for name in names}
    if not names:
        raise DataError(f"{url}: no such file, and no folder that holds one.", "Correct the URL.")
    place = cache_directory() / "objects" / digest_of({"url": url, "versions": versions})[:32]
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(place) as built:
            for name in names:
                copy = built / Path(name).name
                with _named(f"{url} ({Path(name).name})"):
                    files.get_file(name, str(copy))
                if copy.stat().st_size != sizes[name]:
                    raise EnvironmentProblem(
                        f"{url}: {copy.stat().st_size:,} of {sizes[name]:,} bytes of {copy.name} arrived.",
                        "Run again.",
                    )
    return place / Path(names[0]).name if names == [path] else place


def check_absent(url: str) -> None:
    """Raise ``ConfigError`` where a store has something at a URL already, and ``local_copy``'s errors."""
    files, path = _open(url)
    with _named(url):
        is_there = files.exists(path) and bool(files.isfile(path) or files.ls(path, detail=False))
    if is_there:
        raise ConfigError(f"--out {url}: already exists.", "Give a new name.")


def put_directory(source: Path, url: str) -> None:
    """Copy a directory's files to a URL, ``config.json`` last; where that fails, what was put there is removed.

    Raises:
        EnvironmentProblem: the store refuses or breaks off.
    """
    files, path = _open(url)
    names = sorted((p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()), key=_order)
    done: list[str] = []
    try:
        for name in names:
            done.append(f"{path.rstrip('/')}/{name}")
            with _named(f"{url} ({name})"):
                files.put_file(str(source / name), done[-1])
                size = files.info(done[-1])["size"]
            if size != (source / name).stat().st_size:
                raise EnvironmentProblem(f"{url}: {name} is cut there, at {size:,} bytes.", "Run again.")
    except EnvironmentProblem:
        left = [name for name in done if not _removed(files, name)]
        if left:
            raise EnvironmentProblem(
                f"{url}: the upload broke off, and {len(left)} file(s) may be left there.", "Remove them, run again."
            ) from None
        raise


def _order(name: str) -> tuple[bool, str]:
    return name == LAST, name


def _removed(files: Any, name: str) -> bool:
    """Remove a remote file; return whether it is gone."""
    try:
        if files.exists(name):
            files.rm_file(name)
    except Exception:  # noqa: BLE001  # whatever the store's client raises: the caller says that the file may be left
        return False
    return True


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except ImportError as error:  # fsspec's own words name the package
        raise EnvironmentProblem(f"{url}: {error}.", "Install it beside can-dist (s3fs, gcsfs, ...).") from None
    except ValueError as error:
        raise ConfigError(f"{url}: {error}.", "Give s3://, gs:// or another store that fsspec knows.") from None
    files.invalidate_cache()  # of this process: the store may have changed since it was last listed
    return files, str(path)


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Name the URL in whatever a store's client raises."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file, folder or bucket ({error}).", "Correct the URL.") from None
    except (ConfigError, DataError, EnvironmentProblem):
        raise
    except Exception as error:  # each store's client has errors of its own
        raise EnvironmentProblem(
            f"{url}: the store failed ({type(error).__name__}: {error}).", "Check the network and the credentials."
        ) from error
