"""The commands, by what they are about; each module's `app` is merged into one in `cli.main`."""
