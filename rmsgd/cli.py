"""The command ``rmsgd``: ``probe`` looks inside checkpoints, ``doctor`` tells which backend runs."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from rmsgd import doctor
from rmsgd._version import __version__
from rmsgd.backends.base import BackendUnavailable
from rmsgd.extras import install_command
from rmsgd.inspection.probing import Probing
from rmsgd.inspection.reading.checkpoints import CHECKPOINT_SUFFIXES, checkpoint_files
from rmsgd.inspection.reading.printable import printable
from rmsgd.inspection.reading.stored import CheckpointError
from rmsgd.inspection.report.comparison import Comparison
from rmsgd.inspection.report.comparison_table import comparison_table
from rmsgd.inspection.report.layer_table import layer_table
from rmsgd.inspection.report.page import write_page
from rmsgd.inspection.report.report import Report
from rmsgd.inspection.report.series import Series, in_order_of_training
from rmsgd.inspection.report.series_figure import plot_series
from rmsgd.inspection.report.series_table import series_table
from rmsgd.inspection.selection import Selection, usable_device
from rmsgd.plots import check_format

OK, NOTHING, FAILED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: 0 where a layer was measured, 1 where all was read and no layer could be measured, 2 where
something could not be read, written or understood, 130 on Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argparse exits by itself, with 2, on bad usage."""
    sys.stdout, sys.stderr = (
        open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 - closed by whoever started us
        for stream in (sys.stdout, sys.stderr)
    )
    if isinstance(sys.stdout, TextIOWrapper):  # a layer's name may have letters that its encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            options = _parser().parse_args(arguments)
            return int(options.run(options))
        finally:
            print(end="", flush=True)  # an error that came only at exit could not be caught here
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        _drop_stdout()
        return OK
    except OSError as error:  # a full disk
        _complain(str(error))
        _drop_stdout()
        return FAILED
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rmsgd", description="Look inside networks and installations.")
    parser.add_argument("--version", action="version", version=f"rmsgd-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    probe = commands.add_parser(
        "probe",
        help="stable rank, condition number and quality of every layer of a checkpoint",
        description="Measures every layer of a checkpoint from its weights alone: rank and noise variance "
        "(EVBMF), stable rank, condition number, quality and tail exponent, and Q of the network. Several "
        "paths are a series: the same network at several points of its training.",
        epilog="Exit code 0: layers were measured; others may have been skipped. 1: every layer was skipped, "
        "and nothing was measured. 2: something could not be read or written.",
    )
    probe.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a file (safetensors, torch's, TorchScript, NumPy, GGUF, ONNX), or a folder of shards",
    )
    probe.add_argument("--compare", action="store_true", help="two paths side by side, largest change first")
    probe.add_argument(
        "--filter",
        action="append",
        metavar="PATTERN",
        help="only layers of this name: part of it, or a shell pattern such as '*.attn.*'; may be repeated",
    )
    probe.add_argument(
        "--exclude",
        action="append",
        metavar="PATTERN",
        help="no layers of this name: part of it, or a shell pattern; may be repeated",
    )
    probe.add_argument(
        "--key",
        metavar="NAME",
        help="where in the checkpoint the network lies, such as model_ema, or keys with dots between "
        "(default: the command finds it, and names the other networks in the file)",
    )
    probe.add_argument(
        "--include-buffers",
        action="store_true",
        help="also measure tensors that look like masks, positional tables or other constants",
    )
    probe.add_argument(
        "--merge-lora",
        action="store_true",
        help="also measure the product of every LoRA pair, as one more layer",
    )
    probe.add_argument("--device", help="where to measure: cpu, cuda, cuda:1 (default: cpu)")
    probe.add_argument("--json", action="store_true", help="write JSON, and nothing else, to stdout")
    probe.add_argument("--csv", nargs="?", const="-", metavar="FILE", help="write CSV (no FILE: to stdout)")
    probe.add_argument("--plot", metavar="FILE", help="draw a figure (.png, .svg, .pdf)")
    probe.add_argument("--html", metavar="FILE", help="write one self-contained page (one checkpoint)")
    probe.add_argument(
        "--layer",
        metavar="NAME",
        help="the layer whose low-rank part and noise the figure of a "
        "series shows (default: the one whose quality changed most)",
    )
    probe.set_defaults(run=lambda options: _probe(options, probe))

    doctor_ = commands.add_parser("doctor", help="which backend runs here, and why not another")
    doctor_.add_argument("--json", action="store_true", help="write JSON, and nothing else, to stdout")
    doctor_.set_defaults(run=_doctor)
    return parser


# -- probe ---------------------------------------------------------------------------------------


class _Result(Protocol):
    """What a report, a series and a comparison have in common."""

    def to_dict(self) -> dict[str, Any]: ...
    def to_csv(self, path: str | os.PathLike[str] | TextIO) -> None: ...


def _probe(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    _check_usage(options, parser)
    paths = options.paths if options.compare else in_order_of_training(options.paths)
    reports, code = _measure(paths, options)
    result, table = _result(paths, reports, options.compare)
    if result is None:
        return code
    if options.json:
        print(json.dumps(result.to_dict(), indent=1, allow_nan=False))
    elif options.csv == "-":
        _print_csv(result)
    elif table is not None:
        _console(sys.stdout).print(table)
        _print_notes(paths, reports)
    if table is not None:
        try:
            _write_files(options, result)
        except (OSError, ValueError) as error:
            _complain(str(error))
            return max(code, FAILED)
        except KeyboardInterrupt:
            _complain("interrupted: not all files that were asked for have been written")
            return INTERRUPTED
    return code


def _print_csv(result: _Result) -> None:
    """Print CSV: names as they are to a program, and in visible letters to a terminal."""
    table = StringIO()
    result.to_csv(table)
    lines = table.getvalue().removesuffix("\n").split("\n")
    print("\n".join(map(printable, lines) if sys.stdout.isatty() else lines))


def _print_notes(paths: Sequence[str], reports: Sequence[Report]) -> None:
    """Print what a reader should know of each checkpoint, under the table."""
    for path, report in zip(paths, reports, strict=False):
        for note in report.notes:
            print(f"{printable(path)}: {printable(note)}")


def _check_usage(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with a usage error, before anything is measured, for what could not be done afterwards."""
    if options.compare and len(options.paths) != 2:
        parser.error(f"--compare takes two paths, got {len(options.paths)}")
    if options.compare and (options.plot or options.html):
        parser.error("--compare has a table, JSON and CSV, but no figure and no page")
    if options.html and len(options.paths) != 1:
        parser.error(f"--html takes one checkpoint, got {len(options.paths)}; --plot draws a series")
    if options.json and options.csv == "-":
        parser.error("--json and --csv both write to stdout: give --csv a FILE")
    if options.layer and (not options.plot or len(options.paths) == 1):
        parser.error(
            "--layer is for the figure of a series: it needs --plot FILE and two checkpoints or more"
        )
    _check_targets(options, parser)
    try:
        usable_device(options.device or "cpu")
    except (ValueError, BackendUnavailable) as error:
        parser.error(str(error))


def _check_targets(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Exit with a usage error for a file that could not be written, or that another one would overwrite."""
    owner: dict[str, str] = {}
    for option, needs in (("plot", "matplotlib"), ("html", "jinja2"), ("csv", None)):
        target = getattr(options, option)
        if target in (None, "-"):
            continue
        if needs and find_spec(needs) is None:
            parser.error(f"--{option} needs {needs}: {install_command('plot')}")
        if _is_checkpoint(target, options.paths):
            parser.error(f"--{option} {target} would overwrite a checkpoint")
        other = owner.setdefault(os.path.realpath(target), option)
        if other != option:
            parser.error(f"--{option} {target} would overwrite what --{other} writes")
        path = Path(target)
        if path.is_dir() or not path.absolute().parent.is_dir():
            parser.error(f"--{option} {target} is not a file in an existing folder")
        if option == "plot":
            try:
                check_format(target)
            except ValueError as error:
                parser.error(f"--plot: {error}")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            parser.error(f"--{option} {target} cannot be written: permission denied, or a read-only disk")


def _is_checkpoint(target: str, paths: Sequence[str]) -> bool:
    """Whether a file is one that the paths are read from, or is named like a checkpoint."""
    suffixes = (*CHECKPOINT_SUFFIXES, ".index.json")
    if any(name.lower().endswith(suffixes) for name in (target, os.path.realpath(target))):
        return True
    files: list[Path] = []
    for path in paths:
        with suppress(CheckpointError):  # the error is reported when the path is read
            files += checkpoint_files(path)[0]
    return os.path.exists(target) and any(os.path.exists(f) and os.path.samefile(target, f) for f in files)


def _measure(paths: Sequence[str], options: argparse.Namespace) -> tuple[list[Report], int]:
    """The reports of the paths that could be read before Ctrl-C, and the exit code."""
    reports: list[Report] = []
    code = OK
    with _progress_bar() as bar:
        task = bar.add_task("", total=len(paths))
        for index, path in enumerate(paths):
            bar.update(task, description=printable(Path(path).name), completed=index)
            report, interrupted = _measure_one(path, options, partial(_advance, bar, task, index))
            reports.append(report)
            for error in report.errors:
                _complain(error)
                code = FAILED
            if interrupted:
                _complain(f"interrupted at {path}: what follows is what was measured until then")
                return reports, INTERRUPTED
    if code == OK and not any(report.measured for report in reports):
        code = NOTHING
    return reports, code


def _measure_one(
    path: str, options: argparse.Namespace, progress: Callable[[float], None]
) -> tuple[Report, bool]:
    """The report of one path, empty where nothing could be read, and whether Ctrl-C cut it short."""
    report = Report(())
    try:
        selection = Selection(
            options.filter,
            options.exclude,
            options.key,
            options.include_buffers,
            options.merge_lora,
            options.device,
        )
        probing = Probing(path, selection)
        try:
            probing.run(progress)
        finally:
            report = Report(probing.layers, probing.errors, probing.notes)
    except ValueError as error:
        return replace(report, errors=(*report.errors, *str(error).splitlines())), False
    except KeyboardInterrupt:
        return report, True
    return report, False


def _result(
    paths: Sequence[str], reports: Sequence[Report], compare: bool
) -> tuple[_Result | None, RenderableType | None]:
    """The report, series or comparison of the paths, and its table; no table where nothing was read."""
    if compare:
        if len(reports) < 2 or not all(report.layers for report in reports):
            return None, None
        comparison = Comparison((paths[0], paths[1]), *reports)
        return comparison, comparison_table(comparison)
    if len(paths) == 1:
        return reports[0], layer_table(reports[0].layers, paths[0]) if reports[0].layers else None
    series = Series(tuple(paths[: len(reports)]), tuple(reports))
    return series, series_table(series) if any(report.layers for report in reports) else None


def _write_files(options: argparse.Namespace, result: _Result) -> None:
    if options.csv not in (None, "-"):
        with _naming(options.csv):
            result.to_csv(options.csv)
    if options.plot:
        with _naming(options.plot):
            if isinstance(result, Report):
                result.plot(options.plot)
            elif isinstance(result, Series):
                plot_series(result, options.plot, options.layer, options.key)
    if options.html and isinstance(result, Report):
        with _naming(options.html), _progress_bar() as bar:
            task = bar.add_task("spectra", total=1)
            write_page(result, options.paths[0], options.html, partial(_advance, bar, task, 0), options.key)


@contextmanager
def _naming(target: str) -> Iterator[None]:
    """Name the file in an error that does not, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, target) from error
        raise


# -- doctor --------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    found = doctor.examine()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _console(sys.stdout).print(doctor.as_table(found))
    return OK


# -- the terminal --------------------------------------------------------------------------------


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to ``main``: rich would exit with 1."""
        raise BrokenPipeError


def _console(stream: TextIO) -> Console:
    """A console for a stream. In a file or a pipe its lines are as long as they need to be."""
    return _Console(file=stream, width=None if stream.isatty() else 100_000, highlight=False)


class _Bar(Progress):
    """A bar that leaves nothing behind where it is not shown: rich before version 15 ends it with a line."""

    def stop(self) -> None:
        if not self.disable:
            super().stop()


def _progress_bar() -> Progress:
    """A progress bar on stderr. It is shown on terminals only, and vanishes when it is done."""
    console = _console(sys.stderr)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    return _Bar(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )


def _advance(bar: Progress, task: TaskID, index: int, share: float) -> None:
    bar.update(task, completed=index + share)


def _drop_stdout() -> None:
    """Redirect stdout to the null device, since flushing its buffer at exit would fail again."""
    with suppress(OSError):  # a stream may have no file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(line: str) -> None:
    with suppress(OSError):  # a full disk; the exit code tells of the failure
        print(f"rmsgd: {printable(line)}", file=sys.stderr)
