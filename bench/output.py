"""Where a command writes: looked at before anything is measured, for what is measured takes hours."""

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import measure, readme


def check(folder: Path, page: Path | None = None, tables: Iterable[str] = ()) -> None:
    """Makes the folder of the results, and sees that it and the page can be written.

    Args:
        folder: of `--out`.
        page: of `--readme`.
        tables: of the page that are to be rewritten.

    Raises:
        OSError: the folder or the page cannot be written.
        UsageError: the page has no mark of such a table.

    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_writable(folder)
    if page is not None:
        readme.marked(page, tables)
        _check_writable(page.resolve().parent)


def check_file(path: Path) -> None:
    """Makes the folder of a file that is to be written, and sees that the file can be.

    Raises:
        OSError: it cannot.

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
    """Writes the result as JSON, the figures and the page's tables, and says which files there are now.

    Args:
        path: of the JSON.
        result: as `measure.write_json` and `readme.rewrite` take it.
        console: where it is said.
        page: of `--readme`.
        draw: writes the figures; see `figures`.

    """
    measure.write_json(path, result)
    written = [path, *figures(draw, console)]
    if page is not None:
        readme.rewrite(page, result)
        written.append(page)
    say(written, console)


def say(written: Iterable[Path], console: Console) -> None:
    """Says which files there are now."""
    console.print("wrote " + ", ".join(map(str, written)), soft_wrap=True)


def figures(draw: Callable[[], Sequence[Path]], console: Console) -> list[Path]:
    """The files that `draw` returns; none, and a word why, where matplotlib is missing."""
    try:
        return list(draw())
    except ModuleNotFoundError as error:
        console.print(f"no figures: {error}", soft_wrap=True, markup=False)
        return []
