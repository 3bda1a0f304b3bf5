"""The `bessemer` command: one thin file per command, each importing what it needs when it runs."""
