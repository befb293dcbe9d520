"""The files that a command writes. They are checked before it measures, since that may take hours."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import measure, readme, terminal


def check(folder: Path, page: Path | None = None, tables: Iterable[str] = ()) -> None:
    """Makes the folder of the results, and checks that the folder and the page can be written.

    Args:
        folder: the folder given by `--out`.
        page: the page given by `--readme`.
        tables: the names of the page's tables that are to be rewritten.

    Raises:
        OSError: the folder or the page cannot be written.
        UsageError: the page has no mark for one of these tables.

    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_writable(folder)
    if page is not None:
        readme.marked(page, tables)
        _check_writable(page.resolve().parent)


def check_file(path: Path) -> None:
    """Makes the folder of a file, and checks that the file can be written.

    Raises:
        OSError: the file cannot be written.

    """
    if path.is_dir():
        raise IsADirectoryError(None, "Is a folder, not a file", str(path))
    check(path.parent)


def _check_writable(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


def finish(
    path: Path,
    result: dict[str, Any],
    console: Console,
    *,
    page: Path | None = None,
    draw: Callable[[], Sequence[Path]] = tuple,
) -> None:
    """Writes the result as JSON, the figures and the page's tables, and prints the names of these files.

    Args:
        path: the path of the JSON file.
        result: the result, in the form that `measure.write_json` and `readme.rewrite` take.
        console: the console to print the names on.
        page: the page given by `--readme`.
        draw: the function that writes the figures; see `figures`.

    """
    measure.write_json(path, result)
    written = [path, *figures(draw, console)]
    if page is not None:
        readme.rewrite(page, result)
        written.append(page)
    say(written, console)


def say(written: Iterable[Path], console: Console) -> None:
    """Prints the names of the files that were written."""
    terminal.say("wrote " + ", ".join(map(str, written)), console)


def figures(draw: Callable[[], Sequence[Path]], console: Console) -> list[Path]:
    """The files that `draw` returns; where matplotlib is missing there are none, and it prints the reason."""
    try:
        return list(draw())
    except ModuleNotFoundError as error:
        terminal.say(f"no figures: {error}", console)
        return []
