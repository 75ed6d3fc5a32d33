"""Clients of the service: plain and asyncio. They need neither Ray nor a web framework."""

from sbi_dist.serving.client.answers import Answer, Densities, Samples, Summaries
from sbi_dist.serving.client.blocking import Client
from sbi_dist.serving.client.concurrent import AsyncClient
from sbi_dist.serving.client.patience import RequestRefused, ServiceError

__all__ = [
    "Answer",
    "AsyncClient",
    "Client",
    "Densities",
    "RequestRefused",
    "Samples",
    "ServiceError",
    "Summaries",
]
