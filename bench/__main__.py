"""`python -m bench COMMAND`: one line per command here, everything else in the command's module."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from bench.errors import UnavailableError, UsageError, is_out_of_memory

# From a command to what it does. Its module has the same name with underscores, and a function
# `main(arguments: Sequence[str]) -> int`. A module is imported only when its command is given.
COMMANDS = {
    "train": "train a network with several optimizers side by side",
    "study": "repeat the paper's tables and figures, and compare with what it published",
    "same-lr": "hold the default rule against SGD at the same learning rate on small tasks",
    "layer-rates": "time layer-wise rates for AdamW against a loop of SVDs, and train a GPT with each rule",
    "epoch-time": "time an epoch with several optimizers, part by part",
    "gate": "fail when the optimizer got slower: the check for CI",
    "noise-search": "compare EVBMF's search for the noise variance with rmsgd 1.0.2's and the Python VBMF's",
    "gpu": "build, test and measure the CUDA kernels on this machine's GPU",
    "speed": "time the step and the epoch end against torch's SGD and rmsgd 1.0.2",
    "split": "time an epoch end that two processes share, and model it for more processes",
    "spectrum": "time the spectrum of one matrix of each size, part by part, against torch's routines",
    "probe-speed": "time rmsgd.probe against WeightWatcher on the same state dicts",
    "tables": "write the measured tables of README and docs from the recorded results",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The command's exit status; 1 where memory does not suffice, 2 where something cannot be done here or
            cannot be written, 130 when interrupted. Bad arguments exit with 2. Any other error is a fault of
            the program and passes.

    """
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks and training runs of RMSGD. Every command has its own --help.",
    )
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        choices.add_parser(name, help=summary, add_help=False)
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen = parser.parse_args(given[:1]).command
    try:
        return importlib.import_module(f"bench.{chosen.replace('-', '_')}").main(given[1:])
    except (UsageError, UnavailableError) as error:
        return _say(chosen, f"error: {error}", 2)
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        return _say(chosen, f"error: {error.strerror or error}{where}", 2)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _say(chosen, "error: out of memory: a smaller batch, width or network takes less", 1)
    except KeyboardInterrupt:
        return _say(chosen, "interrupted: nothing was written", 130)


def _say(command: str, text: str, status: int) -> int:
    """Prints a line on stderr; returns the status."""
    print(f"python -m bench {command}: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
