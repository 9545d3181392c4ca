"""The commands of `flowc`, one file per group. Each is a plain function with typer annotations; `flowc.cli` puts them
together.

What a command needs beyond the standard library is imported when it runs, so that `flowc --help` stays quick.
"""
