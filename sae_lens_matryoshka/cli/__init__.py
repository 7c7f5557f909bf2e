"""The command `sae-matryoshka`: one file per subcommand.

Nothing here imports PyTorch or SAELens before a subcommand runs, so that help and mistakes in the
arguments answer at once.
"""

import os
import signal
import sys
from collections.abc import Sequence

from sae_lens_matryoshka import __version__
from sae_lens_matryoshka.cli import cache, demo, eval, levels, publish, steer, synth, train, tree
from sae_lens_matryoshka.cli.options import PROGRAM, CommandParser, Parser
from sae_lens_matryoshka.util.suggest import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of this process if None.

    Returns:
        The exit code: 0, 2 for a mistake in the command, the config or a file, 1 if the training,
        an evaluation, the Hub or the disk failed, 130 after SIGINT, 143 after SIGTERM.
    """
    parser = Parser(prog=PROGRAM, description="Matryoshka sparse autoencoders for SAELens.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    for command in (train, cache, levels, tree, steer, eval, synth, publish, demo):
        command.add_parser(commands)
    known = [*commands.choices, "--help", "-h", "--version"]
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words and words[0] not in known:
            hint = did_you_mean(words[0], known)
            raise ValueError(f"{words[0]!r} is not a command ({', '.join(commands.choices)}){hint}")
        args = parser.parse_args(words)
        # PyTorch asks Linux for huge pages: 4 KB at a time, memory that is allocated anew took a
        # quarter of a training step, and more of a language model's forward pass
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        if os.environ.get("RANK", "0") != "0":
            os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
        from sae_lens_matryoshka.util.output import tidy_output

        tidy_output()
        return args.run(args)
    except ValueError as error:
        return _refuse(error, code=2)
    except OSError as error:
        return _refuse(error, code=1)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _refuse(error: Exception, code: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return code
