"""A cluster on one machine, to try everything: Ray nodes, an S3 server and Prometheus.

``python -m cluster.local up`` starts it and prints the environment to use it with, ``status`` tells
what of it runs, and ``down`` ends exactly what ``up`` started.
"""
