"""The command line: `memcomp --help` lists the commands (`memcomp.cli`) and the exit codes.

Results go to stdout (or, whole or not at all, to --output), all else to stderr.  Errors: three lines, exit code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from memcomp.ir.errors import MemcompError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code, one of `memcomp.cli.parser.CODES`."""
    args = None
    try:
        from memcomp.cli.parser import parser
        from memcomp.files import check_place

        args = parser().parse_args(argv)
        for place in filter(None, (getattr(args, "output", None), getattr(args, "html", None))):
            check_place(place)
        code = int(args.run(args))
        if sys.stdout is not None:  # it was closed (`>&-`)
            sys.stdout.flush()
        return code
    except MemcompError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RecursionError, MemoryError) as error:  # a legal program may be larger than what runs it
        print(f"error: {getattr(args, 'input', 'this')} is too large for this machine\n"
              f"{type(error).__name__}: {error}\n"
              "hint: use smaller extents, and fewer operations in one statement", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written in part", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe (`| head`) has seen enough
        _mute()
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            print(f"error: the result cannot be written\n{error.strerror}", file=sys.stderr)
            _mute()
            return 2
        if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "memcomp":
            print(f"error: this needs {error.name}, which is not installed\nhint: pip install memcomp", file=sys.stderr)
            return 2
        import traceback

        traceback.print_exc()
        print("error: this is a fault of memcomp\nhint: tell us of it, with the lines above and the input",
              file=sys.stderr)
        return 70


def _mute() -> None:
    """What is left in stdout's buffer goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
