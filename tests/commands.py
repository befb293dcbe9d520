"""The commands of `python -m bench`, run in this process."""

from bench.__main__ import main


def run_bench(capsys, *arguments):
    """Exit status, standard output and standard error of `python -m bench ARGUMENTS`."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
