"""Stages as jobs of a remote Ray cluster: what is sent there, and how a job is followed and ended.

Over the HTTP interface of the cluster's dashboard, so that nothing here needs a Ray of its own.
"""
