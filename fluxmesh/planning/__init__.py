"""What stands behind `fluxmesh.planning.plan`, from a request's sizes to the ways of doing it. Pure.

`work` counts what a request asks for, `cost` says how long that takes one host, `room` whether it
fits, `handout` who is free when, and `options` puts them together. Nothing here imports mlx, opens
a socket, reads a clock or draws a number: the same question has the same answer.
"""
