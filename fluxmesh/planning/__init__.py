"""The planner: from a request's sizes to every way of doing it, and the best one. Pure.

`plan` is what others call. `workload` counts what a request asks for, `cost` says how long that
takes one host, `capacity` whether it fits, `list_schedule` who is free when, and `candidates` puts
them together. Nothing here imports mlx, opens a socket, reads a clock or draws a number: the same
question has the same answer.
"""
