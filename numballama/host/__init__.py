"""The machine as this process may use it: what a container allows, what the environment sets, Ctrl-C."""
