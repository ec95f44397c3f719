"""LightningCLI with further subcommands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_nettrim.cli.command import Command

GIVEN = {"trainer", "model", "datamodule"}
"""Parameters of `Command.run` that are no options."""


class NetTrimCLI(LightningCLI):
    """LightningCLI whose subcommands are those of the Trainer and some `Command` classes.

    Attributes:
        commands: the `Command` classes by name.
    """

    commands: ClassVar[dict[str, type[Command]]] = {}

    @classmethod
    def run(cls, args: list[str] | None = None, commands: Sequence[type[Command]] = ()) -> None:
        """Parse the arguments and run the subcommand.

        Args:
            args: arguments of the command line; ``None`` is those of the process.
            commands: further subcommands.
        """
        named = {command.name: command for command in commands}
        type(cls.__name__, (cls,), {"commands": cls.commands | named})(args=args, seed_everything_default=0)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, command in self.commands.items():
            description = (command.run.__doc__ or "").strip().partition("\n")[0]
            own = self.init_parser(description=description, **kwargs.get(name, {}))
            self._add_arguments(own)
            own.add_method_arguments(command, "run", skip=GIVEN)
            self._subcommand_parsers[name] = own
            assert parser._subcommands_action is not None
            parser._subcommands_action.add_subcommand(name, own, help=description)

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in self.commands:
            super()._run_subcommand(subcommand)
            return
        command = self.commands[subcommand]
        names = self._command_options(command)
        options = {key: value for key, value in self.config_init[subcommand].items() if key in names}
        command().run(self.trainer, self.model, self.datamodule, **options)

    def _command_options(self, command: type[Command]) -> set[str]:
        code = command.run.__code__
        return {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} - GIVEN - {"self"}
