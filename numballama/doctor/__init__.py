"""`numballama doctor`: what this machine offers, whether CPU and GPU work, and the command that mends what does not.

`cpu` and `gpu` each run a check in a process of its own, which a broken driver or compiler may end.
"""
