"""Which command runs what: the command table, error printing, exit codes. Imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import sys
import traceback

import click

from vlmx.console import show_error
from vlmx.errors import VlmxError, of_system

COMMANDS = {
    "demo": "vlmx.serve.command:demo",
    "extract": "vlmx.extract.command:extract",
    "train": "vlmx.train.command:train",
    "eval": "vlmx.evaluate.command:evaluate",
    "score": "vlmx.evaluate.command:score",
    "compare": "vlmx.evaluate.compare_command:compare",
    "correlate": "vlmx.evaluate.correlate_command:correlate",
    "maps": "vlmx.evaluate.maps_command:maps",
    "report": "vlmx.evaluate.report.command:report",
    "probe": "vlmx.evaluate.command:probe",
    "export": "vlmx.serve.export_command:export",
    "cache": "vlmx.extract.cache_commands:cache",
    "profile": "vlmx.serve.profile_command:profile",
    "data": "vlmx.data.command:data",
    "weights": "vlmx.extract.weights.command:weights",
    "list": "vlmx.serve.command:list_",
    "doctor": "vlmx.serve.command:doctor",
    "completion": "vlmx.serve.command:completion",
}

EPILOG = """\b
Worked examples:
  vlmx demo                                                  the whole product in small, in minutes, on a laptop
  vlmx extract --backbone vmamba-s-coco --res 512 --data photos/
  vlmx train --cache vmamba-s-coco@512 --connector mlp3 --llm lmsys/vicuna-7b-v1.5 --data llava_v1_5_mix665k.json
  vlmx eval --run latest
  vlmx report runs/* -o report.html

\b
Exit codes: 0 done, 1 failed, 2 wrong command, name or configuration, 3 data, 4 weights, 5 cache,
            6 disk full, 7 run, 8 missing library or device, 130 interrupted.
"""


class CommandTable(click.Group):
    """Imports a command's module only when that command, or the list of all, is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"No such command '{name}'.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=CommandTable, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vlmx")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """What does this frozen vision encoder give my vision-language model?

    Phase one (extract) runs an encoder once and stores its visual tokens. Phase two (train, eval) trains a connector
    and a language model from the stored tokens and scores the answers: no image and no encoder is needed again.
    """


def main(args: list[str] | None = None) -> None:
    """Run one command and exit with its code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    try:
        code = cli.main(args=arguments, prog_name="vlmx", standalone_mode=False)
        if isinstance(code, int) and code:  # click hands over what a command has exited with
            sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except VlmxError as error:
        if debug:
            traceback.print_exc()
        show_error(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug:
            traceback.print_exc()
        show_error(of_system(error))
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  the one place where a bug of ours becomes a message
        if debug:
            traceback.print_exc()
        show_error(
            VlmxError(
                f"unexpected {type(error).__name__}: {error}",
                why="this is a bug in vlmx, or a library that behaves in an unforeseen way",
                fix="give the command again as `vlmx --debug ...` and report the traceback",
            )
        )
        sys.exit(1)
