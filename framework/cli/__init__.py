"""The command line: commands are checked before anything heavy is imported, then run by LightningCLI.

Called by `leyden …`; its `parser` also by commands in other rooms. `lightning_cli` is the composition root, where
everything meets. May import every other room but `compare`. Begin reading at `launcher`, then `command` and
`lightning_cli`.
"""
