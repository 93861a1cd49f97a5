"""The command line: one file a command group, put together in `app`. Each imports what it needs when it runs."""
